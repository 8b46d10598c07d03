"""Hidden states on their way out of a model: the right layer, the right position, with the gradient that belongs to
them, and nothing left behind in the model.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate import Accelerator
from architectures import tiny
from conftest import make_model
from peft import LoraConfig, get_peft_model
from test_prefix import view_of
from torch import Tensor, nn

from hfkd.batch import Batch, View
from hfkd.errors import StateError, UnsupportedCache
from hfkd.rows import base_model_of, decode, supervised
from hfkd.signal import DISTRIBUTION, NEEDS, STATES, TeacherSignal
from hfkd.states import Recorder, block_list, recording, state_count, state_width
from hfkd.teachers import LocalTeacher, SelfTeacher, Teacher

ARCHITECTURES = ("llama", "gpt2", "gptj", "granite", "cohere", "gemma2", "gemma3_text", "falcon_h1", "mistral", "phi")
LONG = [3 + (7 * place) % 90 for place in range(40)]


@pytest.fixture
def accelerator() -> Accelerator:
    """On the CPU."""
    return Accelerator(cpu=True)


def student(*, train: bool = True, **settings) -> nn.Module:
    """A PEFT model whose adapter is not zero, as after some steps."""
    torch.manual_seed(11)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config |= {"init_lora_weights": False, **settings}
    return get_peft_model(make_model(num_hidden_layers=3), LoraConfig(**config)).train(train)


def recorded(model: nn.Module, layers, view: View | None = None) -> dict[int, Tensor]:
    """The states of one run of the decoder."""
    view = view_of() if view is None else view
    with recording(model, layers) as recorder:
        last = decode(model, view.input_ids, view.attention_mask, view.position_ids).last_hidden_state
    return recorder.finish(last)


def by_transformers(model: nn.Module, view: View) -> tuple[Tensor, ...]:
    """All states as transformers numbers them."""
    given = {"input_ids": view.input_ids, "attention_mask": view.attention_mask, "position_ids": view.position_ids}
    with torch.no_grad():
        return model(**given, output_hidden_states=True).hidden_states


def hooks_of(model: nn.Module) -> int:
    """How many hooks hang on the model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def checkpointing(model: nn.Module, reentrant: bool) -> nn.Module:
    """The model with activation checkpointing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its newer name is not in every version that is supported
        base_model_of(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def gradients(model: nn.Module, layers=(1, 2)) -> tuple[dict[int, Tensor], list[Tensor]]:
    """The states, and what a cost on them alone teaches each parameter."""
    model.zero_grad()
    states = recorded(model, layers)
    sum(state.square().mean() for state in states.values()).backward()
    learned = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return {layer: state.detach() for layer, state in states.items()}, learned


# ------------------------------------------------------------------------------------------ the right layer


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_layer_is_what_transformers_returns(kind, side):
    """Prevents states that are off by a layer, or taken before or behind a norm, in a single architecture."""
    model, view = tiny(kind, num_hidden_layers=3) if kind not in ("gpt2", "gptj") else tiny(kind), view_of(side)
    count = state_count(model)
    theirs = by_transformers(model, view)
    hooks = hooks_of(model)  # transformers leaves its own behind
    with torch.no_grad():
        ours = recorded(model, range(count + 1), view)
    assert list(ours) == [*range(count + 1)] and len(theirs) == count + 1 == len(block_list(model)) + 1
    real = view.attention_mask.bool()
    for layer, state in ours.items():
        assert state.shape[-1] == state_width(model)
        torch.testing.assert_close(state[real], theirs[layer][real], rtol=0, atol=0)
    apart = [(ours[layer] - ours[layer + 1])[real].abs().max() > 1e-3 for layer in range(count)]
    assert all(apart), "equal layers would hide a shift"
    assert hooks_of(model) == hooks


def test_an_architecture_without_embeddings_in_its_states_is_numbered_alike():
    """Prevents one number from meaning two layers: Mamba of transformers begins to count behind the first block."""
    model, view = tiny("mamba", num_hidden_layers=3), view_of()
    with torch.no_grad():
        ours = recorded(model, range(4), view)
    theirs = by_transformers(model, view)
    assert torch.equal(ours[1], theirs[0]) and torch.equal(ours[2], theirs[1]) and torch.equal(ours[3], theirs[-1])
    assert torch.equal(ours[0], model.get_input_embeddings()(view.input_ids))


def test_only_the_layers_asked_for_are_kept():
    """Prevents the memory of every layer from being paid for one."""
    model = make_model(num_hidden_layers=4)
    hooks = hooks_of(model)
    with recording(model, [3, 1, 3]) as recorder:
        assert hooks_of(model) == hooks + 2
        last = decode(model, *_inputs()).last_hidden_state
        assert sorted(recorder._kept) == [1, 3]
    assert list(recorder.finish(last)) == [1, 3]
    assert not recorder._kept


@pytest.mark.parametrize("layers", [[], [4]], ids=["none", "last"])
def test_no_hook_where_none_is_needed(layers, monkeypatch):
    """Prevents models whose blocks can't be found from being refused for losses that don't read them."""
    monkeypatch.setattr("hfkd.states.block_list", lambda model: pytest.fail("looked for blocks"))
    model = make_model(num_hidden_layers=4)
    with recording(model, layers) as recorder:
        assert hooks_of(model) == 0
        last = decode(model, *_inputs()).last_hidden_state
    assert [*recorder.finish(last)] == layers
    assert all(state is last for state in recorder.finish(last).values())


def test_hooks_are_gone_after_an_error():
    """Prevents a failed batch that is caught from leaving hooks that hold the memory of every later step."""
    model = make_model()
    with pytest.raises(RuntimeError, match="stop"), recording(model, [0, 1]):
        assert hooks_of(model) == 2
        raise RuntimeError("stop")
    assert hooks_of(model) == 0


def test_the_latest_run_counts():
    """Prevents states of a prefix, or of another batch, from being compared with those of this one."""
    model, one, two = make_model(), view_of(), view_of("left", extra=2)
    with torch.no_grad(), recording(model, [0, 1]) as recorder:
        decode(model, one.input_ids, one.attention_mask, one.position_ids)
        last = decode(model, two.input_ids, two.attention_mask, two.position_ids).last_hidden_state
    states = recorder.finish(last)
    with torch.no_grad():
        expected = recorded(model, [0, 1], two)
    assert all(torch.equal(states[layer], expected[layer]) for layer in (0, 1))


def test_an_adapter_is_looked_through():
    """Prevents a PEFT student from being refused, or read below its adapter."""
    model = student(train=False)
    view = view_of()
    with torch.no_grad():
        ours = recorded(model, range(4), view)
    theirs = by_transformers(model, view)
    for layer, state in ours.items():
        assert torch.equal(state, theirs[layer])
    with torch.no_grad():
        base = recorded(make_model(num_hidden_layers=3), [1], view)
    assert (ours[1] - base[1]).abs().max() > 0.1
    assert state_count(model) == 3 and state_width(model) == 32
    assert block_list(model) is model.get_base_model().model.layers


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("make", [make_model, student], ids=["full", "adapter"])
def test_checkpointing_changes_neither_states_nor_gradients(make):
    """Prevents a second run of a block in the backward pass from replacing states, or from losing their gradient."""
    states, learned = gradients(make().train())
    again, relearned = gradients(checkpointing(make(), reentrant=False))
    assert learned and any(gradient.abs().max() > 1e-4 for gradient in learned) and len(learned) == len(relearned)
    for layer, state in states.items():
        assert torch.equal(state, again[layer])
    for one, two in zip(learned, relearned, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_a_layer_teaches_what_lies_below_it_only():
    """Prevents a state that is detached, or one of a later layer."""
    model = make_model(num_hidden_layers=3).train()
    gradients(model, layers=(2,))
    touched = [any(parameter.grad is not None for parameter in block.parameters()) for block in block_list(model)]
    assert touched == [True, True, False]
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_reentrant_checkpointing_that_cuts_the_gradient_is_refused():
    """Prevents a term that is logged, looks alive and teaches nothing."""
    model = checkpointing(make_model(), reentrant=True)
    model.disable_input_require_grads()
    model.get_input_embeddings().requires_grad_(False)
    with pytest.warns(UserWarning, match="requires_grad"), pytest.raises(StateError, match="use_reentrant.*False"):
        recorded(model, [1])
    assert hooks_of(model) == 0
    with torch.no_grad():
        assert not recorded(model, [1])[1].requires_grad


def test_reentrant_checkpointing_that_keeps_the_gradient_is_right():
    """Prevents a refusal, or a wrong gradient, where nothing is cut."""
    states, learned = gradients(make_model().train())
    try:
        again, relearned = gradients(checkpointing(make_model(), reentrant=True))
    except StateError:
        return  # versions of transformers that run hooks inside the checkpoint
    assert all(torch.equal(state, again[layer]) for layer, state in states.items())
    for one, two in zip(learned, relearned, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_a_layer_below_everything_that_learns_is_no_fault():
    """Prevents adapters on upper layers only, or frozen embeddings, from being taken for a cut gradient."""
    model = student(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    states = recorded(model, [0, 1, 2, 3])
    assert [state.requires_grad for state in states.values()] == [False, False, True, True]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_named(layer):
    """Prevents Python's negative indices, or a KeyError in the middle of a step."""
    with pytest.raises(StateError, match=rf"0 \(embeddings\) to 2 .*\[{layer}\]"):
        Recorder(make_model(), [1, layer])


def test_a_model_without_a_list_of_blocks_is_refused():
    """Prevents hooks on whatever list comes first."""
    model = make_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(StateError, match="7 blocks.*none"):
        block_list(model)
    model.config.num_hidden_layers = 2
    model.model.more = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(StateError, match="layers.*more"):
        block_list(model)


def test_the_list_nearest_to_the_top_is_the_decoders():
    """Prevents the experts of a block, which may be as many as there are blocks, from being taken for blocks."""
    model = make_model()
    for block in model.model.layers:
        block.experts = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert block_list(model) is model.model.layers


def test_a_state_of_another_shape_is_refused():
    """Prevents rows of a layer that doesn't keep one state a token from being compared with those of one that does."""
    model = make_model()
    with recording(model, [1]) as recorder:
        decode(model, *_inputs())
    with pytest.raises(StateError, match="Layer 1 of LlamaForCausalLM left the shape"):
        recorder.finish(torch.zeros(1, 1, 32))
    with recording(model, [1]) as recorder:
        pass
    with pytest.raises(StateError, match="None"):
        recorder.finish(torch.zeros(1, 1, 32))


# ------------------------------------------------------------------------------------------------ teachers


def batch_of(side: str = "right") -> Batch:
    """The student reads three questions; the teacher reads them behind demonstrations."""
    return Batch(view_of(side, prefix=[4]), view_of(side, prefix=LONG))


def expected_states(model: nn.Module, batch: Batch) -> list[Tensor]:
    """What transformers returns of the teacher's view, supervised rows only."""
    view = batch.teacher_view
    return [supervised(state, view.labels) for state in by_transformers(model.eval(), view)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("share", [False, True], ids=["whole", "prefix"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi"])
def test_a_teacher_shows_its_supervised_rows(accelerator, kind, share, side):
    """Prevents states that stand beside other tokens than the distributions do, with and without a shared prefix."""
    teacher, batch = LocalTeacher(tiny(kind, seed=3)), batch_of(side)
    teacher.prepare(accelerator, make_model())
    if share:
        teacher.share_prefix(LONG)
    teacher.keep_states([2, 0, 1, 1])
    for _ in range(2):  # the prefix is run in the first, and found in the second
        signal = teacher.signal(batch, NEEDS)
        assert list(signal.states) == [0, 1, 2]
        for layer, expected in enumerate(expected_states(teacher.model, batch)):
            assert expected.abs().max() > 0.1 and not signal.states[layer].requires_grad
            torch.testing.assert_close(signal.states[layer], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(signal.states[2], signal.rows.hidden)
    assert (teacher.prefix is not None and teacher.prefix._cache is not None) == share


def test_a_prefix_that_cannot_be_shared_costs_no_states(accelerator, monkeypatch):
    """Prevents the states of a failed attempt from being handed out for the run that replaced it."""
    teacher, batch = LocalTeacher(make_model(seed=1)), batch_of()
    teacher.prepare(accelerator, make_model())
    teacher.share_prefix(LONG)
    teacher.keep_states([1])

    def fail(model: nn.Module, rest: View) -> Tensor:
        decode(model, rest.input_ids, rest.attention_mask)
        raise UnsupportedCache("no")

    monkeypatch.setattr(teacher.prefix, "decode_rest", fail)
    states = teacher.signal(batch, NEEDS).states
    torch.testing.assert_close(states[1], expected_states(teacher.model, batch)[1])
    assert teacher.prefix is None and list(states) == [1]


@pytest.mark.parametrize("share", [False, True], ids=["whole", "prefix"])
def test_the_self_teacher_shows_the_states_of_the_base(accelerator, share):
    """Prevents states of the adapted model from being given for those of the base under it."""
    learner, teacher, batch = student(), SelfTeacher("adapter_off"), batch_of()
    teacher.prepare(accelerator, learner)
    if share:
        teacher.share_prefix(LONG)
    teacher.keep_states([1, 3])
    hooks = hooks_of(learner)
    signal = teacher.signal(batch, NEEDS)
    assert hooks_of(learner) == hooks and learner.training
    expected = expected_states(make_model(num_hidden_layers=3), batch)
    adapted = expected_states(student(), batch)
    for layer in (1, 3):
        torch.testing.assert_close(signal.states[layer], expected[layer], rtol=1e-4, atol=1e-4)
        assert (signal.states[layer] - adapted[layer]).abs().max() > 0.1


def test_teaching_before_the_student_runs_leaves_its_states_alone(accelerator):
    """Prevents the teacher's run of the same model from counting as the student's."""
    learner, teacher, batch = student(), SelfTeacher("adapter_off"), batch_of()
    teacher.prepare(accelerator, learner)
    teacher.keep_states([1])
    before, _ = gradients(learner, [1])
    teacher.signal(batch, NEEDS)
    after, learned = gradients(learner, [1])
    assert torch.equal(before[1], after[1]) and any(gradient.abs().max() > 0 for gradient in learned)


def test_states_are_kept_only_where_they_are_needed(accelerator):
    """Prevents an evaluation on distributions alone from paying for states, and losses from finding them by luck."""
    teacher = LocalTeacher(make_model(seed=1))
    teacher.prepare(accelerator, make_model())
    teacher.keep_states([1])
    assert STATES in teacher.provides and NEEDS == {DISTRIBUTION, STATES}
    assert teacher.signal(batch_of(), frozenset({DISTRIBUTION})).states is None
    signal = teacher.signal(batch_of(), frozenset({STATES}))
    assert list(signal.states) == [1] and signal.rows.head is not None


def test_a_teacher_without_states_says_so():
    """Prevents a state loss from meeting a teacher that has nothing to compare with, in the middle of a step."""

    class Silent(Teacher):
        def signal(self, batch: Batch, needs: frozenset[str]) -> TeacherSignal:
            return TeacherSignal()

    assert STATES not in Silent().provides
    Silent().keep_states([])
    with pytest.raises(TypeError, match=r"Silent shows no hidden states.*\[1, 2\]"):
        Silent().keep_states([1, 2])


def _inputs() -> tuple[Tensor, Tensor]:
    view = view_of()
    return view.input_ids, view.attention_mask
