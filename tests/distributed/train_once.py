"""What each of two processes runs: the same sixteen words, half of them here. Writes the update that process 0
sees.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from training import make_trainer, trained_weights

from hfkd import LocalTeacher, Objective
from hfkd.data.collate import DistillationCollator
from hfkd.terms import Term


def main(folder: Path, case: str) -> None:
    """Train one case and save what came out."""
    settings = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    if case == "accumulated":
        settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    if case == "full":
        from conftest import make_model

        settings |= {"teacher": LocalTeacher(make_model(seed=1)), "demonstrations": [], "learning_rate": 0.3}
    if case == "own_parameter":
        from test_trainer import Jeffreys

        settings |= {"objective": Objective([Term("jeffreys", Jeffreys())])}
    if case == "states":
        from test_trainer_terms import STATES, narrow_teacher

        torch.manual_seed(PartialState().process_index)  # projections drawn apart would train apart
        objective = Objective([*STATES, {"kind": "clipped_kl", "support": 32}])
        settings |= {"teacher": narrow_teacher(), "demonstrations": [], "learning_rate": 0.3, "objective": objective}
    trainer = make_trainer(folder / "run", **settings)
    if case == "masked_rank" and PartialState().process_index == 1:

        def masked(features):
            inputs = DistillationCollator(2)(features)
            for name in ("labels", "teacher_labels"):
                inputs[name] = torch.full_like(inputs[name], -100)
            return inputs

        trainer.data_collator = masked
    before = trained_weights(trainer)
    trainer.train()
    update = {name: value - before[name] for name, value in trained_weights(trainer).items()}
    metrics = trainer.evaluate(trainer.train_dataset)
    if PartialState().is_main_process:
        factor = [float(value.sum()) for value in trainer.objective.parameters()]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save(update, folder / "update.pt")
        (folder / "numbers.json").write_text(
            json.dumps({"losses": losses, "eval_loss": metrics["eval_loss"], "factor": factor})
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
