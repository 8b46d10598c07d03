"""ZeRO without DeepSpeed: the teacher's configuration, and reading a parameter that is in shards, with stand-ins."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import make_model
from torch import nn

from hfkd import Objective
from hfkd.compatibility import check_learning_terms
from hfkd.rows import Head
from hfkd.zero import has_engine, inference_config, row_count, shard_for_inference, whole, zero_stage

CONFIG = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "scheduler": {"type": "WarmupLR"},
    "bf16": {"enabled": True},
    "steps_per_print": float("inf"),
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "none"},
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
    },
}


class Gathered:
    """Stands for `deepspeed.zero.GatheredParameters`: fills the parameter, and empties it again."""

    calls = 0

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        (self.parameter,) = parameters

    def __enter__(self) -> None:
        type(self).calls += 1
        self.parameter.data = self.parameter.kept.clone()

    def __exit__(self, *_: Any) -> None:
        self.parameter.data = torch.empty(0)


def partition(parameter: nn.Parameter) -> None:
    """Make a parameter look like ZeRO-3's between two forwards."""
    parameter.ds_id, parameter.ds_status = 0, SimpleNamespace(name="NOT_AVAILABLE")
    parameter.kept, parameter.ds_shape = parameter.data.clone(), parameter.shape
    parameter.data = torch.empty(0)


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the package."""
    given: dict[str, Any] = {}

    def initialize(**settings: Any) -> tuple[Any, ...]:
        given.update(settings)
        return settings["model"], None, None, None

    fake = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered), initialize=initialize, given=given)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    monkeypatch.setattr(Gathered, "calls", 0)
    return fake


def accelerator(stage: int = 3) -> Any:
    """Stands for one that DeepSpeed drives."""
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=CONFIG)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state, device=torch.device("cpu"))


def test_the_teachers_configuration_has_nothing_of_training() -> None:
    """DeepSpeed builds an optimizer over frozen weights from these sections, and stops."""
    before = repr(CONFIG)
    made = inference_config(CONFIG, 64)
    assert repr(CONFIG) == before, "the student's own must stay"
    assert not {"optimizer", "scheduler", "gradient_clipping", "gradient_accumulation_steps"} & set(made)
    assert "offload_optimizer" not in made["zero_optimization"] and made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["stage3_param_persistence_threshold"] == 640
    assert made["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    assert made["bf16"] == {"enabled": True} and made["train_micro_batch_size_per_gpu"] == 1
    assert "train_batch_size" not in made


def test_nothing_is_left_to_be_completed() -> None:
    """Trainer completes `auto` for the student only; DeepSpeed fails on the word."""
    assert "auto" not in repr(inference_config(CONFIG, None))


@pytest.mark.parametrize("offload", [False, True])
def test_the_teachers_engine(deepspeed: SimpleNamespace, offload: bool) -> None:
    """A teacher that still learns would be given an optimizer, and one that is to be streamed would fill the GPU."""
    model = make_model()
    engine = shard_for_inference(model, accelerator(), offload)
    assert engine is model and not engine.training
    assert not any(weight.requires_grad for weight in model.parameters())
    device = deepspeed.given["config"]["zero_optimization"]["offload_param"]["device"]
    assert device == ("cpu" if offload else "none")
    assert set(deepspeed.given) == {"model", "config"}, "no optimizer and no parameters to optimize"


def test_a_head_in_shards_is_gathered_and_learns(deepspeed: SimpleNamespace) -> None:
    """Outside its module's forward the head is empty: logits of nothing, or a gradient that reaches nobody."""
    model = make_model(tie_word_embeddings=False)
    weight = model.lm_head.weight
    expected = weight.detach().clone()
    partition(weight)
    assert row_count(weight) == 384 and row_count(expected) == 384
    head = Head.of(model)
    assert Gathered.calls == 1 and weight.numel() == 0, "and empty again"
    assert torch.equal(head.weight.detach(), expected)
    for _ in range(2):  # twice: nothing of the first time may be left
        (2 * Head.of(model).weight).sum().backward()
        assert torch.equal(weight.grad, torch.full_like(expected, 2.0)) and weight.numel() == 0
        weight.grad = None  # DeepSpeed takes it away at once


def test_one_that_is_there_already_isnt_gathered_again(deepspeed: SimpleNamespace) -> None:
    """DeepSpeed frees what it gathered itself; freeing it before makes it stop with an error."""
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.ds_id, parameter.ds_status = 0, SimpleNamespace(name="AVAILABLE")
    found = whole(parameter)
    assert Gathered.calls == 0 and found is not parameter and torch.equal(found, parameter)
    plain = nn.Parameter(torch.ones(2))
    assert whole(plain) is plain


def test_what_drives_the_run() -> None:
    """A teacher placed for another stage is whole where it was to be cut."""
    assert [zero_stage(accelerator(stage)) for stage in (2, 3)] == [2, 3]
    assert zero_stage(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)) == 0
    model = make_model()
    assert not has_engine(model)
    model.ds_id = 0
    assert has_engine(model)


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_with_parameters_are_refused(stage: int) -> None:
    """DeepSpeed's engine knows the student's parameters only, and stops at others with a bare KeyError."""
    learning = Objective("forward_kl")
    learning.register_parameter("factor", nn.Parameter(torch.ones(())))
    with pytest.raises(ValueError, match=rf"parameters of their own.*ZeRO-{stage}"):
        check_learning_terms(accelerator(stage), learning)
    check_learning_terms(accelerator(stage), Objective("forward_kl"))
