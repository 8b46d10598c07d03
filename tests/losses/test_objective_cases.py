"""Cases that the objective must get right, whatever the loss: mixtures, heads, vocabularies, what it refuses."""

from __future__ import annotations

import pytest
import torch
from battery import only, zero_at_equality
from reference import DenseTerm, dense_objective
from torch import Tensor, nn

from hfkd.losses import LOSSES, Divergence, TokenLoss
from hfkd.objective import build_objective
from hfkd.rows import DenseRows, Head
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk
from hfkd.terms import Term


def rows_of(hidden: Tensor, head: Tensor, **more) -> DenseRows:
    return DenseRows(hidden, Head(head, **more))


def pair(*, rows: int = 9, vocabulary: int = 23, width: int = 6, seed: int = 0) -> tuple[Tensor, ...]:
    """Student states and head (both with gradients), teacher states and head, targets."""
    generator = torch.Generator().manual_seed(seed)
    states, head, theirs, their_head = (
        torch.randn(*shape, generator=generator)
        for shape in ((rows, width), (vocabulary, width), (rows, width), (vocabulary, width))
    )
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return states.requires_grad_(True), head.requires_grad_(True), theirs, their_head, targets


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ("forwardkl", "forward_kl"),
        ([{"kind": "reverse_lk"}], "reverse_kl"),
        ([], "weight"),
        ([{"kind": "forward_kl", "weight": -1.0}], "weight"),
        ([{"kind": "forward_kl", "weight": 0.0}], "weight"),
        ([{"kind": "forward_kl", "temprature": 2.0}], "temprature"),
    ],
)
def test_impossible_objectives_are_refused(terms, words):
    """Prevents a run that trains nothing, or something else, because of a misspelt recipe."""
    with pytest.raises(ValueError, match=words):
        build_objective(terms)


def test_a_divergence_without_a_teacher_is_refused():
    """Prevents a missing teacher that shows up as an attribute error deep inside a chunk."""
    states, head, _, _, targets = pair()
    for signal in (None, TeacherSignal()):
        with pytest.raises(ValueError, match="teacher"):
            build_objective("forward_kl")(rows_of(states, head), signal, targets)


def test_rows_of_different_number_are_refused():
    """Prevents a student that is compared with the teacher's rows of other tokens, by broadcasting or by chance."""
    states, head, theirs, their_head, targets = pair()
    objective = build_objective("forward_kl")
    with pytest.raises(ValueError, match="9"):
        objective(rows_of(states, head), TeacherSignal(rows_of(theirs[:-1], their_head)), targets)
    with pytest.raises(ValueError, match="9"):
        objective(rows_of(states, head), TeacherSignal(rows_of(theirs, their_head)), targets[:-1])
    with pytest.raises(ValueError, match="9"):
        objective(rows_of(states, head), TeacherSignal(rows_of(theirs, their_head)), targets, torch.ones(8))


def test_cross_entropy_needs_no_teacher():
    """Prevents a teacher's forward that is paid for and not read."""
    states, head, _, _, targets = pair()
    objective = build_objective("cross_entropy")
    assert objective.needs == frozenset()
    assert build_objective("forward_kl").needs == {"distribution"}
    total = objective(rows_of(states, head), None, targets).total
    logits = (states @ head.T).double()
    assert total.item() == pytest.approx(
        nn.functional.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-6
    )


# --------------------------------------------------------------------------------------- the objective


def test_terms_add_up_whatever_rows_they_read_together():
    """Prevents a mixture of terms whose gradients or logged parts leak into each other."""
    states, head, theirs, their_head, targets = pair()
    weights = torch.linspace(0.5, 1.5, 9)
    terms = [
        {"kind": "forward_kl", "weight": 0.7, "temperature": 2.0},
        {"kind": "cross_entropy", "weight": 0.2},
        {"kind": "sinkhorn", "weight": 1.5, "group_size": 4},
        {"kind": "total_variation"},
    ]
    expected = dense_objective(
        states,
        head,
        None,
        theirs @ their_head.T,
        targets,
        [
            DenseTerm("forward_kl", 0.7, {"temperature": 2.0}),
            DenseTerm("cross_entropy", 0.2),
            DenseTerm("sinkhorn", 1.5, {"groups": [range(4), range(4, 8), [8]]}),
            DenseTerm("total_variation"),
        ],
        weights,
    )
    for size in (1, 4, 9, None):
        states.grad = head.grad = None
        result = build_objective(terms, size)(
            rows_of(states, head), TeacherSignal(rows_of(theirs, their_head)), targets, weights
        )
        result.total.backward()
        assert list(result.parts) == [term["kind"] for term in terms]
        assert not any(torch.as_tensor(part).requires_grad for part in result.parts.values())
        assert [float(part) for part in result.parts.values()] == pytest.approx(expected.parts, rel=1e-5)
        assert result.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
        assert expected.hidden.abs().max() > 1e-3 and expected.weight.abs().max() > 1e-3
        torch.testing.assert_close(states.grad.double(), expected.hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(head.grad.double(), expected.weight, rtol=1e-4, atol=1e-5)


def test_terms_with_different_groups_read_all_rows_each():
    """Prevents the second grouping from overwriting the first one's gradient, or from counting rows twice."""
    states, head, theirs, _, targets = pair()
    their_head = head.detach().clone()
    theirs[2:6] = 1.3 * states[2:6].detach()  # the same likeliest token, no ties between probabilities
    sizes = (4, 3)
    dense = [DenseTerm("sinkhorn", 1.0, {"groups": [range(i, min(i + n, 9)) for i in range(0, 9, n)]}) for n in sizes]
    dense.append(DenseTerm("reverse_kl", 0.5))
    expected = dense_objective(states, head, None, theirs @ their_head.T, targets, dense)
    terms = [Term(f"groups of {n}", LOSSES["sinkhorn"](group_size=n)) for n in sizes]
    terms.append(Term("rows", LOSSES["reverse_kl"](), 0.5))
    agreed = ((states @ head.T).argmax(-1) == (theirs @ their_head.T).argmax(-1)).sum()
    assert 4 <= agreed < 9
    for order in (terms, terms[::-1]):
        for size in (1, 5, None):
            result = build_objective(order, size)(
                rows_of(states, head), TeacherSignal(rows_of(theirs, their_head)), targets, measure_agreement=True
            )
            gradients = torch.autograd.grad(result.total, [states, head])
            assert int(result.agreed) == int(agreed)
            assert [float(result.parts[term.name]) for term in terms] == pytest.approx(expected.parts, rel=1e-5)
            assert result.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
            for ours, exact in zip(gradients, (expected.hidden, expected.weight), strict=True):
                assert exact.abs().max() > 1e-2
                torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scale", "soft_cap"), [(0.25, None), (1.0, 3.0), (2.0, 5.0)])
def test_logit_scale_and_soft_cap_reach_value_and_gradient(scale, soft_cap):
    """Prevents a loss on other logits than the model's own (Granite, Cohere, Gemma), which trains without a word."""
    states, head, theirs, their_head, targets = pair()
    bias = torch.linspace(-1, 1, 23).requires_grad_(True)
    raw = scale * (theirs @ their_head.T)
    teacher_logits = raw if soft_cap is None else soft_cap * torch.tanh(raw / soft_cap)
    expected = dense_objective(
        states, head, bias, teacher_logits, targets, [DenseTerm("reverse_kl")], scale=scale, soft_cap=soft_cap
    )
    rules = {"scale": scale, "soft_cap": soft_cap}
    result = build_objective("reverse_kl", 4)(
        rows_of(states, head, bias=bias, **rules), TeacherSignal(rows_of(theirs, their_head, **rules)), targets
    )
    gradients = torch.autograd.grad(result.total, [states, head, bias])
    assert result.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    for ours, theirs_ in zip(gradients, (expected.hidden, expected.weight, expected.bias), strict=True):
        assert theirs_.abs().max() > 1e-3
        torch.testing.assert_close(ours.double(), theirs_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("student_ids", "teacher_ids"), [(26, 23), (23, 26)])
def test_padded_vocabularies_are_cut_before_the_softmax(student_ids, teacher_ids):
    """Prevents padding ids that take probability, or gradients, because one head is wider than the other."""
    states, head, _, _, targets = pair(vocabulary=student_ids)
    _, _, theirs, their_head, _ = pair(vocabulary=teacher_ids, seed=1)
    targets = targets % 23
    expected = dense_objective(states, head[:23], None, theirs @ their_head[:23].T, targets, [DenseTerm("forward_kl")])
    result = build_objective("forward_kl", 4)(
        rows_of(states, head), TeacherSignal(rows_of(theirs, their_head)), targets
    )
    result.total.backward()
    assert result.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    assert expected.weight.abs().max() > 1e-3 and head.grad.shape == head.shape
    torch.testing.assert_close(head.grad[:23].double(), expected.weight, rtol=1e-4, atol=1e-5)
    assert (head.grad[23:] == 0).all()


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if zero_at_equality(kind, {"debias": True})])
def test_identical_student_and_teacher_cost_nothing(kind):
    """Prevents a self-teacher with the student's own prompt from pushing the weights anywhere."""
    states, head, *_, targets = pair()
    arguments = {"alone": True, "debias": True} if kind == "sinkhorn" else {}
    terms = only(kind, arguments)
    result = build_objective(terms)(
        rows_of(states, head), TeacherSignal(rows_of(states.detach().clone(), head.detach().clone())), targets
    )
    gradients = torch.autograd.grad(result.total, [states, head])
    assert abs(result.total.item()) <= 1e-5
    assert all(gradient.abs().max() <= 1e-4 for gradient in gradients)


def test_the_teacher_gets_no_gradient():
    """Prevents a teacher that drifts toward its student, most of all a live self-teacher with the same parameters."""
    states, head, theirs, their_head, targets = pair()
    theirs.requires_grad_(True)
    their_head.requires_grad_(True)
    build_objective("reverse_kl")(
        rows_of(states, head), TeacherSignal(rows_of(theirs, their_head)), targets
    ).total.backward()
    assert theirs.grad is None and their_head.grad is None
    assert states.grad.abs().max() > 0 and head.grad.abs().max() > 0


def test_a_tied_self_teacher_gets_the_students_gradient_only():
    """Prevents a doubled or mixed gradient of a head that student and teacher share."""
    states, head, theirs, _, targets = pair()
    expected = dense_objective(states, head, None, theirs @ head.detach().T, targets, [DenseTerm("forward_kl")])
    build_objective("forward_kl", 2)(
        rows_of(states, head), TeacherSignal(rows_of(theirs, head)), targets
    ).total.backward()
    assert expected.weight.abs().max() > 1e-3
    torch.testing.assert_close(head.grad.double(), expected.weight, rtol=1e-4, atol=1e-5)


def test_head_gradient_is_summed_wider_than_bfloat16():
    """Prevents the bias of a bfloat16 running sum: after a few hundred chunks, small shares no longer change it."""
    generator = torch.Generator().manual_seed(0)
    states = (1.0 + 0.1 * torch.rand(600, 4, generator=generator)).bfloat16().requires_grad_(True)
    head = torch.zeros(8, 4, dtype=torch.bfloat16).requires_grad_(True)
    targets = torch.zeros(600, dtype=torch.long)
    expected = dense_objective(states, head, None, None, targets, [DenseTerm("cross_entropy")], dtype=torch.bfloat16)
    assert expected.weight.abs().min() > 10
    for size in (1, 600):
        head.grad = None
        build_objective("cross_entropy", size)(rows_of(states, head), None, targets).total.backward()
        torch.testing.assert_close(head.grad.double(), expected.weight, rtol=2**-8, atol=0.0)


class Silent(TokenLoss):
    """A loss that finds nothing to say, for the test below."""

    may_stand_alone = False

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n] zeros that hang on nothing."""
        return torch.zeros(len(chunk))

    def groups(self, layout) -> Tensor:
        """Two by two, so that it is read apart from other terms."""
        return layout.position // 2


def test_a_term_may_have_nothing_to_say():
    """Prevents a run that fails at the first answer in which no phrase, number or name is to be compared."""
    states, head, theirs, their_head, targets = pair()
    signal = TeacherSignal(rows_of(theirs, their_head))
    for size in (1, 4, None):
        both, other = (
            torch.autograd.grad(build_objective(terms, size)(rows_of(states, head), signal, targets).total, states)[0]
            for terms in ([Term("silent", Silent()), "forward_kl"], ["forward_kl"])
        )
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(both, other)


class Tempered(TokenLoss):
    """A loss with a parameter of its own, for the test below."""

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.start = start
        self.sharpness = nn.Parameter(torch.tensor([start]))

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n]."""
        return -self.sharpness * chunk.target_log_probs() + self.sharpness**2


def test_parameters_of_a_loss_are_trained_with_the_student():
    """Prevents a learnable loss whose own parameters stay where they began, or feel only the last chunk."""
    states, head, _, _, targets = pair()
    cost = nn.functional.cross_entropy((states @ head.T).detach(), targets, reduction="sum").item()
    for size in (1, 4, 9):
        loss = Tempered()
        objective = build_objective([Term("own", loss, weight=2.0)], size)
        assert loss.sharpness in set(objective.parameters())
        objective(rows_of(states, head), None, targets).total.backward()
        assert loss.sharpness.grad.item() == pytest.approx(2.0 * (cost + 9 * 2 * 0.5), rel=1e-5)


class Chi(Divergence):
    """A user's own divergence: one method, and not one sum over rows or word about chunks."""

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n]."""
        return ((teacher - student).exp() * teacher.exp()).sum(-1) - 1


def test_a_divergence_of_ones_own_by_its_path():
    """Prevents a plug-in point that works for our classes only."""
    states, head, theirs, their_head, targets = pair()
    result = build_objective([{"kind": f"{__name__}:Chi", "temperature": 2.0}], 4)(
        rows_of(states, head), TeacherSignal(rows_of(theirs, their_head)), targets
    )
    q, p = (torch.softmax((x @ y.T).double() / 2, -1) for x, y in ((states, head), (theirs, their_head)))
    assert result.total.item() == pytest.approx(4 * ((p**2 / q).sum() - 9).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(result.total, states)
    assert gradient.abs().max() > 1e-3


def test_agreement_counts_rows_with_the_same_likeliest_token():
    """Prevents a logged agreement that depends on the chunks or on token weights."""
    states, head, theirs, their_head, targets = pair(rows=40, vocabulary=3)
    expected = ((states @ head.T).argmax(-1) == (theirs @ their_head.T).argmax(-1)).sum()
    assert 0 < expected < 40
    for size in (1, 7, None):
        result = build_objective("forward_kl", size)(
            rows_of(states, head), TeacherSignal(rows_of(theirs, their_head)), targets, measure_agreement=True
        )
        assert int(result.agreed) == int(expected)
