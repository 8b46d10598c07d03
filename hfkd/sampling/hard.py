"""Prompts on which student and teacher are far apart, drawn more often than others. Knows no column of the rows."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Trainer

from hfkd.data.views import DistillationDataset
from hfkd.reading import read_batch
from hfkd.sampling.course import cycle
from hfkd.sampling.measuring import MeasuringSampler, mean_by_group, whole_number

DIVERGENCES = ("reverse_kl", "forward_kl")
"""What prompts may be ranked by."""


class HardPromptSampler(MeasuringSampler):
    """Every example once an epoch, in random order, and between them the hard ones again.

    Every `interval` steps some examples are drawn evenly and ranked by the mean divergence over the tokens of their
    answers. The first of them are hard, the others aren't; each stays so until it is among those ranked again. So
    an example is held only against those that were read with the same weights: what was read long ago would look
    harder than it is.

    An epoch is as many draws as there are examples. The hard ones' second draws take the place of others, so that
    with hard ones not every example comes in every epoch.

    Args:
        interval: Optimizer steps between two rankings.
        examples: How many are ranked at once; all where there are fewer.
        fraction: The part of those ranked that is hard, above 0 and below 1; at least one is.
        times: How often a hard example is drawn for once that another one is, above 1.
        by: `reverse_kl`, KL(student || teacher), or `forward_kl`, KL(teacher || student), in nats a token.

    Attributes:
        hard: [examples] whether each is, once attached.

    Raises:
        ValueError: An argument is none of these.

    Paper:
        The idea, to learn where the teacher and the student disagree, is that of Nix, Burg and Sinz (HARD), 2023,
        https://arxiv.org/abs/2305.14890. There augmentations of images are learned that make them disagree; here
        prompts are chosen among those that are there, and none is changed.
    """

    def __init__(
        self,
        interval: int = 100,
        examples: int = 64,
        fraction: float = 0.25,
        times: float = 2.0,
        by: str = "reverse_kl",
    ) -> None:
        super().__init__(interval)
        self.examples = whole_number(examples, "examples", "prompts that are ranked at once")
        if not _is_number(fraction) or not 0 < fraction < 1:
            raise ValueError(f"fraction is {fraction!r}; expected the part that is hard, above 0 and below 1.")
        if not _is_number(times) or not 1 < times < math.inf:
            raise ValueError(
                f"times is {times!r}; expected how often a hard prompt is drawn for once that another is, above 1."
            )
        if by not in DIVERGENCES:
            raise ValueError(f"by is {by!r}; expected one of {', '.join(DIVERGENCES)}.")
        self.fraction, self.times, self.by = float(fraction), float(times), by

    def attach(self, dataset: DistillationDataset, *, seed: int, examples_per_step: int) -> None:
        """Begin with no hard example."""
        super().attach(dataset, seed=seed, examples_per_step=examples_per_step)
        self.hard = torch.zeros(len(dataset), dtype=torch.bool)

    def order(self, epoch: int) -> Iterator[int]:
        """Walk through all examples; in between, through those that are hard here."""
        draw, count = random.Random(f"{self.seed}/{epoch}/hard"), len(self)
        walk, again = cycle(range(count), f"{self.seed}/{epoch}"), iter(())
        counting, share = None, 0.0
        for place in range(count):
            self.drawn = place + 1
            if (decision := self.course.at(epoch, place)) is not counting:
                counting, again = decision, cycle(decision.tolist(), f"{self.seed}/{epoch}/{place}")
                more = (self.times - 1) * len(decision)
                share = more / (count + more)
            yield next(again) if draw.random() < share else next(walk)

    def measure(self, trainer: Trainer, step: int) -> tuple[Tensor | None, dict[str, float]]:
        """Rank some examples."""
        count = len(self)
        asked = sorted(random.Random(f"{self.seed}/{step}/ranked").sample(range(count), min(self.examples, count)))
        found = mean_by_group(trainer, asked, range(len(asked)), self._divergences)
        ranked = [place for place in np.argsort(-found, kind="stable").tolist() if not math.isnan(found[place])]
        if not ranked:
            return None, {}
        first = ranked[: math.ceil(self.fraction * len(ranked))]
        self.hard[[asked[place] for place in ranked]] = False
        self.hard[[asked[place] for place in first]] = True
        figures = {
            "hard_prompts/divergence": float(found[ranked].mean()),
            "hard_prompts/divergence_of_hard": float(found[first].mean()),
            "hard_prompts/share": float(self.hard.double().mean()),
        }
        return self.hard.nonzero()[:, 0], figures

    def _divergences(
        self, trainer: Trainer, inputs: Mapping[str, Any]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        figures = read_batch(trainer, inputs)
        return figures.text, figures.reverse_kl if self.by == "reverse_kl" else figures.forward_kl

    def settings(self) -> dict[str, float]:
        """What decides the draws besides what was measured."""
        own = {"examples": self.examples, "fraction": self.fraction, "times": self.times}
        return {**super().settings(), **own, "by": DIVERGENCES.index(self.by)}

    def state_dict(self) -> dict[str, Tensor]:
        """Which are hard, and what counts from where."""
        return {"hard": self.hard, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self.hard = state["hard"].clone()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
