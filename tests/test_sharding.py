"""Where a second model's weights lie: whole, or in CPU memory and streamed. Shards are tested in tests/distributed."""

from __future__ import annotations

import pytest
import torch
from accelerate import PartialState
from conftest import make_model
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from training import DEMONSTRATIONS, lora, make_trainer, run, worst_difference

from hfkd import DistillationConfig, LocalTeacher
from hfkd.loading import fetch
from hfkd.rows import input_device
from hfkd.sharding import Launch, Placement, _shard, blocks_of, is_sharded, one_process_at_a_time, place
from hfkd.teachers import MixtureTeacher

HERE = Launch(torch.device("cpu"))


def bytes_of(model) -> int:
    """Counted apart from the code under test."""
    return sum(weight.nbytes for weight in {id(one): one for one in [*model.parameters(), *model.buffers()]}.values())


def test_a_whole_model():
    """Everything is here, in one shard."""
    model = make_model(seed=0)
    assert place(model, HERE) is model
    assert Placement.of(model) == Placement("whole", 1, bytes_of(model), bytes_of(model), "cpu")
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
    assert (placement.kind, placement.device) == ("streamed", "cpu")
    assert placement.bytes_whole == before + (head if tied else 0)  # a tied head is copied to the device
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, whole.eval()(ids).logits)


def test_what_is_streamed_or_several_is_told(tmp_path):
    """One process, and members of which each has a place of its own."""
    streamed, whole = LocalTeacher(make_model(seed=1), offload=True), LocalTeacher(make_model(seed=2))
    trainer = make_trainer(tmp_path, teacher=MixtureTeacher({"far": streamed, "near": whole}), max_steps=1)
    trainer.train()
    told = next(entry for entry in trainer.state.log_history if "placement/student_shards" in entry)
    assert told["placement/teacher_near_megabytes"] == pytest.approx(bytes_of(whole.model) / 1e6)
    assert told["placement/teacher_far_megabytes"] > told["placement/teacher_near_megabytes"]  # a tied head is copied
    alone = make_trainer(tmp_path, teacher=LocalTeacher(make_model(seed=1), offload=True), max_steps=1)
    alone.train()
    assert any("placement/teacher_megabytes" in entry for entry in alone.state.log_history)
    quiet = make_trainer(tmp_path, teacher=LocalTeacher(make_model(seed=1)), max_steps=1)
    quiet.train()  # whole, on the only process: there is nothing to tell
    assert not any("placement/student_shards" in entry for entry in quiet.state.log_history)


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


@pytest.fixture
def alone_in_a_group(tmp_path, monkeypatch):
    """A group of one process, so that weights can be cut; the process's device is another one than the weights'."""
    PartialState()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    monkeypatch.setitem(PartialState().__dict__, "device", torch.device("meta"))
    yield
    torch.distributed.destroy_process_group()


def test_shards_that_wait_in_cpu_memory_read_on_the_device(alone_in_a_group):
    """Ids on the CPU beside weights that were gathered on a GPU: below the root's forward nothing moves them there."""
    model = make_model(seed=0)
    assert input_device(model) == torch.device("cpu")
    _shard(model, torch.device("cpu"), 1, offload=False)
    assert input_device(model) == torch.device("meta")
    partitioned = make_model(seed=0)
    partitioned.get_input_embeddings().weight.ds_id = 0
    assert input_device(partitioned) == torch.device("meta")


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_tied_ends_behind_a_copy_are_cut_together(alone_in_a_group, end):
    """The original weights, behind the copy that an adapter has trained, belong to both ends: in two groups they are
    refused by torch, or held twice.
    """
    model = get_peft_model(make_model(seed=0), lora(target_modules=["q_proj"], modules_to_save=[end]))
    _shard(model.requires_grad_(False), torch.device("cpu"), 1, offload=False)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    own = [getattr(one, "original_module", one).weight for one in ends]
    assert own[0] is own[1]


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
    monkeypatch.setattr("hfkd.sharding.largest_and_smallest", lambda number: (number + 2, number))
    with one_process_at_a_time(Launch(torch.device("cpu"), 8, True)):
        pass
    assert len(waits) == 3 + 5  # another machine has five


def test_what_is_downloaded_is_there_before_the_turns(tmp_path, monkeypatch):
    """Hours of a download in one process's turn are hours in a barrier for the others."""
    done = []
    monkeypatch.setattr(PartialState, "wait_for_everyone", lambda self: done.append("waited"))
    monkeypatch.setattr("hfkd.teachers.local.fetch", lambda name, options: done.append((name, options["revision"])))
    monkeypatch.setattr(LocalTeacher, "_prepare", lambda self, *args: done.append("read"))
    launch = Launch(torch.device("cpu"), 1, True)
    LocalTeacher("some/model", revision="main").prepare(launch, make_model())
    assert done == [("some/model", "main"), "read", "waited"]
    done.clear()
    LocalTeacher(make_model()).prepare(launch, make_model())  # it is in memory
    LocalTeacher("some/model").prepare(HERE, make_model())  # nobody waits
    assert done == ["read", "waited", "read"]


@pytest.mark.parametrize("parts", [0, 2])
def test_all_weights_are_fetched(tmp_path, monkeypatch, parts):
    """One file, or the parts that an index names; whatever else lies in the repository is left there."""
    asked = []

    def found(name, file, **where):
        asked.append((file, where.get("revision")))
        return None if parts and "index" not in file else str(tmp_path / file)

    monkeypatch.setattr("hfkd.loading.cached_file", found)
    monkeypatch.setattr("hfkd.loading.get_checkpoint_shard_files", lambda name, index, **where: asked.append("parts"))
    fetch("some/model", {"revision": "v1", "trust_remote_code": False})
    whole = [("model.safetensors", "v1")]
    assert asked == ([*whole, ("model.safetensors.index.json", "v1"), "parts"] if parts else whole)
    asked.clear()
    fetch(str(tmp_path), {})
    assert not asked


def test_what_cannot_be_fetched_is_left_to_loading(monkeypatch):
    """Its error says what is wrong; one that is raised before the turns says less."""

    def missing(*args, **kwargs):
        raise OSError("no such model")

    monkeypatch.setattr("hfkd.loading.cached_file", missing)
    fetch("some/model", {})
