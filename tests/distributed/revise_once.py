"""What each of two processes runs where batches are revised. Writes the update that process 0 sees, and the log."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from deciding import make_trainer, trained
from test_writer import ending_in

from hfkd.revision.correction import Correction
from hfkd.revision.select import Selection
from hfkd.revision.teacher_quality import TeacherQuality

WRITTEN = {"answer": "student", "objective": "reverse_kl"}
CASES = {
    "sequences": lambda: ([Selection(per="domain", decay=0.5)], {"learning_rate": 0.02}),
    "tokens": lambda: ([Selection("token", confidence=0.03)], {}),
    "nothing": lambda: ([Selection(confidence=1.0)], {}),
    "quality": lambda: ([TeacherQuality("likelihood", "step"), Selection()], {}),
    "corrected": lambda: ([Correction()], {"rollout": ending_in(), **WRITTEN}),
}
"""Revisers that one process and two must revise with alike; made anew for each run."""

FIGURES = ("loss", "selection/kept", "selection/confidence_threshold", "teacher/quality", "correction/corrected")


def figures(trainer) -> dict[str, list[float]]:
    """The log by name."""
    log = trainer.state.log_history
    return {name: [entry[name] for entry in log if name in entry] for name in FIGURES}


def main(folder: Path) -> None:
    """Train all cases and save what came out."""
    for case, made in CASES.items():
        revisers, settings = made()
        trainer = make_trainer(
            folder / case, revisers, per_device_train_batch_size=4, ddp_backend="gloo", max_steps=3, **settings
        )
        update = trained(trainer)
        if PartialState().is_main_process:
            torch.save(update, folder / f"{case}.pt")
            (folder / f"{case}.json").write_text(json.dumps(figures(trainer)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
