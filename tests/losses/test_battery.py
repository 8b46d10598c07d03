"""The battery, first half: every loss in `LOSSES` by itself. A new loss is tested by being listed there.

The other half is `test_battery_objective.py`; what both run on, and what a new loss has to bring, is in `battery.py`.
"""

from __future__ import annotations

import doctest
import inspect
import re

import pytest
import torch
from battery import (
    DETACHED,
    ORDERED,
    ROWS,
    UNBOUNDED_IN_A_LOGIT,
    VOCABULARY,
    assert_live,
    assert_near,
    both_temperatures,
    every_case,
    every_loss,
    every_row_by_row_case,
    has_temperature,
    logits_case,
    may_be_infinite,
    reference_value,
    sparse_reference,
    with_temperature,
    zero_at_equality,
)
from torch import Tensor

from hfkd.losses import LOSSES, Divergence, TokenLoss
from hfkd.rows import TopKRows
from hfkd.support import TokenChunk

# ---------------------------------------------------------------------------------- the loss by itself


@every_case
@both_temperatures
def test_value_equals_the_definition(kind, arguments, temperature):
    """Prevents a loss that trains well enough but is not the one that its name and the paper say."""
    arguments = with_temperature(kind, arguments, temperature)
    student, teacher, targets = logits_case()
    expected = reference_value(kind, arguments, student, teacher, targets)
    costly = expected[1:] if kind == "span_correlation" else expected  # a span's first row has no neighbour before it
    assert costly.abs().mean() > 1e-3 and (costly.abs() > 1e-6).double().mean() > 0.8
    ours = LOSSES[kind](**arguments)(TokenChunk.from_logits(targets, student, teacher))
    assert ours.dtype == torch.float32 and ours.shape == (ROWS,)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@every_case
@both_temperatures
def test_gradient_equals_the_definition(kind, arguments, temperature):
    """Prevents a right value with a wrong gradient: a detached factor, a scale on the reported number only."""
    arguments = with_temperature(kind, arguments, temperature)
    student, teacher, targets = logits_case()
    exact = student.double().requires_grad_(True)
    (expected,) = torch.autograd.grad(reference_value(kind, arguments, exact, teacher, targets).sum(), exact)
    student.requires_grad_(True)
    value = LOSSES[kind](**arguments)(TokenChunk.from_logits(targets, student, teacher)).sum()
    (ours,) = torch.autograd.grad(value, student)
    assert_live(ours, expected)
    assert_near(ours, expected, 1e-5)


@every_case
def test_gradient_equals_finite_differences(kind, arguments):
    """Prevents a hand-written or detached backward that no autograd comparison of two copies would notice."""
    if kind in DETACHED:
        pytest.skip("its weight is taken out of the graph; its gradient is compared with the definition's alone")
    student, teacher, targets = logits_case(rows=3)
    loss = LOSSES[kind](**arguments)
    logits = student.double().requires_grad_(True)

    def value(student_logits: Tensor) -> Tensor:
        return loss(TokenChunk.from_logits(targets, student_logits, teacher.double()))

    assert value(logits).dtype == torch.float64
    assert torch.autograd.gradcheck(value, (logits,), eps=1e-6, atol=1e-6, rtol=1e-5)


READS_MORE = ("span_likelihood", "normalized_kd")
"""They read the target, so their one method is `compare`; the test of the whole loss is the one that counts."""


@every_loss
def test_between_passes_gradcheck(kind):
    """Prevents a `between` that is right only behind the base class, where users call and subclass it."""
    if not issubclass(LOSSES[kind], Divergence):
        assert not hasattr(LOSSES[kind], "between")
        return
    if kind in DETACHED:
        pytest.skip("its weight is taken out of the graph")
    if kind in READS_MORE:
        pytest.skip("log-probabilities alone are not all that it reads")
    student, teacher, _ = logits_case(rows=3)
    loss, fixed = LOSSES[kind](), torch.log_softmax(teacher.double(), -1)
    logits = student.double().requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda z: loss.between(torch.log_softmax(z, -1), fixed), (logits,), atol=1e-6, rtol=1e-5
    )


@every_case
def test_zero_at_equality_and_never_negative(kind, arguments):
    """Prevents a "divergence" that is a cross-entropy, whose curve never reaches 0 and whose thresholds lie."""
    student, teacher, targets = logits_case(rows=64, seed=7)
    loss = LOSSES[kind](**arguments)
    assert (loss(TokenChunk.from_logits(targets, student, teacher)) > 0).any()
    if not arguments.get("debias"):  # the parts of a debiased group may be negative, their sum may not
        assert (loss(TokenChunk.from_logits(targets, student, teacher)) >= 0).all()
    assert loss(TokenChunk.from_logits(targets, student, teacher)).sum() >= 0
    near = student + 1e-3 * teacher
    assert loss(TokenChunk.from_logits(targets, near, student)).sum() >= -1e-6
    if zero_at_equality(kind, arguments):
        same = student.clone().requires_grad_(True)
        value = loss(TokenChunk.from_logits(targets, same, student))
        assert value.abs().max() <= 1e-6
        (gradient,) = torch.autograd.grad(value.sum(), same)
        exact = student.double().requires_grad_(True)
        (residue,) = torch.autograd.grad(reference_value(kind, arguments, exact, student, targets).sum(), exact)
        assert residue.abs().max() <= 1e-4  # not 0 for a transport plan that hasn't converged
        assert gradient.abs().max() <= 1e-5 + residue.abs().max()


@every_case
def test_temperature_squared_scales_value_and_gradient_alike(kind, arguments):
    """Prevents Hinton's factor on the reported number only, or a loss that changes by T^2 with a switch elsewhere."""
    if not has_temperature(kind):
        student, teacher, targets = logits_case()
        hot = torch.full((ROWS, VOCABULARY), 5.0)
        one, two = (LOSSES[kind](**arguments)(TokenChunk.from_logits(targets, student, t)) for t in (teacher, hot))
        compares = issubclass(LOSSES[kind], Divergence)  # with something else that a temperature doesn't fit
        assert compares or torch.equal(one, two), "a loss without a temperature compares with no teacher"
        return
    results = []
    for scale in (True, False):
        loss = LOSSES[kind](**arguments, temperature=3.0, scale_by_temperature_squared=scale)
        student, teacher, targets = logits_case()
        student.requires_grad_(True)
        value = loss(TokenChunk.from_logits(targets, student, teacher))
        results.append((value, torch.autograd.grad(value.sum(), student)[0]))
    (scaled, scaled_gradient), (plain, plain_gradient) = results
    assert_live(scaled_gradient, plain_gradient)
    left, left_gradient = _not_tempered(kind)
    assert_near(scaled - left, 9.0 * (plain - left), 1e-5)
    assert_near(scaled_gradient - left_gradient, 9.0 * (plain_gradient - left_gradient), 1e-5)


def _not_tempered(kind: str) -> tuple[Tensor, Tensor]:
    """The part of a loss that stands at temperature 1 by its definition, and its gradient; 0 for all but one."""
    student, teacher, targets = logits_case()
    if kind != "normalized_kd":
        return torch.zeros(ROWS), torch.zeros_like(student)
    student.requires_grad_(True)
    part = reference_value(kind, {"non_target_weight": 0.0}, student, teacher, targets)
    return part.detach().float(), torch.autograd.grad(part.sum(), student)[0]


@every_case
@both_temperatures
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_at_a_logit_gap_of_200(kind, arguments, temperature, dtype):
    """Prevents NaN from the log of a probability that underflowed, in the first confident disagreement of a run."""
    # Not quite flat: the order of tied entries is nobody's. Sixty-fourths are exact in every dtype.
    steps = torch.arange(VOCABULARY) / 64
    student, teacher = steps.flip(0).repeat(6, 1).to(dtype), steps.repeat(6, 1).to(dtype)
    student[0, 0], teacher[0, 1] = 200.0, 200.0  # both certain, of different tokens
    student[1, 0], teacher[1, 0] = 200.0, 200.0  # both certain, of the same
    student[2, 0] = 200.0
    teacher[3, 0] = 200.0
    student[4, :] = teacher[4, :]
    student[5, 0], teacher[5, 0] = -200.0, 200.0
    targets = torch.tensor([1, 0, 3, 0, 2, 0])
    student.requires_grad_(True)
    loss = LOSSES[kind](**with_temperature(kind, arguments, temperature))
    value = loss(TokenChunk.from_logits(targets, student, teacher))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    expected = reference_value(
        kind, with_temperature(kind, arguments, temperature), student.detach(), teacher, targets
    )
    assert torch.isfinite(expected).all() and expected.max() > 1e-2
    if kind == "clipped_kl":
        if "quantiles" not in arguments:
            return  # the learned upper quantile begins where a ramp meets the end of all mass: 0 or 1e-7 is rounding
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-4)
        return
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.parametrize("both", [False, True], ids=["teacher", "teacher and student"])
def test_finite_where_a_probability_is_exactly_zero(kind, arguments, both):
    """Prevents NaN gradients behind a finite loss: ids that are suppressed, padded or missing are minus infinity."""
    student, teacher, targets = logits_case()
    teacher[:, -4:] = -torch.inf
    targets = targets % (VOCABULARY - 4)
    if both:
        student[:, -4:] = -torch.inf
    student.requires_grad_(True)
    value = LOSSES[kind](**arguments)(TokenChunk.from_logits(targets, student, teacher))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    if kind in UNBOUNDED_IN_A_LOGIT:
        return  # what it makes of the stand-in for minus infinity is no more than finite
    assert_live(gradient)
    expected = reference_value(kind, arguments, student.detach(), teacher, targets)
    known = torch.isfinite(expected)
    assert known.all() or (may_be_infinite(kind, arguments) and (not both or kind == "logit_binary_kl"))
    torch.testing.assert_close(value.double()[known], expected[known], rtol=1e-5, atol=1e-6)
    if both:
        assert gradient[:, -4:].abs().max() == 0


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_measured_in_float32(kind, arguments, dtype):
    """Prevents divergences that go negative in production, because a softmax was taken in bfloat16."""
    student, teacher, targets = logits_case()
    student, teacher = student.to(dtype), teacher if kind in ORDERED else teacher.to(dtype)
    expected = reference_value(kind, arguments, student, teacher, targets)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            ours = LOSSES[kind](**arguments)(TokenChunk.from_logits(targets, student, teacher))
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@every_case
def test_settings_rebuild_the_loss(kind, arguments):
    """Prevents a run record or a card that names another loss than the one that was trained."""
    arguments = with_temperature(kind, arguments, 2.0)
    loss = LOSSES[kind](**arguments)
    described = loss.describe()
    assert described["kind"] == kind == LOSSES[kind].key
    again = LOSSES[described.pop("kind")](**described)
    student, teacher, targets = logits_case()
    chunk = TokenChunk.from_logits(targets, student, teacher)
    assert torch.equal(again(chunk), loss(chunk))
    assert all(_plain(loss.settings()[name]) == _plain(value) for name, value in arguments.items())


def _plain(value: object) -> object:
    return list(value) if isinstance(value, (list, tuple)) else value


@every_row_by_row_case
@both_temperatures
@pytest.mark.parametrize("kept", [6, VOCABULARY], ids=["top 6", "all"])
def test_sparse_teacher_is_measured_with_its_tail(kind, arguments, temperature, kept):
    """Prevents a top-k loss that lets the student put any mass outside k for nothing, or that falls below 0."""
    if not issubclass(LOSSES[kind], Divergence):
        return  # reads no teacher
    student, teacher, targets = logits_case()
    p = torch.log_softmax(teacher.double() / temperature, -1)
    ids = p.topk(kept, -1).indices
    rows = TopKRows(ids, p.gather(-1, ids).float(), VOCABULARY, temperature)
    loss = LOSSES[kind](**with_temperature(kind, arguments, temperature))
    if kind == "normalized_kd" and temperature != 1.0:
        with pytest.raises(ValueError, match="temperature"):  # what p(y) is at temperature 1 can't be known
            loss(TokenChunk(targets, student, rows))
        return
    exact = student.double().requires_grad_(True)
    expected = sparse_reference(kind, arguments, exact, teacher, targets, ids, temperature)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    student.requires_grad_(True)
    ours = loss(TokenChunk(targets, student, rows))
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    assert_live(gradient, expected_gradient)
    assert_near(ours, expected, 1e-5)
    assert_near(gradient, expected_gradient, 1e-4)


SECTIONS = ["Formula", "Args", "Reads", "Cost", "Undefined", "Paper", "Example"]


# ----------------------------------------------------------------------------------- what it is called


def _sections(kind: str) -> dict[str, str]:
    text = inspect.getdoc(LOSSES[kind]) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\s*$", text, flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


@every_loss
def test_docstring_says_what_every_loss_must_say(kind):
    """Prevents a loss whose direction, cost or bad spots one must read out of its code."""
    sections = _sections(kind)
    assert list(sections) == ["", *SECTIONS], (
        f"{kind}: sections are {list(sections)[1:]}, expected {SECTIONS} in this order"
    )
    assert all(sections[name].strip() for name in SECTIONS), f"{kind}: an empty section"
    first = sections[""].strip()
    assert first.startswith("Punishes ") and first.endswith("."), f"{kind}: the first sentence says what it punishes"
    assert "\n\n" not in first
    for argument in inspect.signature(LOSSES[kind].__init__).parameters:
        if argument not in ("self", "args", "kwargs"):
            assert f"{argument}:" in sections["Args"], f"{kind}: Args doesn't explain {argument!r}"
    assert "http" in sections["Paper"] or sections["Paper"].strip().startswith("None")


@every_loss
def test_docstring_example_runs(kind):
    """Prevents an example that a newcomer copies and that fails, or shows another number."""
    loss = LOSSES[kind]
    found = doctest.DocTestParser().get_doctest(
        inspect.getdoc(loss), dict(vars(inspect.getmodule(loss))), loss.__name__, None, None
    )
    assert any("round" in example.source or example.want for example in found.examples)
    runner, report = doctest.DocTestRunner(), []
    assert runner.run(found, out=report.append).failed == 0, "".join(report)


@every_loss
def test_the_key_is_the_name_of_the_class(kind):
    """Prevents a recipe key that names another measure than the class it builds."""
    assert issubclass(LOSSES[kind], TokenLoss)
    assert LOSSES[kind].__name__.lower() == kind.replace("_", "") and LOSSES[kind].key == kind
