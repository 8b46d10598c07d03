"""Prompts without the words that mislead the student, beside the prompts as they are.

Knows student and teacher and the rows; how the rows are learned afterwards is the recipe's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from numbers import Real
from typing import Any

import numpy as np
from torch import nn

from hfkd.data.messages import prompt_key
from hfkd.sharding import is_sharded
from hfkd.transforms.base import Row, RowTransform, Workshop
from hfkd.transforms.figures import row_figures, weights_digest
from hfkd.transforms.sensitivity import AskedRow, sensitivity, with_question
from hfkd.transforms.spans import confounding, leanings, runs, without


class ConfounderRows(RowTransform):
    """Adds to each row copies of it, each without one stretch of words that the student leans on and the teacher
    doesn't.

    Formula:
        n_i is the norm of the gradient of the answer's mean cross-entropy with respect to the embedding of token i of
        the row's own prompt, stretched to 0 .. 1 within the prompt; d_i = teacher's n_i - student's n_i, stretched
        again. Tokens with d_i <= min(quantile of d at share, cap) are taken out, each run of them in a copy of its
        own. White space is never taken out, nor anything of the template, the system message or the demonstrations.
    Args:
        share: The quantile, from 0 to below 1. The lowest d_i of a prompt is always marked; at 0 nothing else is.
        cap: The most that d_i may be, above 0 and at most 1.
        spare: A regular expression; a token in whose text it is found is never taken out: `\\d`, say, where without a
            number there is another answer. None spares nothing, as the paper does.
        max_length: In tokens, prompt and answer; of longer rows no copy is made.

    Raises:
        ValueError: A setting is out of its range.

    Paper:
        LeaF, Guo et al., 2025, https://arxiv.org/abs/2506.07851. As in its released code, every run becomes a row,
        whether or not the answer gets better without it. Here gradients are taken for the embeddings alone, tokens are
        found again in the text by their characters, nothing is pruned of the answer, and a copy that asks what a
        held-out row asks is left out.
    """

    needs_teacher = True

    def __init__(
        self, share: float = 0.05, cap: float = 0.5, spare: str | None = None, max_length: int = 2048
    ) -> None:
        if not _is_number(share) or not 0 <= share < 1:
            raise ValueError(f"share is {share!r}; expected a share of a prompt's tokens, from 0 to below 1.")
        if not _is_number(cap) or not 0 < cap <= 1:
            raise ValueError(f"cap is {cap!r}; expected a number above 0 and at most 1.")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
            raise ValueError(f"max_length is {max_length!r}; expected a number of tokens, at least 2.")
        self.share, self.cap, self.max_length = float(share), float(cap), max_length
        self._spared = _compiled(spare)
        self._told: dict[str, Any] = {}

    def apply(self, rows: Sequence[Row], workshop: Workshop) -> list[Row]:
        """Hold the two models' gradients against each other, row by row.

        Raises:
            ValueError: The teacher's gradients can't be taken or are the student's own, or a row can't be written.
        """
        _check_models(workshop)
        asked = {number: one for number, one in enumerate(_asked(rows, workshop)) if self._fits(one)}
        self._told = {"rows": len(rows), "looked_at": len(asked), "changed": 0, "made": 0}
        if not asked:
            raise ValueError(
                f"confounders: no row has {self.max_length} tokens or fewer and words of its own; raise max_length"
            )
        found = self._leanings(list(asked.values()), rows, workshop)
        taken = {prompt_key(row) for row in [*workshop.held_out, *workshop.demonstrations]}
        copies = {number: self._copies(rows[number], *pair, taken) for (number, _), pair in _paired(asked, found)}
        self._told["changed"] = sum(map(bool, copies.values()))
        self._told["made"] = sum(map(len, copies.values()))
        return [each for number, row in enumerate(rows) for each in (row, *copies.get(number, ()))]

    def describe(self) -> dict[str, Any]:
        """How many rows were looked at, how many have copies, and how many copies there are."""
        return dict(self._told)

    def _fits(self, asked: AskedRow) -> bool:
        return bool(asked.places) and len(asked) <= self.max_length

    def _leanings(self, asked: Sequence[AskedRow], rows: Sequence[Row], workshop: Workshop) -> np.ndarray:
        with ExitStack() as stack:
            teacher = stack.enter_context(workshop.teacher.weights())
            models = [workshop.student, teacher]
            _check_whole(models)

            def leaning(number: int) -> list[float]:
                ours, theirs = (sensitivity(model, asked[number]).cpu().double().numpy() for model in models)
                return leanings(ours, theirs).tolist()

            workshop.say(f"confounders: the gradients of student and teacher on {len(asked)} prompts.")
            decided = {"rows": list(rows), "prompts": [one.prompt for one in asked]}
            decided["weights"] = [weights_digest(model) for model in models]
            width = max(len(one.places) for one in asked)
            return row_figures(len(asked), width, leaning, workshop, "confounders", decided)

    def _copies(self, row: Row, asked: AskedRow, leaning: np.ndarray, taken: set[str]) -> list[Row]:
        marks = confounding(leaning[: len(asked.places)], self.share, self.cap) & asked.removable(self._spared)
        texts: dict[str, None] = {}
        for first, end in runs(marks.tolist()):
            span = min(start for start, _ in asked.spans[first:end]), max(stop for _, stop in asked.spans[first:end])
            texts[without(asked.text, span)] = None
        copies = [with_question(row, text) for text in texts if text.strip()]
        return [copy for copy in copies if prompt_key(copy) not in taken]


def _paired(asked: dict[int, AskedRow], found: np.ndarray) -> Iterator[tuple[tuple[int, Any], tuple]]:
    for item, leaning in zip(asked.items(), found, strict=True):
        yield item, (item[1], leaning)


def _asked(rows: Sequence[Row], workshop: Workshop) -> Iterator[AskedRow]:
    for number, row in enumerate(rows):
        try:
            yield AskedRow.of(row, workshop.builder)
        except ValueError as error:
            raise ValueError(f"confounders: training row {number}: {error}") from error


def _check_models(workshop: Workshop) -> None:
    teacher = workshop.teacher
    if workshop.student is None or teacher is None:
        lacking = "student" if workshop.student is None else "teacher"
        raise ValueError(f"confounders: holds student and teacher against each other, and there is no {lacking} here")
    if teacher.begins_as_student:
        raise ValueError(
            f"confounders: this teacher ({teacher.describe()['kind']}) has the student's own weights before the first "
            "step, so both lean on the same words; take another model (teacher.kind: local)"
        )
    if not teacher.writes or teacher.other_vocabulary:
        raise ValueError(
            f"confounders: takes gradients of the teacher on the student's tokens, and {type(teacher).__name__} has "
            "no model that reads them; take one model with the student's tokenizer (teacher.kind: local)"
        )


def _check_whole(models: Sequence[nn.Module]) -> None:
    if any(map(is_sharded, models)):
        raise ValueError(
            "confounders: the weights of student or teacher are in shards, and gradients of single rows need them "
            "whole; make the rows on one process, or launch without sharding (recipes/accelerate/ddp.yaml)"
        )


def _compiled(spare: str | None) -> re.Pattern[str] | None:
    try:
        return None if spare is None else re.compile(spare)
    except (re.error, TypeError) as error:
        raise ValueError(f"spare is {spare!r}, which is no regular expression ({error}).") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
