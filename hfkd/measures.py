"""The arithmetic of fidelity: how near one distribution, answer or score is to another. One place for it, so that a
report and a metric of the same name never differ.

What is given for single tokens are tensors, and the functions on top say one number for each; the functions below
them turn columns of such numbers into shares and means. Nothing here knows a model, a tokenizer or a file.

Shapes: n tokens, S entries of a support (the vocabulary, or listed ids and a tail), T texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hfkd.losses.kl import kl

BINS = 10
"""Bins of a reliability diagram, of equal width in confidence."""

POSITIONS = 32
"""The most entries of a table by position."""

RESAMPLES = 1000
"""Draws of a bootstrap."""

FEWEST = 10
"""Texts that an interval needs at least."""

# --- one number for each token


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities [n, S], in nats [n]; rounding can't make it negative."""
    return kl(first, second).clamp(min=0.0)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of log-probabilities [n, S], in nats [n]."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def brier_score(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Squared distance [n] between a distribution [n, S] and certainty of the right entry [n]: 0 to 2."""
    probs = log_probs.exp()
    right = probs.gather(-1, targets[:, None])[:, 0]
    return (probs * probs).sum(dim=-1) - 2 * right + 1


def mass_on(log_probs: Tensor, ids: Tensor) -> Tensor:
    """What a distribution [n, S] puts on some ids [n, k] together, [n], 0 to 1."""
    return log_probs.gather(-1, ids).exp().sum(dim=-1).clamp(max=1.0)


# --- from columns of numbers to figures


def agreement(agreed: ArrayLike, teacher_right: ArrayLike | None = None) -> dict[str, Any]:
    """How often two say the same, and how often where one of them is wrong.

    Args:
        agreed: [n] whether student and teacher say the same.
        teacher_right: [n] whether the teacher is right; None where that isn't known.

    Returns:
        `agreement` (share), and where it is known `teacher_wrong` (how often) and `agreement_when_teacher_wrong`
        (share of those; None where there are none).
    """
    agreed = np.asarray(agreed, dtype=bool)
    figures: dict[str, Any] = {"agreement": float(agreed.mean())}
    if teacher_right is not None:
        wrong = ~np.asarray(teacher_right, dtype=bool)
        figures["teacher_wrong"] = int(wrong.sum())
        figures["agreement_when_teacher_wrong"] = float(agreed[wrong].mean()) if wrong.any() else None
    return figures


def chance_agreement(student: ArrayLike, teacher: ArrayLike) -> float:
    """The agreement that is expected when the teacher's words are dealt out at random, a share.

    Args:
        student: [n] what the student says, numbers or texts.
        teacher: [n] what the teacher says.
    """
    ours, our_counts = np.unique(np.asarray(student), return_counts=True)
    theirs, their_counts = np.unique(np.asarray(teacher), return_counts=True)
    _, here, there = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    total = float(our_counts.sum()) * float(their_counts.sum())
    return float((our_counts[here].astype(float) * their_counts[there]).sum() / total)


def reliability(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> list[dict[str, Any]]:
    """How often a model is right where it is about so sure.

    Args:
        confidence: [n] the probability of what the model finds likeliest.
        right: [n] whether that was right.
        bins: Of equal width; the last one holds a confidence of 1, too.

    Returns:
        For each bin that isn't empty `low`, `high`, `tokens`, and the means `confidence` and `accuracy`.
    """
    confidence, right = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (confidence, right)]
    return [
        {
            "low": number / bins,
            "high": (number + 1) / bins,
            "tokens": int(counts[number]),
            "confidence": float(sums[0][number] / counts[number]),
            "accuracy": float(sums[1][number] / counts[number]),
        }
        for number in np.flatnonzero(counts).tolist()
    ]


def calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """Expected calibration error of `reliability`: the mean distance between confidence and accuracy, a share."""
    tokens = sum(each["tokens"] for each in bins)
    return sum(each["tokens"] * abs(each["confidence"] - each["accuracy"]) for each in bins) / tokens


def perplexity(log_probs: ArrayLike) -> float:
    """exp of the mean surprise at tokens of the given log-probabilities [n] (nats); infinite where a float can't hold
    it.
    """
    surprise = -float(np.mean(np.asarray(log_probs, dtype=float)))
    return math.inf if surprise > 709 else math.exp(surprise)


def bootstrap(
    parts: ArrayLike, wholes: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of a ratio of sums, by drawing the texts anew with replacement.

    Tokens of one text go together, so it is texts that are drawn: an interval over tokens would be too narrow.

    Args:
        parts: [T] the sum of each text.
        wholes: [T] what it is divided by: the number of its tokens, say.
        resamples: How often to draw.
        seed: Of the draws.
        level: The share of the draws that lies inside.

    Returns:
        The lower and the upper end. Of texts that are all alike both are the value itself; see `interval`.
    """
    parts, wholes = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    draw, texts, ratios = np.random.default_rng(seed), len(parts), []
    for _ in range(-(-resamples // 100)):
        counts = draw.multinomial(texts, np.full(texts, 1.0 / texts), size=100)
        ratios.append((counts @ parts) / np.maximum(counts @ wholes, np.finfo(float).tiny))
    edge = (1.0 - level) / 2
    low, high = np.quantile(np.concatenate(ratios)[:resamples], [edge, 1.0 - edge])
    return float(low), float(high)


def interval(parts: ArrayLike, wholes: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> list[float] | None:
    """The 95 % interval of `bootstrap`, or None where drawing the texts anew can't tell how far a figure may move: of
    fewer than `FEWEST` texts, and where all texts are alike, so that the interval would have no width.

    Args:
        parts: [T] the sum of each text.
        wholes: [T] what it is divided by.
        resamples: How often to draw.
        seed: Of the draws.
    """
    if len(np.asarray(parts)) < FEWEST:
        return None
    low, high = bootstrap(parts, wholes, resamples=resamples, seed=seed)
    return None if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12) else [low, high]


def position_ranges(longest: int, limit: int = POSITIONS) -> NDArray[np.int64]:
    """Where the entries of a table by position begin, and the end of the last one.

    Args:
        longest: Positions there are.
        limit: The most entries. Up to so many positions stand alone; of more the first half of the entries do, and the
            others are ranges that grow.
    """
    if longest <= limit:
        return np.arange(longest + 1)
    alone = limit // 2
    grown = np.geomspace(alone, longest, limit - alone + 1).round().astype(int)
    return np.unique(np.concatenate([np.arange(alone), grown]))


def by_position(position: ArrayLike, agreed: ArrayLike, forward_kl: ArrayLike) -> list[dict[str, Any]]:
    """Agreement and divergence by place in the answer.

    Args:
        position: [n] from 0.
        agreed: [n] whether both find the same token likeliest.
        forward_kl: [n] nats.

    Returns:
        Entries of `first` and `last` position, `tokens`, `agreement` (share) and `forward_kl` (nats), without those
        that no token is in.
    """
    position = np.asarray(position)
    edges = position_ranges(int(position.max()) + 1)
    place = np.searchsorted(edges, position, side="right") - 1
    counts = np.bincount(place, minlength=len(edges) - 1)
    sums = [np.bincount(place, weights=np.asarray(each, dtype=float)) for each in (agreed, forward_kl)]
    return [
        {
            "first": int(edges[number]),
            "last": int(edges[number + 1]) - 1,
            "tokens": int(counts[number]),
            "agreement": float(sums[0][number] / counts[number]),
            "forward_kl": float(sums[1][number] / counts[number]),
        }
        for number in np.flatnonzero(counts).tolist()
    ]


def worst_tokens(
    targets: ArrayLike,
    student: ArrayLike,
    teacher: ArrayLike,
    forward_kl: ArrayLike,
    *,
    count: int = 10,
    name: Callable[[int], str] = str,
) -> list[dict[str, Any]]:
    """The tokens of the text at which the student is furthest from the teacher, all their occurrences together.

    Args:
        targets: [n] the ids that the text has.
        student: [n] the ids that the student finds likeliest there.
        teacher: [n] the ids that the teacher finds likeliest there.
        forward_kl: [n] nats.
        count: How many tokens.
        name: From an id to a text.

    Returns:
        By falling `total` (nats): `token`, `tokens` (how often), `forward_kl` (mean, nats), and what `student` and
        `teacher` say there most often.
    """
    targets, student, teacher = (np.asarray(each) for each in (targets, student, teacher))
    ids, group, occurrences = np.unique(targets, return_inverse=True, return_counts=True)
    totals = np.bincount(group, weights=np.asarray(forward_kl, dtype=float))
    return [
        {
            "text": name(int(ids[number])),
            "tokens": int(occurrences[number]),
            "forward_kl": float(totals[number] / occurrences[number]),
            "total": float(totals[number]),
            "student": name(_most_frequent(student[group == number])),
            "teacher": name(_most_frequent(teacher[group == number])),
        }
        for number in np.argsort(-totals, kind="stable")[:count].tolist()
    ]


def forgetting(after: ArrayLike, before: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """What a task lost, item by item.

    Args:
        after: [n] each item's score afterwards: 1 or 0 for right or wrong, or any number.
        before: [n] the score of the same item before.
        resamples: Draws of the bootstrap over items.
        seed: Of the draws.

    Returns:
        The means `before` and `after`, `change`, its 95 % `change_interval` (None where `interval` gives none), and
        how many items fell (`lost`) and rose (`gained`), of `items`.
    """
    after, before = np.asarray(after, dtype=float), np.asarray(before, dtype=float)
    change = after - before
    return {
        "items": len(change),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "change": float(change.mean()),
        "change_interval": interval(change, np.ones_like(change), resamples=resamples, seed=seed),
        "lost": int((change < 0).sum()),
        "gained": int((change > 0).sum()),
    }


def exposure(log_perplexities: ArrayLike, inserted: ArrayLike) -> dict[str, Any]:
    """How far a canary stands out among the texts that could have been inserted in its place (Carlini et al., 2019).

    The rank is 1 + how many candidates the model finds likelier + half of those that it finds as likely, so that a
    model that tells none apart puts a canary in the middle: about 1 bit, a little less among few candidates.

    Args:
        log_perplexities: [R] how surprising each candidate is (nats); the canary is one of them.
        inserted: [R] which of them were inserted.

    Returns:
        `exposure` (bits): log2 of the candidates minus log2 of the rank, the mean where several were inserted;
        `largest` (bits) and `rank` of the one that stands out most; `candidates`, and `maximum` (bits), what a canary
        that is likelier than all others has.

    Raises:
        ValueError: A candidate has no finite log-perplexity; nothing could be ranked against it.
    """
    values, marks = np.asarray(log_perplexities, dtype=float), np.asarray(inserted, dtype=bool)
    if wrong := int((~np.isfinite(values)).sum()):
        raise ValueError(
            f"{wrong} of {len(values)} candidates have no finite log-perplexity, so there is no rank and no exposure: "
            "a model's outputs aren't numbers. Look at its weights, and at the precision it runs in."
        )
    ordered, canaries = np.sort(values), values[marks]
    likelier = np.searchsorted(ordered, canaries, side="left")
    alike = np.searchsorted(ordered, canaries, side="right") - likelier - 1
    ranks = 1 + likelier + alike / 2
    bits = math.log2(len(values)) - np.log2(ranks)
    return {
        "exposure": float(bits.mean()),
        "largest": float(bits.max()),
        "rank": float(ranks.min()),
        "candidates": len(values),
        "maximum": math.log2(len(values)),
    }


def _most_frequent(ids: NDArray[Any]) -> int:
    """The id that occurs most often, the smallest of several."""
    found, counts = np.unique(ids, return_counts=True)
    return int(found[counts.argmax()])
