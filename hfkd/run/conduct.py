"""Runs a recipe: k-shot before, the teacher's answers, training, k-shot after, the comparisons, and what is written.

Every process takes part in each model pass, so that sharded models work; the first one alone prints and writes. What
the objects are and how they are made is `hfkd.run.build`; how the results read is `hfkd.report` and `hfkd.card`.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console

from hfkd.compatibility import check_second_view
from hfkd.data.views import DistillationDataset
from hfkd.energy import EnergyMeter
from hfkd.errors import Preempted
from hfkd.eval.fidelity import measure_fidelity
from hfkd.eval.k_shot import KShotReport
from hfkd.eval.predictions import prediction_lines
from hfkd.hub import check_push
from hfkd.masking import safe_command
from hfkd.objective import build_objective
from hfkd.preemption import interruptible
from hfkd.recipe.schema import Recipe
from hfkd.record import (
    GOLD_BASELINE,
    RECORD_NAME,
    RunRecord,
    check_same_cache,
    check_same_data,
    checkpoints,
    clear_output_folder,
    read_record,
)
from hfkd.rollout.on_policy import Mixture
from hfkd.run.build import ASIDE, Run, build, make_config
from hfkd.run.deciding import check_rows, transformed
from hfkd.run.evaluation import ask, movable, plain_results
from hfkd.run.expected import expected_contract
from hfkd.run.models import load_student, save_base
from hfkd.run.outcome import describe_origins, describe_run, push_run, write_outcome
from hfkd.run.progress import training_bar
from hfkd.run.reinforce import make_reinforced_trainer
from hfkd.run.reporting import Measured
from hfkd.run.rows import Task
from hfkd.run.texts import (
    answered_rows,
    fidelity_texts,
    fitting,
    prepare_to_write,
    unanswered,
    visited_rows,
)
from hfkd.run.training import make_trainer
from hfkd.run.words import accuracies_line, comparison_tables, fidelity_line, plan_lines, summary_lines
from hfkd.sharding import Launch
from hfkd.student import as_published
from hfkd.teachers import CachedTeacher

if TYPE_CHECKING:
    from torch import nn

    from hfkd.trainer import DistillationTrainer

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class RunResult:
    """What a run left behind.

    Attributes:
        output_dir: The folder with the weights, `run.json`, `report.json`, `report.html`, `plots/` and `README.md`.
        report: What `report.json` holds.
        record: What `run.json` holds.
    """

    output_dir: Path
    report: dict[str, Any]
    record: RunRecord


def run_recipe(recipe: Recipe, *, console: Console | None = None, command: Sequence[str] = ()) -> RunResult:
    """Run a recipe from the first check to the last file.

    Args:
        recipe: From `load_recipe`.
        console: Where the first process prints; None prints to the terminal.
        command: The command line, for the record; secrets in it are masked.

    Returns:
        The report and the record, as written.

    Raises:
        ValueError: Something in the recipe or the data can't work, or the output folder holds another run.
        OSError: A file is missing or damaged.
    """
    return _Conductor(build(recipe), console, command).conduct()


class _Conductor:
    """One run under way: the objects, the clock and the report that grows."""

    def __init__(self, run: Run, console: Console | None, command: Sequence[str]) -> None:
        self.run, self.recipe = run, run.recipe
        self.first = run.config.process_index == 0
        self.console = (console or Console()) if self.first else Console(quiet=True)
        self.record = RunRecord(
            recipe=run.recipe.resolved(), fingerprint=run.fingerprint, command=safe_command(command)
        )
        self.measured = Measured([{} for _ in run.forgetting])
        self.energy = EnergyMeter()
        self.trains = False

    def conduct(self) -> RunResult:
        """All stages in order; once training began, a failure is noted in `run.json` before it goes on its way."""
        run, policy = self.run, self.recipe.training.get("run_policy", "refuse")
        if self.first and self.recipe.hub.push:  # a refused token is told before the training, not after it
            hub, student = self.recipe.hub, self.recipe.student
            with_base = bool(student.init and student.lora) and not hub.merged
            check_push(hub.repo_id, private=hub.private, with_base=with_base)
        PartialState().wait_for_everyone()  # all have looked at the folder before the first one writes into it
        if policy == "overwrite" and self.first:
            clear_output_folder(run.output_dir)
        self.console.print("\n".join(plan_lines(run)), markup=False, highlight=False)
        self._describe()
        if policy == "resume":
            self.record.take_over(run.output_dir)
        with interruptible() as calm:
            try:
                with self.energy:
                    self._stages()
                return self._finish()
            except BaseException as error:
                calm()
                self._note(error)
                raise

    def _note(self, error: BaseException) -> None:
        """Write down how the run ended, unless it was over."""
        preempted = isinstance(error, Preempted)
        if self.record.status != "finished":
            self.record.add_energy(self.energy.to_dict())
            self.record.status = "preempted" if preempted else "failed"
            # Before training nothing is there to protect, and the mended recipe may use the folder; but a scheduler
            # must see that the run wants to be started again.
            if self.trains or (preempted and not (self.run.output_dir / RECORD_NAME).exists()):
                self._write_record()
        if preempted and error.checkpoint is not None:
            PartialState().wait_for_everyone()  # the launcher ends all when the first one leaves

    def _stages(self) -> None:
        run = self.run
        if movable(run.model) and not self._waits():
            run.model.to(run.config.device)
        fitting_rows = self._fitting_rows()
        with self._clock("evaluation_before"):
            self._evaluate("before", run.model)
        self._evaluate_teacher()
        rows = visited_rows(run, fitting_rows)
        gold_rows = rows
        if self.recipe.data.answer == "teacher":
            with self._clock("teacher_answers"):
                rows = self._with_teacher_answers(rows)
        if self.recipe.data.transforms:
            with self._clock("transforms"):
                rows, self.record.data["transforms"] = transformed(run, rows, self._say)
        if "dataset" not in self.recipe.data.shares:
            rows = unanswered(run, rows)
        rewarded = self.recipe.reinforcement is not None
        if rewarded:
            trainer = make_reinforced_trainer(run, rows)
        else:
            trainer = make_trainer(run, rows, run.model, run.teacher, run.objective, run.config)
        self._count_late(trainer.views if rewarded else trainer.train_dataset)
        texts = self._fidelity_texts()
        self._hold_against_teacher("before", trainer, texts)
        before = read_record(run.output_dir).get("metrics", {})
        self.trains = True
        self._write_record()
        if self.first:
            save_base(self.recipe, run.tokenizer)
        with self._clock("training"), training_bar(trainer, self.console, "Training"):
            outcome = trainer.train(resume_from_checkpoint=_goes_on(run, run.output_dir))
        made = trainer.state.global_step > trainer._initial_global_step  # else the figures are of no step
        metrics = outcome.metrics if made else before
        if not made:
            self.console.print("The training was over before: no step is made, and its figures are kept.")
        self.record.metrics = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        self.record.teacher = run.teacher.describe() if run.teacher is not None else {"kind": "none"}
        self.record.origins = describe_origins(run)  # again: a hub's revisions are known once models are loaded
        self.measured.keep_log(trainer.state.log_history)
        trainer.save_model(str(run.output_dir))  # before anything else can fail
        if self.first:
            run.tokenizer.save_pretrained(run.output_dir)
        with self._clock("evaluation_after"):
            self._evaluate("after", trainer.accelerator.unwrap_model(trainer.model))
        self._hold_against_teacher("after", trainer, texts)
        if self.recipe.evaluation is not None and self.recipe.evaluation.gold_baseline:
            run.model, run.teacher = None, None
            del trainer
            gc.collect()
            with self._clock("gold_baseline"):
                self._gold_baseline(gold_rows)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _fidelity_texts(self) -> DistillationDataset | None:
        """The held-out texts for both models; rows that lack what a teacher needs are a reason, not an end."""
        evaluation = self.recipe.evaluation
        if self.recipe.reinforcement is not None:
            asked = evaluation is not None and evaluation.fidelity and self.run.teacher is not None
            return self._no_fidelity("a rewarded run leaves it to `hfkd evaluate --fidelity`") if asked else None
        try:
            texts = fidelity_texts(self.run)
        except ValueError as error:
            return self._no_fidelity(str(error))
        if texts is not None and self.recipe.teacher.cache is not None:
            return self._no_fidelity(
                "the cache holds what the teacher says of the training texts, not of the held-out ones; `hfkd "
                f"evaluate {self.run.output_dir} --fidelity teacher.cache=null` asks the teacher itself"
            )
        return texts

    def _no_fidelity(self, reason: str) -> None:
        self.measured.fidelity = {"unavailable": reason}
        self.console.print(f"Fidelity isn't measured: {reason}", markup=False, highlight=False)

    def _hold_against_teacher(
        self, stage: str, trainer: DistillationTrainer, texts: DistillationDataset | None
    ) -> None:
        """Measure how near the student is to its teacher; where that can't be, the report has the reason."""
        if texts is None or "unavailable" in self.measured.fidelity:
            return
        with self._clock(f"fidelity_{stage}"):
            try:
                report = measure_fidelity(trainer, texts)
            except ValueError as error:  # the same on all processes
                return self._no_fidelity(str(error))
        self.measured.fidelity[stage] = figures = report.to_dict()
        self.console.print(f"{stage}: {fidelity_line(figures)}", markup=False, highlight=False)

    def _waits(self) -> bool:
        """Whether the student stays where it was loaded until the trainer cuts it, since nobody asks it before."""
        data = self.recipe.data
        asked = self.run.evaluation is not None or data.answer == "teacher" or bool(data.transforms)
        launch = Launch.of(self.run.config)
        return (launch.is_fsdp2 or launch.is_zero3) and not asked

    def _describe(self) -> None:
        run = self.run
        describe_run(run, self.record)
        if self.recipe.training.get("run_policy") == "resume":
            check_same_data(run.output_dir, self.record.data)
            check_same_cache(run.output_dir, self.record.teacher)

    def _count(self, dataset: DistillationDataset) -> None:
        """Say what was left out: an example that is dropped in silence is one that nobody misses."""
        counts = {
            "examples": len(dataset),
            "too_long": dataset.dropped,
            "demonstrations": dataset.dropped_demonstrations,
        }
        self.record.data["training_examples"] = counts
        if dataset.dropped or dataset.dropped_demonstrations:
            self.console.print(
                f"Left out of training: {dataset.dropped} examples that don't fit their views, "
                f"{dataset.dropped_demonstrations} that are demonstrations; {len(dataset)} are left."
            )

    def _count_late(self, dataset: DistillationDataset) -> None:
        """Rows that fitted with a short answer, but not with the one that the teacher wrote."""
        if dataset.dropped:
            self.record.data["training_examples"]["too_long_once_answered"] = dataset.dropped
            self.console.print(f"Left out of training: {dataset.dropped} more, too long with the teacher's answer.")

    def _fitting_rows(self) -> list[dict[str, Any]]:
        """The training rows that can be examples; the choice is made among these."""
        rows, dataset = fitting(self.run)
        self._count(dataset)
        mixture = Mixture.of(self.recipe.data.shares)
        if self.recipe.reinforcement is None:
            check_second_view(self.run.objective, self.run.teacher, dataset, mixture)
        check_rows(self.run, dataset)
        if isinstance(self.run.teacher, CachedTeacher):
            self.run.teacher.expected = expected_contract(self.run, dataset)
            self.run.teacher.prepare(PartialState(), self.run.model)  # another cache is refused before time is spent
        return rows

    def _with_teacher_answers(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with what the prompted teacher wrote; rows that it left empty are taken out and counted."""
        prepare_to_write(self.run)
        cache = self.recipe.teacher.cache
        kept = answered_rows(self.run, rows, Path(cache or self.run.output_dir), written=cache is not None)
        empty = len(rows) - len(kept)
        self.record.data["teacher_answers"] = {"rows": len(kept), "empty": empty}
        left_out = f"; {empty} answers were empty and are left out" if empty else ""
        self.console.print(f"The teacher answered {len(kept)} prompts{left_out}.")
        return kept

    def _evaluate(self, name: str, model: nn.Module) -> None:
        run = self.run
        if run.evaluation is None or not run.evaluation.shots:
            return
        with as_published(model):
            self.measured.k_shot[name] = self._ask(model, run.evaluation, name, name)
            for task, reports in zip(run.forgetting, self.measured.forgetting, strict=True):
                reports[name] = self._ask(model, task, f"{task.name}, {name}", name)

    def _evaluate_teacher(self) -> None:
        """Another model's own accuracy on the prompt it has in training: one that guesses has nothing to teach."""
        run = self.run
        asked = run.evaluation is not None and run.evaluation.shots
        if not asked or self.recipe.teacher.kind != "local" or self.recipe.teacher.cache:
            return
        task = dataclasses.replace(run.evaluation, shots=[min(len(run.demonstrations), max(run.evaluation.shots))])
        with self._clock("evaluation_teacher"), run.teacher.weights() as model:
            self.measured.k_shot["teacher"] = self._ask(model, task, "teacher", "teacher")

    def _ask(self, model: nn.Module, task: Task, words: str, stage: str) -> KShotReport:
        report = ask(self.run, model, task, f"k-shot {words}" if self.first else None)
        self.measured.predictions += prediction_lines(task.name, stage, report, task.items)
        self.console.print(f"{words}: {accuracies_line(plain_results(report))}", markup=False, highlight=False)
        return report

    def _gold_baseline(self, rows: list[dict[str, Any]]) -> None:
        """Fine-tune a fresh student on the data set's own answers to the rows before transforms; all else is alike."""
        run, folder = self.run, self.run.output_dir / GOLD_BASELINE
        changes = {
            **ASIDE,
            "output_dir": str(folder),
            "save_only_model": False,  # the checkpoint of a signal is to be gone on from
        }
        config = make_config(self.recipe, **changes)
        model = load_student(self.recipe, seed=run.config.seed)
        trainer = make_trainer(run, rows, model, None, build_objective("cross_entropy"), config)
        with training_bar(trainer, self.console, "Fine-tuning on gold, for comparison"):
            trainer.train(resume_from_checkpoint=_goes_on(run, folder))  # from where a signal ended it
        self._evaluate("gold", trainer.accelerator.unwrap_model(trainer.model))
        if self.first:
            for checkpoint in checkpoints(folder):
                shutil.rmtree(checkpoint)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _finish(self) -> RunResult:
        run, folder = self.run, self.run.output_dir
        task = run.evaluation.name if run.evaluation is not None else ""
        others = [other.name for other in run.forgetting]
        report = self.measured.report(task, others, self.record.metrics, self.record.durations)
        self.record.add_energy(self.energy.to_dict())
        if self.first:
            write_outcome(folder, {**self.record.to_dict(), "status": "finished"}, report, self.measured.predictions)
        self.record.status = "finished"
        self._write_record()  # the last one: it says that the others are there
        for table in comparison_tables(report):
            self.console.print()
            self.console.print(table)
        for line in summary_lines(folder, report):
            self.console.print(line, markup=False, highlight=False)
        if self.first and self.recipe.hub.push:
            push_run(self.recipe, folder, self.console)
        return RunResult(folder, report, self.record)

    def _write_record(self) -> None:
        if self.first:
            self.record.write(self.run.output_dir)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = self.record.durations.get(stage, 0.0) + time.perf_counter() - start
        self.record.durations[stage] = round(spent, 2)


def _goes_on(run: Run, folder: Path) -> bool:
    """Whether there is a checkpoint to go on from, as the first process sees it; a run that ended before its first one
    begins anew.
    """
    found = bool(checkpoints(folder))
    return run.recipe.training.get("run_policy") == "resume" and gather_object([found])[0]
