"""A run's folder, as a finished run leaves it, with all that must never leave the machine beside it. Made in a second,
without training.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from functools import cache
from pathlib import Path

import torch
import yaml
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from hfkd.report.page import build_page

SECRET = "hf_" + "Zz9" * 8
PICTURE = b"\x89PNG\r\n\x1a\n" + b"\0" * 64
NEVER = (
    *("training_args.bin", ".env", "predictions.jsonl", "teacher_answers.jsonl", "optimizer.pt", "notes.txt"),
    *("checkpoint-3/optimizer.pt", "checkpoint-3/adapter_model.safetensors", "checkpoint-3/rng_state.pth"),
    *("_unfinished/checkpoint-4/model.safetensors", "_nonfinite-step-3/process-0/batches.safetensors"),
    *("gold_baseline/adapter_model.safetensors", "weights.bin", "plots/data.csv", ".git/config", "run.json.bak"),
)


@cache
def picture() -> bytes:
    """A PNG picture of 50 kB whose points are noise: written as text they look like anything, paths too."""
    rows = b"".join(b"\0" + random.Random(row).randbytes(480) for row in range(105))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 160, 105, 8, 2, 0, 0, 0)),
        *((b"IDAT", zlib.compress(rows)), (b"IEND", b"")),
    )
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return PICTURE[:8] + b"".join(parts)


def adapted(base: PreTrainedModel, seed: int = 3) -> torch.nn.Module:
    """An adapter whose weights are not zero, so that it changes what the model says."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, lora).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """[1, 12, V] of some fixed tokens."""
    with torch.no_grad():
        return model.eval()(torch.arange(5, 17)[None]).logits.float()


def write_run(
    folder: Path, model: torch.nn.Module, *, lora: bool, origin: str = "me/base", source: str = "hub"
) -> Path:
    """A finished run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's draft, which a run replaces
    make_tokenizer().save_pretrained(folder)
    recipe = {
        "student": {"model": origin, "init": None, "lora": {"r": 4} if lora else None, "dtype": "float32"},
        "teacher": {"kind": "self", "weights": "adapter_off", "cache": None, "revision": None},
        "data": {"train": {"path": "words.jsonl"}, "demonstrations": {"count": 4}, "answer": "dataset"},
        "loss": {"terms": [{"kind": "forward_kl", "weight": 1.0}]},
        "training": {"max_steps": 3, "output_dir": "outputs/run"},
    }
    run = {
        "recipe": recipe,
        "fingerprint": "f" * 64,
        "status": "finished",
        "command": ["hfkd", "train", "recipe.yaml"],
        "versions": {"python": "3.11.7", "hfkd": "0.1.0"},
        "hardware": {"device": "cpu", "processes": 1},
        "student": {"source": source},
        "data": {"train": {"rows": 16, "sha256": "a" * 64}},
        "origins": {"student": {"id": origin, "source": source, "revision": None, "licence": None}},
    }
    words = [{"text": " the", "tokens": 3, "forward_kl": 0.2, "total": 0.6, "student": " a", "teacher": " the"}]
    report = {"k_shot": {}, "k_shot_details": {}, "loss_history": [], "fidelity": {"after": {"worst_tokens": words}}}
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "report.html").write_text(build_page(run, report, {"loss.png": picture()}))
    (folder / "plots").mkdir()
    (folder / "plots/loss.png").write_bytes(PICTURE)
    for name in NEVER:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"never: {SECRET}\n")
    return folder


def adapter_run(folder: Path, base: str = "me/base", **settings: str) -> tuple[Path, torch.Tensor]:
    """The folder of a LoRA run on a base of the hub, and what its model says."""
    model = make_model(seed=0)
    model.config._name_or_path = model.name_or_path = base
    model = adapted(model)
    return write_run(folder, model, lora=True, **{"origin": base, **settings}), logits(model)


def whole_run(folder: Path) -> tuple[Path, torch.Tensor]:
    """The folder of a run that trained all weights, and what its model says."""
    model = make_model(seed=4)
    return write_run(folder, model, lora=False), logits(model)
