"""What each of two processes runs: thirteen texts in batches of four, so that the last round holds three of them
twice. Writes the report that each process gets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from conftest import make_model
from launching import SHARDED, forget_choice, shard_on_cpu
from training import ROWS, make_trainer

from hfkd import LocalTeacher
from hfkd.eval.fidelity import measure_fidelity

CASES = {"whole": {}, "shards": SHARDED}


def measured(folder: Path, processes: int, **settings: Any) -> dict[str, Any]:
    """Train two steps and measure afterwards, and before them too where the student is whole."""
    trainer = make_trainer(
        folder,
        teacher=LocalTeacher(make_model(seed=1)),
        demonstrations=[],
        learning_rate=0.3,
        per_device_train_batch_size=8 // processes,
        per_device_eval_batch_size=4,
        **settings,
    )
    reports = {} if "fsdp" in settings else {"before": measure_fidelity(trainer, ROWS[:13]).to_dict()}
    if "fsdp" not in settings:
        trainer.evaluate(ROWS[:13])  # must not leave the processes to train each by itself
    trainer.train()
    reports["after"] = measure_fidelity(trainer, ROWS[:13]).to_dict()
    return reports


def main(folder: Path) -> None:
    """Measure each case and save what came out."""
    for case, settings in CASES.items():
        if settings:
            shard_on_cpu()
            forget_choice()
        found = measured(folder / case, 2, ddp_backend="gloo", **settings)
        (folder / f"{case}-{PartialState().process_index}.json").write_text(json.dumps(found))
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
