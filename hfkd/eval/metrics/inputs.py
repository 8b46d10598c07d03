"""What the metrics of this package are given, checked and made into tensors, and how they describe themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value
from numpy.typing import NDArray
from torch import Tensor

from hfkd.rows import LOWEST
from hfkd.support import TokenChunk

ROWS = List(Value("float32"))
"""One distribution a token: the log-probabilities (nats) or logits of all ids."""

_SUM_TOLERANCE = 1e-3


class CheckedMetric(evaluate.Metric):
    """A metric that says so where it isn't given what it needs.

    The metrics reach it through this module: `evaluate.load` takes the first metric that a file names.
    """

    def add_batch(self, *, predictions: Any = None, references: Any = None, **others: Any) -> None:
        """Take a batch of inputs."""
        given = {"predictions": predictions, "references": references, **others}
        for name in self._feature_names():
            if given.get(name) is None:
                raise ValueError(
                    f"The metric {self.name} needs {name}, and there are none. It takes "
                    f"{', '.join(self._feature_names())}.{self.inputs_description}"
                )
        evaluate.Metric.add_batch(self, predictions=predictions, references=references, **others)

    def compute(self, *, predictions: Any = None, references: Any = None, **others: Any) -> dict[str, Any] | None:
        """Take a last batch, if one is given, and compute the figures of all batches."""
        if predictions is None and references is None and self.process_id == 0 and not len(self):
            self.add_batch()  # nothing was given at all, which it says
        return evaluate.Metric.compute(self, predictions=predictions, references=references, **others)


def describe(description: str, inputs: str, citation: str = "", **features: Any) -> evaluate.MetricInfo:
    """What a metric says of itself.

    Args:
        description: What it measures.
        inputs: What it takes and returns.
        citation: The paper, where there is one.
        **features: The kinds of its inputs.
    """
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs,
        features=Features(**{name: Value(kind) if isinstance(kind, str) else kind for name, kind in features.items()}),
    )


def log_probs_of(rows: Sequence[Any], name: str) -> Tensor:
    """Distributions as log-probabilities.

    Args:
        rows: n rows of V log-probabilities or logits; minus infinity counts as -1e4.
        name: Of the input, for messages.

    Returns:
        [n, V], in float32.

    Raises:
        ValueError: There are none, they are of unequal length, hold what is no number, or are probabilities
            themselves.
    """
    require(rows, name)
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1 or not widths[0]:
        raise ValueError(
            f"The rows of {name} have {widths[0]} to {widths[-1]} entries; expected the same ids in all of them."
        )
    values = torch.from_numpy(np.asarray(rows, dtype=np.float32))
    if bool(values.isnan().any()) or bool((values == torch.inf).any()):
        raise ValueError(f"{name} holds NaN or infinity; expected log-probabilities or logits.")
    if bool((values == -torch.inf).all(dim=-1).any()):
        raise ValueError(f"A row of {name} rules out all ids, so it is no distribution; expected one id with a logit.")
    if widths[0] > 1 and bool((values >= 0).all()) and bool(((values.sum(dim=-1) - 1).abs() < _SUM_TOLERANCE).all()):
        raise ValueError(
            f"The rows of {name} are at least 0 and sum to 1: these are probabilities. Pass their logarithms, or the "
            "logits."
        )
    return torch.log_softmax(values.clamp(min=LOWEST), dim=-1)


def chunk_of(predictions: Sequence[Any], references: Sequence[Any], targets: Tensor | None = None) -> TokenChunk:
    """Student and teacher side by side.

    Args:
        predictions: n rows of the student.
        references: n rows of the teacher.
        targets: [n] the text's ids, where they matter.

    Raises:
        ValueError: See `log_probs_of`; or their vocabularies differ.
    """
    student, teacher = log_probs_of(predictions, "predictions"), log_probs_of(references, "references")
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's rows (predictions) have {student.shape[1]} ids and the teacher's (references) "
            f"{teacher.shape[1]}. Cut both to the ids that they share."
        )
    return TokenChunk(torch.zeros(len(student), dtype=torch.long) if targets is None else targets, student, teacher)


def ids_of(values: Sequence[int] | None, name: str, count: int, vocab_size: int | None = None) -> Tensor:
    """Token ids.

    Args:
        values: The ids.
        name: Of the input, for messages.
        count: How many there must be.
        vocab_size: What they must be below, where that is known.

    Returns:
        [count] ids.

    Raises:
        ValueError: They aren't there, are too few or too many, or lie outside the vocabulary.
    """
    if values is None:
        raise ValueError(f"This metric needs {name}=, one token id for each of the {count} predictions.")
    if any(value is None for value in values):
        raise ValueError(f"{name} holds None; expected one token id for each of the {count} predictions.")
    ids = torch.as_tensor(np.asarray(values, dtype=np.int64))
    if ids.shape != (count,):
        raise ValueError(
            f"{name} has the shape {list(ids.shape)} and there are {count} predictions; expected [{count}]."
        )
    if vocab_size is not None and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(
            f"{name} holds ids from {int(ids.min())} to {int(ids.max())}, and the rows have {vocab_size} entries. "
            "Leave out positions that aren't learned (-100)."
        )
    return ids


def numbers_of(values: Sequence[float], name: str, lowest: float | None = None) -> NDArray[np.float64]:
    """Numbers.

    Args:
        values: n of them.
        name: Of the input, for messages.
        lowest: What minus infinity counts as; None refuses it.

    Returns:
        [n], all finite.

    Raises:
        ValueError: There are none, or one is None, NaN or infinite.
    """
    require(values, name)
    numbers = np.asarray(values, dtype=float)
    if lowest is not None:
        numbers = np.where(numbers == -np.inf, lowest, numbers)
    if wrong := int((~np.isfinite(numbers)).sum()):
        raise ValueError(f"{wrong} of {len(numbers)} {name} aren't finite numbers (None, NaN or infinity).")
    return numbers


def require(values: Sequence[Any], name: str) -> None:
    """Refuse nothing at all.

    Raises:
        ValueError: There are no values.
    """
    if len(values) == 0:
        raise ValueError(f"There are no {name}; expected at least one.")
