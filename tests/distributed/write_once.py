"""What each of two processes runs where texts are written during training. Writes the update that process 0 sees."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from test_on_policy import WRITTEN, losses, make_trainer, trained
from training import trained_weights

from hfkd.rollout import OffPolicyBuffer


def resumed(folder: Path, settings: dict) -> dict:
    """Six steps in one go, and the last three of them again behind a checkpoint: both ends, on this process."""
    settings = settings | {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.05}
    ends = []
    for name, checkpoint in (("straight", None), ("resumed", str(folder / "straight" / "checkpoint-3"))):
        trainer = make_trainer(folder / name, buffer=OffPolicyBuffer(16, 0.5), **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(trained_weights(trainer))
    gaps = [float((ends[0][name] - ends[1][name]).norm() / ends[0][name].norm()) for name in ends[0]]
    files = sorted(path.name for path in (folder / "straight" / "checkpoint-3").glob("texts*"))
    return {"gap": max(gaps), "files": files, "reused": sum(losses(trainer, "rollout/from_buffer"))}


def main(folder: Path, case: str) -> None:
    """Train one case and save what came out."""
    settings = {**WRITTEN[case.removesuffix("_reused")](), "per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    if case.endswith("_reused"):
        update, numbers = {}, resumed(folder, settings)
    else:
        trainer = make_trainer(folder / "run", **settings)
        update = trained(trainer)
        numbers = {"losses": losses(trainer), "own": losses(trainer, "rollout/own_text")}
        numbers["length"] = losses(trainer, "rollout/length")
    if PartialState().is_main_process:
        torch.save(update, folder / "update.pt")
        (folder / "numbers.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
