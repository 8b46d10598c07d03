"""What each of two processes runs where tokens are marked as private. Writes what process 0 sees."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from training import ROWS, make_trainer, trained_weights

from hfkd.revision.private import ALL_MARKED_STEPS, PrivateTokens

SECRET = [
    {"prompt": row["prompt"], "completion": f"{row['completion']} {4821 + place}"} for place, row in enumerate(ROWS)
]


def secretive(folder: Path, **settings):
    """A trainer that hides numbers."""
    trainer = make_trainer(folder, objective=["swing", "cross_entropy"], rows=SECRET[:16], **settings)
    trainer.revisers = [PrivateTokens(patterns=["numbers"])]
    trainer.revisers[0].attach(trainer)
    return trainer


def learned(trainer) -> dict:
    """Its update."""
    before = trained_weights(trainer)
    trainer.train()
    return {name: value - before[name] for name, value in trained_weights(trainer).items()}


def steps_until_refused(folder: Path, everywhere: bool) -> int:
    """The step at which a scorer that marks every token is refused, 0 for never."""
    trainer = make_trainer(folder, per_device_train_batch_size=4)
    mine = everywhere or PartialState().process_index == 1
    reviser = PrivateTokens(
        scorer=lambda text: [(0, len(text), float(mine and reviser.trainer.state.global_step < 9))]
    )
    reviser.trainer, reviser.scorer = trainer, None
    trainer.state.global_step = 9  # nothing is marked while the scorer is tried
    reviser.attach(trainer)
    trainer.state.global_step = 0
    batches = [next(iter(trainer.get_train_dataloader()))]
    for step in range(ALL_MARKED_STEPS + 2):
        try:
            reviser.revise(batches, step)
        except ValueError:
            return step + 1
    return 0


def main(folder: Path) -> None:
    """Train, and try bad scorers."""
    trainer = secretive(folder / "run", per_device_train_batch_size=4, ddp_backend="gloo")
    update = learned(trainer)
    numbers = {"one": steps_until_refused(folder, False), "all": steps_until_refused(folder, True)}
    lines = [line for line in trainer.state.log_history if "private/share" in line]
    numbers["shares"] = [line["private/share"] for line in lines]
    if PartialState().is_main_process:
        torch.save(update, folder / "update.pt")
        (folder / "numbers.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
