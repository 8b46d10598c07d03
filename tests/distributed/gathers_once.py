"""What each of two processes runs: one step of a sharded student and a sharded teacher, counting what is gathered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from conftest import make_model
from launching import SHARDED, forget_choice, shard_on_cpu
from training import make_trainer

from hfkd import LocalTeacher

NAMES = ("all_gather_into_tensor", "all_gather_single")
"""What `fully_shard` calls, before and since torch 2.13."""


def gathered_in_a_step(folder: Path, chunk_size: int) -> list[int]:
    """The sizes, in numbers, of everything that one step gathers from both processes."""
    forget_choice()
    sizes: list[int] = []
    originals = {name: getattr(torch.distributed, name) for name in NAMES if hasattr(torch.distributed, name)}

    def counting(original):
        def gather(output_tensor, *args, **kwargs):
            sizes.append(output_tensor.numel())
            return original(output_tensor, *args, **kwargs)

        return gather

    trainer = make_trainer(
        folder / "run", model=make_model(seed=0), teacher=LocalTeacher(make_model(seed=1)), demonstrations=[],
        learning_rate=0.3, max_steps=2, chunk_size=chunk_size, per_device_train_batch_size=4, log_agreement=False,
        **SHARDED,
    )  # fmt: skip
    step = trainer.training_step

    def watched(*args, **kwargs):
        sizes.clear()  # only the last step is looked at: the first one checks the heads
        for name, original in originals.items():
            setattr(torch.distributed, name, counting(original))
        try:
            return step(*args, **kwargs)
        finally:
            for name, original in originals.items():
                setattr(torch.distributed, name, original)

    trainer.training_step = watched
    trainer.train()
    return list(sizes)


def main(folder: Path) -> None:
    """Count with chunks of one row and with one chunk for all rows."""
    shard_on_cpu()
    found = {str(size): gathered_in_a_step(folder, size) for size in (1, 10_000)}
    if PartialState().is_main_process:
        (folder / "gathers.json").write_text(json.dumps(found))
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
