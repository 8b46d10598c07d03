"""What each of two processes runs in a rewarded training. Each writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from conftest import make_model
from rewarding import learned, logged, make_rewarded, odd

from hfkd.errors import VerifierError


def breaks_on_the_second(row: dict, text: str) -> float:
    """A verifier that fails for what the second process drew alone."""
    if PartialState().process_index == 1:
        raise KeyError("grade")
    return odd(row, text)


def main(folder: Path, case: str) -> None:
    """Train one case and save what this process saw."""
    settings = {"per_device_train_batch_size": 4, "ddp_backend": "gloo", "teacher": make_model(seed=1)}
    verifier = breaks_on_the_second if case == "broken" else odd
    options = {"distillation_weight": 0.5, "reward_weight": 0.0, "distil_where": "wrong_responses"}
    trainer = make_rewarded(folder / "run", verifier=verifier, **settings, **options)
    found: dict = {}
    try:
        trainer.train()
        sums = {name: float(value.double().abs().sum()) for name, value in learned(trainer).items()}
        found = {"weights": sums, "share": logged(trainer, "distillation/share"), "loss": logged(trainer, "loss")}
        found |= {"term": logged(trainer, "distillation/loss"), "reward": logged(trainer, "reward")}
    except VerifierError as error:
        found = {"error": str(error)}
    (folder / f"process-{PartialState().process_index}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
