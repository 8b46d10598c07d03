"""Where a second model's weights lie: whole, or in CPU memory and streamed. Shards are tested in tests/distributed."""

from __future__ import annotations

import pytest
import torch
from accelerate import PartialState
from conftest import make_model
from training import DEMONSTRATIONS, run, worst_difference

from hfkd import DistillationConfig, LocalTeacher
from hfkd.sharding import Launch, Placement, blocks_of, is_sharded, one_process_at_a_time, place

HERE = Launch(torch.device("cpu"))


def bytes_of(model) -> int:
    """Counted apart from the code under test."""
    return sum(weight.nbytes for weight in {id(one): one for one in [*model.parameters(), *model.buffers()]}.values())


def test_a_whole_model():
    """Everything is here, in one shard."""
    model = make_model(seed=0)
    assert place(model, HERE) is model
    assert Placement.of(model) == Placement("whole", 1, bytes_of(model), bytes_of(model))
    assert not is_sharded(model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_streamed_model_says_the_same(tied):
    """Between two calls the layers are nowhere on the device, and the logits don't change by a bit."""
    whole, streamed = (make_model(seed=1, tie_word_embeddings=tied) for _ in range(2))
    ids = torch.arange(3, 15)[None]
    before = bytes_of(streamed)
    place(streamed.requires_grad_(False).eval(), HERE, offload=True)
    assert all(weight.device.type == "meta" for weight in streamed.model.layers.parameters())
    place(streamed, HERE, offload=True)  # a trainer places again what a recipe's run has placed
    placement = Placement.of(streamed)
    head = streamed.lm_head.weight.nbytes
    assert placement.kind == "streamed"
    assert placement.bytes_whole == before + (head if tied else 0)  # a tied head is copied to the device
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, whole.eval()(ids).logits)


@pytest.mark.parametrize("demonstrations", [[], DEMONSTRATIONS * 3])
def test_a_streamed_teacher_teaches_the_same(tmp_path, demonstrations):
    """With a prefix that is run once, and without one."""
    settings = {"demonstrations": demonstrations, "learning_rate": 0.3}
    update, losses = run(tmp_path, teacher=LocalTeacher(make_model(seed=1)), **settings)
    theirs, their_losses = run(tmp_path, teacher=LocalTeacher(make_model(seed=1), offload=True), **settings)
    assert worst_difference(update, theirs) < 1e-6
    assert their_losses == pytest.approx(losses, rel=1e-6)


def test_layers_that_cannot_be_found():
    """A whole model in one group would be gathered at once, which is what sharding is to avoid."""
    model = make_model(seed=0)
    assert blocks_of(model) == list(model.model.layers)
    model._no_split_modules = ["SomethingElse"]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM can't be sharded.*SomethingElse.*_no_split_modules"):
        blocks_of(model)


def test_how_a_run_was_started(tmp_path, monkeypatch):
    """Before Trainer has an accelerator, the launcher's variables and the arguments say what will be sharded."""
    args = DistillationConfig(str(tmp_path), use_cpu=True)
    assert args.device == torch.device("cpu")  # asked first: it makes the process's state anew
    monkeypatch.setitem(PartialState().__dict__, "num_processes", 2)
    assert not Launch.of(args).is_fsdp2
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not Launch.of(args).is_fsdp2  # version 1 is the launcher's default
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert Launch.of(args).is_fsdp2
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    args.fsdp_plugin_args = {"fsdp_version": 2}
    assert Launch.of(args).is_fsdp2
    monkeypatch.setitem(PartialState().__dict__, "num_processes", 1)
    assert not Launch.of(args).is_fsdp2


def test_turns_are_taken_only_where_models_are_cut(monkeypatch):
    """Three processes wait three times each: before their turn and after it."""
    waits = []
    monkeypatch.setattr(PartialState, "wait_for_everyone", lambda self: waits.append(1))
    with one_process_at_a_time(HERE):
        assert not waits
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setitem(PartialState().__dict__, "local_process_index", 1)
    with pytest.raises(OSError), one_process_at_a_time(Launch(torch.device("cpu"), 3, True)):
        assert len(waits) == 1
        raise OSError
    assert len(waits) == 3  # also after an error, or the others would wait for ever
