"""What each of two processes runs: an early exit whose norm is fitted, beside neighbours as targets. Writes the update
and the norm that each process sees.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from training import lora, make_trainer, trained_weights

from hfkd.losses import EmbeddingNeighbours
from hfkd.teachers import EarlyExitTeacher
from hfkd.terms import Term


def made(folder: Path, **settings: Any) -> Any:
    """A trainer of two steps of eight rows."""
    terms = [{"kind": "forward_kl"}, Term("near", EmbeddingNeighbours(neighbours=4, spread=1.0, cap=0.5))]
    teacher = EarlyExitTeacher(1, "trained", 4, only_where_layers_disagree=True, weights="live")
    return make_trainer(folder, teacher=teacher, peft_config=lora(), objective=terms, **settings)


def main(folder: Path) -> None:
    """Train with half of the rows on each process."""
    trainer = made(folder / "run", per_device_train_batch_size=4, ddp_backend="gloo")
    before = trained_weights(trainer)
    trainer.train()
    update = {name: value - before[name] for name, value in trained_weights(trainer).items()}
    torch.save({"update": update, "norm": trainer.teacher.state_dict()}, folder / f"{PartialState().process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
