"""Where a recipe's models lie before and beside training: in CPU memory, whole, or left for the trainer to cut."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from conftest import make_model, make_tokenizer
from rich.console import Console
from training import ROWS

from hfkd import LocalTeacher
from hfkd.cache import make_codec
from hfkd.recipe import load_recipe
from hfkd.rollout.base import GenerationSettings
from hfkd.rollout.hf import HFRollout
from hfkd.run import run_recipe
from hfkd.run.build import build
from hfkd.run.caching import build_cache
from hfkd.run.conduct import _Conductor
from hfkd.sharding import Launch

HERE = Launch(torch.device("cpu"))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two models and a recipe of one step, whose prompts share a prefix."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("student", "teacher")):
        make_model(seed=number).save_pretrained(name)
        make_tokenizer().save_pretrained(name)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:12]))
    recipe = {
        "student": {"model": "student"},
        "teacher": {"kind": "local", "model": "teacher"},
        "data": {
            "train": {"path": "rows.jsonl"},
            "demonstrations": {"count": 4},
            "generation": {"max_new_tokens": 2},
        },
        "training": {
            "output_dir": "out",
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.parametrize("tied", [False, True])
def test_it_writes(tied: bool) -> None:
    """Ids belong on the device that the layers are run on, which the waiting weights don't say."""
    prompts = [[5, 6, 7], [8, 9], [7, 7, 7, 7]]
    written = []
    for offload in (False, True):
        teacher = LocalTeacher(make_model(seed=1, tie_word_embeddings=tied), offload=offload)
        teacher.prepare(HERE, make_model())
        with teacher.weights() as model:
            written.append(HFRollout(make_tokenizer(), GenerationSettings(max_new_tokens=4)).generate(model, prompts))
    assert written[0] == written[1]


def test_a_recipe_asks_it_and_has_it_answer(desk: Path) -> None:
    """The evaluation of the teacher and its answers come before the trainer, which alone was tried."""
    found = []
    for offload in ("false", "true"):
        overrides = [f"teacher.offload={offload}", f"training.output_dir=out-{offload}", "data.answer=teacher"]
        overrides.append("evaluation={shots: [0, 2], size: 2, max_new_tokens: 2}")
        report = run_recipe(load_recipe("recipe.yaml", overrides), console=Console(file=io.StringIO())).report
        found.append((report["k_shot_details"]["teacher"], [entry["loss"] for entry in report["loss_history"]]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_its_cache_is_the_same(desk: Path) -> None:
    """A teacher that fits nowhere else is just the one to be cached."""
    for offload in ("false", "true"):
        recipe = load_recipe("recipe.yaml", [f"teacher.offload={offload}"])
        build_cache(recipe, f"cache-{offload}", make_codec("hidden"), console=Console(file=io.StringIO()))
    shards = [sorted((desk / f"cache-{offload}").glob("part-*")) for offload in ("false", "true")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]] != []


def test_a_cache_is_built_from_a_whole_copy(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a build read different numbers of texts, and shards must be run together: one would wait."""
    monkeypatch.setattr(Launch, "of", classmethod(lambda cls, args: cls(args.device, 2, is_fsdp2=True)))
    recipe = load_recipe("recipe.yaml", ["teacher={kind: self, weights: frozen_copy}"])
    manifest = build_cache(recipe, "cache", make_codec("hidden"), console=Console(file=io.StringIO()))
    assert manifest.status == "complete"


ZERO3 = Launch(torch.device("meta"), 2, is_zero3=True)  # whatever is moved there is seen to have been


def built(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Any:
    """A recipe's teacher, built as under ZeRO-3."""
    monkeypatch.setattr(Launch, "of", classmethod(lambda cls, args: ZERO3))
    return build(load_recipe("recipe.yaml", overrides)).teacher


def test_zero_3_is_seen_before_there_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't seen to be cut later is put whole onto every GPU first."""
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    for stage in (None, 2, 3):
        plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
        assert Launch.of(SimpleNamespace(device="cpu", deepspeed_plugin=plugin)).is_zero3 is (stage == 3)
    assert not Launch.of(SimpleNamespace(device="cpu")).is_zero3


@pytest.mark.parametrize("offload", ["false", "true"])
def test_a_teacher_waits_for_its_engine(desk: Path, monkeypatch: pytest.MonkeyPatch, offload: str) -> None:
    """There is no engine before the trainer: the whole teacher would fill each GPU, or have hooks that no engine
    knows.
    """
    teacher = built(monkeypatch, f"teacher.offload={offload}")
    given = []
    monkeypatch.setattr("hfkd.sharding.shard_for_inference", lambda model, *_: given.append(model) or model)
    plugin = SimpleNamespace(zero_stage=3)
    trainers = {"distributed_type": DistributedType.DEEPSPEED, "state": SimpleNamespace(deepspeed_plugin=plugin)}
    teacher.prepare(SimpleNamespace(device=torch.device("cpu"), num_processes=2, **trainers), make_model())
    assert given == [teacher.model] and {weight.device.type for weight in teacher.model.parameters()} == {"cpu"}
    assert not any(hasattr(module, "_hf_hook") for module in teacher.model.modules())


ASKED_EARLY = ["evaluation={shots: [0], size: 2}", "data.answer=teacher"]


@pytest.mark.parametrize("override", ASKED_EARLY)
def test_a_teacher_that_is_asked_before_is_whole(desk: Path, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    """What has no engine yet can speak only whole, and not out of CPU memory."""
    teacher = built(monkeypatch, override)
    assert {weight.device.type for weight in teacher.model.parameters()} == {"meta"}
    monkeypatch.setattr("hfkd.run.build.load_student", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="teacher.offload: .*before training.*ZeRO-3"):
        built(monkeypatch, override, "teacher.offload=true")


@pytest.mark.parametrize(
    ("launch", "override", "moved"),
    [
        ({}, "data.seed=1", True),
        ({"is_fsdp2": True}, "data.seed=1", False),
        ({"is_zero3": True}, "data.seed=1", False),
        ({"is_fsdp2": True}, ASKED_EARLY[0], True),
        ({"is_zero3": True}, "data.answer=teacher", True),
    ],
)
def test_a_student_that_will_be_cut_waits(
    desk: Path, monkeypatch: pytest.MonkeyPatch, launch: dict[str, bool], override: str, moved: bool
) -> None:
    """A student that is cut because it fits no GPU whole mustn't be put whole onto each before."""

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    run = build(load_recipe("recipe.yaml", ["teacher={kind: self}", "student.lora={r: 2}", override]))
    calls: list[object] = []
    run.model.to = calls.append
    monkeypatch.setattr(Launch, "of", classmethod(lambda cls, args: cls(args.device, 2, **launch)))
    conductor = _Conductor(run, Console(file=io.StringIO()), [])
    monkeypatch.setattr(conductor, "_fitting_rows", stop)
    with pytest.raises(Stop):
        conductor.conduct()
    assert calls == [run.config.device] * moved
