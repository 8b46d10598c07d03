"""What is written during training, counted: figures for the log, and the two ways in which it goes wrong.

A model that never ends costs time and learns from torn texts; one that writes nothing has nothing to learn from.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hfkd.errors import NothingToLearn
from hfkd.rollout.base import Completion, GenerationSettings

logger = logging.getLogger(__name__)


class Watch:
    """Counts the texts of each step on this process.

    Attributes:
        figures: Of the last step, `(numerator, denominator)` by name; the denominator is 0 where nothing was counted.
    """

    CUT_STEPS = 10
    """Written steps over which the share of cut answers is looked at."""

    BLANK_STEPS = 3
    """Written steps in a row that may be blank, up to which training goes on."""

    def __init__(self) -> None:
        self.figures: dict[str, tuple[float, float]] = {}
        self._cut: deque[tuple[int, int]] = deque(maxlen=self.CUT_STEPS)
        self._warned = False
        self._blank = 0

    def state_dict(self) -> dict[str, Tensor]:
        """What the warnings count, as integers: cut answers and answers [n, 2], blank steps, whether it warned."""
        return {
            "cut": torch.tensor(list(self._cut), dtype=torch.int64).reshape(-1, 2),
            "blank": torch.tensor(self._blank),
            "warned": torch.tensor(int(self._warned)),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self._cut.clear()
        self._cut.extend((cut, answers) for cut, answers in state["cut"].tolist())
        self._blank, self._warned = int(state["blank"]), bool(state["warned"])

    def step(
        self,
        *,
        own_text: bool = False,
        from_buffer: bool = False,
        lengths: Sequence[int] = (),
        completions: Sequence[Completion] = (),
        seconds: float = 0.0,
    ) -> None:
        """Count a step.

        Args:
            own_text: Whether its texts are the student's.
            from_buffer: Whether they were written before.
            lengths: Tokens of each answer.
            completions: The answers that were generated now.
            seconds: What it took.
        """
        cut, empty = sum(not each.finished for each in completions), sum(not each.text.strip() for each in completions)
        self.figures = {
            "rollout/own_text": (float(own_text), 1.0),
            "rollout/from_buffer": (float(from_buffer), 1.0),
            "rollout/length": (float(sum(lengths)), float(len(lengths))),
            "rollout/cut": (float(cut), float(len(completions))),
            "rollout/empty": (float(empty), float(len(completions))),
            "rollout/seconds": (seconds, 1.0),
        }

    def judge(self, completions: Sequence[Completion], settings: GenerationSettings | None) -> None:
        """Warn of answers that don't end, and stop at answers that say nothing.

        Args:
            completions: The answers of a step that was generated.
            settings: For the words.

        Raises:
            NothingToLearn: All answers of the last steps were blank.
        """
        if not completions:
            return
        self._cut.append((sum(not each.finished for each in completions), len(completions)))
        self._warn_of_cut(settings)
        self._blank = 0 if any(each.text.strip() for each in completions) else self._blank + 1
        if self._blank < self.BLANK_STEPS:
            return
        stop = f" (stop={list(settings.stop)}, max_new_tokens={settings.max_new_tokens})" if settings else ""
        raise NothingToLearn(
            f"In {self._blank} steps in a row all texts that were written on this process are blank; the last began "
            f"with the ids {completions[-1].ids[:8]}. Look at the stop strings, of which one may stand at the very "
            f"beginning of an answer, at the end of the prompt, and at max_new_tokens{stop}."
        )

    def _warn_of_cut(self, settings: GenerationSettings | None) -> None:
        cut, answers = (sum(numbers) for numbers in zip(*self._cut, strict=True))
        if self._warned or len(self._cut) < self.CUT_STEPS or 2 * cut <= answers:
            return
        self._warned = True
        limit = f"max_new_tokens={settings.max_new_tokens}" if settings else "the limit of new tokens"
        logger.warning(
            "Of the %d answers written in the last %d steps %d (%.0f%%) didn't end and were cut at %s. Torn texts "
            "teach no end: raise it, or look at the prompt and the stop strings.",
            answers,
            self.CUT_STEPS,
            cut,
            100 * cut / answers,
            limit,
        )
