"""Whose text should a student learn from? One recipe and the same number of steps, with text that the teacher wrote
once, that the student writes at each step, half of it, or labels; and with the teacher in memory or in a cache.

Runs `recipes/secokd/<task>.yaml` as `hfkd train` would, once for each way and task, and prints accuracy beside
seconds. Nothing of training is known here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("outputs/compare_texts")

# What each way changes of the recipe. On the student's own text reverse KL is the measure of the literature.
_REVERSE = ["loss.terms=[{kind: reverse_kl}]"]
_SAMPLED = ["data.generation.temperature=1.0"]
WAYS: dict[str, list[str]] = {
    "teacher's text": [],
    "teacher's text, cached": [],
    "teacher's text, reverse KL": _REVERSE,
    "student's text, reverse KL": ["data.answer=student", *_SAMPLED, *_REVERSE],
    "half student's, half labels, reverse KL": ["data.answer={student: 0.5, dataset: 0.5}", *_SAMPLED, *_REVERSE],
    "labels, cross-entropy": [
        *("data.answer=dataset", "data.teacher_max_length=null"),
        *("teacher={kind: none}", "loss.terms=[{kind: cross_entropy}]"),
    ],
}
CACHED = "teacher's text, cached"
DONE = "compared.json"


def run_way(task: str, way: str, model: str | None, steps: int, output: Path) -> dict[str, Any]:
    """Run one way of one task, unless it has run, and return what the table needs.

    Args:
        task: The name of a recipe in recipes/secokd.
        way: A key of `WAYS`.
        model: Where the model is, in place of the recipe's.
        steps: Optimizer steps.
        output: The folder of all runs.
    """
    from hfkd.recipe import load_recipe
    from hfkd.run import run_recipe

    folder = output / task / "".join(letter if letter.isalnum() else "_" for letter in way)
    done = folder / DONE
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    overrides = [
        *WAYS[way],
        f"training.output_dir={folder}",
        f"training.max_steps={steps}",
        "training.run_policy=overwrite",
        "training.save_strategy=no",
        "evaluation.gold_baseline=false",
        "evaluation.forgetting=[]",
        *([f"student.model={model}"] if model else []),
    ]
    path, building = ROOT / "recipes" / "secokd" / f"{task}.yaml", 0.0
    if way == CACHED:
        building = _build(load_recipe(path, overrides), folder.with_name("cache"))
        overrides.append(f"teacher.cache={folder.with_name('cache')}")
    result = run_recipe(load_recipe(path, overrides))
    durations = result.record.durations
    kept = {
        "task": task,
        "way": way,
        "steps": steps,
        "before": result.report["k_shot_details"]["before"],
        "after": result.report["k_shot_details"]["after"],
        "training_seconds": durations["training"],
        "seconds_before_training": round(durations.get("teacher_answers", 0.0) + building, 1),
    }
    done.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return kept


def _build(recipe: Any, folder: Path) -> float:
    """Cache what the recipe's teacher says; returns the seconds that it took."""
    import time

    from hfkd.cache import Hidden
    from hfkd.run.caching import build_cache

    start = time.perf_counter()
    build_cache(recipe, folder, Hidden(), overwrite=True)
    return time.perf_counter() - start


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of a Markdown table, the state before training first in each task."""
    shots = list(results[0]["after"])
    columns = ["task", "text and loss", *(f"{count} shots" for count in shots), "before training, s", "training, s"]
    yield f"| {' | '.join([*columns, 'most frequent answer'])} |"
    yield "|---" * (len(columns) + 1) + "|"
    for task in dict.fromkeys(result["task"] for result in results):
        own = [result for result in results if result["task"] == task]
        yield _line(task, "before training", own[0]["before"], shots, "", "")
        for result in own:
            seconds = f"{result['seconds_before_training']:.0f}", f"{result['training_seconds']:.0f}"
            yield _line("", result["way"], result["after"], shots, *seconds)


def _line(task: str, way: str, cells: Mapping[str, Any], shots: list[str], before: str, training: str) -> str:
    frequent = f"{100 * cells[shots[0]]['most_frequent_share']:.1f}"
    columns = [task, way, *(_cell(cells[count]) for count in shots), before, training, frequent]
    return f"| {' | '.join(columns)} |"


def _cell(result: Mapping[str, Any]) -> str:
    """Accuracy and its standard error in percent, and how many answers were distinct."""
    return f"{100 * result['accuracy']:.1f} ± {100 * result['standard_error']:.1f} ({result['distinct_answers']})"


def main(
    tasks: Annotated[list[str], typer.Option("--task", help="A recipe of recipes/secokd.")] = ["past_tense", "plural"],  # noqa: B006
    ways: Annotated[list[str] | None, typer.Option("--way", help="One of the ways; all by default.")] = None,
    model: Annotated[str | None, typer.Option(help="A folder or hub id in place of the recipe's model.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 30,
    output: Annotated[Path, typer.Option(help="Where the runs are written.")] = OUTPUT,
) -> None:
    """Run all ways on all tasks and print the table."""
    chosen = ways or list(WAYS)
    if unknown := [way for way in chosen if way not in WAYS]:
        raise typer.BadParameter(f"there is no way {unknown[0]!r}; expected {', '.join(WAYS)}")
    results = [run_way(task, way, model, steps, output) for task in tasks for way in chosen]
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    typer.echo("\n".join(table(results)))
    typer.echo("Accuracy in percent ± one standard error, in brackets how many of the answers were distinct.")


if __name__ == "__main__":
    typer.run(main)
