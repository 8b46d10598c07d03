"""What each of two processes runs until one of them is killed, raises, is told to end, or meets a NaN."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from torch.distributed.elastic.multiprocessing.errors import record
from training import make_trainer
from transformers import TrainerCallback

from hfkd.errors import Preempted


class Announce(TrainerCallback):
    """Says which process does which step, and raises at the fifth where that is the case."""

    def __init__(self, folder: Path, case: str) -> None:
        self.folder, self.case = folder, case

    def on_step_begin(self, args, state, control, **kwargs):
        process = PartialState().process_index
        (self.folder / f"process-{process}.txt").write_text(f"{os.getpid()} {state.global_step}")
        time.sleep(0.05)
        if self.case == "raises" and process == 1 and state.global_step == 4:
            raise ValueError("the data of this process are broken")


class Breaks:
    """A collator's product of the second process, spoilt in its fifth batch."""

    def __init__(self, collator):
        self.collator, self.calls = collator, 0

    def __call__(self, features):
        self.calls += 1
        inputs = self.collator(features)
        if PartialState().process_index == 1 and self.calls == 5:
            inputs["token_weights"] = torch.full(inputs["labels"].shape, math.inf)
        elif "token_weights" not in inputs:
            inputs["token_weights"] = torch.ones(inputs["labels"].shape)
        return inputs


class SignalInTheLastStep(TrainerCallback):
    """Tells one process to end when no step follows in which the other would hear of it."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1 and PartialState().process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def told_at_the_end(folder: Path) -> None:
    """Both processes must leave alike, which the caller reads from what they say."""
    settings = {"ddp_backend": "gloo", "per_device_train_batch_size": 4, "callbacks": [SignalInTheLastStep()]}
    try:
        make_trainer(folder / "last", max_steps=3, **settings).train()
    except Preempted as end:
        sys.stderr.write(f"process {PartialState().process_index} left with {end.code}, {end.checkpoint.name}\n")


@record
def main(folder: Path, case: str, steps: int) -> None:
    """Train; what ends it comes from outside or from the case."""
    if case == "non_finite":
        told_at_the_end(folder)
    trainer = make_trainer(
        folder / "run",
        max_steps=steps,
        per_device_train_batch_size=4,
        **({"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}),
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        callbacks=[Announce(folder, case)],
    )
    if case == "non_finite":
        trainer.data_collator = Breaks(trainer.data_collator)
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
