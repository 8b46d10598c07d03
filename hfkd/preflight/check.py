"""`hfkd check`: everything that can be known of a recipe's run before it is started, the cheap things first.

Rows, tokens and templates are looked at before a model is loaded, memory is reckoned before a step is made. Whatever
is written goes into a folder that is gone afterwards. What each check looks at is in the files beside this one.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import PrinterCallback, ProgressCallback

from hfkd.compatibility import check_second_view
from hfkd.config import DistillationConfig
from hfkd.data.messages import prompt_key, text_key
from hfkd.data.prompts import PromptBuilder
from hfkd.data.views import teacher_prompts
from hfkd.objective import build_objective
from hfkd.preflight import deciding, distillable, duration, two_paths
from hfkd.preflight.distillable_text import by_text
from hfkd.preflight.findings import Examination, Finding, findings_table, verdict
from hfkd.preflight.leakage import find_leaks
from hfkd.preflight.lengths import gold_lengths, written_lengths
from hfkd.preflight.room import check_room, measure_room
from hfkd.preflight.template import check_template, is_chat
from hfkd.preflight.views import check_examples, show_examples
from hfkd.preflight.vocabulary import compare_vocabularies, position_counts
from hfkd.recipe.schema import Recipe
from hfkd.record import BY_EVALUATION, OutputFolderError, check_output_folder
from hfkd.rollout.hf import HFRollout
from hfkd.rollout.on_policy import Mixture
from hfkd.run.build import ASIDE, Run, check_engine, check_imports, make_config, make_parts, settings_of
from hfkd.run.evaluation import movable
from hfkd.run.expected import expected_contract
from hfkd.run.models import load_student, load_tokenizer, prepare_teacher
from hfkd.run.rows import load_data
from hfkd.run.texts import answered_rows, fitting, fixed_demonstrations, make_dataset, unanswered, visited_rows
from hfkd.run.training import make_trainer
from hfkd.sharding import Launch
from hfkd.teachers import CachedTeacher

if TYPE_CHECKING:
    from hfkd.data.views import DistillationDataset
    from hfkd.trainer import DistillationTrainer

_STYLES = {"passed": "bold green", "warning": "bold yellow", "error": "bold red"}


def check_recipe(
    recipe: Recipe, *, processes: int | None = None, items: int = 32, console: Console | None = None
) -> list[Finding]:
    """Look at everything that can be known of a run before it is started. Changes nothing: no weight, no file.

    Args:
        recipe: From `load_recipe`.
        processes: Memory and duration of a run of so many; None takes this one.
        items: Questions that student and teacher are asked, and answers that are written.
        console: Where examples, findings and the verdict are printed; None prints to the terminal.

    Returns:
        The findings, in the order of the checks.

    Raises:
        ValueError: It is run by several processes; or a number is below 1.
    """
    if PartialState().num_processes > 1:
        raise ValueError("hfkd check is run as one process; --world-size says of how many the run will be")
    if items < 1 or (processes is not None and processes < 1):
        raise ValueError(f"got items={items} and processes={processes}; expected numbers of at least 1")
    with tempfile.TemporaryDirectory(prefix="hfkd-check-") as folder:
        return _Preflight(recipe, Path(folder), processes or 1, items, console or Console()).conduct()


class _Preflight:
    """One check under way: the objects that were made so far, each None until then."""

    def __init__(self, recipe: Recipe, folder: Path, processes: int, items: int, console: Console) -> None:
        self.recipe, self.folder = recipe, folder
        self.processes, self.items, self.console = processes, items, console
        self.exam = Examination(console)
        self.run: Run | None = None
        self.config: DistillationConfig | None = None
        self.parts: bool | None = None
        self.same_tokens: bool | None = None
        self.template: bool | None = None
        self.examples: tuple[list[dict[str, Any]], DistillationDataset] | None = None
        self.fits: bool | None = None
        self.models: bool | None = None
        self.student: distillable.Asked | None = None
        self.teachers: dict[str, distillable.Asked] = {}
        self.unasked = ""
        self.answer_seconds: float | None = None

    def conduct(self) -> list[Finding]:
        """All checks, and what they found in a table."""
        self._settings()
        if self.run is not None:
            self._texts()
            self._memory()
            self._load_models()
            self._trials()
        found = self.exam.close()
        self.console.print()
        self.console.print(findings_table(found))
        said = verdict(found)
        style = next(style for word, style in _STYLES.items() if word in said)
        self.console.print(Text(said, style=style if "error" not in said else _STYLES["error"]))
        return found

    # --- without a model

    def _settings(self) -> None:
        exam, recipe = self.exam, self.recipe
        real = exam.make("settings", lambda: settings_of(recipe))
        if real is None:
            return
        self.config = real.config
        exam.check("output folder", lambda: _output_folder(recipe, real))
        self.run = exam.make("settings", lambda: settings_of(_trial_of(recipe, self.folder)))

    def _texts(self) -> None:
        """Rows, tokens, templates and views."""
        exam, run, recipe = self.exam, self.run, self.recipe
        rows = exam.make("rows", lambda: load_data(recipe, run.sources))
        if rows is not None:
            run.take(rows)
            exam.add(_rows_finding(run))
        run.tokenizer = exam.make("tokenizer", lambda: load_tokenizer(recipe.student))
        run.builder = exam.make("template", lambda: PromptBuilder(run.tokenizer, run.style), tokenizer=run.tokenizer)
        self.parts = exam.make("parts", self._make_parts)
        needs = {"builder": run.builder, "rows": rows}
        self.same_tokens = self._passed("vocabulary", self._vocabulary, tokenizer=run.tokenizer)
        self.template = self._passed("template", lambda: check_template(run), **needs)
        needs |= {"parts": self.parts, "template": self.template}
        if recipe.teacher.kind == "cross_tokenizer":
            needs["teacher"] = self.same_tokens and exam.make("teacher", self._own_tokenizer)
        self.examples = exam.make("examples", self._make_examples, **needs)
        exam.check("examples", self._show, examples=self.examples)
        if deciding.decides(run):
            exam.check(deciding.NAME, lambda: deciding.check_deciding(run, self.examples[1]), examples=self.examples)
        exam.check("leakage", self._leaks, rows=rows)
        if "dataset" in recipe.data.shares and recipe.data.answer != "teacher":
            exam.check("answer lengths", self._gold_lengths, examples=self.examples)

    def _passed(self, name: str, check: Any, **needs: Any) -> bool | None:
        """True for a check without an error, else None: what depends on it isn't made."""
        return self.exam.check(name, check, **needs) or None

    def _make_parts(self) -> bool:
        """The teacher, not loaded yet, and whether it goes with the terms."""
        check_imports(self.recipe)
        check_engine(self.recipe)
        make_parts(self.run)
        return True

    def _vocabulary(self) -> Iterator[Finding]:
        run = self.run
        chats = bool(run.builder and run.train) and is_chat(run.builder, run.train[0])
        return compare_vocabularies(self.recipe, run.tokenizer, chats)

    def _own_tokenizer(self) -> bool:
        """A teacher that cuts texts in its own way says where, which the views need before it is loaded."""
        self.run.teacher.tokenizer = load_tokenizer(self.recipe.teacher)
        return True

    def _make_examples(self) -> tuple[list[dict[str, Any]], DistillationDataset]:
        """The views of all rows, refused where teacher and student would read the same to no end."""
        run = self.run
        rows, dataset = fitting(run)
        if self.recipe.reinforcement is None:
            check_second_view(run.objective, run.teacher, dataset, Mixture.of(self.recipe.data.shares))
        if isinstance(run.teacher, CachedTeacher):
            run.teacher.expected = expected_contract(run, dataset)
            run.teacher.prepare(PartialState(), nn.Identity())
        return rows, dataset

    def _show(self) -> Iterator[Finding]:
        show_examples(self.console, self.run, self.examples[1])
        return check_examples(self.run, self.examples[1], position_counts(self.recipe))

    def _leaks(self) -> Iterator[Finding]:
        run = self.run
        items = run.evaluation.items if run.evaluation is not None else []
        left_out = self.examples[1].dropped_demonstrations if self.examples is not None else 0
        key = text_key if self.recipe.data.whole_text else prompt_key  # a passage's prompt is its first word
        return find_leaks(run.train, fixed_demonstrations(run), items, left_out, key)

    def _gold_lengths(self) -> Iterator[Finding]:
        dataset, evaluation = self.examples[1], self.recipe.evaluation
        asked = evaluation is not None and evaluation.shots and not self.recipe.data.whole_text
        return gold_lengths(_supervised(dataset), evaluation.max_new_tokens if asked else None)

    def _memory(self) -> None:
        """Bytes by part, before anything is loaded."""
        if self.recipe.reinforcement is not None:
            self.fits = True
            return
        known = replace(self.run, config=self.config)  # that of the run, its evaluations included
        if self.examples is None:
            known = replace(known, train=[])  # by the limits
        room = self.exam.make("memory", lambda: measure_room(known, self.processes), parts=self.parts)
        if isinstance(room, str):
            self.exam.add(Finding("warning", "memory", f"Not estimated: {room}."))
            self.fits = True
            return
        self.exam.check("memory", lambda: check_room(self.run, room, self.console), room=room)
        self.fits = (room is not None and room.can_be_tried) or None

    # --- with models

    def _load_models(self) -> None:
        needs = {"examples": self.examples, "same_tokens": self.same_tokens, "memory": self.fits}
        self.models = self.exam.make("models", self._make_models, **needs)

    def _make_models(self) -> bool:
        run, recipe = self.run, self.recipe
        run.model = load_student(recipe, seed=run.config.seed)
        if movable(run.model):
            run.model.to(run.config.device)
        launch = Launch(run.config.device)
        prepare_teacher(recipe, run.teacher, run.model, run.tokenizer, launch)
        if run.teacher is not None:
            run.teacher.prepare(launch, run.model)
            run.teacher.check_vocabulary(run.tokenizer)
        return True

    def _trials(self) -> None:
        """What only models can tell: who knows the answers, what is written, the loss, the time of a step."""
        exam, needs = self.exam, {"models": self.models}
        exam.check(distillable.NAME, self._ask, **needs)
        rows = exam.make("answer lengths", self._trial_rows, **needs)
        if self.recipe.reinforcement is not None:
            return
        trainer = exam.make("trainer", lambda: self._make_trainer(rows), rows=rows)
        exam.check(two_paths.NAME, lambda: two_paths.compare_paths(trainer), trainer=trainer)
        if self.unasked and self.run.teacher is not None and self.run.objective.needs:
            exam.check(distillable.NAME, lambda: self._by_text(trainer, rows), trainer=trainer)
        exam.check(duration.NAME, lambda: self._duration(trainer), trainer=trainer)

    def _ask(self) -> Iterator[Finding]:
        run = self.run
        items = distillable.choose_items(run, self.items)
        reason = distillable.why_not(run, items)
        if items is not None and self.recipe.evaluation is not None and self.recipe.evaluation.shots:
            self.student = distillable.ask_student(run, items)
        if reason:
            self.unasked = reason
            if run.teacher is None or not run.objective.needs:
                yield Finding("pass", distillable.NAME, f"Not asked: {reason}.", {"asked": False})
            return
        student = self.student or distillable.ask_student(run, items)
        self.teachers = distillable.ask_teachers(run, items)
        yield from distillable.judge(items, student, self.teachers)

    def _trial_rows(self) -> list[dict[str, Any]]:
        """Rows for a few micro-steps, answered as in the run, drawn over the whole data."""
        run, data = self.run, self.recipe.data
        wanted = run.config.train_batch_size * (duration.TRIED + 1)
        rows = self.examples[0]
        if data.answer == "teacher" and isinstance(run.teacher, CachedTeacher):
            rows = answered_rows(run, visited_rows(run, rows), run.teacher.path, written=True)
        draws = random.Random(run.config.seed)
        if data.answer == "teacher" and not isinstance(run.teacher, CachedTeacher):
            rows = self._answered(draws.sample(rows, min(self.items, len(rows))))
        if "student" in data.shares:
            self._student_texts(draws.sample(rows, min(self.items, len(rows))))
        if "dataset" not in data.shares:
            rows = unanswered(run, rows)
        chosen = draws.sample(rows, min(wanted, len(rows)))
        return [chosen[place % len(chosen)] for place in range(wanted)]

    def _answered(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with what the teacher writes; what it leaves empty is taken out."""
        run = self.run
        prompts = teacher_prompts(rows, run.builder, fixed_demonstrations(run))
        with run.teacher.weights() as model:
            texts = self._written("teacher", model, prompts)
        answered = [run.builder.with_answer(row, text) for row, text in zip(rows, texts, strict=True) if text.strip()]
        if not answered:
            raise ValueError(
                f"all {len(rows)} answers of the teacher are empty; look at data.prompt, its stop strings above all"
            )
        return answered

    def _student_texts(self, rows: list[dict[str, Any]]) -> None:
        """Let the student write, as it will at each step."""
        run = self.run
        dataset = make_dataset(run, unanswered(run, rows), None, build_objective("cross_entropy"))
        self._written("student", run.model, dataset.student_prompts)

    def _written(self, writer: str, model: nn.Module, prompts: list[list[int]]) -> list[str]:
        """Answers to learn from, measured."""
        began = time.perf_counter()
        completions = HFRollout(self.run.tokenizer, self.run.generation).generate(model, prompts)
        if writer == "teacher":
            self.answer_seconds = (time.perf_counter() - began) / len(completions)
        for finding in written_lengths(writer, completions, self.run.generation.max_new_tokens):
            self.exam.add(finding)
        return [completion.text for completion in completions]

    def _make_trainer(self, rows: list[dict[str, Any]]) -> DistillationTrainer:
        """A trainer whose steps are single micro-batches, with the run's number of steps for its schedules."""
        run = self.run
        steps = duration.planned_steps(run, len(self.examples[0]))
        config = make_config(run.recipe, max_steps=steps, gradient_accumulation_steps=1)
        trainer = make_trainer(run, rows, run.model, run.teacher, run.objective, config, draws=False)
        for shown in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(shown)
        return trainer

    def _by_text(self, trainer: DistillationTrainer, rows: list[dict[str, Any]]) -> Iterator[Finding]:
        once = list({id(row): row for row in rows}.values())
        texts = make_dataset(self.run, once, self.run.teacher, self.run.objective)
        return by_text(trainer, texts, self.unasked)

    def _duration(self, trainer: DistillationTrainer) -> Iterator[Finding]:
        seconds = duration.time_steps(trainer)
        examples = len(self.examples[0])
        asked = {"student": self.student, "teacher": self.teachers.get("teacher")}
        return duration.estimate_duration(self.run, examples, seconds, asked, self.answer_seconds, self.processes)


def _trial_of(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with an output folder that will be gone, and without what looks beyond a few steps."""
    training = {**recipe.training, **ASIDE, "disable_tqdm": True, "output_dir": str(folder)}
    if training.get("lr_scheduler_type") in BY_EVALUATION:
        training["lr_scheduler_type"] = "constant"
    return recipe.model_copy(update={"training": training})


def _output_folder(recipe: Recipe, run: Run) -> Iterator[Finding]:
    policy = recipe.training.get("run_policy", "refuse")
    try:
        check_output_folder(run.output_dir, policy, run.fingerprint, recipe.resolved())
    except OutputFolderError as error:
        # A run that is in the way is dealt with on the command line, not in the recipe.
        in_the_way = policy == "refuse" and run.output_dir.is_dir()
        yield Finding("warning" if in_the_way else "error", "output folder", str(error))
        return
    yield Finding("pass", "output folder", f"{run.output_dir} can be written into.")


def _rows_finding(run: Run) -> Finding:
    counts = {"train": len(run.train), "demonstrations": len(run.demonstrations)}
    words = f"{len(run.train)} to train, {len(run.demonstrations)} demonstrations"
    if run.evaluation is not None:
        counts["evaluation"] = len(run.evaluation.items)
        words += f", {counts['evaluation']} evaluation items"
    for task in run.forgetting:
        counts[f"forgetting: {task.name}"] = len(task.items)
        words += f", {len(task.items)} of {task.name} to see what is forgotten"
    return Finding("pass", "rows", f"{words}.", counts)


def _supervised(dataset: DistillationDataset) -> list[int]:
    """The number of learned tokens of each example."""
    return [sum(label >= 0 for label in dataset[number]["student"]["labels"]) for number in range(len(dataset))]
