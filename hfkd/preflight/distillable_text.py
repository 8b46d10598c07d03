"""Is there anything to distil, where the teacher can't be asked: who finds the texts' own tokens likelier?

Teacher and student both read the same answers, each behind its own prompt, and say at each token what they expect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hfkd.data.views import DistillationDataset
from hfkd.preflight.distillable import NAME
from hfkd.preflight.findings import Finding
from hfkd.signal import DISTRIBUTION
from hfkd.trainer import DistillationTrainer


def by_text(trainer: DistillationTrainer, texts: DistillationDataset, reason: str) -> Iterator[Finding]:
    """Compare how well both predict the answers of some training rows.

    Args:
        trainer: Before its first step.
        texts: What both read.
        reason: Why the teacher wasn't asked to answer.
    """
    from hfkd.eval.fidelity import measure_fidelity

    if DISTRIBUTION not in trainer.objective.needs:
        yield Finding("pass", NAME, f"Not asked: {reason}, and no term reads its distribution.", {"asked": False})
        return
    try:
        report = measure_fidelity(trainer, texts)
    except ValueError as error:
        yield Finding("pass", NAME, f"Not asked: {reason}. Nor by its distributions: {error}", {"asked": False})
        return
    sides: dict[str, Any] = {"teacher": report.teacher, "student": report.student}
    figures = {"asked": False, "tokens": report.tokens}
    figures |= {name: {key: side[key] for key in ("accuracy", "perplexity")} for name, side in sides.items()}
    teacher, student = (figures[name]["accuracy"] for name in sides)
    error = math.sqrt((teacher * (1 - teacher) + student * (1 - student)) / report.tokens)
    words = (
        f"Not asked to answer ({reason}). Of {report.tokens} tokens of {report.texts} training texts the teacher "
        f"expects {teacher:.1%}, the student {student:.1%} (difference {100 * (teacher - student):+.1f} ± "
        f"{100 * error:.1f} points), at perplexities of {_perplexity(sides['teacher'])} and "
        f"{_perplexity(sides['student'])}."
    )
    if teacher - student > 2 * error:
        yield Finding("pass", NAME, f"{words} There is something to distil.", figures)
        return
    yield Finding(
        "warning",
        NAME,
        f"{words} The teacher is not clearly better than its student: there may be little to distil. Give it a better "
        "prompt, or take a stronger one.",
        figures,
    )


def _perplexity(side: dict[str, Any]) -> str:
    value = side["perplexity"]
    return "unknown" if value is None else f"{value:.3g}"
