"""What the battery of losses runs on: constructor arguments, a student and a teacher, and guarded comparisons.

A new loss needs two things to be tested by the battery: its definition in `tests/reference.py` (float64, from the
formula), and, where its defaults don't show all it can do, a line in `ARGUMENTS`.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from reference import REFERENCES, DenseTerm, dense_objective, rounded_to
from torch import Tensor

from hfkd.losses import LOSSES, Divergence, TokenLoss
from hfkd.objective import build_objective
from hfkd.rows import DenseRows, Head
from hfkd.signal import TeacherSignal

ROWS, VOCABULARY, WIDTH, TEACHER_WIDTH, GROUP = 13, 37, 8, 10, 5

ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "jensen_shannon": [{}, {"mixture_weight": 0.1}, {"mixture_weight": 0.9}],
    "skew_forward_kl": [{}, {"skew": 0.5}],
    "skew_reverse_kl": [{}, {"skew": 0.5}],
    "sinkhorn": [
        {"alone": True, "group_size": GROUP},
        {"alone": True, "group_size": GROUP, "debias": True, "epsilon": 0.3},
        {"alone": True, "group_size": GROUP, "epsilon": 0.05, "iterations": 7},
    ],
}
"""Constructor arguments that the battery goes through; defaults alone for a loss that is not here."""

NOT_IN_THE_REFERENCE = ("alone", "group_size", "mode")
"""Arguments that choose rows or permit something, and so are no part of a definition."""

CASES = [(kind, arguments) for kind in LOSSES for arguments in ARGUMENTS.get(kind, [{}])]
CASE_IDS = [f"{kind}-{'-'.join(f'{k}={v}' for k, v in arguments.items()) or 'default'}" for kind, arguments in CASES]
every_case = pytest.mark.parametrize(("kind", "arguments"), CASES, ids=CASE_IDS)
# Losses that compare rows with each other refuse rows with a support of their own (another test says so).
ROW_BY_ROW = [place for place, (kind, _) in enumerate(CASES) if LOSSES[kind].groups is TokenLoss.groups]
every_row_by_row_case = pytest.mark.parametrize(
    ("kind", "arguments"), [CASES[place] for place in ROW_BY_ROW], ids=[CASE_IDS[place] for place in ROW_BY_ROW]
)
every_loss = pytest.mark.parametrize("kind", list(LOSSES))
both_temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0])


def has_temperature(kind: str) -> bool:
    return "temperature" in inspect.signature(LOSSES[kind].__init__).parameters


def with_temperature(kind: str, arguments: dict[str, Any], temperature: float) -> dict[str, Any]:
    """The arguments at this temperature, times its square; unchanged for a loss that has none."""
    if not has_temperature(kind):
        return arguments
    return arguments | {"temperature": temperature, "scale_by_temperature_squared": True}


def zero_at_equality(kind: str, arguments: dict[str, Any]) -> bool:
    """What the class says of itself: a divergence is 0 at equality, unless `Undefined` admits otherwise."""
    loss = LOSSES[kind]
    if not issubclass(loss, Divergence):
        return False
    return "not 0 at equality" not in " ".join(inspect.getdoc(loss).split()) or arguments.get("debias", False)


def reference_value(
    kind: str, arguments: dict[str, Any], student: Tensor, teacher: Tensor, targets: Tensor, **more
) -> Tensor:
    assert kind in REFERENCES, f"write the definition of {kind!r} in tests/reference.py"
    definition = {name: value for name, value in arguments.items() if name not in NOT_IN_THE_REFERENCE}
    return REFERENCES[kind](student.double(), teacher.double(), targets, **definition, **more)


def logits_case(rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits and targets of `rows` rows, a few nats apart."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2.0 * torch.randn(rows, VOCABULARY, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(VOCABULARY, (rows,), generator=generator)


class World:
    """A student and a teacher of different widths with a head each, and what the objective needs besides."""

    def __init__(self, rows: int = ROWS, dtype: torch.dtype = torch.float32, bias: bool = True, trained: bool = True):
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden = normal(rows, WIDTH).to(dtype).requires_grad_(True)
        self.weight = (0.7 * normal(VOCABULARY, WIDTH)).to(dtype).requires_grad_(trained)
        self.bias = normal(VOCABULARY).to(dtype).requires_grad_(trained) if bias else None
        self.teacher_hidden = normal(rows, TEACHER_WIDTH).to(dtype)
        self.teacher_weight = (0.7 * normal(VOCABULARY, TEACHER_WIDTH)).to(dtype)
        self.targets = torch.randint(VOCABULARY, (rows,), generator=generator)
        self.token_weights = torch.rand(rows, generator=generator) + 0.5

    @property
    def teacher_logits(self) -> Tensor:
        return rounded_to(self.teacher_hidden.double() @ self.teacher_weight.double().T, self.hidden.dtype)

    def ours(self, terms: Any, chunk_size: int | None = None, weights: Tensor | None = None, factor: float = 1.0):
        """Total, and gradients of hidden, weight and bias of `factor * total`."""
        leaves = [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]
        for leaf in leaves:
            leaf.grad = None
        result = build_objective(terms, chunk_size)(
            DenseRows(self.hidden, Head(self.weight, self.bias)),
            TeacherSignal(DenseRows(self.teacher_hidden, Head(self.teacher_weight))),
            self.targets,
            weights,
        )
        (factor * result.total).backward()
        return result, [leaf.grad for leaf in leaves]

    def reference(self, kind: str, arguments: dict[str, Any], weights: Tensor | None = None):
        definition = {name: value for name, value in arguments.items() if name not in NOT_IN_THE_REFERENCE}
        if "group_size" in arguments:
            rows = range(len(self.hidden))
            definition["groups"] = [rows[start : start + GROUP] for start in range(0, len(rows), GROUP)]
        term = DenseTerm(kind, 1.0, definition)
        result = dense_objective(
            self.hidden,
            self.weight,
            self.bias,
            self.teacher_logits,
            self.targets,
            [term],
            token_weights=weights,
            dtype=self.hidden.dtype if self.hidden.dtype.itemsize < 4 else None,
        )
        return result.total, [
            gradient for gradient in (result.hidden, result.weight, result.bias) if gradient is not None
        ]


def only(kind: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"kind": kind, **arguments}]


def assert_live(*gradients: Tensor | None) -> None:
    """Guard: two gradients that are both absent or both zero would agree about nothing."""
    for gradient in gradients:
        assert gradient is not None, "there is no gradient to compare"
        assert torch.isfinite(gradient).all(), "the gradient isn't finite"
        assert gradient.abs().max() > 1e-6, "the gradient is zero everywhere"


def assert_near(ours: Tensor, expected: Tensor, relative: float) -> None:
    """Largest difference at most `relative` of the largest expected entry: what an update of weights feels."""
    ours, expected = ours.detach().double(), expected.detach().double()
    assert ours.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-300)
    error = ((ours - expected).abs().max() / scale).item()
    assert error <= relative, f"relative difference {error:.3g}, allowed {relative:g}"
