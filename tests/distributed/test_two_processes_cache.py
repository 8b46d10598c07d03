"""Two gloo processes build the cache that one builds, train from it as one does, and both hear of its damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from caches import build, content
from conftest import make_model, make_tokenizer
from training import WORDS, run, worst_difference

from hfkd.cache import Hidden, TopK
from hfkd.recipe import load_recipe
from hfkd.run.caching import build_cache
from hfkd.teachers.cached import CachedTeacher

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "cache_once.py"


def two_processes(folder: Path, case: str) -> None:
    """Launch the case."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(SCRIPT), str(folder), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_two_processes_build_what_one_builds(tmp_path: Path) -> None:
    """Shards that depend on who wrote them, or a manifest that is closed too early, would be another cache."""
    make_model(seed=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": word, "completion": word + "ed"} for word in WORDS]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": str(tmp_path / "model"), "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "self"},
        "data": {"train": {"path": str(tmp_path / "words.jsonl")}, "demonstrations": {"count": 2}},
        "training": {"output_dir": str(tmp_path / "out"), "max_steps": 2, "use_cpu": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    two_processes(tmp_path, "build")
    build_cache(load_recipe(tmp_path / "recipe.yaml", []), tmp_path / "one", TopK(16), batch_size=3)
    assert len(list((tmp_path / "one").glob("part-*.parquet"))) > 2
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_two_processes_train_from_a_cache_as_one_does(tmp_path: Path) -> None:
    """Each process reads the rows of its own share of the batch."""
    build(tmp_path / "cache", Hidden())
    update, losses = run(tmp_path / "one", teacher=CachedTeacher(tmp_path / "cache"))
    two_processes(tmp_path, "train")
    assert worst_difference(update, torch.load(tmp_path / "update.pt", weights_only=True)) < 1e-5
    assert json.loads((tmp_path / "numbers.json").read_text())["losses"] == pytest.approx(losses, rel=1e-5)


def test_both_hear_of_damage_that_one_finds(tmp_path: Path) -> None:
    """A process that stops alone leaves the other waiting for it."""
    build(tmp_path / "cache", Hidden())
    shard = tmp_path / "cache" / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    two_processes(tmp_path, "train")
    assert all("part-00001.parquet" in (tmp_path / f"error-{index}.txt").read_text() for index in (0, 1))
