"""Reads what runs left of their answers, to compare them: a run's folder, its `predictions.jsonl`, or the file of
`hfkd evaluate --json`. Computes nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from hfkd.eval.comparison.asking import way_of_asking
from hfkd.eval.comparison.compare import Key, Series, Side
from hfkd.eval.harness import PREFIX
from hfkd.eval.predictions import PREDICTIONS_NAME, checked_line, read_predictions
from hfkd.eval.results import read_results
from hfkd.record import read_record

_TRAINED, _PUBLISHED = "after", "before"


def load_sides(paths: Sequence[Path], stage: str | None = None) -> list[Side]:
    """The sides of a comparison.

    Args:
        paths: Of several runs, each one's answers at a stage; of one, its stages, `before` first.
        stage: Which stage of each run; None takes `after`, or the only one that there is.

    Raises:
        ValueError: A file is damaged or of another kind, a run kept no answers, or hasn't the stage.
        OSError: A file can't be read.
    """
    runs = [_stages(path) for path in paths]
    if len(runs) == 1 and stage is None:
        return _own_stages(paths[0], runs[0])
    names = _names(paths)
    return [_side(name, _chosen(path, run, stage)) for name, path, run in zip(names, paths, runs, strict=True)]


_Stage = dict[str, Any]


def _stages(path: Path) -> dict[str, _Stage]:
    """By stage `series` and `fidelity`."""
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".jsonl":
        return _of_folder(path.parent) if path.name == PREDICTIONS_NAME else _of_file(path)
    return {stage: _of_tasks(path, tasks) for stage, tasks in read_results(path)["results"].items() if tasks}


def _of_folder(folder: Path) -> dict[str, _Stage]:
    if not (folder / PREDICTIONS_NAME).is_file():
        raise ValueError(
            f"{folder} has no {PREDICTIONS_NAME}: it is no folder of a run, the run asked no questions, or it was "
            f"made before single answers were kept. `hfkd evaluate {folder} --base --json FILE` asks them again; "
            "compare that FILE"
        )
    report = _report_of(folder)
    found, asked = _of_file(folder / PREDICTIONS_NAME), _asked_of(folder, report)
    _check_names(folder, report, found)
    for stage, parts in found.items():
        parts["series"] = [replace(one, asked=_of_task(asked, one.task)) for one in parts["series"]]
        parts["fidelity"] = (report.get("fidelity") or {}).get(stage) or {}
    return found


def _of_file(path: Path) -> dict[str, _Stage]:
    return {stage: {"series": series} for stage, series in _of_lines(read_predictions(path)).items()}


def _report_of(folder: Path) -> dict[str, Any]:
    """What the report of a run says of the fidelity by stage (`fidelity`), and the names of its other tasks (`others`)
    with how many of them were asked (`asked`); empty where there is none.
    """
    path = folder / "report.json"
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        fidelity = {name: found for name, found in (report.get("fidelity") or {}).items() if isinstance(found, dict)}
        others = list(report.get("forgetting") or [])
        names = [str(one["task"]) for one in others]
        return {"fidelity": fidelity, "others": names, "asked": sum(any(one["k_shot"].values()) for one in others)}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(
            f"{path} is damaged; mend it or take it away, it is only read for the fidelity and the tasks"
        ) from None


def _check_names(folder: Path, report: Mapping[str, Any], found: Mapping[str, _Stage]) -> None:
    """Refuse a run with two tasks of one name: their answers stand in one file, and would be one task.

    Raises:
        ValueError: There are more tasks in the report than names in the answers.
    """
    names = {one.task for stage in found.values() for one in stage["series"]}
    expected = 1 + report.get("asked", 0)
    if names and len(names) < expected:
        raise ValueError(
            f"{folder / PREDICTIONS_NAME} has {expected} tasks under {len(names)} names ({', '.join(sorted(names))}), "
            f"so it can't be known which answer belongs to which. `hfkd evaluate {folder} --base --json FILE` asks "
            "them again, each under a name of its own; compare that FILE"
        )


def _asked_of(folder: Path, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How a run asked its questions, by the names of the other tasks, and of its own under `""`; nothing where its
    recipe isn't there or isn't one.
    """
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        prompt, evaluation = recipe["data"]["prompt"], recipe["evaluation"]
        known = read_record(folder).get("data", {}).get("demonstrations", {}).get("sha256")
        found = {"": way_of_asking(prompt, evaluation, evaluation["extract"], known)}
        for name, other in zip(report.get("others", ()), evaluation["forgetting"], strict=False):
            found[name] = way_of_asking(prompt, evaluation, other.get("extract") or evaluation["extract"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return {}
    return found


def _of_task(asked: Mapping[str, dict[str, Any]], task: str) -> dict[str, Any]:
    return asked.get(task) or asked.get("") or {}


def _of_tasks(path: Path, tasks: Mapping[str, Mapping[str, Any]]) -> _Stage:
    series: list[Series] = []
    try:
        for name, entry in tasks.items():
            result = entry["result"]
            if name.startswith(PREFIX):
                series += _of_scores(result["scores"])
            elif "predictions" in result:
                taken = {one.task for one in series}
                for one in chain(*_of_lines(map(checked_line, result["predictions"])).values()):
                    title = f"{one.task} ({name})" if one.task in taken else one.task
                    series.append(replace(one, task=title, asked=dict(result.get("asked") or {})))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; run `hfkd evaluate` into a new file") from None
    return {"series": series, "fidelity": (tasks.get("fidelity") or {}).get("result") or {}}


def _of_scores(scores: Mapping[str, Mapping[str, Sequence[Sequence[Any]]]]) -> list[Series]:
    found = []
    for task, metrics in scores.items():
        for metric, pairs in metrics.items():
            keys = _numbered(item for item, _ in pairs)
            values = {key: float(value) for key, (_, value) in zip(keys, pairs, strict=True)}
            found.append(Series(PREFIX + task, metric, values))
    return found


def _of_lines(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Series]]:
    """By stage a series for each task and number of demonstrations, in the order of the lines."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["stage"], line["task"], line["shots"]), []).append(line)
    stages: dict[str, list[Series]] = {}
    for (stage, task, shots), asked in groups.items():
        keyed = list(zip(_numbered(line["item"] for line in asked), asked, strict=True))
        series = Series(
            task,
            f"{shots}-shot",
            {key: float(line["right"]) for key, line in keyed},
            {key: (line["prediction"], line["gold"]) for key, line in keyed},
            {key: line["text"] for key, line in keyed},
        )
        stages.setdefault(stage, []).append(series)
    return stages


def _numbered(items: Iterable[Hashable]) -> list[Key]:
    """Each item with how often it was there before: a question that is asked twice is two items."""
    seen: Counter[Hashable] = Counter()
    keys = []
    for item in items:
        keys.append((str(item), seen[item]))
        seen[item] += 1
    return keys


def _own_stages(path: Path, stages: Mapping[str, _Stage]) -> list[Side]:
    if _PUBLISHED not in stages or len(stages) < 2:
        raise ValueError(
            f"{path} holds {' and '.join(stages) or 'no answers'}; one run alone is compared with itself before "
            "training. Name a second run, or make a file with both: `hfkd evaluate RUN --base --json FILE`"
        )
    others = [stage for stage in stages if stage != _PUBLISHED]
    return [_side(stage, stages[stage]) for stage in [_PUBLISHED, *others]]


def _chosen(path: Path, stages: Mapping[str, _Stage], stage: str | None) -> _Stage:
    if stage is None and len(stages) == 1:
        return next(iter(stages.values()))
    wanted = stage or _TRAINED
    if wanted not in stages:
        raise ValueError(f"{path} has no answers of {wanted}; it has {', '.join(stages) or 'none'}. Name one: --stage")
    return stages[wanted]


def _side(name: str, stage: _Stage) -> Side:
    return Side(name, stage["series"], stage.get("fidelity") or {})


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, numbered where it is another's too."""
    plain = [_short(path) for path in paths]
    return [f"{name} ({place})" if plain.count(name) > 1 else name for place, name in enumerate(plain, 1)]


def _short(path: Path) -> str:
    full = path.resolve()
    return full.parent.name if full.name == PREDICTIONS_NAME else full.name if path.is_dir() else full.stem
