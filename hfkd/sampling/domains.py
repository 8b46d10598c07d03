"""Examples drawn by domain: more of the domains in which the student is furthest behind its teacher.

Knows domains as a column of the rows, and perplexities; it knows no loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Trainer

from hfkd.data.messages import prompt_key
from hfkd.data.views import DistillationDataset
from hfkd.reading import read_batch
from hfkd.sampling.course import cycle
from hfkd.sampling.measuring import MeasuringSampler, mean_by_group, student_log_probs, whole_number
from hfkd.teachers import Teacher


class DomainSampler(MeasuringSampler):
    """Draws the domain of each example by shares that follow the gap between student and teacher.

    Of each domain some prompts are set aside: they are never drawn, in another domain neither, and the perplexities of
    both models on their answers are measured after the first step and then every `interval` steps. With r_i the share
    of domain i of N and s_i / t_i the perplexity of the student over that of the teacher,

        r = softmax(s / t) after the first step,
        r_i <- (1 - smoothing) r_i exp(s_i / t_i) / sum_j r_j exp(s_j / t_j) + smoothing / N  from then on.

    Until the first interval is over all domains are drawn alike, as in the paper. Within an epoch no row of a domain
    comes again before all of it came; a domain that runs out begins anew in another order. An epoch is as many draws
    as there are rows that can be drawn.

    Args:
        column: Of the rows, with the name of each one's domain.
        interval: Optimizer steps between two measurements. 1000 in the paper, of 30,000.
        smoothing: The part of the shares that is spread evenly over the domains, from 0 to below 1, so that none falls
            below smoothing / N; 1 - alpha in the paper. At 0 the shares never forget, and one domain takes all.
        examples: Prompts that are set aside in each domain. 500 in the paper.

    Attributes:
        domains: The names, sorted, once attached.
        held_out: By domain, the examples that are measured and never drawn.
        shares: By domain, as last measured; what is drawn lies in `course`.

    Raises:
        ValueError: A number is out of range; later, that the column is missing, a row lacks it, it has one value
            only, or a domain has no row left beside those set aside.

    Paper:
        Liu et al. (DDK), 2024, https://arxiv.org/abs/2407.16154. There the first shares are measured before the first
        step, and the data of an interval are drawn at its beginning; here a measurement counts from the next step of
        which no example is drawn yet.
    """

    def __init__(
        self, column: str = "domain", interval: int = 100, smoothing: float = 0.5, examples: int = 32
    ) -> None:
        super().__init__(interval)
        number = isinstance(smoothing, int | float) and not isinstance(smoothing, bool)
        if not number or not 0 <= smoothing < 1:
            raise ValueError(
                f"smoothing is {smoothing!r}; expected the part of the shares that is spread evenly, from 0 to below "
                "1 (at 1 all domains are always drawn alike)."
            )
        self.column, self.smoothing = column, float(smoothing)
        self.examples = whole_number(examples, "examples", "prompts set aside in each domain")
        self.domains: list[str] = []
        self.held_out: list[list[int]] = []
        self._members: list[list[int]] = []

    def attach(self, dataset: DistillationDataset, *, seed: int, examples_per_step: int) -> None:
        """Sort the examples by domain, and set aside what is measured."""
        super().attach(dataset, seed=seed, examples_per_step=examples_per_step)
        by_domain = _by_domain(dataset, self.column)
        self.domains = sorted(by_domain)
        prompts = {name: _by_prompt(dataset, by_domain[name]) for name in self.domains}
        chosen = {name: self._set_aside(name, list(prompts[name])) for name in self.domains}
        hidden = set().union(*chosen.values())  # whatever the domain in which it is asked again
        self.held_out = [
            [found[0] for prompt, found in prompts[name].items() if prompt in chosen[name]] for name in self.domains
        ]
        self._members = [_drawn(name, prompts[name], hidden) for name in self.domains]
        self.shares = torch.full((len(self.domains),), 1 / len(self.domains), dtype=torch.float64)
        self._teacher = torch.full_like(self.shares, math.nan)
        self._begun = False

    def _set_aside(self, name: str, prompts: Sequence[str]) -> set[str]:
        """The prompts of a domain that are measured."""
        if len(prompts) <= self.examples:
            raise ValueError(
                f"The domain {name!r} has {len(prompts)} different prompts, and examples={self.examples} of them are "
                "set aside to measure on, so that none is left to learn. Lower `examples`, bring more rows, or take "
                "the domain out."
            )
        return set(random.Random(f"{self.seed}/{name}/held out").sample(prompts, self.examples))

    def __len__(self) -> int:
        return sum(map(len, self._members))

    def order(self, epoch: int) -> Iterator[int]:
        """Draw a domain by the shares that count here, then the next of its rows."""
        draw = random.Random(f"{self.seed}/{epoch}/domains")
        walks = [
            cycle(members, f"{self.seed}/{epoch}/{name}")
            for name, members in zip(self.domains, self._members, strict=True)
        ]
        counting, shares = None, [1.0] * len(walks)
        for place in range(len(self)):
            self.drawn = place + 1
            if (decision := self.course.at(epoch, place)) is not counting:
                counting, shares = decision, decision.tolist()
            yield next(draw.choices(walks, shares)[0])

    def is_due(self, step: int) -> bool:
        """After the first step, too: what was drawn until then was drawn alike."""
        return not self._begun or super().is_due(step)

    def measure(self, trainer: Trainer, step: int) -> tuple[Tensor | None, dict[str, float]]:
        """New shares out of both models' perplexities; the first ones aren't drawn by yet.

        Raises:
            ValueError: A perplexity isn't known or not finite.
        """
        student = self._perplexities(trainer, "student")
        if bool(self._teacher.isnan().any()) or not stays(trainer.teacher):
            self._teacher = torch.from_numpy(self._perplexities(trainer, "teacher"))
        first, self._begun = not self._begun, True
        ratios = (student / self._teacher.numpy()).tolist()
        self.shares = torch.tensor(
            next_shares(self.shares.tolist(), ratios, 0.0 if first else self.smoothing), dtype=torch.float64
        )
        return None if first else self.shares, self._figures(student, first)

    def _perplexities(self, trainer: Trainer, side: str) -> NDArray[np.float64]:
        """[domains] exp of the mean negative log-probability of the answers' tokens."""
        examples = [index for some in self.held_out for index in some]
        groups = [number for number, some in enumerate(self.held_out) for _ in some]
        reading = student_log_probs if side == "student" else _teacher_log_probs
        found = np.exp(-mean_by_group(trainer, examples, groups, reading))
        for name, value in zip(self.domains, found, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"The perplexity of the {side} in the domain {name!r} is {value}; expected a finite number. A "
                    "cache of the likeliest ids doesn't know what the teacher gives every token: take the teacher "
                    "itself, or a cache with the codec hidden."
                )
        return found

    def _figures(self, student: NDArray[np.float64], first: bool) -> dict[str, float]:
        drawn = [1 / len(self.domains)] * len(self.domains) if first else self.shares.tolist()
        columns = {"share": drawn, "student_perplexity": student, "teacher_perplexity": self._teacher.tolist()}
        return {
            f"domains/{name}/{what}": float(values[number])
            for number, name in enumerate(self.domains)
            for what, values in columns.items()
        }

    def settings(self) -> dict[str, float]:
        """What decides the draws besides what was measured."""
        domains = len(self.domains)
        return {**super().settings(), "smoothing": self.smoothing, "examples": self.examples, "domains": domains}

    def state_dict(self) -> dict[str, Tensor]:
        """The shares, what the teacher said, and what counts from where."""
        state = {"shares": self.shares, "teacher": self._teacher, "begun": torch.tensor(self._begun)}
        return {**state, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self.shares, self._teacher, self._begun = state["shares"], state["teacher"], bool(state["begun"])


def next_shares(shares: Sequence[float], ratios: Sequence[float], smoothing: float) -> list[float]:
    """Move the domains' shares by what the student lacks.

    Args:
        shares: Of each domain so far; they sum to 1.
        ratios: The student's perplexity over the teacher's, of each domain.
        smoothing: What is spread evenly, from 0 to 1.

    Returns:
        As many shares, each at least smoothing over the number of domains; they sum to 1.

    Example:
        >>> first = next_shares([1 / 3] * 3, [12 / 8, 6 / 5, 20 / 10], smoothing=0.0)
        >>> [round(share, 6) for share in first]
        [0.295025, 0.21856, 0.486415]
        >>> [round(share, 6) for share in next_shares(first, [11 / 8, 5.8 / 5, 16 / 10], smoothing=0.5)]
        [0.303195, 0.248243, 0.448562]
    """
    tiny = np.finfo(np.float64).tiny
    heights = [math.log(max(share, tiny)) + ratio for share, ratio in zip(shares, ratios, strict=True)]
    top = max(heights)  # a weak student's ratio is beyond what exp can take
    masses = [math.exp(height - top) for height in heights]
    return [(1 - smoothing) * mass / sum(masses) + smoothing / len(masses) for mass in masses]


def stays(teacher: Teacher) -> bool:
    """Whether a teacher is known to say of a text what it said before: it hears of no step, or is frozen."""
    silent = type(teacher).after_step is Teacher.after_step and type(teacher).after_epoch is Teacher.after_epoch
    return silent or getattr(teacher, "frozen", False)


def _teacher_log_probs(trainer: Trainer, inputs: Mapping) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    figures = read_batch(trainer, inputs)
    return figures.text, figures.teacher.log_prob


def _by_prompt(dataset: DistillationDataset, members: Sequence[int]) -> dict[str, list[int]]:
    """Examples by what they ask."""
    prompts: dict[str, list[int]] = {}
    for index in members:
        prompts.setdefault(prompt_key(dataset.row(index)), []).append(index)
    return prompts


def _drawn(name: str, prompts: Mapping[str, Sequence[int]], hidden: Collection[str]) -> list[int]:
    """The examples of a domain that may be drawn.

    Raises:
        ValueError: Each of its prompts is set aside, in this domain or in another.
    """
    drawn = [index for prompt, found in prompts.items() if prompt not in hidden for index in found]
    if not drawn:
        raise ValueError(
            f"The domain {name!r} asks what other domains ask, too, and all of its {len(prompts)} prompts are set "
            "aside in one of them, so that none is left to learn. Lower `examples`, bring more rows, or take the "
            "domain out."
        )
    return drawn


def _by_domain(dataset: DistillationDataset, column: str) -> dict[str, list[int]]:
    """The examples of each domain.

    Raises:
        ValueError: A row has none, or all have the same.
    """
    found: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        row = dataset.row(index)
        name = row.get(column)
        if name is None or not str(name).strip():
            raise ValueError(
                f"Row {dataset.kept[index]} has no {column!r}, by which examples are to be drawn (its columns: "
                f"{', '.join(name for name, value in row.items() if value is not None)}). Name the column that holds "
                "it (data.train.columns: {domain: <column>}), or leave the sampler out."
            )
        found.setdefault(str(name), []).append(index)
    if len(found) < 2:
        raise ValueError(
            f"The column {column!r} has one value only, {next(iter(found))!r}: there is nothing to choose between. "
            "Bring rows of several domains, or leave the sampler out."
        )
    return found
