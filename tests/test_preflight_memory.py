"""The memory estimate against real training, and what it says of runs that can't be measured here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_model, make_tokenizer

from hfkd.preflight.memory import Estimate, chunk_size_that_fits, estimate
from hfkd.recipe import load_recipe
from hfkd.run.build import Run, make_sources, settings_of
from hfkd.run.models import load_tokenizer
from hfkd.run.rows import load_data
from hfkd.data.prompts import PromptBuilder

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
    rows = [{"prompt": f"walk {place}", "completion": " walked" * (100 + 20 * place)} for place in range(4)]
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
        said, faults = process.communicate(timeout=300)
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
    print(kind, chunk, found.total / 1e6, measured[kind, chunk] / 1e6, found)
    assert found.rehearsed and not found.notes
    assert found.total == pytest.approx(measured[kind, chunk], rel=0.15)
