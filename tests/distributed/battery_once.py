"""What each of two processes runs: every case of the battery, under DDP or sharded."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from launching import SHARDED, forget_choice, shard_on_cpu
from path_battery import CASES, make_case, share_here, train_case


def main(folder: Path, strategy: str, cases: list[str]) -> None:
    """Train the cases one after the other and save what came out."""
    if strategy == "fsdp2":
        shard_on_cpu()
    results = {}
    for case in cases or CASES:
        forget_choice()
        trainer = make_case(case, folder, processes=2, **(SHARDED if strategy == "fsdp2" else {}))
        results[case] = train_case(trainer)
        results[case]["type"] = trainer.accelerator.distributed_type.value
        results[case]["student_here"] = share_here(trainer.model)
        if case.split()[1] not in ("cached", "routed"):
            with trainer.teacher.weights() as model:
                results[case]["teacher_here"] = share_here(model)
    torch.save(results, folder / f"{strategy}-{PartialState().process_index}.pt")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
