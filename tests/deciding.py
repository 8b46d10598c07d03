"""Trainers with revisers, figures of tokens made by hand, and the recipe of a run of two steps. Shared by the tests of
what decides what is learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import training
import yaml
from conftest import make_model, make_tokenizer
from training import trained_weights

from hfkd.data.views import DistillationDataset
from hfkd.revision import Reviser
from hfkd.token_figures import SideFigures, TokenFigures


def figures(
    rows: Sequence[int],
    *,
    target: Sequence[int] | None = None,
    divergence: Sequence[float] | None = None,
    teacher: dict[str, Sequence[float]] | None = None,
    student: dict[str, Sequence[float]] | None = None,
) -> TokenFigures:
    """Figures of tokens that lie in these rows; what isn't given is 0."""
    size = len(rows)

    def side(given: dict[str, Sequence[float]] | None) -> SideFigures:
        columns = {name: np.zeros(size, dtype=np.float32) for name in SideFigures.__dataclass_fields__}
        columns["top"] = np.zeros(size, dtype=np.int64)
        columns |= {name: np.asarray(values, columns[name].dtype) for name, values in (given or {}).items()}
        return SideFigures(**columns)

    position = np.array([list(rows[:place]).count(row) for place, row in enumerate(rows)], dtype=np.int64)
    apart = np.zeros(size) if divergence is None else np.asarray(divergence)
    ids = np.zeros(size, dtype=np.int64) if target is None else np.asarray(target)
    return TokenFigures(np.asarray(rows, dtype=np.int64), position, ids, apart, apart, side(student), side(teacher))


def batch_of(answers: Sequence[Sequence[int]], prompt: int = 2) -> dict[str, torch.Tensor]:
    """A padded batch whose teacher reads two tokens more."""
    width = max(map(len, answers))
    inputs: dict[str, torch.Tensor] = {}
    for view, size in (("", prompt), ("teacher_", prompt + 2)):
        gaps = [width - len(answer) for answer in answers]
        pairs = list(zip(answers, gaps, strict=True))
        inputs[f"{view}input_ids"] = torch.tensor([[9] * size + [*answer] + [2] * gap for answer, gap in pairs])
        inputs[f"{view}attention_mask"] = torch.tensor([[1] * (size + len(a)) + [0] * gap for a, gap in pairs])
        inputs[f"{view}labels"] = torch.tensor([[-100] * size + [*answer] + [-100] * gap for answer, gap in pairs])
    return inputs


def fake_trainer(**parts: Any) -> SimpleNamespace:
    """As much of a trainer as a reviser asks for before it reads a batch."""
    known = {"teacher": object(), "model": make_model(), "writer": None, "train_dataset": None}
    args = SimpleNamespace(device=torch.device("cpu"), seed=3)
    known |= {"args": args, "processing_class": None, "revisers": [], "add_callback": lambda callback: None}
    return SimpleNamespace(**{**known, **parts})


def make_trainer(folder: Any, revisers: Sequence[Reviser] = (), **overrides: Any):
    """As in training.py, with revisers."""
    rows = [{**row, "domain": "long" if len(row["prompt"]) > 4 else "short"} for row in training.ROWS[:16]]
    trainer = training.make_trainer(folder, **{"rows": rows, **overrides})
    assert isinstance(trainer.train_dataset, DistillationDataset)
    trainer.revisers = list(revisers)
    for reviser in trainer.revisers:
        reviser.attach(trainer)
    return trainer


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    """Train; the update of every parameter that learns."""
    before = trained_weights(trainer)
    trainer.train()
    return {name: value - before[name] for name, value in trained_weights(trainer).items()}


def log(trainer: Any, name: str) -> list[float]:
    """A figure of each step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def lay_out(rows: Sequence[Mapping[str, Any]], demonstrations: int = 4) -> None:
    """Write a model, these rows and a recipe of two steps into the working folder: `recipe.yaml`."""
    make_model().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": "model", "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "self"},
        "data": {"train": {"path": "rows.jsonl"}, "demonstrations": {"count": demonstrations}},
        "evaluation": {"shots": [0], "size": 4, "max_new_tokens": 3, "fidelity": False},
        "training": {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
