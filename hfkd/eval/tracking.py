"""A k-shot curve and sample completions while a student trains, for the trackers that `report_to` names.

At each evaluation of the trainer the student answers held-out questions as it is by then (`hfkd.eval.k_shot`). The
figures go through the trainer's log, so every tracker draws them; completions go as a text or a table to those that
can show one. The training isn't touched: its weights, its random numbers and its speed are the same without it. Knows
the trackers only as callbacks of transformers; knows no recipe.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from hfkd.data.messages import Row, prompt_messages, text_of
from hfkd.data.prompts import PromptBuilder
from hfkd.data.select import check_leakage
from hfkd.eval.answers import EXTRACTORS
from hfkd.eval.k_shot import KShotReport, evaluate_k_shot, gold_answer
from hfkd.masking import mask_text

if TYPE_CHECKING:
    from hfkd.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

_LONGEST_TEXT = 2000


@dataclass(frozen=True)
class Sample:
    """One answer of the student, as a tracker shows it: secrets and home folders masked, long texts cut.

    Attributes:
        question: The prompt of the row, without the demonstrations.
        shots: Demonstrations that stood before it.
        completion: What the student wrote, whole.
        gold: The right answer.
        right: Whether the answer that was read out of the completion is the right one.
    """

    question: str
    shots: int
    completion: str
    gold: str
    right: bool


class KShotCallback(TrainerCallback):
    """Asks the student at each evaluation, and logs its k-shot accuracy and some of what it wrote.

    Pass it to a `DistillationTrainer` in `callbacks=[...]`, before callbacks that read its figures (early stopping).
    The figures are named `eval_k_shot_<k>` (the accuracy, a fraction) and the same with `_standard_error`,
    `_most_frequent_share` (what the most frequent gold answer would score) and `_top_answer_share` (how often the
    student gave its most frequent answer); trackers show them under `eval/`. They are among the metrics of the
    evaluation too, so `metric_for_best_model="k_shot_8"` works. All processes answer; those of the first one count.

    Args:
        items: Held-out rows, as in `evaluate_k_shot`.
        demonstrations: Rows to show before the question.
        builder: Turns a row and demonstrations into a prompt; its tokenizer must be the student's.
        shots: Numbers of demonstrations.
        extract: Name in `EXTRACTORS` of what reads the answer out of the text.
        samples: How many items' completions go to TensorBoard, W&B and Trackio, for each number of demonstrations;
            always the same items, spread evenly over all.
        name: Of the task, where one training has several such callbacks: `eval_<name>_k_shot_<k>`.
        settings: More arguments of `evaluate_k_shot`: `tolerance`, `max_new_tokens`, `batch_size`, `seed`,
            `reshuffle`.

    Attributes:
        trainer: The `DistillationTrainer` whose callback it is, which sets it.

    Raises:
        ValueError: There are no items or no shots, fewer demonstrations than shots, an unknown extractor, a negative
            number of samples, or an item is among the demonstrations.
    """

    def __init__(
        self,
        items: Sequence[Row],
        demonstrations: Sequence[Row],
        builder: PromptBuilder,
        *,
        shots: Sequence[int] = (0, 1, 8),
        extract: str = "text",
        samples: int = 4,
        name: str = "",
        **settings: Any,
    ) -> None:
        self.items, self.demonstrations, self.builder = list(items), list(demonstrations), builder
        self.settings = {"shots": sorted(set(shots)), "extract": extract, **settings}
        self.samples, self.name = samples, name
        self.trainer: DistillationTrainer | None = None
        self._asked_at: int | None = None
        self._figures: dict[str, float] = {}
        self._failed: set[str] = set()
        self._check()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Another training asks anew."""
        self._asked_at = None

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Ask, once a step however many data sets are evaluated, and add the figures to the evaluation's.

        Raises:
            RuntimeError: The trainer isn't known.
        """
        if metrics is None or not any(name.startswith("eval_") for name in metrics):
            return  # an evaluation under another name is about something else
        trainer = self._known_trainer()
        if not trainer.is_in_train or self._asked_at != state.global_step:
            with trainer.meter.paused():
                report = self._ask(trainer)
                # Of the first process, as all must agree on which checkpoint is the best.
                self._figures = gather_object([figures(report, self.name)])[0]
            self._asked_at = state.global_step
            trainer.log(dict(self._figures))
            if self.samples and state.is_world_process_zero:
                self._send(trainer, sample_completions(report, self.items, self.samples), state.global_step)
        metrics.update(self._figures)

    def _check(self) -> None:
        """Refuse now what would end the training at its first evaluation."""
        shots, extract = self.settings["shots"], self.settings["extract"]
        if not self.items or not shots or shots[0] < 0:
            raise ValueError(
                f"KShotCallback got {len(self.items)} items and the shots {shots}; expected at least one item, and "
                "numbers of demonstrations, 0 or more, like [0, 1, 8]."
            )
        if shots[-1] > len(self.demonstrations):
            raise ValueError(
                f"shots asks for {shots[-1]} demonstrations and there are {len(self.demonstrations)}. Give more "
                "demonstrations, or take the number out of shots."
            )
        if extract not in EXTRACTORS:
            raise ValueError(f"extract is {extract!r}; expected one of {', '.join(EXTRACTORS)}.")
        if self.samples < 0:
            raise ValueError(f"samples is {self.samples}; expected 0 (none) or more.")
        everything = bool(self.settings.get("reshuffle"))
        check_leakage(self.demonstrations if everything else self.demonstrations[: shots[-1]], self.items)

    def _known_trainer(self) -> DistillationTrainer:
        if self.trainer is None:
            raise RuntimeError(
                "KShotCallback doesn't know its trainer, and can't log. Pass it to a DistillationTrainer in "
                "callbacks=[...]."
            )
        return self.trainer

    def _ask(self, trainer: DistillationTrainer) -> KShotReport:
        model = trainer.accelerator.unwrap_model(trainer.model)
        return evaluate_k_shot(
            model, self.builder.tokenizer, self.items, self.demonstrations, self.builder, **self.settings
        )

    def _send(self, trainer: DistillationTrainer, samples: Sequence[Sample], step: int) -> None:
        """Give the samples to each active tracker that shows texts; one that fails is named once."""
        tag = f"eval/{self.name}_samples" if self.name else "eval/samples"
        active = trainer.callback_handler.callbacks
        for kind, (tracker, send) in _TRACKERS.items():
            for callback in (one for one in active if isinstance(one, kind)):
                try:
                    send(callback, tag, samples, step)
                except Exception as error:  # whatever it is, no training ends because of what shows it
                    if tracker not in self._failed:
                        self._failed.add(tracker)
                        words = "%s takes no sample completions, and the training goes on without them there: %s"
                        logger.warning(words, tracker, mask_text(f"{type(error).__name__}: {error}"))


def figures(report: KShotReport, name: str = "") -> dict[str, float]:
    """What is logged of a report.

    Args:
        report: Of the student as it is now.
        name: Of the task, or nothing where there is only one.

    Returns:
        Fractions by the names that `KShotCallback` tells.
    """
    prefix = f"eval_{name}_k_shot" if name else "eval_k_shot"
    found = {}
    for shots, result in report.results.items():
        found[f"{prefix}_{shots}"] = result.accuracy
        for field in ("standard_error", "most_frequent_share", "top_answer_share"):
            found[f"{prefix}_{shots}_{field}"] = getattr(result, field)
    return found


def sample_completions(report: KShotReport, items: Sequence[Row], count: int) -> list[Sample]:
    """Some of the answers, the same items at each number of demonstrations, question by question.

    Args:
        report: Of these items.
        items: That were asked.
        count: How many items; all where there are fewer.
    """
    count = min(count, len(items))
    places = [number * len(items) // count for number in range(count)]
    return [
        Sample(
            _shown("\n".join(text_of(message.get("content")) for message in prompt_messages(items[place]))),
            shots,
            _shown(result.texts[place]),
            _shown(gold_answer(items[place])),
            result.right[place],
        )
        for place in places
        for shots, result in report.results.items()
    ]


def _shown(text: str) -> str:
    """Masked first: half a secret is no longer found."""
    text = mask_text(text)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


def _to_tensorboard(callback: Any, tag: str, samples: Sequence[Sample], step: int) -> None:
    callback.tb_writer.add_text(tag, _markdown(samples), step)
    callback.tb_writer.flush()


def _to_wandb(callback: Any, tag: str, samples: Sequence[Sample], step: int) -> None:
    import wandb

    rows = [asdict(sample) for sample in samples]
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    wandb.log({tag: table, "train/global_step": step})


def _to_trackio(callback: Any, tag: str, samples: Sequence[Sample], step: int) -> None:
    import trackio

    table = trackio.Table(data=[asdict(sample) for sample in samples])
    trackio.log({tag: table, "train/global_step": step})


_TRACKERS: Mapping[type[TrainerCallback], tuple[str, Callable[[Any, str, Sequence[Sample], int], None]]] = {
    TensorBoardCallback: ("TensorBoard", _to_tensorboard),
    WandbCallback: ("W&B", _to_wandb),
    TrackioCallback: ("Trackio", _to_trackio),
}


def _markdown(samples: Sequence[Sample]) -> str:
    """As indented blocks, in which nothing that a student writes is taken for markup."""
    blocks = []
    for sample in samples:
        heading = f"#### {sample.shots} shot{'' if sample.shots == 1 else 's'}: {'right' if sample.right else 'wrong'}"
        told = f"{sample.question}\n\n-> {sample.completion}\n\ngold: {sample.gold}"
        blocks.append(f"{heading}\n\n{textwrap.indent(told, '    ', lambda line: True)}")
    return "\n\n".join(blocks)
