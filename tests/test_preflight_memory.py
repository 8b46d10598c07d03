"""The memory estimate against real training, and what it says of runs that can't be measured here."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from rich.console import Console
from transformers import LlamaConfig

import hfkd.preflight.memory
from hfkd.data.prompts import PromptBuilder
from hfkd.eval.fidelity import measure_fidelity
from hfkd.preflight.ghosts import Ghosts, Ledger
from hfkd.preflight.memory import CannotEstimate, Estimate, available_bytes, chunk_size_that_fits, estimate
from hfkd.preflight.rehearsal import _Step
from hfkd.preflight.room import check_room, measure_room
from hfkd.recipe import load_recipe
from hfkd.run.build import Run, make_sources, settings_of
from hfkd.run.models import load_student, load_tokenizer, make_teacher, prepare_teacher
from hfkd.run.rows import load_data
from hfkd.run.texts import held_out_views
from hfkd.run.training import make_trainer
from hfkd.sharding import Launch

SCRIPT = Path(__file__).with_name("measured_training.py")
MEASURABLE = sys.platform == "linux" and Path("/proc/self/clear_refs").exists()

STUDENT = {"vocab_size": 24000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4}
TEACHER = {**STUDENT, "num_hidden_layers": 2}
SIZES = {"full": {}, "lora": {"student.lora": {"r": 8, "alpha": 16}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 16 million parameters, a tiny one, rows of unequal length, and a recipe of two steps."""
    folder = tmp_path_factory.mktemp("memory")
    tokenizer = make_tokenizer()
    for name, sizes in {"student": STUDENT, "teacher": TEACHER, "tiny": {}}.items():
        make_model(initializer_range=0.02, **sizes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"walk {place}", "completion": " walked" * (70 + 15 * place)} for place in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": "student"},
        "teacher": {"kind": "local", "model": "teacher"},
        "data": {"train": {"path": "rows.jsonl"}},
        "training": {
            "output_dir": "out",
            "run_policy": "overwrite",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def written(folder: Path, name: str, **changes: Any) -> Path:
    """The recipe with other values at dotted keys, in a file of its own."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    recipe["training"]["output_dir"] = f"out-{name}"
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def unloaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run of a recipe with its rows and its tokenizer, and no model."""
    monkeypatch.chdir(path.parent)
    recipe = load_recipe(str(path))
    run = settings_of(recipe)
    run.take(load_data(recipe, make_sources(recipe)))
    run.tokenizer = load_tokenizer(recipe.student)
    run.builder = PromptBuilder(run.tokenizer, run.style)
    return run


def of(found: Estimate) -> dict[str, int]:
    """Bytes by part at the peak."""
    return {part.name: part.bytes for part in found}


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[tuple[str, int], int]:
    """What four runs took, each in a process of its own, side by side."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    running = {}
    for kind, changes in SIZES.items():
        for chunk in (64, 1024):
            path = written(folder, f"{kind}-{chunk}", **changes, **{"loss.chunk_size": chunk})
            command = [sys.executable, str(SCRIPT), path.name]
            running[kind, chunk] = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
    found = {}
    for key, process in running.items():
        said, faults = process.communicate(timeout=900)
        assert process.returncode == 0, faults.decode()[-2000:]
        found[key] = int(said.decode().split("took")[-1])
    return found


@pytest.mark.skipif(not MEASURABLE, reason="the peak of a process is read from /proc, as Linux has it")
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("chunk", [64, 1024])
def test_within_fifteen_percent_of_real_training(
    folder: Path, measured: dict, monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int
) -> None:
    """An estimate that is far off sends a run into a night that ends out of memory, or forbids one that fits."""
    run = unloaded(folder / f"{kind}-{chunk}.yaml", monkeypatch)
    found = estimate(run)
    assert found.rehearsed and not found.notes
    assert found.total == pytest.approx(measured[kind, chunk], rel=0.15)


def with_numbers(run: Run) -> float:
    """The bytes of the same step's tensors, run for real in this process."""
    run.model, run.teacher = load_student(run.recipe, 0), make_teacher(run.recipe)
    prepare_teacher(run.recipe, run.teacher, run.model, run.tokenizer, Launch(torch.device("cpu")))
    plan, ledger = hfkd.preflight.memory._Plan(run, 1), Ledger()
    with Ghosts(ledger, real=True) as real:
        _Step(plan.scene, ledger, real, None, None).run()
    return sum(ledger.peak.values())


LOCAL = {"kind": "local", "model": "tiny-teacher"}
LORA = {"r": 4, "alpha": 8}
KINDS = {
    "checkpointing": {"training.activation_checkpointing": True},
    "lora-and-checkpointing": {"training.activation_checkpointing": True, "student.lora": LORA},
    "padding-free": {"training.padding_free": True},
    "accumulation": {"training.gradient_accumulation_steps": 2},
    "bf16": {"training.bf16": True},
    "adafactor": {"training.optim": "adafactor"},
    "adapter-off": {"teacher": {"kind": "self"}, "student.lora": LORA},
    "live": {"teacher": {"kind": "self", "weights": "live"}},
    "frozen-copy": {"teacher": {"kind": "self", "weights": "frozen_copy"}},
    "ema": {"teacher": {"kind": "ema"}},
    "mixture": {"teacher": {"kind": "mixture", "members": {"one": LOCAL, "other": {**LOCAL, "model": "tiny"}}}},
    "states": {"loss.terms": [{"kind": "forward_kl"}, {"kind": "hidden_mse"}]},
    "cut": {"student": {"init": {"from": "tiny-teacher", "keep_layers": 2}}},
    "written": {"data.answer": "student", "data.generation": {"max_new_tokens": 64}},
}


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    """The same folder with a tiny pair of models in the recipe, and demonstrations long enough to be run once."""
    make_model(1, num_hidden_layers=3).save_pretrained(folder / "tiny-teacher")
    make_tokenizer().save_pretrained(folder / "tiny-teacher")
    rows = [{"prompt": f"walk {place}", "completion": " walked" * (10 + 3 * place)} for place in range(12)]
    (folder / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny(folder: Path, name: str, **changes: Any) -> Path:
    """A recipe of tiny models."""
    base = {"student.model": "tiny", "teacher": LOCAL, "data.train.path": "short.jsonl"}
    base |= {"data.demonstrations": {"count": 2}, "loss.chunk_size": 32}
    if "student" in changes:
        base.pop("student.model")
    return written(folder, name, **{**base, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_takes_what_the_step_takes(small: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A rehearsal that goes another way than training (another kernel, no checkpointing, a teacher without its prefix)
    reckons another run.
    """
    run = unloaded(tiny(small, kind, **KINDS[kind]), monkeypatch)
    found = estimate(run)
    assert found.rehearsed and not found.notes
    assert found.total == pytest.approx(with_numbers(run), rel=0.03)


@pytest.mark.parametrize("loss", ["clipped_kl", "sinkhorn", "adaptive_kl", "mutual_information", "uld"])
def test_each_loss_is_counted(small: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """A loss that needs more buffers than another is what fills a GPU; one that looks at numbers must not end the
    check.
    """
    teacher = {"kind": "cross_tokenizer", "model": "tiny-teacher"} if loss == "uld" else LOCAL
    changes = {
        "loss.terms": [{"kind": loss}, {"kind": "cross_entropy"}],
        "teacher": teacher,
        "training.per_device_train_batch_size": 2,
    }
    run = unloaded(tiny(small, loss, **changes), monkeypatch)
    found = estimate(run)
    assert found.rehearsed and of(found)["objective"] > 2 * 32 * 384 * 4 / 2
    if teacher is LOCAL:
        assert found.total == pytest.approx(with_numbers(run), rel=0.15)


def test_nothing_is_loaded(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate that loads the model runs out of memory in the place of the run; here are no weights at all."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 4, "num_attention_heads": 64}
    LlamaConfig(vocab_size=128256, **sizes, tie_word_embeddings=False).save_pretrained(small / "large")
    make_tokenizer().save_pretrained(small / "large")
    changes = {"student.model": "large", "teacher": {"kind": "none"}, "loss.terms": [{"kind": "cross_entropy"}]}
    found = of(
        estimate(unloaded(tiny(small, "large", **changes, **{"data.demonstrations": {"count": 0}}), monkeypatch))
    )
    parameters = 2 * 128256 * 8192 + 4 * (4 * 8192**2 + 3 * 8192 * 28672 + 2 * 8192) + 8192
    assert found["weights"] == pytest.approx(4 * parameters, rel=1e-4)
    assert found["optimizer"] == pytest.approx(8 * parameters, rel=1e-4)


def test_the_prefix_is_counted(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of long demonstrations stay in memory from the first step to the last."""
    run = unloaded(tiny(small, "prefix", **{"data.demonstrations": {"count": 3}}), monkeypatch)
    found = estimate(run)
    length = found.figures["prefix"]
    keys_and_values = 2 * 3 * length * 2 * 8 * 4  # of three layers with two heads of size 8, in float32
    assert length >= 32 and of(found)["prefix cache"] == keys_and_values
    without = tiny(small, "no-prefix", **{"data.demonstrations": {"count": 3}, "teacher.reuse_prefix": False})
    assert "prefix cache" not in of(estimate(unloaded(without, monkeypatch)))


ASKED = {"evaluation": {"shots": [0], "size": 4, "max_new_tokens": 4}, "training.per_device_train_batch_size": 1}


@pytest.mark.parametrize("kind", ["fidelity", "evaluation in training"])
def test_held_out_texts_are_counted(small: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Fidelity comes before the first step and reads more texts at once: a run that learns from one text at a time
    ends there, after a check that passed.
    """
    changes = {**ASKED, "data.demonstrations": {"count": 0}, "training.activation_checkpointing": True}
    if kind != "fidelity":
        changes |= {"evaluation": {**ASKED["evaluation"], "fidelity": False}}
        changes |= {"training.eval_strategy": "steps", "training.eval_steps": 1}
    run = unloaded(tiny(small, kind.replace(" ", "-"), **changes), monkeypatch)
    found = estimate(run)
    assert found.rehearsed and (found.figures["rows"], found.figures["evaluation_rows"]) == (1, 4)
    assert of(found)["evaluation"] > 0, "it is the peak of this run"
    assert most(found)["evaluation"] == pytest.approx(really_read(run, kind == "fidelity"), rel=0.25)
    fewer = {**changes, "training.per_device_eval_batch_size": 1}
    less = estimate(unloaded(tiny(small, f"{kind.replace(' ', '-')}-1", **fewer), monkeypatch))
    assert most(less)["evaluation"] < 0.7 * most(found)["evaluation"] and less.total < found.total


def most(found: Estimate) -> dict[str, int]:
    """Bytes by part, each at its most."""
    return {part.name: part.most for part in found}


def really_read(run: Run, fidelity: bool) -> float:
    """The bytes of what a trainer makes of the held-out texts, over what it holds."""
    run.model, run.teacher = load_student(run.recipe, 0), make_teacher(run.recipe)
    prepare_teacher(run.recipe, run.teacher, run.model, run.tokenizer, Launch(torch.device("cpu")))
    trainer = make_trainer(run, run.train[:2], run.model, run.teacher, run.objective, run.config, run.evaluation.items)
    texts = held_out_views(run, run.evaluation.items, run.teacher, run.objective)
    ledger = Ledger({"weights": 0.0})
    for model in (run.model, run.teacher.model):
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.take(tensor, "weights")
    with Ghosts(ledger, real=True):
        if fidelity:
            measure_fidelity(trainer, texts)
        else:
            trainer._heads_checked = True  # a look at a few logits, once
            trainer.evaluate(texts)
    return sum(ledger.peak.values())


def test_all_who_write_are_counted(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task's prompts may be the longest, and a larger teacher takes more for its own answers than the student:
    both are asked before training, at the evaluation's batch size.
    """
    (small / "long.jsonl").write_text(json.dumps({"prompt": "walk " * 80, "completion": "walked"}) + "\n")
    changes = {**ASKED, "data.demonstrations": {"count": 0}}
    alone = unloaded(tiny(small, "alone", **changes), monkeypatch)
    other = {"path": "long.jsonl", "size": 1, "demonstrations": 0, "split": "train"}
    changes["evaluation"] = {**ASKED["evaluation"], "forgetting": [other]}
    both = unloaded(tiny(small, "both", **changes), monkeypatch)
    ours, theirs = (list(hfkd.preflight.memory._Plan(run, 1)._writings()) for run in (alone, both))
    assert [(one.teacher, one.early, one.rows) for one in ours] == [(False, False, 4), (True, True, 4)]
    assert theirs[0].length > 80 > ours[0].length and theirs[1] == ours[1]
    own = {"data.demonstrations": {"count": 2}, "teacher": {"kind": "self"}, "student.lora": LORA}
    run = unloaded(tiny(small, "own", **{**changes, **own}), monkeypatch)
    assert [one.teacher for one in hfkd.preflight.memory._Plan(run, 1)._writings()] == [False]


def test_what_to_lower_is_what_the_peak_is_made_of(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice that doesn't lower the peak costs another night."""
    run = unloaded(tiny(small, "lower", **ASKED, **{"training.activation_checkpointing": True}), monkeypatch)
    monkeypatch.setattr(hfkd.preflight.memory, "available_bytes", lambda *_: 1000)
    (finding,) = check_room(run, measure_room(run, 1), Console(file=io.StringIO()))
    assert finding.level == "error" and "while held-out texts are read" in finding.message
    assert "training.per_device_eval_batch_size (it is 8" in finding.message
    assert "per_device_train_batch_size" not in finding.message
    changes = {**ASKED, "training.per_device_eval_batch_size": 1, "training.per_device_train_batch_size": 8}
    run = unloaded(tiny(small, "step", **changes), monkeypatch)
    (finding,) = check_room(run, measure_room(run, 1), Console(file=io.StringIO()))
    assert "in a step of training" in finding.message and "per_device_train_batch_size" in finding.message


def test_the_longest_texts_count(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An average text fits, and the first long one ends the run."""
    run = unloaded(tiny(small, "longest", **{"data.demonstrations": {"count": 0}}), monkeypatch)
    longest = max(len(run.builder.encode_prompt(row)) + len(run.builder.encode_completion(row)) for row in run.train)
    found = estimate(run)
    assert found.figures["student_tokens"] == longest and found.figures["rows"] == 4
    written_anew = tiny(small, "anew", **{"data.answer": "student", "data.generation": {"max_new_tokens": 200}})
    assert estimate(unloaded(written_anew, monkeypatch)).figures["student_tokens"] > 200


def test_without_rows_the_limits_count(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that aren't known must not be taken for short ones."""
    monkeypatch.chdir(small)
    recipe = load_recipe(str(tiny(small, "limits", **{"data.max_length": 100, "data.teacher_max_length": 150})))
    found = estimate(settings_of(recipe))
    assert (found.figures["student_tokens"], found.figures["teacher_tokens"]) == (100, 150)
    assert "recipe allows" in found.notes[0]


def test_shards_and_buckets(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP divides nothing and adds its buckets; shards divide weights, gradients and state."""
    run = unloaded(tiny(small, "shards", **{"training.optim": "sgd"}), monkeypatch)
    alone, ddp = estimate(run, processes=1), estimate(run, processes=4)
    assert of(ddp)["weights"] == of(alone)["weights"]
    learns = of(alone)["weights"]
    assert of(ddp)["communication"] == pytest.approx(learns, rel=0.01)  # once more
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    cut = estimate(run, processes=4)
    assert of(cut)["weights"] == pytest.approx(of(alone)["weights"] / 4, rel=0.01)
    assert of(cut)["gathered"] > 0 and "communication" not in of(cut) and "gathered" not in of(alone)
    assert of(cut)["teacher"] < of(alone)["teacher"]


def test_a_chunk_size_that_fits(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check advises must fit, and be no smaller than it has to be."""
    run = unloaded(tiny(small, "fits", **{"data.demonstrations": {"count": 0}}), monkeypatch)

    def total(chunk: int) -> int:
        run.objective.chunk_size = chunk
        return estimate(run).total

    totals = {chunk: total(chunk) for chunk in (16, 32, 64)}
    assert totals[16] < totals[32] < totals[64]
    run.objective.chunk_size = 1024
    assert chunk_size_that_fits(run, totals[32]) == 32
    assert chunk_size_that_fits(run, totals[16] - 1) is None
    most = chunk_size_that_fits(run, 10**12)
    assert most >= estimate(run).figures["supervised_tokens"] > most / 2


def test_what_cant_be_rehearsed_is_arithmetic(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that looks at its numbers must not end the check with an error of torch."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("looks at numbers")

    run = unloaded(tiny(small, "arithmetic"), monkeypatch)
    rehearsed = estimate(run)
    monkeypatch.setattr(hfkd.preflight.memory, "rehearse", refuse)
    found = estimate(run)
    assert not found.rehearsed and "looks at numbers" in found.notes[0]
    assert of(found)["weights"] == pytest.approx(of(rehearsed)["weights"], rel=0.01)
    assert of(found)["teacher"] <= of(rehearsed)["teacher"]


def test_quantised_weights_are_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels can't be run without numbers; a figure for whole weights would be four times too large."""
    changes = {"student.lora": LORA, "student.load_kwargs": {"quantization_config": {"load_in_4bit": True}}}
    with pytest.raises(CannotEstimate, match="quantised"):
        estimate(unloaded(tiny(small, "quantised", **changes), monkeypatch))


def test_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's limit is what ends a run, however much the machine has."""
    free = available_bytes("cpu")
    assert 0 < free and available_bytes("cpu", processes=2) <= free / 2 * 1.2
    for name, text in {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "inactive_file 50\n"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(hfkd.preflight.memory, "_CGROUP", tmp_path)
    assert available_bytes("cpu") == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes("cpu") > 10**6
