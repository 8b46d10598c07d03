"""Did the student become its teacher? Both read the same held-out texts, and are compared token by token.

The texts go through the trainer's own evaluation loop, so that whatever a student may be wrapped in or spread over,
each process runs as many forwards as the others. The figures are of temperature 1 and count every supervised token
alike. What they are computed with is `hfkd.measures`; whether the answers are right is `hfkd.eval.k_shot`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from hfkd import measures
from hfkd.eval.fidelity.walk import VOCABULARY, Walk, check_teacher
from hfkd.token_figures import SideFigures, TokenFigures
from hfkd.trainer import DistillationTrainer

_WORDS = {"agreement": "agreement", "forward_kl": "KL(teacher || student)", "reverse_kl": "KL(student || teacher)"}


@dataclass
class FidelityReport:
    """How near a student is to its teacher on some texts. Shares are fractions; means are over tokens.

    Attributes:
        texts: How many were read.
        tokens: Supervised tokens in them.
        agreement: Share of tokens at which both find the same token likeliest.
        agreement_interval: 95 % bootstrap over texts, as the other intervals; None of fewer than ten texts, and where
            all texts are alike.
        agreement_when_teacher_wrong: The same share where the teacher's likeliest token isn't the text's; None where
            that never is.
        teacher_wrong: How many tokens those are.
        forward_kl: KL(teacher || student), nats a token.
        forward_kl_interval: Of it.
        reverse_kl: KL(student || teacher), nats a token.
        reverse_kl_interval: Of it.
        captured_mass: `k`, and the mean mass that `student` and `teacher` put on the teacher's k likeliest tokens.
        entropy: Means (nats) of `student` and `teacher`, and `gap`, the student's minus the teacher's.
        student: `accuracy` (share of tokens at which the likeliest is the text's), `perplexity` of the text,
            `expected_calibration_error`, `brier` (0 to 2) and the bins of `reliability`.
        teacher: The same; None where a figure can't be known.
        by_position: Agreement and forward KL by place in the answer.
        worst_tokens: The tokens of the text at which the two are furthest apart.
        support: What divergences and entropies were taken on: `vocabulary`, or the ids that a cache keeps and a tail.
        notes: What has to be read with the figures.
    """

    texts: int
    tokens: int
    agreement: float
    agreement_interval: list[float] | None
    agreement_when_teacher_wrong: float | None
    teacher_wrong: int
    forward_kl: float
    forward_kl_interval: list[float] | None
    reverse_kl: float
    reverse_kl_interval: list[float] | None
    captured_mass: dict[str, float]
    entropy: dict[str, float]
    student: dict[str, Any]
    teacher: dict[str, Any]
    by_position: list[dict[str, Any]]
    worst_tokens: list[dict[str, Any]]
    support: str = VOCABULARY
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    def table(self, title: str | None = None) -> Table:
        """The figures for a terminal, student and teacher side by side where both have one."""
        table = Table(title=title, caption="\n".join(self.notes) or None, caption_justify="left")
        for heading in ("Figure", "Student", "Teacher", "95 %"):
            table.add_column(heading, justify="left" if heading == "Figure" else "right")
        wrong = self.agreement_when_teacher_wrong
        table.add_row("agrees with the teacher", f"{self.agreement:.1%}", "", _interval(self.agreement_interval, "%"))
        table.add_row(f"… where that is wrong ({self.teacher_wrong} tokens)", _figure(wrong, "%"), "", "")
        for name, value, interval in (
            ("KL(teacher || student), nats", self.forward_kl, self.forward_kl_interval),
            ("KL(student || teacher), nats", self.reverse_kl, self.reverse_kl_interval),
        ):
            table.add_row(name, _figure(value), "", _interval(interval))
        pairs = (
            (f"mass on the teacher's {self.captured_mass['k']} likeliest", self.captured_mass, "%"),
            ("entropy, nats", self.entropy, ""),
        )
        for name, pair, unit in pairs:
            table.add_row(name, _figure(pair["student"], unit), _figure(pair["teacher"], unit), "")
        for key, name, unit in (
            ("accuracy", "likeliest token is the text's", "%"),
            ("perplexity", "perplexity of the text", ""),
            ("expected_calibration_error", "expected calibration error", "%"),
            ("brier", "Brier score, 0 to 2", ""),
        ):
            table.add_row(name, _figure(self.student[key], unit), _figure(self.teacher[key], unit), "")
        return table


def measure_fidelity(trainer: DistillationTrainer, dataset: Any, *, top_k: int = 64) -> FidelityReport:
    """Hold a trainer's student against its teacher on held-out texts. Every process calls it; all get the report.

    Nothing of the trainer is changed: modes, the state of the random numbers and the epoch of the data are put back.

    Args:
        trainer: With a teacher that gives whole distributions, or a cache of likeliest ids.
        dataset: Rows or a `DistillationDataset`, as for `trainer.evaluate`.
        top_k: How many of the teacher's likeliest tokens the captured mass is taken over; no more than it lists.

    Raises:
        ValueError: There is no teacher, it is known through drawn ids only or has another vocabulary, its rows were
            taken at another temperature, there is nothing to measure, or a figure is no number.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1, the number of the teacher's likeliest tokens.")
    check_teacher(trainer.teacher)
    walk = Walk(trainer, top_k)
    figures = walk.over(dataset)
    return summarize(figures, top_k=walk.top_k, support=walk.support, name=_namer(trainer.processing_class))


def summarize(
    figures: TokenFigures, *, top_k: int, support: str = VOCABULARY, name: Callable[[int], str] = str
) -> FidelityReport:
    """Turn columns into a report.

    Args:
        figures: Of all tokens, sorted by text.
        top_k: How many of the teacher's likeliest ids the masses were taken over.
        support: What the divergences were taken on.
        name: From an id to a text.

    Raises:
        ValueError: There are no tokens, or a figure is no number.
    """
    _check_figures(figures)
    ours, theirs = figures.student, figures.teacher
    wholes = np.unique(figures.text, return_counts=True)[1]
    intervals = _intervals(figures, wholes)
    entropies = _mean(ours.entropy), _mean(theirs.entropy)
    return FidelityReport(
        texts=len(wholes),
        tokens=len(figures),
        **measures.agreement(figures.agreed, theirs.top == figures.target),
        forward_kl=_mean(figures.forward_kl),
        reverse_kl=_mean(figures.reverse_kl),
        **{f"{key}_interval": ends for key, ends in intervals.items()},
        captured_mass={"k": top_k, "student": _mean(ours.mass), "teacher": _mean(theirs.mass)},
        entropy={"student": entropies[0], "teacher": entropies[1], "gap": entropies[0] - entropies[1]},
        student=_side(ours, figures.target),
        teacher=_side(theirs, figures.target),
        by_position=measures.by_position(figures.position, figures.agreed, figures.forward_kl),
        worst_tokens=measures.worst_tokens(figures.target, ours.top, theirs.top, figures.forward_kl, name=name),
        support=support,
        notes=[*_notes_on_support(figures, support), *_notes_on_intervals(intervals, len(wholes))],
    )


def _intervals(figures: TokenFigures, wholes: np.ndarray) -> dict[str, list[float] | None]:
    """By figure, over texts that have so many tokens; None where there is none to be given."""
    starts, found = np.cumsum(wholes) - wholes, {}
    for key in ("agreement", "forward_kl", "reverse_kl"):
        column = figures.agreed if key == "agreement" else getattr(figures, key)
        found[key] = measures.interval(np.add.reduceat(column.astype(float), starts), wholes)
    return found


def _side(side: SideFigures, targets: np.ndarray) -> dict[str, Any]:
    """What one model says of the text itself; None where that can't be known of all tokens."""
    right = side.top == targets
    bins = measures.reliability(side.confidence, right)
    perplexity = measures.perplexity(side.log_prob)
    return {
        "accuracy": _mean(right),
        "perplexity": perplexity if math.isfinite(perplexity) else None,
        "expected_calibration_error": measures.calibration_error(bins),
        "brier": _mean(side.brier) if np.isfinite(side.brier).all() else None,
        "reliability": bins,
    }


def _notes_on_support(figures: TokenFigures, support: str) -> list[str]:
    if support == VOCABULARY:
        return []
    unlisted = int(np.isnan(figures.teacher.log_prob).sum())
    perplexity = f", nor the perplexity ({unlisted} tokens of the text aren't listed)" if unlisted else ""
    return [
        f"The teacher is known by its {support}: divergences and entropies are of these, and no larger than those "
        f"of the vocabulary; its Brier score can't be known{perplexity}."
    ]


def _notes_on_intervals(intervals: Mapping[str, list[float] | None], texts: int) -> list[str]:
    if texts < measures.FEWEST:
        there = "There is one text" if texts == 1 else f"There are {texts} texts"
        return [f"{there}: too few to say how far the figures may be off, so they have no intervals."]
    alike = [_WORDS[key] for key, ends in intervals.items() if ends is None]
    if not alike:
        return []
    return [
        f"All texts have the same {' and '.join(alike)}: drawing them anew can't say how far that may be off, so it "
        "has no interval."
    ]


def _check_figures(figures: TokenFigures) -> None:
    if not len(figures):
        raise ValueError(
            "No token is supervised in these texts, so there is nothing to measure. Check that their completions "
            "aren't empty and that your collator sets `labels`."
        )
    columns = {"student": figures.student.entropy, "teacher": figures.teacher.entropy, "KL": figures.reverse_kl}
    for owner, column in columns.items():
        if wrong := int((~np.isfinite(column)).sum()):
            raise ValueError(
                f"{wrong} of {len(figures)} tokens have no finite figure ({owner}): a model's logits aren't numbers. "
                "Look at its weights, and at the precision it runs in."
            )


def _namer(tokenizer: Any) -> Callable[[int], str]:
    """From an id to what it stands for; a token that is no text by itself is shown as the tokenizer writes it down."""

    def name(number: int) -> str:
        text = tokenizer.decode([number])
        if text and "\ufffd" not in text:
            return text
        return tokenizer.convert_ids_to_tokens(number) or f"id {number}"

    return str if tokenizer is None else name


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(np.asarray(values, dtype=float)))


def _figure(value: float | None, unit: str = "") -> str:
    if value is None:
        return "unknown"
    return f"{value:.1%}" if unit == "%" else f"{value:.3f}"


def _interval(ends: Sequence[float] | None, unit: str = "") -> str:
    return "" if ends is None else " to ".join(_figure(end, unit) for end in ends)
