"""Devices that aren't there and layers that can't be found: said before a model is loaded or wrapped."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import make_model
from torch import nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from training import lora, make_trainer

from hfkd import DistillationConfig
from hfkd.compatibility import check_layers, check_processes


def pretend(monkeypatch: pytest.MonkeyPatch, processes: int, gpus: int, **environment: str) -> None:
    """Processes that a launcher started on this machine, and the GPUs that it has."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)


@pytest.mark.parametrize(
    ("processes", "gpus", "environment", "words"),
    [
        (
            8,
            2,
            {},
            "8 processes were started on this machine, one for each GPU, and it has 2. Set num_processes .* 2 ",
        ),
        (2, 1, {"ACCELERATE_USE_CPU": "False"}, "it has 1"),
        (2, 0, {"ACCELERATE_USE_FSDP": "true"}, "it has 0 .without one, accelerate would train on the CPU and shard"),
    ],
)
def test_a_config_for_more_gpus_than_there_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: int, gpus: int, environment: dict, words: str
) -> None:
    """torch says `invalid device ordinal` in one process of eight, or nothing at all where there is no GPU."""
    pretend(monkeypatch, processes, gpus, **environment)
    with pytest.raises(ValueError, match=words):
        check_processes()
    with pytest.raises(ValueError, match=words):
        DistillationConfig(str(tmp_path))


def test_two_processes_without_a_gpu_are_told_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the word to accelerate each process trains by itself, and both write into one folder."""
    pretend(monkeypatch, 2, 0)
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=true"):
        DistillationConfig(str(tmp_path))


@pytest.mark.parametrize(
    ("processes", "gpus", "environment", "use_cpu"),
    [
        (2, 2, {}, False),
        (1, 1, {"ACCELERATE_USE_FSDP": "true"}, False),
        (2, 1, {"ACCELERATE_USE_CPU": "True"}, False),
        (2, 1, {}, True),
        (1, 0, {"ACCELERATE_USE_FSDP": "true"}, True),
    ],
)
def test_what_can_run_is_let_through(
    monkeypatch: pytest.MonkeyPatch, processes: int, gpus: int, environment: dict, use_cpu: bool
) -> None:
    """Two processes on a CPU are how this is tested; they must not need two GPUs."""
    pretend(monkeypatch, processes, gpus, **environment)
    check_processes(use_cpu)


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {"use_cpu": True}),
        ({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}, {}),
        ({"ACCELERATE_USE_CPU": "true"}, {"fsdp": True, "fsdp_config": {"version": 2}}),
        ({"ACCELERATE_USE_FSDP": "true", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}, {"use_cpu": True}),
    ],
)
def test_shards_on_cpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict, settings: dict
) -> None:
    """Accelerate runs such a launch as DDP without a word, beside a teacher in shards."""
    pretend(monkeypatch, 2, 0, **environment)
    with pytest.raises(ValueError, match="FSDP and for no GPU .*use_cpu out"):
        DistillationConfig(str(tmp_path), **settings)


def fsdp2(names: list[str] | None = None, policy: Any = transformer_auto_wrap_policy) -> Any:
    """What of an accelerator says how a model is sharded."""
    plugin = SimpleNamespace(auto_wrap_policy=policy, transformer_cls_names_to_wrap=names)
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), is_fsdp2=True)


def renamed(names: Any) -> nn.Module:
    """A model whose architecture names other layers than it has."""
    model = make_model()
    model._no_split_modules = names
    return model


@pytest.mark.parametrize(
    ("model", "names", "words"),
    [
        (renamed(None), None, r"The student, a LlamaForCausalLM, .*the architecture names the classes \[\]\)"),
        (
            renamed(["GPTBlock"]),
            None,
            "and it has no GPTBlock.*fsdp_transformer_layer_cls_to_wrap .*LlamaDecoderLayer",
        ),
        (make_model(), ["LamaLayer"], "fsdp_transformer_layer_cls_to_wrap is .'LamaLayer'.*LlamaDecoderLayer"),
        (nn.Sequential(nn.Linear(2, 2)), None, "The student, a Sequential, .* or launch without FSDP"),
    ],
)
def test_layers_that_cannot_be_found(model: nn.Module, names: list[str] | None, words: str) -> None:
    """Without layers the whole model is one shard, gathered at every step: sharded in name only, and out of memory."""
    with pytest.raises(ValueError, match=words):
        check_layers(model, fsdp2(names))


def test_layers_that_can_be_found() -> None:
    """A check that refuses what works is worse than none."""
    from peft import get_peft_model

    check_layers(make_model(), fsdp2())
    check_layers(get_peft_model(make_model(), lora()), fsdp2())
    check_layers(renamed(None), fsdp2(["LlamaDecoderLayer"]))
    check_layers(renamed(None), fsdp2(policy=size_based_auto_wrap_policy))
    check_layers(renamed(None), fsdp2(policy=functools.partial(size_based_auto_wrap_policy, min_num_params=1)))
    check_layers(renamed(None), Accelerator(cpu=True))


def test_the_plugin_says_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check reads accelerate's own names; if they change, it must not pass by in silence."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LamaLayer"]
    )
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), is_fsdp2=True)
    assert isinstance(Accelerator.is_fsdp2, property)
    with pytest.raises(ValueError, match="LamaLayer"):
        check_layers(make_model(), accelerator)


def test_the_trainer_looks_before_it_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that nobody calls."""
    seen = []
    monkeypatch.setattr("hfkd.trainer.check_layers", lambda model, accelerator: seen.append(model))
    trainer = make_trainer(tmp_path)
    assert seen == [trainer.model]
