"""What the student wrote, corrected at its worst token and written on from there.

Knows batches as tensors and prompts as token ids; it knows no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hfkd.data.views import DistillationDataset
from hfkd.reading import read_batch
from hfkd.revision.base import Reviser
from hfkd.revision.needs import check_teacher
from hfkd.rollout.base import Completion, GenerationSettings, Rollout
from hfkd.rollout.decoding import TextEnds, eos_ids
from hfkd.rollout.texts import Side, Text, padding_side, read_texts, write_batch
from hfkd.rows import position_count
from hfkd.token_figures import TokenFigures


@dataclass(frozen=True)
class Draft:
    """An answer of the student's on its way to a better one.

    Args:
        text: The prompts, with the answer as far as it stands.
        place: Where the corrected token is, from 0; None where nothing was wrong.
        open: Whether the rest is still to be written.
    """

    text: Text
    place: int | None = None
    open: bool = False


class Correction(Reviser):
    """Corrects the student's own texts (sequence correction and re-generation).

    Of the tokens at which the teacher would have said something else, the one with the largest KL(teacher || student)
    is replaced by the teacher's likeliest token; what stood before it is kept, and the student writes the rest anew. A
    text that the teacher agrees with everywhere stays as it is. Steps on other texts aren't touched. Both views get
    the new answer, which is no longer than the rollout allows.

    For each correction one more forward of the student and of the teacher a micro-batch, and one more generation.

    Args:
        times: Corrections of each text, one after the other.

    Paper:
        Liu et al., 2024, https://arxiv.org/abs/2407.10068. Ours: what happens where all tokens agree, on which the
        paper is silent; what comes from a buffer is corrected, and the buffer keeps what the student wrote.

    Raises:
        ValueError: There is no such number.
    """

    needs_teacher = True

    def __init__(self, times: int = 1) -> None:
        if isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise ValueError(f"correct: times is {times!r}; expected a number of corrections, at least 1.")
        self.times = times
        self._side: Side = "right"
        self._figures: dict[str, tuple[float, float]] = {}

    def attach(self, trainer: Any) -> None:
        """Look for a teacher, and for a student that writes.

        Raises:
            ValueError: One of them is missing, another reviser comes first, or the student has too few positions.
        """
        super().attach(trainer)
        check_teacher(trainer, "correct", "the teacher corrects")
        if trainer.writer is None or "student" not in trainer.writer.mixture.sources:
            raise ValueError(
                "correct: it corrects what the student writes, and the student writes nothing. Set answer to "
                "'student', or give it a share."
            )
        if trainer.processing_class is None:
            raise ValueError("correct: where a text ends is asked of a tokenizer. Pass `processing_class=`.")
        before = trainer.revisers[: trainer.revisers.index(self)]
        if others := [type(each).__name__ for each in before if not isinstance(each, Correction)]:
            raise ValueError(
                f"correct: {others[0]} comes before it, and what that decides of a text doesn't hold for another one. "
                "Put `correct` first."
            )
        self._check_positions()

    def revise(self, batches: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Correct the texts, if the student wrote them."""
        self._figures = {}
        if not any(batch.get("own_text") for batch in batches):
            return list(batches)
        counts, revised = np.zeros(3), list(batches)
        for _ in range(self.times):
            revised = self._corrected(revised, step, counts)
        corrected, places, rows = counts.tolist()
        self._figures = {"correction/corrected": (corrected, rows), "correction/place": (places, corrected)}
        return revised

    def figures(self) -> dict[str, tuple[float, float]]:
        """Of the last step: `correction/corrected` (of the texts that were looked at) and `correction/place` (tokens
        before the corrected one).
        """
        return dict(self._figures)

    def _check_positions(self) -> None:
        """All begun texts of a step are written on at once, each by as many tokens as the shortest one has left."""
        dataset, limit, positions = self.trainer.train_dataset, self._limit(), position_count(self.trainer.model)
        if limit is None or positions is None or not isinstance(dataset, DistillationDataset):
            return
        longest = dataset.longest_prompts["student"]
        needed = longest + 2 * (limit - 1)
        if needed > positions:
            most = 1 + (positions - longest) // 2
            raise ValueError(
                f"correct: the longest prompt of the student has {longest} tokens, and texts that are corrected late "
                f"and early ({limit - 1} tokens stand, or are left) are written on together; that may take {needed} "
                f"positions, above the {positions} of the student. Lower max_new_tokens to at most {most}, or show "
                "fewer demonstrations."
            )

    def _corrected(self, batches: Sequence[dict[str, Any]], step: int, counts: np.ndarray) -> list[dict[str, Any]]:
        """Correct each text once; `counts` is added to: corrected texts, their places, all texts."""
        ends = self._ends()
        drafts = [self._drafts(batch, read_batch(self.trainer, batch), ends) for batch in batches]
        places = [draft.place for some in drafts for draft in some if draft.place is not None]
        counts += [len(places), sum(places), sum(draft.text.asked for some in drafts for draft in some)]
        written = self._write_on([draft.text for some in drafts for draft in some if draft.open], step)
        return [
            self._batch(batch, [self._finished(draft, written, ends) for draft in some])
            if any(draft.place is not None for draft in some)
            else batch
            for batch, some in zip(batches, drafts, strict=True)
        ]

    def _drafts(self, batch: Mapping[str, Any], figures: TokenFigures, ends: TextEnds) -> list[Draft]:
        return [
            self._draft(text, figures.select(figures.text == row), ends) for row, text in enumerate(read_texts(batch))
        ]

    def _draft(self, text: Text, figures: TokenFigures, ends: TextEnds) -> Draft:
        answer, place = figures.target.tolist(), worst_place(figures)
        if place is None:
            return Draft(text.answered(answer))
        begun = text.answered([*answer[:place], int(figures.teacher.top[place])])
        limit = self._limit()
        full = limit is not None and len(begun.answer) >= limit
        return Draft(begun, place, open=not full and not ends.ended(begun.answer[-ends.tail :]))

    def _write_on(self, texts: Sequence[Text], step: int) -> dict[tuple[int, ...], Completion]:
        """Let the student write behind prompts and begun answers; also where there are none, for the processes that
        have some. By what was read: equal ones have one end.
        """
        asked = list(dict.fromkeys((*text.student, *text.answer) for text in texts))
        rollout, left = self.trainer.writer.rollout, [(self._limit() or 0) - len(text.answer) for text in texts]
        with self.trainer._student() as model, rollout.at_step(step, self.trainer.args.seed):
            with _at_most(rollout, max(left, default=1)):
                completions = rollout.generate(model, [list(prompt) for prompt in asked])
        return dict(zip(asked, completions, strict=True))

    def _finished(self, draft: Draft, written: Mapping[tuple[int, ...], Completion], ends: TextEnds) -> Text:
        if not draft.open:
            return draft.text
        begun = draft.text.answer
        whole = [*begun, *written[(*draft.text.student, *begun)].ids][: self._limit()]
        # A stop string may have begun before the corrected token.
        last = (end for end in range(len(begun) + 1, len(whole)) if ends.ended(whole[max(0, end - ends.tail) : end]))
        return draft.text.answered(whole[: next(last, len(whole))])

    def _batch(self, like: Mapping[str, Any], texts: Sequence[Text]) -> dict[str, Any]:
        self._side = padding_side(like) or self._side
        return write_batch(texts, like, self.trainer.writer.pad_id, self._side, own_text=True)

    def _ends(self) -> TextEnds:
        tokenizer, settings = self.trainer.processing_class, getattr(self.trainer.writer.rollout, "settings", None)
        with self.trainer._student() as model:
            return TextEnds(tokenizer, getattr(settings, "stop", ()), eos_ids(model, tokenizer))

    def _limit(self) -> int | None:
        """The longest answer in tokens; None where the rollout doesn't say."""
        return getattr(getattr(self.trainer.writer.rollout, "settings", None), "max_new_tokens", None)


def worst_place(figures: TokenFigures) -> int | None:
    """Where an answer is furthest from the teacher.

    Args:
        figures: Of the answer's tokens, in order.

    Returns:
        The place with the largest KL(teacher || student) among those whose token isn't the teacher's likeliest, the
        first of several; None where there is none.
    """
    wrong = figures.target != figures.teacher.top
    return int(np.where(wrong, figures.forward_kl, -np.inf).argmax()) if wrong.any() else None


@contextmanager
def _at_most(rollout: Rollout, tokens: int) -> Iterator[None]:
    """Inside, completions have at most so many tokens, where the rollout has settings."""
    settings = getattr(rollout, "settings", None)
    if not isinstance(settings, GenerationSettings):
        yield
        return
    rollout.settings = replace(settings, max_new_tokens=tokens)
    try:
        yield
    finally:
        rollout.settings = settings
