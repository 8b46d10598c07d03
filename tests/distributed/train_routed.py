"""What each of two processes runs: rows of two teachers, one of which follows the student. Writes the update that each
process sees.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from test_several_teachers import routed_with_a_moving_member
from training import trained_weights


def main(folder: Path) -> None:
    """Train one row at a time, so that the processes' rows name different teachers."""
    trainer = routed_with_a_moving_member(
        folder / "run", per_device_train_batch_size=1, gradient_accumulation_steps=4, ddp_backend="gloo"
    )
    before = trained_weights(trainer)
    trainer.train()
    update = {name: value - before[name] for name, value in trained_weights(trainer).items()}
    torch.save(
        {"update": update, "teacher": trainer.teacher.state_dict()}, folder / f"{PartialState().process_index}.pt"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
