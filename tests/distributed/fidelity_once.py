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
from hfkd.errors import VocabularyError
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


class Ignorant(LocalTeacher):
    """Has nothing to say of the second batch of the second process."""

    asked = 0

    def signal(self, *args: Any) -> Any:
        self.asked += 1
        if PartialState().process_index == 1 and self.asked == 2:
            raise VocabularyError("id 300 isn't shared")
        return super().signal(*args)


def refused(folder: Path) -> str:
    """What a process says when the rows of one of them can't be measured; training must go on all the same."""
    teacher = Ignorant(make_model(seed=1))
    trainer = make_trainer(
        folder, teacher=teacher, demonstrations=[], per_device_eval_batch_size=4, ddp_backend="gloo", max_steps=1
    )
    try:
        measure_fidelity(trainer, ROWS[:13])
    except ValueError as error:
        trainer.train()
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    """Measure each case and save what came out."""
    said = refused(folder / "refused")
    (folder / f"refused-{PartialState().process_index}.txt").write_text(said)
    for case, settings in CASES.items():
        if settings:
            shard_on_cpu()
            forget_choice()
        found = measured(folder / case, 2, ddp_backend="gloo", **settings)
        (folder / f"{case}-{PartialState().process_index}.json").write_text(json.dumps(found))
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
