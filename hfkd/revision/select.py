"""Which sequences or tokens of a step are learned: those that the teacher is sure of and the student still needs.

The thresholds move with what was seen, by domain if asked for, or are fixed. They are means over all processes, so
that all decide alike. Knows figures of tokens, no text and no loss.

Shapes: N supervised tokens of a micro-batch, U items of it (sequences or tokens), G domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback

from hfkd.distributed import total_over_processes
from hfkd.errors import NothingToLearn
from hfkd.reading import read_batch
from hfkd.revision.base import Reviser
from hfkd.revision.needs import check_teacher
from hfkd.revision.thresholds import MovingThreshold
from hfkd.revision.tokens import weighed, with_only
from hfkd.rows import Head
from hfkd.token_figures import TokenFigures

PATIENCE = 50
"""Steps in a row that may keep nothing."""

_SIGNALS = ("confidence", "need")


@dataclass(frozen=True)
class Items:
    """What a micro-batch offers, sequence by sequence or token by token.

    Args:
        of_token: [N] the item that each supervised token belongs to.
        tokens: [U] how many tokens each item has, at least one.
        group: [U] the number of its domain.
        confidence: [U] how sure the teacher is, from 0 to 1.
        need: [U] how unsure the student is, from 0 to 1.
    """

    of_token: NDArray[np.int64]
    tokens: NDArray[np.int64]
    group: NDArray[np.int64]
    confidence: NDArray[np.float64]
    need: NDArray[np.float64]


class Selection(Reviser):
    """Learns only what the teacher is sure of and the student is unsure of.

    A sequence's confidence is exp(mean log p(y)) of its tokens y under the teacher, its need the mean entropy of the
    student as a share of log V. A token's confidence is the largest probability that the teacher gives there, its need
    the student's entropy in the same measure. Kept is what reaches both thresholds; the rest is unsupervised in both
    views and isn't counted, so the loss stays a mean over what is learned. In a step that keeps nothing on any process
    all weights are 0, and the optimizer is shown no gradient at all, so that neither its momentum nor a weight decay
    moves the student. Where DeepSpeed or a scaler of float16 makes the step, both still do.

    One more forward of the student and of the teacher a micro-batch, so it saves no time: what it may save is text.

    Args:
        by: What is kept or left out: `sequence` or `token`.
        per: Whose thresholds: `none` (one for all) or `domain` (each of the rows' column `domain` has its own).
        confidence: The least confidence, fixed, from 0 to 1; None lets it move.
        need: The least need, fixed, from 0 (no student is too sure) to 1; None lets it move.
        decay: What stays of a moving mean at each step, from 0 to below 1.
        weighted: Whether what is kept counts by confidence times need, over the mean of that over the kept tokens.

    Paper:
        Li et al., 2024 (LLKD), https://arxiv.org/abs/2411.08028, which classifies texts. Ours: sequences and tokens,
        domains in the place of classes, the moving means (the paper's exact form wasn't at hand), and the weights'
        mean, so that the loss keeps its size.

    Raises:
        ValueError: An argument is none of these.
    """

    needs_teacher = True

    def __init__(
        self,
        by: str = "sequence",
        per: str = "none",
        confidence: float | None = None,
        need: float | None = None,
        decay: float = 0.9,
        weighted: bool = True,
    ) -> None:
        for name, value, known in (("by", by, ("sequence", "token")), ("per", per, ("none", "domain"))):
            if value not in known:
                raise ValueError(f"select: {name} is {value!r}; expected {known[0]!r} or {known[1]!r}.")
        for name, value in (("confidence", confidence), ("need", need)):
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(
                    f"select: {name} is {value!r}; expected a number from 0 to 1, or null for a threshold that moves."
                )
        if not (_is_number(decay) and 0 <= decay < 1):
            raise ValueError(f"select: decay is {decay!r}; expected a number from 0 to below 1.")
        if not isinstance(weighted, bool):
            raise ValueError(f"select: weighted is {weighted!r}; expected true or false.")
        self.by, self.per, self.decay, self.weighted = by, per, float(decay), weighted
        self.fixed = {"confidence": confidence, "need": need}
        self.groups: list[str] = ["all"]
        self._vocab_size, self._empty_steps = 1, 0
        self._moving = self._fresh()
        self._figures: dict[str, tuple[float, float]] = {}

    def check(self, dataset: Any) -> None:
        """By domain there must be two of them."""
        if self.per == "domain":
            _named_domains(dataset)

    def attach(self, trainer: Any) -> None:
        """Look for a teacher and, where thresholds go by domain, for the domains.

        Raises:
            ValueError: There is no teacher, or there aren't at least two domains, or domains get lost.
        """
        super().attach(trainer)
        check_teacher(trainer, "select", "it asks how sure the teacher is")
        if self.per == "domain":
            self.groups = _domains(trainer)
        self._vocab_size = Head.of(trainer.model).vocab_size
        self._moving = self._fresh()
        trainer.add_callback(_EmptySteps(self))

    @property
    def kept_nothing(self) -> bool:
        """Whether the last step had nothing to learn, the same on all processes."""
        return self._empty_steps > 0

    def revise(self, batches: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Leave out what doesn't reach the thresholds of this step, which has moved them before.

        Raises:
            NothingToLearn: As many steps in a row as there is patience for have kept nothing.
            ValueError: A batch has no domains.
        """
        items = [self._items(batch) for batch in batches]
        self._move(items)
        kept = [self._reaches(each) for each in items]
        worth = [each.confidence * each.need if self.weighted else np.ones(len(each.need)) for each in items]
        here = np.zeros(3)
        for each, chosen, value in zip(items, kept, worth, strict=True):
            here += [each.tokens.sum(), each.tokens[chosen].sum(), (each.tokens * value)[chosen].sum()]
        seen, learned, total = total_over_processes(here.tolist(), self.trainer.args.device).tolist()
        self._note(items, kept)
        if not seen:
            return list(batches)  # no token is supervised: the trainer says so
        if not learned:
            self._count_empty_step()
            return [weighed(batch, np.zeros(len(each.of_token))) for batch, each in zip(batches, items, strict=True)]
        self._empty_steps = 0
        mean = total / learned
        return [
            self._revised(batch, each.of_token, chosen, value / mean if mean > 0 else np.ones_like(value))
            for batch, each, chosen, value in zip(batches, items, kept, worth, strict=True)
        ]

    def figures(self) -> dict[str, tuple[float, float]]:
        """Of the last step: `selection/kept` (of tokens, and by domain), `selection/confidence` and `selection/need`
        (means over the items), and the thresholds `selection/confidence_threshold` and `selection/need_threshold`,
        with `<domain>` before the last part where they go by domain.
        """
        return dict(self._figures)

    def state_dict(self) -> dict[str, Tensor]:
        """The moving means, and how many steps in a row have kept nothing."""
        means = {name: torch.from_numpy(moving.means.copy()) for name, moving in self._moving.items()}
        return {**means, "empty_steps": torch.tensor(self._empty_steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: It is of another number of domains.
        """
        for name, moving in self._moving.items():
            means = state[name].cpu().numpy().astype(float)
            if means.shape != moving.means.shape:
                raise ValueError(
                    f"select: the checkpoint has thresholds for {len(means) - 1} domains, and the rows have "
                    f"{len(self.groups)}: {', '.join(self.groups)}. Go on with the rows that it was saved with."
                )
            moving.means = means
        self._empty_steps = int(state["empty_steps"])

    def _fresh(self) -> dict[str, MovingThreshold]:
        return {name: MovingThreshold(len(self.groups), self.decay) for name in _SIGNALS}

    def _items(self, batch: Mapping[str, Any]) -> Items:
        if self.per == "domain" and batch.get("group") is None:
            raise ValueError(
                "select: a batch has no `group` [B], the number of each row's domain. Use "
                "`hfkd.data.DistillationCollator`, or set per to 'none'."
            )
        groups = batch["group"].cpu().numpy() if self.per == "domain" else np.zeros(len(batch["labels"]), dtype=int)
        return items_of(read_batch(self.trainer, batch), groups, self._vocab_size, self.by)

    def _move(self, items: Sequence[Items]) -> None:
        """Let the means hear of this step, of all processes."""
        size = len(self.groups)
        rows = np.zeros((3, size))
        for each in items:
            parts = (None, each.confidence, each.need)
            rows += np.stack([np.bincount(each.group, weights=part, minlength=size) for part in parts])
        counts, *sums = np.array(total_over_processes(rows.tolist(), self.trainer.args.device).tolist())
        for name, values in zip(_SIGNALS, sums, strict=True):
            self._moving[name].hear(values, counts)

    def _thresholds(self, name: str) -> NDArray[np.float64]:
        fixed = self.fixed[name]
        return self._moving[name].thresholds() if fixed is None else np.full(len(self.groups), float(fixed))

    def _reaches(self, items: Items) -> NDArray[np.bool_]:
        """[U] whether each item reaches both thresholds; a mean's rounding is no reason to fall short of it."""
        return np.logical_and(
            *(getattr(items, name) >= self._thresholds(name)[items.group] * (1 - 1e-9) for name in _SIGNALS)
        )

    def _revised(self, batch: Mapping[str, Any], of_token: NDArray, kept: NDArray, weights: NDArray) -> dict[str, Any]:
        new = weighed(batch, weights[of_token]) if self.weighted else batch
        return with_only(new, kept[of_token])

    def _count_empty_step(self) -> None:
        self._empty_steps += 1
        if self._empty_steps < PATIENCE:
            return
        wanted = ", ".join(f"{name} {np.round(self._thresholds(name), 4).tolist()}" for name in _SIGNALS)
        seen = ", ".join(f"{name} {self._moving[name].means[0]:.4f}" for name in _SIGNALS)
        raise NothingToLearn(
            f"select: {self._empty_steps} steps in a row have kept nothing. The thresholds are {wanted} (of "
            f"{', '.join(self.groups)}), and the means that were seen {seen}. Lower `confidence` or `need` below "
            "them, or leave them out, so that the thresholds move."
        )

    def _note(self, items: Sequence[Items], kept: Sequence[NDArray]) -> None:
        """What the log shows of this step."""
        group, tokens, confidence, need = (
            np.concatenate([getattr(each, name) for each in items]) for name in ("group", "tokens", *_SIGNALS)
        )
        chosen, learned = np.concatenate(list(kept)), {}
        for number, name in enumerate(self.groups):
            part = f"{name}/" if self.per == "domain" else ""
            ours = group == number
            learned[f"selection/{part}kept"] = tokens[ours & chosen].sum(), tokens[ours].sum()
            for signal in _SIGNALS:
                threshold = float(self._thresholds(signal)[number])
                if not np.isnan(threshold):
                    learned[f"selection/{part}{signal}_threshold"] = threshold, 1.0
        learned["selection/kept"] = tokens[chosen].sum(), tokens.sum()
        learned["selection/confidence"] = confidence.sum(), len(confidence)
        learned["selection/need"] = need.sum(), len(need)
        self._figures = {name: (float(part), float(whole)) for name, (part, whole) in learned.items()}


class _EmptySteps(TrainerCallback):
    """Takes the gradients away from an optimizer where a selection kept nothing: of zeros it would go on moving."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between the backward pass and the optimizer's step."""
        scaler = getattr(self.selection.trainer.accelerator, "scaler", None)  # it insists on gradients
        if self.selection.kept_nothing and scaler is None:
            kwargs["optimizer"].zero_grad(set_to_none=True)


def items_of(figures: TokenFigures, groups: NDArray[np.int64], vocab_size: int, by: str) -> Items:
    """What student and teacher say of a micro-batch, item by item.

    Args:
        figures: Of the N supervised tokens.
        groups: [B] the number of each row's domain.
        vocab_size: V, whose logarithm is the largest entropy.
        by: `sequence` or `token`.
    """
    entropy = np.clip(figures.student.entropy.astype(float) / math.log(vocab_size), 0.0, 1.0)
    sure = figures.teacher.confidence.astype(float)
    if by == "token":
        ones = np.ones(len(figures), dtype=np.int64)
        return Items(np.arange(len(figures)), ones, groups[figures.text], sure, entropy)
    rows, of_token, tokens = np.unique(figures.text, return_inverse=True, return_counts=True)
    # Of a token that a sparse teacher doesn't list it is known only that it has no more than the likeliest one, and
    # than what that one leaves.
    most = np.log(np.clip(np.minimum(sure, 1 - sure), np.finfo(float).tiny, None))
    said = np.where(np.isnan(figures.teacher.log_prob), most, figures.teacher.log_prob)
    confidence = np.exp(np.bincount(of_token, weights=said) / tokens)
    need = np.bincount(of_token, weights=entropy) / tokens
    return Items(of_token, tokens, groups[rows], confidence, need)


def _domains(trainer: Any) -> list[str]:
    """The domains of a trainer's rows.

    Raises:
        ValueError: They have none or one, or the texts are written anew and lose theirs.
    """
    if trainer.writer is not None:
        raise ValueError(
            "select: per is 'domain', and the texts are written during training, which know no domain. Set per to "
            "'none', or answer to 'dataset'."
        )
    return _named_domains(trainer.train_dataset)


def _named_domains(dataset: Any) -> list[str]:
    groups = list(getattr(dataset, "groups", []))
    if len(groups) < 2:
        found = (
            f"only the domain {groups[0]!r}" if groups else "no value in the column 'domain' of some row, or no rows"
        )
        raise ValueError(
            f"select: per is 'domain', and there is {found}. Name at least two domains in the column 'domain' of "
            "every row, or set per to 'none'."
        )
    return groups


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
