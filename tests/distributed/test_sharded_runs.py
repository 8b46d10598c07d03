"""Runs with a sharded student: saved, resumed, evaluated, asked, writing its own texts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from launching import launch
from path_battery import make_case, train_case, updates, worst_gap
from peft import PeftModel
from sharded_once import SAVED, SAVING, WRITING, ask, write_alone
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "sharded_once.py"


def read(folder: Path, job: str) -> list[dict[str, Any]]:
    """What each process made of a job."""
    return [torch.load(folder / f"{job}-{process}.pt", weights_only=True) for process in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two launches left what they found; the second one goes on from the checkpoints of the first."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(SCRIPT, folder, "straight", "variants", "refused", timeout=240)
    launch(SCRIPT, folder, "resumed", timeout=120)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The saved runs on one process: what came out, and the trainers."""
    runs = {}
    for student in ("full", "lora"):
        trainer = make_case(f"{student} local 1", folder / "alone", 1, **{**SAVING, "save_strategy": "no"})
        runs[student] = (train_case(trainer), trainer)
    return runs


@pytest.mark.parametrize(("student", "kind"), SAVED)
def test_resumed_in_a_new_launch_ends_as_straight(folder: Path, alone: Any, student: str, kind: str) -> None:
    """A shard, or a part of the optimizer's state, that isn't restored makes another run of it."""
    name = f"{student} {kind}"
    for before, after in zip(read(folder, "straight"), read(folder, "resumed"), strict=True):
        assert len(after[name]["losses"]) == 5 and after[name]["losses"] == before[name]["losses"]
        assert worst_gap(before[name]["after"], after[name]["after"]) == 0
        assert worst_gap(alone[student][0]["after"], before[name]["after"]) < 1e-5
        assert worst_gap(before[name]["before"], before[name]["after"]) > 1e-3, "nothing was learned"


@pytest.mark.parametrize(("student", "kind"), SAVED)
def test_what_is_saved_loads_on_one_process(folder: Path, student: str, kind: str) -> None:
    """A run of days whose last folder holds shards, or nothing, has no model to show."""
    final = folder / f"{student}-{kind}" / "final"
    model = PeftModel.from_pretrained(make_model(seed=0), final) if student == "lora" else None
    model = AutoModelForCausalLM.from_pretrained(final) if model is None else model
    trained = read(folder, "straight")[0][f"{student} {kind}"]["after"]
    found = dict(model.named_parameters())
    assert trained.keys() <= found.keys() and len(trained) > 5
    for name, value in trained.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=0, atol=0)


@pytest.mark.parametrize(("student", "kind"), SAVED)
def test_evaluations_say_what_one_process_says(folder: Path, alone: Any, student: str, kind: str) -> None:
    """Figures of a model that is read while its weights lie in shards, or that writes while another process waits."""
    trainer = alone[student][1]
    metrics, report, written = trainer.evaluate(trainer.train_dataset), ask(trainer), write_alone(trainer)
    assert [len(texts) for texts in written] == [5, 1]
    for process, results in enumerate(read(folder, "straight")):
        found = results[f"{student} {kind}"]
        assert found["eval"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
        assert found["k_shot"] == report
        assert found["written"] == written[process]


@pytest.mark.parametrize("name", ["checkpointed full", "written full", "written lora", "written checkpointed"])
def test_other_ways_to_train(folder: Path, name: str) -> None:
    """Processes that write texts of different lengths must wait for each other, and activations be computed anew from
    gathered weights.
    """
    case = {"written lora": "lora self 4", "written checkpointed": "lora self 1"}.get(name, "full local 1")
    one = train_case(make_case(case, folder / "one", 1, **(WRITING if "written" in name else {})))
    for found in read(folder, "variants"):
        assert found[name]["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert worst_gap(one["after"], found[name]["after"]) < 1e-5
        assert worst_gap(updates(one), updates(found[name])) < 1e-3


def test_half_precision_is_near(folder: Path) -> None:
    """Types that are mixed up between gathered and own weights end in an error or in noise."""
    one = train_case(make_case("full local 1", folder / "one", 1))
    for found in read(folder, "variants"):
        assert found["bf16"]["losses"] == pytest.approx(one["losses"], rel=1e-2)
        assert found["bf16"]["losses"] != pytest.approx(one["losses"], rel=1e-5), "not in half precision"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("moving", "EmaTeacher swaps"),
        ("projections", "'hidden_mse'"),
        ("norms", "log_gradient_norms"),
        ("shards", "fsdp_state_dict_type: FULL_STATE_DICT"),
        ("empty", "fsdp_cpu_ram_efficient_loading"),
        ("early", "eval_on_start=True"),
        ("tied", "out of modules_to_save"),
    ],
)
def test_what_cannot_work_in_shards_is_refused(folder: Path, part: str, words: str) -> None:
    """A part that reads or changes whole weights would fail deep inside the first step, or go wrong without a word."""
    for said in read(folder, "refused"):
        assert words in said[part]
