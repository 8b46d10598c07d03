"""Texts that are written during training: who writes those of a step, and the step's batches with new answers.

The source is drawn once for a step and from seed and step alone, so that all processes and a resumed run draw the
same. Batches are rewritten before their tokens are counted. Knows prompts as token ids and batches as dictionaries of
tensors; it knows no loss and no trainer.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hfkd.rollout.base import Completion, Rollout
from hfkd.rollout.buffer import OffPolicyBuffer
from hfkd.rollout.texts import Side, Text, padding_side, read_texts, write_batch
from hfkd.rollout.watch import Watch

logger = logging.getLogger(__name__)

SOURCES = ("dataset", "student", "teacher")
"""Who may have written an answer."""

_WATCH = "watch."

ModelContext = Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Mixture:
    """How often the answers of a step come from the data set, the student or the teacher.

    Attributes:
        shares: By source, in the order of `SOURCES`; they sum to 1, and none is 0.
    """

    shares: Mapping[str, float]

    @classmethod
    def of(cls, answer: Mixture | str | Mapping[str, float]) -> Mixture:
        """Read `"student"`, `"dataset"`, `"teacher"`, or shares such as `{"student": 0.5, "dataset": 0.5}`.

        Shares are scaled to sum to 1: `{"student": 3, "dataset": 1}` is three quarters and one.

        Raises:
            ValueError: An unknown source, a share that is negative or no number, or no share above 0.
        """
        if isinstance(answer, Mixture):
            return answer
        given = {answer: 1.0} if isinstance(answer, str) else answer
        wanted = f"expected one of {', '.join(SOURCES)}, or shares of them such as {{student: 0.5, dataset: 0.5}}"
        if not isinstance(given, Mapping) or not given:
            raise ValueError(f"answer is {answer!r}; {wanted}.")
        if unknown := [name for name in given if name not in SOURCES]:
            raise ValueError(f"answer names {unknown[0]!r}; {wanted}.")
        for name, share in given.items():
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if not number or not math.isfinite(share) or share < 0:
                raise ValueError(f"The share of {name} in answer is {share!r}; expected a number of 0 or more.")
        total = sum(given.values())
        if total <= 0:
            raise ValueError(f"All shares of answer are 0 in {dict(given)}; give at least one source a share above 0.")
        return cls({name: given[name] / total for name in SOURCES if given.get(name, 0) > 0})

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that can be drawn."""
        return tuple(self.shares)

    @property
    def writes(self) -> bool:
        """Whether anything is written during training."""
        return self.sources != ("dataset",)

    def draw(self, seed: int, step: int) -> str:
        """The source of a step, a function of seed and step alone."""
        place = random.Random(f"{seed}/{step}/source").random()  # a string seed is the same on every machine
        for name, share in self.shares.items():
            place -= share
            if place < 0:
                return name
        return name  # the shares sum to a little less than 1


class Writer:
    """Gives the batches of a step new answers where the mixture says so.

    Samples depend on the seeds, the step and the prompt: neither on the batches of a step nor on the number of
    processes. Equal prompts of a step get one answer. With a buffer they depend on what a process wrote before.

    Args:
        mixture: Whose answers are learned, as `Mixture.of` reads it.
        rollout: Writes.
        student: Makes a context manager that yields the student with the weights that learn in force.
        teacher: The same for the teacher's weights; needed where the teacher has a share.
        seed: Decides the sources, the samples and what a buffer gives.
        buffer: Keeps the student's texts for later steps; None writes all of them anew.
        pad_id: Token id that pads rows.

    Raises:
        ValueError: Who is to write can't.
        TypeError: The rollout is none.
    """

    def __init__(
        self,
        mixture: Mixture | str | Mapping[str, float],
        rollout: Rollout | None,
        *,
        student: ModelContext,
        teacher: ModelContext | None = None,
        seed: int = 0,
        buffer: OffPolicyBuffer | None = None,
        pad_id: int = 0,
    ) -> None:
        self.mixture, self.rollout, self.seed, self.buffer = Mixture.of(mixture), rollout, seed, buffer
        self.pad_id = pad_id
        self._contexts = {"student": student, "teacher": teacher}
        self._watch = Watch()
        self._side: Side = "right"
        self._weights_dropped = False
        self._check()

    def rewrite(self, batches: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Let the source of a step write, for all its micro-batches in one go.

        Args:
            batches: What `Batch.to_inputs` returns, one for each micro-batch.
            step: The optimizer step, counted from 0.

        Returns:
            The batches as they are where the data set has its turn. Else new ones: behind both views' prompts the
            same new ids, which alone are learned, padded on the side and with the types and devices of the old ones;
            `own_text` says whether the student wrote them. A row whose answer has no token learns nothing.

        Raises:
            NothingToLearn: All texts of three written steps in a row are blank on this process.
            ValueError: A row has no prompt.
        """
        source = self.mixture.draw(self.seed, step)
        if source == "dataset":
            self._watch.step()
            return list(batches)
        began = time.perf_counter()
        rows = [read_texts(batch) for batch in batches]
        asked = [text for texts in rows for text in texts if text.asked]
        own, completions = source == "student", []
        old = own and self.buffer is not None and self.buffer.reuses(self.seed, step)
        if old:
            drawn = self.buffer.draw(len(asked), self.seed, step)
            written = drawn or asked  # what has no answer yet stays silent
        else:
            completions = self._write(asked, source, step)
            written = [text.answered(each.ids) for text, each in zip(asked, completions, strict=True)]
            if own and self.buffer is not None:
                self.buffer.add(written)
        new = self._batches(batches, rows, written, own)
        lengths = [len(text.answer) for text in written]
        seconds = time.perf_counter() - began
        self._watch.step(own_text=own, from_buffer=old, lengths=lengths, completions=completions, seconds=seconds)
        self._watch.judge(completions, getattr(self.rollout, "settings", None))
        return new

    def figures(self) -> dict[str, tuple[float, float]]:
        """Of the last step on this process, `(numerator, denominator)` by name.

        `rollout/own_text` and `rollout/from_buffer` (of steps), `rollout/length` (tokens an answer), `rollout/cut`
        (of answers, those that met the limit of tokens), `rollout/empty` (of answers, the blank ones) and
        `rollout/seconds` (a step).
        """
        return dict(self._watch.figures)

    def state_dict(self) -> dict[str, Tensor]:
        """What the buffer keeps on this process, and what the warnings count."""
        watched = {_WATCH + name: value for name, value in self._watch.state_dict().items()}
        return watched if self.buffer is None else {**self.buffer.state_dict(), **watched}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        if self.buffer is not None:
            self.buffer.load_state_dict(state)
        watched = {name.removeprefix(_WATCH): value for name, value in state.items() if name.startswith(_WATCH)}
        if watched:  # checkpoints of hfkd 0.1.0 have none
            self._watch.load_state_dict(watched)

    def _check(self) -> None:
        if not self.mixture.writes:
            return
        sources = [name for name in self.mixture.sources if name != "dataset"]
        if self.rollout is None:
            raise ValueError(f"answer lets the {' and the '.join(sources)} write, but there is no rollout to do it.")
        if not isinstance(self.rollout, Rollout):
            raise TypeError(
                f"rollout is a {type(self.rollout).__name__}; expected an object of a subclass of hfkd.Rollout, such "
                "as HFRollout(tokenizer)."
            )
        if "teacher" in sources and self._contexts["teacher"] is None:
            raise ValueError("answer lets the teacher write, but there is no teacher whose weights could.")
        if "teacher" in sources and not self.rollout.any_model:
            raise ValueError(
                f"{type(self.rollout).__name__} writes with the student's weights only, and answer lets the teacher "
                "write. Take HFRollout (backend: transformers), or let the teacher write before training."
            )
        if self.buffer is not None and "student" not in sources:
            raise ValueError("A buffer keeps what the student writes, and answer never lets it; set buffer_size to 0.")

    def _write(self, texts: Sequence[Text], source: str, step: int) -> list[Completion]:
        """One completion for each row; equal prompts are answered once, so that samples know no batches."""
        behind_teacher = source == "teacher"
        asked = [text.teacher if behind_teacher and text.teacher is not None else text.student for text in texts]
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, asked)))}
        with self._contexts[source]() as model, self.rollout.at_step(step, self.seed):
            completions = self.rollout.generate(model, [list(prompt) for prompt in places])
        if len(completions) != len(places):
            raise ValueError(
                f"{type(self.rollout).__name__} gave {len(completions)} completions for {len(places)} prompts; "
                "expected one for each, in their order."
            )
        return [completions[places[tuple(prompt)]] for prompt in asked]

    def _batches(
        self, batches: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[Text]], written: Sequence[Text], own: bool
    ) -> list[dict[str, Any]]:
        left, new = iter(written), []
        for batch, texts in zip(batches, rows, strict=True):
            self._drop_weights(batch)
            self._side = padding_side(batch) or self._side
            texts = [next(left) if text.asked else text for text in texts]
            new.append(write_batch(texts, batch, self.pad_id, self._side, own))
        return new

    def _drop_weights(self, batch: Mapping[str, Any]) -> None:
        if self._weights_dropped or batch.get("token_weights") is None:
            return
        self._weights_dropped = True
        logger.warning(
            "token_weights belong to the tokens of the data set: the tokens of texts that are written during training "
            "all count alike."
        )
