"""What the battery of losses runs on: constructor arguments, a student and a teacher, and guarded comparisons.

A new loss needs two things to be tested by the battery: its definition in `tests/reference.py` or
`tests/reference_measures.py` (float64, from the formula), and, where its defaults don't show all it can do, a line in
`ARGUMENTS`. What can't hold for it by its nature is said once, below `ARGUMENTS`, with the reason.
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
from hfkd.support import TokenChunk
from hfkd.terms import Term

ROWS, VOCABULARY, WIDTH, TEACHER_WIDTH, GROUP = 13, 37, 8, 10, 5

ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "jensen_shannon": [{}, {"mixture_weight": 0.1}, {"mixture_weight": 0.9}],
    "skew_forward_kl": [{}, {"skew": 0.5}],
    "skew_reverse_kl": [{}, {"skew": 0.5}],
    "sinkhorn": [
        {"alone": True, "group_size": GROUP, "support": None},
        {"alone": True, "group_size": GROUP, "support": None, "debias": True, "epsilon": 0.3},
        {"alone": True, "group_size": GROUP, "support": None, "epsilon": 0.05, "iterations": 7},
        {"alone": True, "group_size": GROUP, "support": 6, "pair_weight": 0.5},
        {"alone": True, "group_size": GROUP, "support": 8, "debias": True},
    ],
    "adaptive_kl": [{}, {"head_rule": "crossing"}, {"head_mass": 0.9}],
    "balanced_kl": [{}, {"sharpness": 4.0}],
    "alpha_beta": [
        {"teacher_power": a, "student_power": b}
        for a, b in [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (0.2, 0.7)]
    ],
    "normalized_kd": [{}, {"non_target_weight": 0.4}],
    "adaptive_label_smoothing": [{}, {"cap": 0.3}, {"cap": 1.0}],
    "clipped_kl": [
        {},
        {"quantiles": [0.0, 1.0]},
        {"quantiles": [0.1, 0.8]},
        {"quantiles": [0.1, 0.8], "support": 8},
        {"quantiles": [0.0, 0.3], "minimum_mass": 0.6, "softness": 0.2},
    ],
    "logit_binary_kl": [{}, {"support": 5}],
    "logit_mse": [{}, {"centre": False}],
    "hinge_ranking": [{}, {"top": 4, "margin": 0.3}],
    "logistic_ranking": [{}, {"top": 4}],
    "span_correlation": [{"spans": GROUP}, {"spans": 3, "scale": 10.0}],
    "uld": [{}, {"top": 4}],
    "span_likelihood": [{}, {"power": 0.5}],
    "swing": [{}, {"measure": "jensen_shannon", "noise": "uniform"}],
}
"""Constructor arguments that the battery goes through; defaults alone for a loss that is not here."""

NOT_IN_THE_REFERENCE = ("alone", "group_size", "mode", "spans", "rank")
"""Arguments that choose rows or permit something, and so are no part of a definition."""

DETACHED = ("adaptive_kl", "balanced_kl", "adaptive_label_smoothing")
"""A weight that depends on the student has no gradient by definition, so finite differences see another function."""

LISTED = ("logit_binary_kl", "logit_mse", "standardized_kl", "hinge_ranking", "logistic_ranking")
"""They read logits, so of a sparse teacher the listed ids only: a tail bucket has no logit."""

UNBOUNDED_IN_A_LOGIT = ("logit_mse", "standardized_kl")
"""A logit of minus infinity is no limit for them: they grow with the stand-in for it, or see nothing but it."""

ORDERED = ("adaptive_kl", "clipped_kl", "logit_binary_kl", "hinge_ranking", "logistic_ranking")
"""They read the order of the teacher's entries, so their value isn't defined where rounding ties two of them."""

CASES = [(kind, arguments) for kind in LOSSES for arguments in ARGUMENTS.get(kind, [{}])]
CASE_IDS = [f"{kind}-{'-'.join(f'{k}={v}' for k, v in arguments.items()) or 'default'}" for kind, arguments in CASES]
every_case = pytest.mark.parametrize(("kind", "arguments"), CASES, ids=CASE_IDS)
# Losses that compare rows with each other refuse rows with a support of their own or make one for all of them, and
# logits without a known level are refused where the level counts (other tests say so).
ROW_BY_ROW = [
    place
    for place, (kind, arguments) in enumerate(CASES)
    if LOSSES[kind].groups is TokenLoss.groups and arguments.get("centre", True)
]
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
    return "not 0 at equality" not in " ".join(inspect.getdoc(loss).split()).lower() or (
        kind == "sinkhorn" and arguments.get("debias", False)
    )


def may_be_infinite(kind: str, arguments: dict[str, Any]) -> bool:
    """Whether an id that the teacher rules out and the student doesn't has an infinite or no cost by definition."""
    reverse = ("reverse_kl", "adaptive_kl", "balanced_kl", "logit_binary_kl")
    return kind in reverse or arguments.get("teacher_power") == 0.0


class Nothing(TokenLoss):
    """Costs nothing and moves nothing: company for a loss that may not stand alone, so that all there is is its."""

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n] zeros."""
        return 0.0 * chunk.target_log_probs()


def company(kind: str, arguments: dict[str, Any]) -> list[Term]:
    """What has to stand beside this loss in an objective: nothing, or a term that says nothing."""
    return [] if LOSSES[kind](**arguments).may_stand_alone else [Term("nothing", Nothing())]


def only(kind: str, arguments: dict[str, Any]) -> list[Any]:
    """The terms of an objective that measures this and nothing else."""
    return [{"kind": kind, **arguments}, *company(kind, arguments)]


def runs(kind: str, arguments: dict[str, Any], rows: int) -> list[range] | None:
    """The groups that a loss makes of rows of one answer when it is told their size; None where rows stand alone."""
    size = arguments.get("group_size", arguments.get("spans"))
    if size is None:
        return None
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def reference_value(
    kind: str, arguments: dict[str, Any], student: Tensor, teacher: Tensor, targets: Tensor, **more
) -> Tensor:
    assert kind in REFERENCES, f"write the definition of {kind!r} in tests/reference.py"
    return REFERENCES[kind](student.double(), teacher.double(), targets, **definition(arguments), **more)


def definition(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in NOT_IN_THE_REFERENCE}


def sparse_reference(
    kind: str,
    arguments: dict[str, Any],
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    tail: str = "bucket",
) -> Tensor:
    """The definition on the K ids of each row and what is left: one more entry, nothing at all, or no part of it.

    Everything is dense where the ids are all there are. `student` and `teacher` are logits, whole.
    """
    arguments = definition(with_temperature(kind, arguments, temperature))
    s, t = student.double(), teacher.double()
    whole = ids.shape[-1] == s.shape[-1]
    if whole or tail == "renormalize" or kind in LISTED:
        column = (ids == targets[:, None]).long().argmax(-1)
        return REFERENCES[kind](s.gather(-1, ids), t.gather(-1, ids), column, **arguments)
    listed = (ids == targets[:, None]).long()
    column = torch.where(listed.any(-1), listed.argmax(-1), ids.shape[-1])
    more = {"tail": True} if kind == "clipped_kl" else {}
    # Log-probabilities at the temperature, turned back into logits that the definition divides by it.
    q, p = (torch.softmax(x / temperature, -1) for x in (s, t))
    q, p = (torch.cat([x.gather(-1, ids), x.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], -1) for x in (q, p))
    return REFERENCES[kind](temperature * q.log(), temperature * p.log(), column, **arguments, **more)


def logits_case(rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits and targets of `rows` rows, a few nats apart."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2.0 * torch.randn(rows, VOCABULARY, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(VOCABULARY, (rows,), generator=generator)


def cost(kind: str, student: Tensor, teacher: Tensor, targets: Tensor | None = None, **arguments) -> Tensor:
    """What a loss says of logits (or of log-probabilities, which are logits)."""
    targets = torch.zeros(len(student), dtype=torch.long) if targets is None else targets
    return LOSSES[kind](**arguments)(TokenChunk.from_logits(targets, student, teacher))


class World:
    """A student and a teacher of different widths with a head each, and what the objective needs besides."""

    def __init__(
        self,
        rows: int = ROWS,
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
        trained: bool = True,
        teacher_dtype: torch.dtype | None = None,
    ):
        theirs = teacher_dtype or dtype
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden = normal(rows, WIDTH).to(dtype).requires_grad_(True)
        self.weight = (0.7 * normal(VOCABULARY, WIDTH)).to(dtype).requires_grad_(trained)
        self.bias = normal(VOCABULARY).to(dtype).requires_grad_(trained) if bias else None
        self.teacher_hidden = normal(rows, TEACHER_WIDTH).to(theirs)
        self.teacher_weight = (0.7 * normal(VOCABULARY, TEACHER_WIDTH)).to(theirs)
        self.targets = torch.randint(VOCABULARY, (rows,), generator=generator)
        self.token_weights = torch.rand(rows, generator=generator) + 0.5

    @property
    def teacher_logits(self) -> Tensor:
        logits = self.teacher_hidden.double() @ self.teacher_weight.double().T
        return rounded_to(logits, self.teacher_hidden.dtype)

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
        """Total and gradients by the definition; an auxiliary loss has none in the head, whatever its formula says."""
        more = {} if (groups := runs(kind, arguments, len(self.hidden))) is None else {"groups": groups}
        result = dense_objective(
            self.hidden,
            self.weight,
            self.bias,
            self.teacher_logits,
            self.targets,
            [DenseTerm(kind, 1.0, definition(arguments) | more)],
            token_weights=weights,
            dtype=self.hidden.dtype if self.hidden.dtype.itemsize < 4 else None,
        )
        of_head = [gradient for gradient in (result.weight, result.bias) if gradient is not None]
        if LOSSES[kind].auxiliary:
            of_head = [torch.zeros_like(gradient) for gradient in of_head]
        return result.total, [result.hidden, *of_head]


def assert_reached(kind: str, gradients: list[Tensor | None]) -> None:
    """Guard for gradients of hidden states and head: an auxiliary loss reaches the states only, any other both."""
    auxiliary = LOSSES[kind].auxiliary
    assert_live(*(gradients[:1] if auxiliary else gradients))
    assert not auxiliary or all((gradient == 0).all() for gradient in gradients[1:])


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
