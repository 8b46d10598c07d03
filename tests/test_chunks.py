"""The chunk runner: who reads which rows, what is never made, and the walk inside a wrapped forward."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hfkd import chunks as chunks_module
from hfkd.batch import IGNORE
from hfkd.distributed import is_main_process, run_inside, total_over_processes
from hfkd.losses import LOSSES
from hfkd.objective import Objective, build_objective
from hfkd.plan import CHUNK_BYTES, SHARE_OF_FREE_MEMORY, plan_chunks, rows_that_fit
from hfkd.rows import DenseRows, Head, RowLayout
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk
from hfkd.terms import Term

LABELS = torch.full((4, 12), IGNORE)
LABELS[0, 3:8], LABELS[1, 9:10], LABELS[3, 2:6], LABELS[3, 8:11] = 5, 6, 7, 8
LAYOUT = RowLayout.of(LABELS)
ROWS = len(LAYOUT)  # 5 + 1 + 0 + 7


def sinkhorn(**settings) -> Term:
    """A term that compares rows, named after its grouping."""
    return Term(str(settings), LOSSES["sinkhorn"](**settings))


def free(kind: str = "forward_kl", weight: float = 1.0) -> Term:
    """A term that reads each row alone."""
    return Term(kind, LOSSES[kind](), weight)


TERMS = {
    "free": [free()],
    "two free": [free(), free("cross_entropy")],
    "tokens": [sinkhorn(group_size=4), free()],
    "sequence": [free(), sinkhorn(mode="sequence")],
    "batch": [sinkhorn(mode="batch"), free("cross_entropy")],
    "grouped only": [sinkhorn(mode="sequence", alone=True)],
    "two groupings": [sinkhorn(mode="sequence"), sinkhorn(mode="batch"), free()],
    "three groupings": [sinkhorn(group_size=3), sinkhorn(mode="batch"), sinkhorn(mode="sequence"), free()],
    "one grouping twice": [sinkhorn(mode="sequence"), sinkhorn(mode="sequence", epsilon=0.5), free()],
}
every_plan = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
SIZES = (1, 2, 5, ROWS, ROWS + 1, None)


def indices(rows: slice | Tensor) -> Tensor:
    """The rows of a chunk as numbers."""
    return torch.arange(ROWS)[rows]


@every_plan
@pytest.mark.parametrize("size", SIZES)
def test_every_term_reads_every_row_once(terms, size):
    """Prevents rows that a term never sees or sees twice, which a loss that is merely a little wrong would hide."""
    seen = [[] for _ in terms]
    for chunk in plan_chunks(terms, LAYOUT, size or ROWS):
        rows = indices(chunk.rows)
        for members, blocks in ((reader.members, reader.blocks) for reader in chunk.readers):
            for block in blocks if blocks is not None else [slice(0, len(rows))]:
                for member in members:
                    seen[member] += rows[block].tolist()
    for member, rows in enumerate(seen):
        assert sorted(rows) == list(range(ROWS)), terms[member].name


@every_plan
@pytest.mark.parametrize("size", SIZES)
def test_a_group_is_read_whole_and_alone(terms, size):
    """Prevents a transport between half a group and a stranger, because a chunk ended there."""
    for chunk in plan_chunks(terms, LAYOUT, size or ROWS):
        rows = indices(chunk.rows)
        for members, blocks in ((reader.members, reader.blocks) for reader in chunk.readers):
            for member in members:
                groups = terms[member].loss.groups(LAYOUT)
                if groups is None:
                    assert blocks is None
                    continue
                for block in blocks:
                    (group,) = groups[rows[block]].unique().tolist()
                    assert sorted(rows[block].tolist()) == (groups == group).nonzero()[:, 0].tolist()


@every_plan
@pytest.mark.parametrize("size", [1, 2, 5])
def test_no_chunk_is_larger_than_asked_for(terms, size):
    """Prevents an out-of-memory that `chunk_size` was to prevent; a group that is larger is a chunk of its own."""
    for chunk in plan_chunks(terms, LAYOUT, size or ROWS):
        grouped = [reader.blocks for reader in chunk.readers if reader.blocks is not None]
        largest = max((block.stop - block.start for block in grouped[0]), default=0) if grouped else 0
        assert len(indices(chunk.rows)) <= max(size, largest)
        assert largest <= size or len(grouped[0]) == 1


def test_terms_with_the_same_groups_share_a_projection():
    """Prevents a second multiplication with the vocabulary for rows that were just projected."""
    together = plan_chunks(TERMS["one grouping twice"], LAYOUT, ROWS)
    assert len(together) == 1
    assert [reader.members for reader in together[0].readers] == [[0, 1], [2]]
    assert len(plan_chunks(TERMS["two groupings"], LAYOUT, ROWS)) == 2


def test_chunks_are_of_nearly_one_size():
    """Prevents a last chunk of one row, whose projection takes as long as that of many."""
    layout = RowLayout.single(101, torch.device("cpu"))
    sizes = [chunk.rows.stop - chunk.rows.start for chunk in plan_chunks([free()], layout, 50)]
    assert sum(sizes) == 101 and len(sizes) == 3 and max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize("vocabulary", [384, 49_152, 151_936, 262_144])
def test_the_chosen_size_keeps_to_its_memory(vocabulary):
    """Prevents a default that runs out of memory with Gemma's vocabulary, or projects row by row."""
    cpu = torch.device("cpu")
    size = rows_that_fit(vocabulary, cpu)
    assert size >= 16 and size & (size - 1) == 0  # a power of two: memory doesn't wobble with the number of rows
    assert size * vocabulary * 2 * 4 <= CHUNK_BYTES["cpu"] or size == 16


def test_the_chosen_size_shrinks_with_the_free_memory(monkeypatch):
    """Prevents a default that takes what isn't there, on a machine that is nearly full."""
    cpu, plenty = torch.device("cpu"), rows_that_fit(49_152, torch.device("cpu"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=SHARE_OF_FREE_MEMORY * 2**26))
    assert 16 <= rows_that_fit(49_152, cpu) < plenty
    assert rows_that_fit(49_152, cpu) * 49_152 * 8 <= 2**26


@every_plan
def test_no_rows_make_a_plan(terms):
    """Prevents a crash on a micro-batch whose labels are all masked: the other processes wait for its gradient."""
    layout = RowLayout.of(torch.full((2, 5), IGNORE))
    for chunk in plan_chunks(terms, layout, 4):
        assert len(torch.arange(0)[chunk.rows]) == 0


# --------------------------------------------------------------------- the same number by hand


def world(seed: int = 0, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """Student and teacher rows over 29 ids, targets and weights; the student has gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return SimpleNamespace(
        hidden=draw(ROWS, 6).requires_grad_(True),
        weight=draw(29, 6).requires_grad_(True),
        theirs=draw(ROWS, 6),
        their_weight=draw(29, 6),
        targets=torch.randint(29, (ROWS,), generator=generator),
        weights=torch.rand(ROWS, generator=generator) + 0.5,
    )


def by_objective(objective: Objective, it: SimpleNamespace, **more) -> tuple:
    """The result, and the gradients of hidden states and head."""
    result = objective(
        DenseRows(it.hidden, Head(it.weight)),
        TeacherSignal(DenseRows(it.theirs, Head(it.their_weight))),
        it.targets,
        it.weights,
        LAYOUT,
        **more,
    )
    return result, torch.autograd.grad(result.total, [it.hidden, it.weight])


def by_hand(terms: list[Term], it: SimpleNamespace) -> tuple[Tensor, list[Tensor]]:
    """Each group by itself, cut out of whole logits by autograd: no chunk, no order, no buffer."""
    student, teacher = it.hidden @ it.weight.T, it.theirs @ it.their_weight.T
    total = torch.zeros(())
    for term in terms:
        groups = term.loss.groups(LAYOUT)
        groups = torch.arange(ROWS) if groups is None else groups
        for group in groups.unique():
            rows = (groups == group).nonzero()[:, 0]
            values = term.loss(TokenChunk(it.targets[rows], student[rows], teacher[rows]))
            total = total + term.weight * (values * it.weights[rows]).sum()
    return total.detach(), list(torch.autograd.grad(total, [it.hidden, it.weight]))


@every_plan
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block_values", [60, chunks_module.BLOCK_VALUES], ids=["blocks of two", "one block"])
def test_every_plan_gives_the_number_of_the_definition(terms, size, block_values, monkeypatch):
    """Prevents groupings, chunk sizes, blocks or company from changing value or gradient: rows of sequences with gaps,
    an empty sequence and token weights included.
    """
    monkeypatch.setattr(chunks_module, "BLOCK_VALUES", block_values)
    it = world()
    total, gradients = by_hand(terms, it)
    result, found = by_objective(Objective(terms, size), it)
    assert result.tokens == ROWS and list(result.parts) == [term.name for term in terms]
    assert result.total.item() == pytest.approx(total.item(), rel=1e-5)
    for ours, theirs in zip(found, gradients, strict=True):
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@every_plan
def test_agreement_is_counted_once_whatever_reads_the_rows(terms):
    """Prevents an agreement above 100 %, or of one grouping's first chunk only."""
    it = world()
    it.theirs[2:8], it.their_weight = 1.3 * it.hidden[2:8].detach(), it.weight.detach().clone()
    agreed = ((it.hidden @ it.weight.T).argmax(-1) == (it.theirs @ it.their_weight.T).argmax(-1)).sum()
    assert 6 <= agreed < ROWS
    for size in SIZES:
        result, _ = by_objective(Objective(terms, size), it, measure_agreement=True)
        assert int(result.agreed) == int(agreed)
    assert by_objective(Objective(terms), it)[0].agreed is None


def test_rows_in_any_order_cost_the_same():
    """Prevents gradients that go back to other rows than they came from, where groups reorder them."""
    it, terms = world(), TERMS["three groupings"][1:]  # token groups do depend on the order
    _, (hidden, weight) = by_objective(Objective(terms, 2), it)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    layout = RowLayout(LAYOUT.sequence[order], LAYOUT.position[order])
    moved = it.hidden.detach()[order].requires_grad_(True)
    result = Objective(terms, 2)(
        DenseRows(moved, Head(it.weight)),
        TeacherSignal(DenseRows(it.theirs[order], Head(it.their_weight))),
        it.targets[order],
        it.weights[order],
        layout,
    )
    found, found_weight = torch.autograd.grad(result.total, [moved, it.weight])
    torch.testing.assert_close(found, hidden[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_weight, weight, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ what is never made


class Watch(TorchDispatchMode):
    """Notes the most rows that any tensor over the vocabulary has, and the number of products with the head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.largest, self.projections = vocabulary, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            if self.vocabulary in result.shape and 4 not in result.shape:  # not the head's own [V, H = 4]
                self.largest = max(self.largest, result.numel() // self.vocabulary)
            self.projections += "aten.mm" in str(function) and result.shape[-1] == self.vocabulary
        return result


@pytest.mark.parametrize("kind", ["forward_kl", "jensen_shannon", "cross_entropy"])
def test_no_tensor_of_all_rows_by_all_ids_is_made(kind):
    """Prevents the [N, V] logits, the largest tensor of distillation, from coming back through a loss or a backward,
    and chunks from being projected a second time in the backward pass.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(64, 4, generator=generator) for _ in range(2))
    weight, their_weight = (torch.randn(50, 4, generator=generator) for _ in range(2))
    student = DenseRows(hidden.requires_grad_(True), Head(weight.requires_grad_(True)))
    signal = TeacherSignal(DenseRows(theirs, Head(their_weight)))
    with Watch(vocabulary=50) as watch:
        build_objective(kind, 8)(student, signal, torch.zeros(64, dtype=torch.long)).total.backward()
    assert hidden.grad.abs().max() > 1e-2 and weight.grad.abs().max() > 1e-2
    assert watch.largest == 8
    # Eight chunks, the student's and, where a term reads it, the teacher's.
    assert watch.projections == (16 if LOSSES[kind].needs else 8)


def test_autocast_around_the_objective_changes_nothing():
    """Prevents the trainer's autocast from rounding log-probabilities to bfloat16."""
    it = world()
    expected, gradients = by_objective(build_objective("forward_kl", 4), it)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, found = by_objective(build_objective("forward_kl", 4), it)
    assert torch.equal(result.total, expected.total)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, gradients, strict=True))


def test_strided_states_are_read_as_they_are():
    """Prevents a wrong gradient for hidden states that are a view of something larger."""
    it = world()
    expected, gradients = by_objective(build_objective("forward_kl", 4), it)
    wide = torch.randn(6, ROWS).requires_grad_(True)
    with torch.no_grad():
        wide.copy_(it.hidden.T)
    it.hidden = wide
    strided = SimpleNamespace(**{**vars(it), "hidden": wide.T})
    assert not strided.hidden.is_contiguous()
    result, found = by_objective(build_objective("forward_kl", 4), strided)
    assert result.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ gradients by hand


def test_backward_twice_is_refused():
    """Prevents a second backward from handing out gradients that were scaled by the first one."""
    it = world()
    total = build_objective("forward_kl")(
        DenseRows(it.hidden, Head(it.weight)), TeacherSignal(DenseRows(it.theirs, Head(it.their_weight))), it.targets
    ).total
    total.backward(retain_graph=True)
    first = it.hidden.grad.clone()
    assert first.abs().max() > 1e-2
    with pytest.raises(RuntimeError, match="Call the objective again"):
        total.backward()
    assert torch.equal(it.hidden.grad, first)


def test_two_objectives_do_not_share_buffers():
    """Prevents gradient accumulation from losing a micro-batch, when two are walked before either goes backward."""
    first, second = world(0), world(1)
    second.weight = first.weight
    expected = [by_objective(build_objective("forward_kl", 4), it)[1] for it in (first, second)]
    objective = build_objective("forward_kl", 4)
    totals = [
        objective(
            DenseRows(it.hidden, Head(it.weight)),
            TeacherSignal(DenseRows(it.theirs, Head(it.their_weight))),
            it.targets,
            it.weights,
        ).total
        for it in (first, second)
    ]
    (totals[0] + 3 * totals[1]).backward()
    for it, (hidden, _), factor in zip((first, second), expected, (1, 3), strict=True):
        torch.testing.assert_close(it.hidden.grad, factor * hidden)
    torch.testing.assert_close(first.weight.grad, expected[0][1] + 3 * expected[1][1])


@pytest.mark.parametrize("learning", ["hidden", "weight", "neither"])
def test_only_what_learns_gets_a_gradient(learning):
    """Prevents a [V, H] gradient for a frozen head (LoRA), and a graph where nothing learns."""
    it = world()
    whole = dict(zip(("hidden", "weight"), by_objective(build_objective("forward_kl", 4), it)[1], strict=True))
    it = world()
    for name in ("hidden", "weight"):
        getattr(it, name).requires_grad_(name == learning)
    total = build_objective("forward_kl", 4)(
        DenseRows(it.hidden, Head(it.weight)),
        TeacherSignal(DenseRows(it.theirs, Head(it.their_weight))),
        it.targets,
        it.weights,
    ).total
    assert total.requires_grad == (learning != "neither")
    if learning != "neither":
        total.backward()
        torch.testing.assert_close(getattr(it, learning).grad, whole[learning])
    assert all(getattr(it, name).grad is None for name in ("hidden", "weight") if name != learning)


def test_many_chunks_in_bfloat16_are_no_worse_than_one():
    """Prevents a head gradient that depends on the chunk size in bfloat16: its running sum must be wider than its
    weights.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(512, 8, generator=generator).bfloat16() for _ in range(2))
    weight, their_weight = (torch.randn(16, 8, generator=generator).bfloat16() for _ in range(2))
    hidden = hidden.abs()  # of one sign, so that the shares of the rows add up
    targets = torch.randint(16, (512,), generator=generator)

    def gradient(size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        head = weight.detach().clone().to(dtype).requires_grad_(True)
        build_objective("reverse_kl", size)(
            DenseRows(hidden.to(dtype), Head(head)),
            TeacherSignal(DenseRows(theirs.to(dtype), Head(their_weight.to(dtype)))),
            targets,
        ).total.backward()
        assert head.grad.dtype == dtype
        return head.grad.double()

    exact, many, one = gradient(512, torch.float64), gradient(1), gradient(512)
    naive = torch.zeros(16, 8, dtype=torch.bfloat16)
    for row in range(512):
        logits = (hidden[row] @ weight.T).float().requires_grad_(True)
        difference = logits.log_softmax(-1) - (theirs[row] @ their_weight.T).float().log_softmax(-1)
        (share,) = torch.autograd.grad((logits.softmax(-1) * difference).sum(), logits)
        naive += torch.outer(share.bfloat16(), hidden[row])
    scale = exact.abs().max()
    assert scale > 10
    assert (many - one).abs().max() <= 1e-2 * scale
    assert (many - exact).norm() < 0.5 * (naive.double() - exact).norm()


# ----------------------------------------------------------------------- inside the wrapped forward


class Wrapper(nn.Module):
    """Stands for DDP: it must see every forward, and calls what it wraps."""

    def __init__(self, module: nn.Module, fail: str = "") -> None:
        super().__init__()
        self.module, self.fail, self.inside, self.calls = module, fail, False, 0

    def forward(self, *args, **kwargs):
        """Note that it is under way."""
        self.calls += 1
        self.inside = True
        try:
            if self.fail == "before":
                raise RuntimeError("before")
            return None if self.fail == "skip" else self.module(*args, **kwargs)
        finally:
            self.inside = False


def test_work_runs_inside_the_wrapper_and_may_call_the_module():
    """Prevents DDP from sleeping through a step: its hooks are armed by its own forward, and ranks drift apart
    without them.
    """
    wrapper = Wrapper(nn.Linear(2, 3))

    def work(factor: float, states: Tensor) -> Tensor:
        assert wrapper.inside
        assert "forward" not in wrapper.module.__dict__  # the original is back by then
        return factor * wrapper.module(states)

    states = torch.randn(4, 2)
    result = run_inside(wrapper, wrapper.module, work, 2.0, states)
    assert torch.equal(result, 2.0 * wrapper.module(states))
    assert wrapper.calls == 1 and "forward" not in wrapper.module.__dict__
    assert torch.equal(wrapper(states), wrapper.module(states))


def test_without_a_wrapper_it_is_a_plain_call():
    """Prevents a single process from paying for a redirection, or from losing its own `forward`."""
    module = nn.Linear(2, 3)
    assert run_inside(module, module, lambda first, second: first + second, 1, 2) == 3
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("fail", ["inside", "before", "skip"])
def test_the_forward_is_back_after_an_error(fail):
    """Prevents a failed batch from leaving a model whose forward is somebody else's function."""
    wrapper = Wrapper(nn.Linear(2, 3), fail)

    def work(states: Tensor) -> Tensor:
        raise RuntimeError("inside")

    states = torch.randn(4, 2)
    if fail == "skip":
        assert run_inside(wrapper, wrapper.module, work, states) is None
    else:
        with pytest.raises(RuntimeError, match=fail):
            run_inside(wrapper, wrapper.module, work, states)
    assert "forward" not in wrapper.module.__dict__
    assert wrapper.module(states).shape == (4, 3)


@pytest.mark.parametrize("error", [False, True])
def test_a_forward_of_the_instance_is_kept(error):
    """Prevents Accelerate's own patch of `forward` (mixed precision) from being dropped after the first step."""
    wrapper = Wrapper(nn.Linear(2, 3))
    calls: list[str] = []
    original = wrapper.module.forward

    def patched(states: Tensor) -> Tensor:
        calls.append("patched")
        return original(states)

    wrapper.module.forward = patched

    def work(states: Tensor) -> Tensor:
        result = wrapper.module(states)
        if error:
            raise RuntimeError("late")
        return result

    states = torch.randn(4, 2)
    if error:
        with pytest.raises(RuntimeError, match="late"):
            run_inside(wrapper, wrapper.module, work, states)
    else:
        run_inside(wrapper, wrapper.module, work, states)
    assert calls == ["patched"]
    assert wrapper.module.__dict__["forward"] is patched


def test_hooks_of_the_module_see_the_work_too():
    """Prevents FSDP, whose hooks sit on the module itself, from gathering its parameters for nobody."""
    wrapper, seen = Wrapper(nn.Linear(2, 3)), []
    wrapper.module.register_forward_pre_hook(lambda *_: seen.append("before"))
    wrapper.module.register_forward_hook(lambda *_: seen.append("after"))
    run_inside(wrapper, wrapper.module, lambda: seen.append("work"))
    assert seen == ["before", "work", "after"]


def test_one_process_counts_for_itself():
    """Prevents a collective, and a hang, where there is nobody to talk to."""
    total = total_over_processes(7, torch.device("cpu"))
    assert total.dtype == torch.float64 and total.item() == 7.0 and is_main_process()


def test_small_blocks_cover_a_chunk(monkeypatch):
    """Prevents rows at the end of a chunk from being read by no loss, when a chunk is read in blocks."""
    for values in (1, 29, 60, 10**6):
        monkeypatch.setattr(chunks_module, "BLOCK_VALUES", values)
        blocks = list(chunks_module._small_blocks(torch.zeros(11, 29)))
        assert blocks[0].start == 0 and blocks[-1].stop == 11
        assert all(one.stop == two.start for one, two in pairwise(blocks))
