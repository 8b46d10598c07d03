"""Asks a recipe's student its questions: the k-shot accuracy that a run reports, and `hfkd evaluate`.

Each task's result is kept as soon as it is there, and isn't made again while settings, rows and weights are the same.
Trains nothing; how answers are generated and scored is `hfkd.eval.k_shot`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hfkd.data.messages import completion_text
from hfkd.data.prompts import PromptBuilder
from hfkd.eval.comparison.asking import way_of_asking
from hfkd.eval.generation import generation_quality
from hfkd.eval.harness import PREFIX, HarnessSettings, check_harness, run_harness
from hfkd.eval.k_shot import KShotReport, ShotResult, evaluate_k_shot, gold_answer
from hfkd.eval.predictions import prediction_lines
from hfkd.eval.results import SCHEMA, Results, fingerprint_of, read_results
from hfkd.masking import shareable
from hfkd.recipe.schema import Recipe
from hfkd.record import rows_fingerprint
from hfkd.run.against_teacher import (
    check_fidelity,
    deciding_of,
    is_own,
    is_switched,
    measure_against_teacher,
    without_accessories,
)
from hfkd.run.build import Run, settings_of
from hfkd.run.models import load_tokenizer
from hfkd.run.provenance import check_model, check_rows, deciding_code, deciding_versions
from hfkd.run.rows import Task, load_data
from hfkd.run.subjects import Subject, find_subjects, weights_fingerprint

if TYPE_CHECKING:
    from torch import nn

_SINGLE = ("predictions", "texts", "right")


@dataclass(frozen=True)
class _Question:
    """One task of an evaluation: what decides its result, how that is made, and how it is shown."""

    name: str
    deciding: dict[str, Any]
    measure: Callable[[], dict[str, Any]]
    show: Callable[[Mapping[str, Any]], None]


def evaluate_recipe(
    recipe: Recipe,
    *,
    adapter: Path | None = None,
    run_folder: Path | None = None,
    base: bool = False,
    fidelity: bool = False,
    harness: HarnessSettings | None = None,
    json_path: Path | None = None,
    chosen: Collection[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a recipe's student, without training.

    Args:
        recipe: From `load_recipe`.
        adapter: A folder with a trained adapter.
        run_folder: The folder of a run, with an adapter or with all weights. Without both, the student is asked as it
            is published.
        base: Ask the student as it is published, too.
        fidelity: Hold it against the recipe's teacher on the evaluation items.
        harness: Tasks of lm_eval to ask besides.
        json_path: Where each result is written as soon as it is there. What this file holds already, made with the
            same settings, rows, weights, code and versions, isn't made again.
        chosen: Of `rows` and `model`, what may be other than the run in `run_folder` had, since the user chose it.
        console: Where tables go; None prints to the terminal.

    Returns:
        What the file holds: `results` by stage (`before`: as published; `after`: trained) and task (`k_shot`,
        `forgetting.<name>`, `fidelity`, `lm_eval.<name>`), each with `fingerprint`, `seconds` and `result`.

    Raises:
        ValueError: Something is asked for without what it needs, `json_path` is a file of another kind, or the rows
            or the model aren't those of the run.
        OSError: A file is missing or damaged.
    """
    _check(recipe, adapter, fidelity, harness)
    console = console or Console()
    if json_path is not None and json_path.exists():
        read_results(json_path)  # a file of another kind is refused before anything is loaded
    subjects = find_subjects(recipe, adapter or run_folder, base)
    read = any(subject.recipe is recipe for subject in subjects) or (fidelity and is_own(recipe))
    notes = check_model(run_folder, recipe, chosen) if run_folder is not None and read else []
    run = _prepare(subjects[-1].recipe)
    notes += [] if run_folder is None else check_rows(run_folder, run, chosen)
    for note in notes:
        console.print(f"Note: {note}.", markup=False, highlight=False)
    weights = {subject.stage: weights_fingerprint(subject) for subject in subjects}
    results = Results(json_path, weights)
    for stage in results.dropped:
        console.print(f"{json_path}: the results of {stage} were of other weights, and are replaced.", markup=False)
    for subject in subjects:
        asked = _Evaluation(run, subject, recipe, console, fidelity, harness)
        asked.conduct(results, weights[subject.stage], alone=len(subjects) == 1)
    return results.document


class _Evaluation:
    """One model under questions; it is loaded when the first of them has no answer yet."""

    def __init__(
        self,
        run: Run,
        subject: Subject,
        published: Recipe,
        console: Console,
        fidelity: bool,
        harness: HarnessSettings | None,
    ) -> None:
        self.run, self.subject, self.published, self.console = run, subject, published, console
        self.fidelity, self.harness = fidelity, harness
        self._model: nn.Module | None = None

    def conduct(self, results: Results, weights: str, alone: bool) -> None:
        """Ask what isn't known yet, keep it, and show all."""
        stage, versions = self.subject.stage, deciding_versions()
        for question in self._questions():
            title = question.name if alone else f"{stage}: {question.name}"
            deciding = {"schema": SCHEMA, "versions": versions, "weights": weights, **question.deciding}
            fingerprint = fingerprint_of(deciding)
            found = results.known(stage, question.name, fingerprint)
            if found is None:
                self._say(title)
                start = time.perf_counter()
                found = question.measure()
                results.put(stage, question.name, fingerprint, found, time.perf_counter() - start)
            else:
                self._say(
                    f"{title} (not run again: {results.path} has it, of the same settings, rows, weights and code)"
                )
            question.show(found)

    def _questions(self) -> Iterator[_Question]:
        run = self.run
        tasks = [] if run.evaluation is None else [("k_shot", run.evaluation)]
        tasks += [(f"forgetting.{task.name}", task) for task in run.forgetting]
        for name, task in tasks:
            if task.shots:
                yield self._k_shot(name, task)
        if self.harness is not None:
            for name in self.harness.tasks:
                yield self._harness(name)
        if self.fidelity:
            deciding = {**_rows_of(run.evaluation), **deciding_of(self.published)}
            yield _Question("fidelity", deciding, self._against_teacher, self._show_fidelity)

    def _k_shot(self, name: str, task: Task) -> _Question:
        recipe = self.run.recipe
        settings = {"tolerance", "max_new_tokens", "seed", "reshuffle"}
        deciding = {
            **_rows_of(task),
            **recipe.evaluation.model_dump(mode="json", include=settings),
            "prompt": recipe.data.prompt.model_dump(mode="json"),
            "shots": task.shots,
            "extract": task.extract,
            "code": deciding_code(recipe, ("data.prompt",)),
        }

        rows = deciding["demonstrations"]["sha256"]
        way = way_of_asking(deciding["prompt"], recipe.evaluation.model_dump(mode="json"), task.extract, rows)
        way |= {f"{key}, code": digests for key, (_, *digests) in deciding["code"].items()}

        def measure() -> dict[str, Any]:
            report = ask(self.run, self._loaded(), task, f"k-shot {task.name}")
            return {
                **shareable({"task": task.name, "k_shot": report.accuracies(), "details": plain_results(report)}),
                "asked": shareable(way),
                "generation": self._generation(report, task),
                "predictions": prediction_lines(task.name, self.subject.stage, report, task.items),
            }

        return _Question(name, deciding, measure, self._show_k_shot)

    def _generation(self, report: KShotReport, task: Task) -> dict[str, Any]:
        """Figures of how it wrote, by number of demonstrations; gold completions are whole, not the short answers."""
        golds = [_gold_text(row) for row in task.items]
        return {
            str(shots): generation_quality(result.texts, golds, tokens=self._lengths(result.texts), cut=result.cut)
            for shots, result in report.results.items()
        }

    def _lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.run.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _harness(self, name: str) -> _Question:
        batch_size = self.run.config.per_device_eval_batch_size
        return _Question(
            PREFIX + name,
            self.harness.describe(name),
            lambda: run_harness(self._loaded(), self.run.tokenizer, name, self.harness, batch_size=batch_size),
            self._show_harness,
        )

    def _against_teacher(self) -> dict[str, Any]:
        return measure_against_teacher(self.run, self.subject, self._loaded(), self.published)

    def _loaded(self) -> nn.Module:
        if self._model is None:
            self._model = self.subject.load(fresh_adapter=self.fidelity and is_switched(self.published))
            if movable(self._model):
                self._model.to(self.run.config.device)
        return self._model

    def _say(self, words: str) -> None:
        self.console.print(words, markup=False, highlight=False)

    def _show_k_shot(self, found: Mapping[str, Any]) -> None:
        results = {int(shots): ShotResult(**result) for shots, result in found["details"].items()}
        self.console.print(KShotReport(results).table(found["task"]))
        for shots, figures in found["generation"].items():
            self._say(f"{shots}-shot texts: {generation_line(figures)}")

    def _show_fidelity(self, found: Mapping[str, Any]) -> None:
        from hfkd.eval.fidelity import FidelityReport

        self.console.print(FidelityReport(**found).table("Nearness to the teacher"))

    def _show_harness(self, found: Mapping[str, Any]) -> None:
        table = Table("Task", "Metric", "Value", "Documents", "Shots", title="lm_eval", title_justify="left")
        for name, task in found["tasks"].items():
            for metric, figure in task["figures"].items():
                error = figure["standard_error"]
                value = f"{figure['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")
                table.add_row(name, metric, value, str(task["documents"] or ""), str(task["shots"] or 0))
        self.console.print(table)


def generation_line(figures: Mapping[str, Any]) -> str:
    """How a model wrote, in one line."""
    tokens = figures["tokens"]
    parts = [f"{tokens['mean']:.1f} tokens on average (longest {tokens['longest']})"]
    parts += [f"{figures[name]:.0%} {words}" for name, words in (("cut", "cut at the limit"), ("empty", "empty"))]
    for name, words in (("distinct_2", "of word pairs differ"), ("repeated", "of runs of four words are repeated")):
        if figures[name] is not None:
            parts.append(f"{figures[name]:.0%} {words}")
    parts += [f"{name} {value:.3g}" for name, value in figures.get("likeness", {}).items()]
    return ", ".join(parts)


def ask(run: Run, model: nn.Module, task: Task, description: str | None) -> KShotReport:
    """The k-shot accuracy of a model on a task, with the settings of the recipe's `evaluation`."""
    settings = run.recipe.evaluation.model_dump(
        include={"tolerance", "max_new_tokens", "batch_size", "seed", "reshuffle"}
    )
    return evaluate_k_shot(
        model, run.tokenizer, task.items, task.demonstrations, run.builder,
        shots=task.shots, extract=task.extract, description=description, **settings,
    )  # fmt: skip


def plain_results(report: KShotReport) -> dict[str, Any]:
    """The results without the single answers, which would swamp a report."""
    return {
        shots: {name: value for name, value in result.items() if name not in _SINGLE}
        for shots, result in report.to_dict().items()
    }


def movable(model: nn.Module) -> bool:
    """Whether a model may be put on another device: a quantised or dispatched one has its place already."""
    return not getattr(model, "is_quantized", False) and getattr(model, "hf_device_map", None) is None


def _check(recipe: Recipe, adapter: Path | None, fidelity: bool, harness: HarnessSettings | None) -> None:
    """Refuse what is asked for without what it needs, before a row or a model is read."""
    if recipe.evaluation is None and harness is None:
        raise ValueError("the recipe has no evaluation section; add one, or give evaluation.size=48 behind the recipe")
    if recipe.evaluation is not None and not (recipe.evaluation.shots or fidelity or harness):
        raise ValueError(
            "evaluation.shots is empty and nothing else is asked for; give shots, --fidelity or --lm-eval"
        )
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise ValueError(
            f"--adapter: {adapter} has no adapter_config.json; expected the folder of a LoRA run (the folder of a run "
            "whose weights were all trained is given in the place of the recipe)"
        )
    if fidelity:
        check_fidelity(recipe)
    if harness is not None:
        check_harness(harness)


def _prepare(recipe: Recipe) -> Run:
    """The rows, the tokenizer and the prompts; no model."""
    run = settings_of(without_accessories(recipe), trains=False)
    if recipe.evaluation is not None:
        run.take(load_data(recipe, run.sources))
    run.tokenizer = load_tokenizer(recipe.student)
    run.builder = PromptBuilder(run.tokenizer, run.style)
    return run


def _rows_of(task: Task) -> dict[str, Any]:
    return {"items": rows_fingerprint(task.items), "demonstrations": rows_fingerprint(task.demonstrations)}


def _gold_text(row: Mapping[str, Any]) -> str:
    try:
        return completion_text(row)
    except ValueError:  # a row with its short answer alone
        return gold_answer(row)
