"""Rejection sampling: a model answers each prompt several times, and the answers that a verifier accepts are learned.

Knows prompts, answers and a verifier; how a verifier comes to its verdict is known elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from hfkd.data.messages import completion_text
from hfkd.data.verify import VERIFIERS, as_verifier
from hfkd.errors import NothingToLearn
from hfkd.transforms.base import Row, RowTransform, Workshop
from hfkd.transforms.texts import STUDENT, WRITERS, check_writer, labelled, prompts_of, written

GOLD = ("always", "unsolved", "never")


@dataclass
class _Answered:
    """A row and the accepted answers to it, by how they are compared."""

    row: Row
    accepted: dict[str, Row] = field(default_factory=dict)


class RejectionSampling(RowTransform):
    """Puts verified samples in the place of the rows' answers, or beside them.

    Args:
        verifier: Says whether an answer is right: `exact`, `contains`, `reasoning_gym`, or `package.module:function`
            of a row and a text (see `hfkd.data.verify`). The row's gold answer stands in its `answer`.
        writer: `student`, or `teacher`, who reads its demonstrations and the row's privileged context.
        samples: Answers to each prompt.
        keep: The most different answers that are kept of a prompt, which is then asked no more; null keeps all.
        threshold: What the verifier must give an answer, above 0 and at most 1.
        gold: Whether the row's own answer (its completion, else its `answer`) is learned as well: `always`, where no
            sample was accepted (`unsolved`), or `never`.
        temperature: Of the samples; the other settings are those of data.generation.
        demonstrations: Whether a student reads the demonstrations while it writes.

    Raises:
        ValueError: A setting is outside its limits, or there is no such verifier.

    Paper:
        Yuan et al. (RFT), 2023, https://arxiv.org/abs/2308.01825: different right answers of a fine-tuned model beside
        the gold ones (`gold: always`). There two answers differ where their equations do; here, where their words do.
        RFT as the baseline of NFT, 2025, https://arxiv.org/abs/2505.18116, is one round with `gold: never`.
    """

    def __init__(
        self,
        verifier: str = "exact",
        writer: Literal["student", "teacher"] = STUDENT,
        samples: int = 4,
        keep: int | None = None,
        threshold: float = 1.0,
        gold: Literal["always", "unsolved", "never"] = "unsolved",
        temperature: float = 1.0,
        demonstrations: bool = False,
    ) -> None:
        for name, value, known in (("writer", writer, WRITERS), ("gold", gold, GOLD)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
        _at_least_one("samples", samples)
        if keep is not None:
            _at_least_one("keep", keep)
        if not _is_number(threshold) or not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold!r}; expected what an answer must reach, above 0 and at most 1.")
        if not _is_number(temperature) or not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature!r}; expected 0 (greedy) or more.")
        if temperature == 0 and samples > 1:
            raise ValueError(
                f"temperature is 0 and samples is {samples}: all samples of a prompt would be the same. Set a "
                "temperature above 0, or samples to 1."
            )
        self.verify = as_verifier(verifier)
        self.needs_answers = gold != "never" or verifier in VERIFIERS
        self.writer, self.samples, self.keep = writer, samples, keep
        self.threshold, self.gold, self.temperature = float(threshold), gold, float(temperature)
        self.demonstrations = demonstrations
        self._told: dict[str, Any] = {}

    def apply(self, rows: Sequence[Row], workshop: Workshop) -> list[Row]:
        """Sample, verify, keep.

        Raises:
            NothingToLearn: No sample was accepted, and the gold answers are not to be learned.
            VerifierError: The verifier fails, or gives no number from 0 to 1; names the row.
            ValueError: There is no model that could write, or a row has no answer and one is needed.
        """
        check_writer(workshop, self.writer, "rejection")
        rows = labelled(rows, workshop, "rejection") if self.needs_answers else rows
        asked = [_Answered(dict(row)) for row in rows]
        counts: Counter[str] = Counter()
        for draw in range(self.samples):
            wanting = [one for one in asked if self.keep is None or len(one.accepted) < self.keep]
            prompts = prompts_of(workshop, self.writer, [one.row for one in wanting], self.demonstrations)
            settings = {"temperature": self.temperature}
            texts = written(workshop, self.writer, prompts, f"rejection_{self.writer}_{draw + 1}", draw, **settings)
            for one, text in zip(wanting, texts, strict=True):
                counts.update(self._judge(one, text, workshop))
        made = [row for one in asked for row in self._rows(one)]
        solved = sum(bool(one.accepted) for one in asked)
        kept = sum(len(one.accepted) for one in asked)
        self._told = {"prompts": len(asked), "solved": solved, "kept": kept, **counts}
        workshop.say(
            f"rejection: of the {self.writer}'s {counts['samples']} answers {counts['accepted']} are right, {kept} of "
            f"them different; {solved} of {len(asked)} prompts are solved."
        )
        if not made:
            raise NothingToLearn(
                f"rejection: none of the {self.writer}'s {counts['samples']} answers was accepted "
                f"({counts['empty']} are empty), and gold is {self.gold}. Use more samples, a lower threshold, "
                "demonstrations, or gold: unsolved."
            )
        return made

    def describe(self) -> dict[str, Any]:
        """Numbers of prompts, samples, empty and accepted ones, different ones that were kept, prompts solved."""
        return dict(self._told)

    def _judge(self, one: _Answered, text: str, workshop: Workshop) -> dict[str, int]:
        answered = workshop.builder.with_answer(one.row, text)
        said = completion_text(answered)
        if not said:
            return {"samples": 1, "empty": 1}
        if self.verify(answered, said) < self.threshold:
            return {"samples": 1}
        one.accepted.setdefault(" ".join(said.split()), answered)
        return {"samples": 1, "accepted": 1}

    def _rows(self, one: _Answered) -> list[Row]:
        gold = self.gold == "always" or (self.gold == "unsolved" and not one.accepted)
        if not gold:
            return list(one.accepted.values())
        said = " ".join(completion_text(one.row).split())
        return [one.row, *(row for key, row in one.accepted.items() if key != said)]


def _at_least_one(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
