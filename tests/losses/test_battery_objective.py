"""The battery, second half: every loss in `LOSSES` through the whole objective, against dense float64 autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from battery import (
    GROUP,
    ORDERED,
    ROWS,
    UNBOUNDED_IN_A_LOGIT,
    VOCABULARY,
    WIDTH,
    World,
    assert_live,
    assert_near,
    assert_reached,
    both_temperatures,
    company,
    every_case,
    every_row_by_row_case,
    only,
    with_temperature,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hfkd.losses import LOSSES
from hfkd.objective import build_objective
from hfkd.rows import DenseRows, Head, TopKRows
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk
from hfkd.terms import Term

# ------------------------------------------------------------------------- through the whole objective


@every_case
@both_temperatures
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_objective_equals_dense_autograd(kind, arguments, temperature, bias):
    """Prevents a gradient-in-forward that forgets a factor, a chunk, a bias or a head, or swaps the two models."""
    arguments = with_temperature(kind, arguments, temperature)
    world = World(bias=bias)
    expected, expected_gradients = world.reference(kind, arguments)
    result, gradients = world.ours(only(kind, arguments), chunk_size=5)
    assert_reached(kind, gradients)
    assert_reached(kind, expected_gradients)
    assert len(gradients) == 2 + bias and result.tokens == ROWS
    assert_near(result.total, expected, 1e-5)
    assert_near(torch.as_tensor(result.parts[kind]), expected, 1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert_near(ours, theirs, 1e-5)


@every_case
def test_chunk_size_changes_nothing(kind, arguments):
    """Prevents a loss that depends on a memory setting: the same run on another card would be another run."""
    world = World()
    outcomes = [world.ours(only(kind, arguments), chunk_size=size) for size in (1, 5, ROWS, ROWS + 1, None)]
    (first, first_gradients), *others = outcomes
    assert_reached(kind, first_gradients)
    for result, gradients in others:
        assert_near(result.total, first.total, 1e-5)
        for ours, theirs in zip(gradients, first_gradients, strict=True):
            assert_near(ours, theirs, 1e-5)


@every_case
def test_reading_a_chunk_in_blocks_changes_nothing(kind, arguments, monkeypatch):
    """Prevents a block that reads teacher, weights or targets of its neighbour (real vocabularies need blocks)."""
    world = World()
    expected, expected_gradients = world.reference(kind, arguments, weights=world.token_weights)
    for rows in (1, 3):
        monkeypatch.setattr("hfkd.chunks.BLOCK_VALUES", rows * VOCABULARY)
        result, gradients = world.ours(only(kind, arguments), chunk_size=7, weights=world.token_weights)
        assert_reached(kind, gradients)
        assert_near(result.total, expected, 1e-5)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            assert_near(ours, theirs, 1e-5)


@every_row_by_row_case
def test_sparse_teacher_reaches_the_objective_row_by_row(kind, arguments, monkeypatch):
    """Prevents cached rows that meet the tokens of another chunk or block."""
    world = World()
    log_probs, ids = torch.log_softmax(world.teacher_logits, -1).float().topk(6, -1)
    rows = TopKRows(ids, log_probs, VOCABULARY)
    monkeypatch.setattr("hfkd.chunks.BLOCK_VALUES", 2 * VOCABULARY)
    logits = (world.hidden @ world.weight.T + world.bias).detach()
    loss = LOSSES[kind](**arguments)
    by_group = torch.zeros(())
    for part in (slice(start, start + GROUP) for start in range(0, ROWS, GROUP)):
        theirs = replace(rows, ids=ids[part], log_probs=log_probs[part])
        by_group += loss(TokenChunk(world.targets[part], logits[part], theirs)).sum()
    for size in (1, 5, None):
        result = build_objective(only(kind, arguments), size)(
            DenseRows(world.hidden, Head(world.weight, world.bias)), TeacherSignal(rows), world.targets
        )
        assert_reached(kind, torch.autograd.grad(result.total, [world.hidden, world.weight, world.bias]))
        assert_near(result.total, by_group, 1e-5)


class _Sizes(TorchDispatchMode):
    """Collects the shape of every tensor that any operation allocates, inside custom backward functions too.

    Views of the tensors `known` before (a transposed weight, say) are no allocation.
    """

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known if tensor is not None}
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.seen.add(tuple(sorted(tensor.shape)))
        return out


@every_case
def test_frozen_head_gets_no_gradient_and_costs_none(kind, arguments):
    """Prevents a [V, H] gradient for a head that LoRA doesn't train, and an [N, V] tensor anywhere."""
    of_head, of_all_logits = (WIDTH, VOCABULARY), (ROWS, VOCABULARY)
    trained, frozen = World(), World(trained=False)
    with _Sizes(trained.weight) as sizes:
        _, expected = trained.ours(only(kind, arguments), chunk_size=5)
    assert of_head in sizes.seen, "guard: a head's gradient is seen where there is one"
    assert of_all_logits not in sizes.seen
    with _Sizes(frozen.weight) as sizes:
        result, gradients = frozen.ours(only(kind, arguments), chunk_size=5)
    assert gradients[1] is None and gradients[2] is None
    assert result.total.requires_grad
    assert_live(gradients[0], expected[0])
    assert_near(gradients[0], expected[0], 1e-6)
    assert any((rows, VOCABULARY) in sizes.seen for rows in (3, GROUP)) and not {of_head, of_all_logits} & sizes.seen


@every_case
def test_token_weights_multiply_each_token(kind, arguments):
    """Prevents weights that reach the value and not the gradient, or the wrong rows of a chunk."""
    world = World()
    world.token_weights[[0, 6]] = 0.0
    expected, expected_gradients = world.reference(kind, arguments, weights=world.token_weights)
    unweighted, _ = world.reference(kind, arguments)
    assert (expected - unweighted).abs() > 1e-3 * unweighted.abs()
    for size in (1, 5, ROWS):
        result, gradients = world.ours(only(kind, arguments), chunk_size=size, weights=world.token_weights)
        assert_reached(kind, gradients)
        assert_near(result.total, expected, 1e-5)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            assert_near(ours, theirs, 1e-5)


@every_case
def test_backward_scales_the_gradient(kind, arguments):
    """Prevents gradients that ignore what the trainer divides by or the loss scaler multiplies with."""
    world = World()
    _, full = world.ours(only(kind, arguments))
    full = [gradient.clone() for gradient in full]
    _, part = world.ours(only(kind, arguments), factor=0.125)
    assert_reached(kind, full)
    for ours, theirs in zip(part, full, strict=True):
        assert_near(ours, 0.125 * theirs, 1e-6)


@every_case
def test_term_weight_multiplies_total_and_not_parts(kind, arguments):
    """Prevents a logged term that silently holds its weight, and a weight that misses the gradient."""
    world = World()
    one, full = world.ours([Term(kind, LOSSES[kind](**arguments)), *company(kind, arguments)])
    full = [gradient.clone() for gradient in full]
    half, part = world.ours([Term(kind, LOSSES[kind](**arguments), weight=0.5), *company(kind, arguments)])
    assert_reached(kind, full)
    assert_near(half.total, 0.5 * one.total, 1e-6)
    assert_near(torch.as_tensor(half.parts[kind]), torch.as_tensor(one.parts[kind]), 1e-6)
    for ours, theirs in zip(part, full, strict=True):
        assert_near(ours, 0.5 * theirs, 1e-6)


@every_case
def test_no_rows_give_zero_and_still_take_part_in_backward(kind, arguments):
    """Prevents a fully masked rank that hangs the others, or divides 0 by 0."""
    world = World(rows=0)
    result, gradients = world.ours(only(kind, arguments))
    assert result.total.requires_grad and result.total.item() == 0.0 and result.tokens == 0
    assert float(result.parts[kind]) == 0.0
    for gradient, leaf in zip(gradients, (world.hidden, world.weight, world.bias), strict=True):
        assert gradient is not None and gradient.shape == leaf.shape and (gradient == 0).all()


@every_case
def test_value_without_a_graph(kind, arguments):
    """Prevents an evaluation under `no_grad` that fails, or that reports another number than training."""
    world = World()
    trained, _ = world.ours(only(kind, arguments))
    with torch.no_grad():
        evaluated = build_objective(only(kind, arguments))(
            DenseRows(world.hidden, Head(world.weight, world.bias)),
            TeacherSignal(DenseRows(world.teacher_hidden, Head(world.teacher_weight))),
            world.targets,
        )
    assert not evaluated.total.requires_grad
    assert_near(evaluated.total, trained.total, 1e-6)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_objective_in_half_precision_follows_the_definition(kind, arguments, dtype):
    """Prevents half precision beyond the models' own: the same rounded inputs must give nearly the exact gradients."""
    world = World(dtype=dtype, teacher_dtype=torch.float32 if kind in ORDERED else dtype)
    expected, expected_gradients = world.reference(kind, arguments)
    rounding = torch.finfo(dtype).eps * (2 if kind == "span_correlation" else 1)  # a product of two rows, squared
    result, gradients = world.ours(only(kind, arguments), chunk_size=5)
    assert result.total.dtype == torch.float32
    assert_reached(kind, gradients)
    assert all(gradient.dtype == dtype for gradient in gradients)
    assert_near(result.total, expected, rounding)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert_near(ours, theirs, 3 * rounding)


@every_case
def test_half_precision_states_with_a_float32_head(kind, arguments):
    """Prevents mixed precision, the default of most users, from failing on dtypes or rounding the head's gradient."""
    whole, world = World(dtype=torch.bfloat16), World()
    world.hidden = whole.hidden
    world.teacher_hidden = whole.teacher_hidden
    world.weight = whole.weight.detach().float().requires_grad_(True)
    world.teacher_weight = whole.teacher_weight.float()
    world.bias = whole.bias.detach().float().requires_grad_(True)
    result, gradients = world.ours(only(kind, arguments), chunk_size=5)
    expected, expected_gradients = whole.ours(only(kind, arguments), chunk_size=5)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    assert_reached(kind, gradients)
    assert_reached(kind, expected_gradients)
    rounding = torch.finfo(torch.bfloat16).eps
    assert_near(result.total, expected.total, rounding)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert_near(ours, theirs, 3 * rounding)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_objective_is_finite_at_extreme_and_ruled_out_logits(kind, arguments, dtype):
    """Prevents the first certain token, or a head bias of minus infinity on padded ids, from ending a run in NaN."""
    width = 6
    logits = torch.zeros(6, width)
    logits[0, 0], logits[1, 1], logits[3, :2], logits[4, 0] = 200.0, 200.0, 100.0, -100.0
    logits[2] = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, 1.5])
    logits[5] = torch.linspace(0.5, 0.0, width)
    others = logits[[1, 0, 3, 4, 5, 2]] / 10
    hidden = (logits / 10).to(dtype).requires_grad_(True)  # states and weights share the gap of 200, as in a model
    weight = (10 * torch.eye(width)).to(dtype).requires_grad_(True)
    closed = torch.zeros(width, dtype=dtype)
    closed[-1] = -50.0 if kind in UNBOUNDED_IN_A_LOGIT else -torch.inf
    for student_bias in (None, closed):
        result = build_objective(only(kind, arguments))(
            DenseRows(hidden, Head(weight, student_bias)),
            TeacherSignal(DenseRows(others.to(dtype), Head((10 * torch.eye(width)).to(dtype), closed))),
            torch.tensor([1, 1, 2, 0, 3, 4]),
        )
        gradients = torch.autograd.grad(result.total, [hidden, weight])
        assert torch.isfinite(result.total) and result.total > 0
        assert_reached(kind, gradients)
