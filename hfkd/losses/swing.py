"""Swing distillation: another divergence, with less of the teacher's word to see the more private a token is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hfkd.losses.adaptive import AdaptiveKL, BalancedKL
from hfkd.losses.alpha_beta import AlphaBeta
from hfkd.losses.base import Divergence, Temperature
from hfkd.losses.clipped import ClippedKL
from hfkd.losses.jensen_shannon import JensenShannon
from hfkd.losses.kl import ForwardKL, ReverseKL
from hfkd.losses.label_smoothing import AdaptiveLabelSmoothing
from hfkd.losses.normalized_kd import NormalizedKD
from hfkd.losses.sinkhorn import Sinkhorn
from hfkd.losses.skew import SkewForwardKL, SkewReverseKL
from hfkd.losses.span import SpanCorrelation
from hfkd.losses.total_variation import TotalVariation
from hfkd.rows import TopKRows
from hfkd.schedules import all_values
from hfkd.support import TokenChunk, wide

Noise = Literal["none", "uniform", "dirichlet", "laplace"]
"""What is mixed into the target of a private token: nothing, the same for all ids, a random share for each id, or
random numbers of both signs that are added.
"""

MEASURES: dict[str, type[Divergence]] = {
    cls.key: cls
    for cls in (
        *(ForwardKL, ReverseKL, JensenShannon, SkewForwardKL, SkewReverseKL, TotalVariation, Sinkhorn),
        *(AdaptiveKL, BalancedKL, AlphaBeta, NormalizedKD, AdaptiveLabelSmoothing, ClippedKL, SpanCorrelation),
    )
}
"""What can be measured: divergences of probabilities. Those of logits and of ranks see through a temperature."""

_LEAST = 1e-3
"""What ids have together where added noise would leave them nothing, so that a reverse KL stays finite."""

_PAIRS = 24
"""Pairs of ids whose order names a teacher's row, so that it has the same noise at each visit."""


class Swing(Divergence):
    """Punishes what another divergence punishes, between the student and a teacher whose word on private tokens is
    flattened and blurred.

    Formula:
        D(p~ || q) with D the `measure`, p~ = (1 - n s) softmax(t / h) + n s u, h = T + (max_temperature - T) s, s how
        private the token is (0 to 1), T the temperature, n the `noise_share`, u the noise, t the teacher's logits.
        With `noise: laplace` p~ is softmax(t / h) + n s u, cut off below and made to sum to 1.
    Args:
        measure: The divergence, by its key or as a mapping with `kind` and its arguments; not its temperature.
        max_temperature: What divides the teacher's logits at a wholly private token, at least the temperature.
        noise: `none`, `uniform`, `dirichlet` (random shares that sum to 1) or `laplace` (random numbers of both signs,
            whose sizes sum to about 1).
        noise_share: How much of the noise there is at a wholly private token, above 0 and at most 1.
        student_too: Divide the student's logits by h too. Then the student still learns the teacher's order of the
            ids at a private token, in small steps: it hides less.
        seed: Of the noise.
        temperature: Divides both models' logits where nothing is private, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2, whatever the measure does by default; at a wholly
            private token by 1, whatever divided its logits, or private tokens would count most.
    Reads:
        Both distributions, how private each token is, and what the measure reads. A sparse teacher's tail counts as so
        many equally likely ids.
    Cost:
        O(V) per token, and as much again for a private one, more with noise.
    Undefined:
        Nowhere where the measure isn't. Where nothing is private it is the measure, to the last bit.
    Paper:
        Li et al. (Swing Distillation), 2022, https://arxiv.org/abs/2212.08349, known to us by its abstract and
        introduction; there is no official code. The formula, the noise and what names a row are ours. It is no proof
        against leaking: nothing here is differentially private.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> open_word = TokenChunk(torch.tensor([0]), student, teacher, private=torch.tensor([0.0]))
        >>> hidden_word = TokenChunk(torch.tensor([0]), student, teacher, private=torch.tensor([1.0]))
        >>> round(Swing()(open_word).item(), 4), round(Swing(max_temperature=4.0)(hidden_word).item(), 4)
        (0.3681, 0.0363)
    """

    def __init__(
        self,
        measure: str | Mapping[str, Any] = "forward_kl",
        max_temperature: float = 10.0,
        noise: Noise = "none",
        noise_share: float = 0.1,
        student_too: bool = False,
        seed: int = 0,
        temperature: Temperature = 1.0,
        scale_by_temperature_squared: bool = True,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        self.measure = measure if isinstance(measure, str) else dict(measure)
        self.measured = _make_measure(measure, temperature, scale_by_temperature_squared)
        for name in ("needs", "may_stand_alone", "why_not_alone", "fits_text", "groups"):
            setattr(self, name, getattr(self.measured, name))  # it is in all this what it measures
        hottest = max(all_values(self._temperature))
        if not hottest <= max_temperature < math.inf:
            raise ValueError(
                f"{self.key}: max_temperature is {max_temperature}; expected a number, at least the temperature "
                f"({hottest})."
            )
        if noise not in get_args(Noise):
            raise ValueError(f"{self.key}: noise is {noise!r}; expected one of {', '.join(get_args(Noise))}.")
        if not 0 < noise_share <= 1:
            raise ValueError(
                f"{self.key}: noise_share is {noise_share}; expected a number above 0 and at most 1 (for none leave "
                "noise at 'none')."
            )
        if max_temperature == hottest and noise == "none":
            raise ValueError(
                f"{self.key}: max_temperature is the temperature and there is no noise, so nothing would be hidden. "
                "Raise one of them, or use the measure itself."
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(f"{self.key}: seed is {seed!r}; expected a whole number from 0 to 2147483647.")
        self.max_temperature, self.noise, self.noise_share = float(max_temperature), noise, float(noise_share)
        self.student_too, self.seed = bool(student_too), seed

    def prepare(self, width: int, vocab_size: int) -> None:
        """Let the measure make its parameters."""
        self.measured.prepare(width, vocab_size)

    def set_step(self, step: int, total: int | None = None) -> None:
        """Put the temperature of this step in force, here and in the measure."""
        super().set_step(step, total)
        self.measured.set_step(step, total)

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the measure where nothing is private."""
        return self.measured.between(student, teacher)

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the measure between the student and what the teacher shows of itself."""
        if chunk.private is None or not bool((chunk.private > 0).any()):
            return self.measured(chunk)
        values = self.compare(chunk)
        if self.scale_by_temperature_squared and self.temperature != 1.0:
            values = values * (self.temperature**2 * (1 - chunk.private) + chunk.private)
        return values

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the measure before its scale."""
        if chunk.private is None:
            return self.measured.compare(chunk)
        shown = self._shown(chunk)
        values = self.measured.compare(shown)
        chunk.measures |= shown.measures
        return values

    def _shown(self, chunk: TokenChunk) -> TokenChunk:
        """The same tokens with less of the teacher in them."""
        heat = 1 + (self.max_temperature / self.temperature - 1) * chunk.private
        with torch.no_grad():
            teacher = self._listed(chunk, heat) if chunk.sparse else self._whole(chunk, heat)
        # Known up to a constant in each row, which no distribution sees.
        student = chunk.student_log_probs() if chunk.sparse else chunk.logits()[0]
        if self.student_too:
            student = student / heat[:, None]
        beside = {"tail": chunk.tail, "hidden": chunk.hidden, "group": chunk.group}
        return TokenChunk(chunk.targets, student, teacher, **beside)

    def _whole(self, chunk: TokenChunk, heat: Tensor) -> Tensor:
        """[n, V] the logits of a dense teacher; rows without anything private are its own."""
        logits = chunk.logits()[1].clone()
        rows = chunk.private.nonzero()[:, 0]
        known = torch.log_softmax(logits[rows] / self.temperature, dim=-1)
        ids = torch.arange(logits.shape[-1], device=logits.device)[None]
        row_names = _names_by_order(logits[rows], self.seed)
        shown = self._blurred(known, heat[rows], chunk.private[rows], row_names, ids, 0)
        logits[rows] = self.temperature * shown
        return logits

    def _listed(self, chunk: TokenChunk, heat: Tensor) -> TopKRows:
        """A sparse teacher's rows, with a tail where there was one."""
        ids, known = chunk.top_ids(chunk.listed), chunk.top_log_probs(chunk.listed, self.temperature)[1]
        kept = ids.shape[-1]
        beyond = chunk.vocab_size - kept if known.shape[-1] > kept else 0
        row_names = _mixed(ids ^ self.seed).sum(dim=-1)  # in whatever order they are listed
        shown = self._blurred(known, heat, chunk.private, row_names, ids, beyond)
        rows = torch.where(chunk.private[:, None] > 0, shown, known)
        tail = rows[:, kept] if beyond else None
        return TopKRows(ids, rows[:, :kept], chunk.vocab_size, self.temperature, tail)

    def _blurred(
        self, known: Tensor, heat: Tensor, private: Tensor, row_names: Tensor, ids: Tensor, beyond: int
    ) -> Tensor:
        """Flatten and blur distributions.

        Args:
            known: [m, S] log-probabilities (nats); the last entry stands for `beyond` ids where there are any.
            heat: [m] what divides them.
            private: [m] how private each row is.
            row_names: [m] a number for each row, for its noise.
            ids: [m or 1, S or S - 1] the ids of the entries.
            beyond: How many ids the tail stands for, 0 for no tail.

        Returns:
            [m, S] log-probabilities.
        """
        width = torch.ones(known.shape[-1], dtype=known.dtype, device=known.device)
        if beyond:
            width[-1] = beyond
        flat = torch.log_softmax(width.log() + (known - width.log()) / heat[:, None], dim=-1)
        if self.noise == "none":
            return flat
        share = (self.noise_share * private)[:, None].to(known.dtype)
        noise = self._noise(row_names, ids, width, beyond).to(known.dtype)
        even = width / width.sum()
        if self.noise == "laplace":
            mixture = (flat.exp() + share * noise).clamp(min=_LEAST * even)
        else:
            mixture = (1 - share) * flat.exp() + share * noise
        mixture = mixture / mixture.sum(dim=-1, keepdim=True)
        return mixture.clamp(min=torch.finfo(known.dtype).tiny).log()

    def _noise(self, row_names: Tensor, ids: Tensor, width: Tensor, beyond: int) -> Tensor:
        """[m, S] shares that sum to 1, or with `laplace` numbers whose sizes sum to about 1."""
        if self.noise == "uniform":
            return (width / width.sum()).expand(len(row_names), -1)
        drawn = _drawn(row_names, ids, self.seed)
        if self.noise == "laplace":
            centred = drawn - 0.5
            noise = -centred.sign() * (1 - 2 * centred.abs()).log()
            last = beyond / 2  # what is left of so many numbers where negative ones count as 0
        else:
            noise, last = -drawn.log(), float(beyond)
        if beyond:
            noise = torch.cat([noise, noise.new_full((len(noise), 1), last)], dim=-1)
        return noise / (width.sum() if self.noise == "laplace" else noise.sum(dim=-1, keepdim=True))

    def settings(self) -> dict[str, Any]:
        """The measure, how the teacher is hidden, and what every divergence has."""
        return {
            "measure": self.measure,
            "max_temperature": self.max_temperature,
            "noise": self.noise,
            "noise_share": self.noise_share,
            "student_too": self.student_too,
            "seed": self.seed,
            **super().settings(),
        }


def _make_measure(measure: str | Mapping[str, Any], temperature: Temperature = 1.0, scale: bool = True) -> Divergence:
    options = {"kind": measure} if isinstance(measure, str) else dict(measure)
    kind = options.pop("kind", None)
    if kind not in MEASURES:
        raise ValueError(
            f"swing: measure is {kind!r}; expected a divergence of probabilities, one of {', '.join(MEASURES)}. "
            "Losses on logits and on ranks see through a temperature, so there is nothing that it could hide."
        )
    if clash := sorted({"temperature", "scale_by_temperature_squared"} & options.keys()):
        raise ValueError(f"swing: the measure has {clash[0]}; give it to swing itself, which both are read at.")
    try:
        return MEASURES[kind](**options, temperature=temperature, scale_by_temperature_squared=scale)
    except (TypeError, ValueError) as error:
        raise ValueError(f"swing: the measure {kind!r}: {error}") from error


def _names_by_order(logits: Tensor, seed: int) -> Tensor:
    """[m] a number for each row of logits [m, V]: which of two ids is likelier, for some pairs of ids. It is the same
    at each visit of a teacher that stays as it is, and rounding hardly changes it. Were it the text's token or the
    likeliest one, whoever knows the seed could read that off the noise.
    """
    numbers = _mixed(torch.arange(2 * _PAIRS, device=logits.device) + (seed << 8)) % logits.shape[-1]
    first, second = numbers.view(2, _PAIRS)
    powers = 2 ** torch.arange(_PAIRS, device=logits.device)
    return ((wide(logits[:, first]) > wide(logits[:, second])).long() * powers).sum(dim=-1)


def _drawn(row_names: Tensor, ids: Tensor, seed: int) -> Tensor:
    """[m, S] random numbers strictly between 0 and 1, each a function of its row's number, its id and the seed alone:
    the same in any order, chunk, process and on any device.
    """
    mixed = _mixed(_mixed(row_names[:, None] ^ _mixed(torch.full_like(ids[:1, :1], seed + 1))) ^ ids)
    return (_shifted(mixed, 40).float() + 0.5) / 2**23


def _mixed(numbers: Tensor) -> Tensor:
    """Scatter int64 numbers: the mixing step of the generator SplitMix64 (Steele, Lea and Flood, 2014)."""
    numbers = numbers + _signed(0x9E3779B97F4A7C15)
    numbers = (numbers ^ _shifted(numbers, 30)) * _signed(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ _shifted(numbers, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(numbers ^ _shifted(numbers, 31), 1)


def _shifted(numbers: Tensor, places: int) -> Tensor:
    """Shift int64 numbers to the right as if they had no sign."""
    return (numbers >> places) & ((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    return number - 2**64
