"""What each of two processes runs: trainings whose samplers measure, left alone and gone on from a checkpoint inside
the second epoch.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from accelerate.utils import gather_object
from conftest import make_model
from training import WORDS, make_trainer, trained_weights

from hfkd import DistillationTrainer, LocalTeacher
from hfkd.sampling import ExampleSampler
from hfkd.sampling.domains import DomainSampler
from hfkd.sampling.hard import HardPromptSampler

SPOKEN = [{"prompt": word, "completion": f"{word}ed", "domain": "past"} for word in WORDS[:12]]
ROWS = [*SPOKEN, *({"prompt": f"{word} {word}", "completion": "2", "domain": "count"} for word in WORDS[:8])]
KINDS = {
    "domains": lambda: DomainSampler(examples=2, interval=1, smoothing=0.2),
    "hard": lambda: HardPromptSampler(examples=5, interval=1, times=4),
}
ROWS_OF = {"domains": ROWS, "hard": ROWS[:16]}  # sixteen of each are drawn in an epoch: four steps


def trainer_of(folder: Path, kind: str, sampler: ExampleSampler, batch: int = 2, **more: Any) -> DistillationTrainer:
    """Seven steps of four rows; the last measured micro-batch is not full, and the processes don't have as many."""
    return make_trainer(
        folder,
        rows=ROWS_OF[kind],
        sampler=sampler,
        teacher=LocalTeacher(make_model(seed=1)),
        demonstrations=(),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=3,
        learning_rate=1e-2,
        optim="adamw_torch",
        max_steps=7,
        save_strategy="steps",
        save_steps=2,
        **more,
    )


def drawn(sampler: ExampleSampler) -> list[int]:
    """What the course, which forgets epochs that are over, makes of the last epoch."""
    return list(sampler.order(1))


def main(folder: Path) -> None:
    """Both kinds."""
    state = PartialState()
    for kind, make in KINDS.items():
        straight = trainer_of(folder / kind, kind, whole := make(), ddp_backend="gloo")
        straight.train()
        assert whole.epoch == 1 and len(whole.course.state_dict()["places"]) > 2
        assert len({str(found) for found in gather_object([drawn(whole)])}) == 1
        again_in = folder / f"{kind}-again"
        if state.is_main_process:
            shutil.copytree(folder / kind / "checkpoint-6", again_in / "checkpoint-6")
        state.wait_for_everyone()
        again = trainer_of(again_in, kind, resumed := make(), ddp_backend="gloo")
        again.train(resume_from_checkpoint=True)
        assert again._initial_global_step == 6 and resumed.epoch == 1, (kind, resumed.epoch)
        ours, theirs = trained_weights(straight), trained_weights(again)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [], kind
        assert all(value.equal(resumed.state_dict()[name]) for name, value in whole.state_dict().items())
        if state.is_main_process:
            torch.save((trained_weights(straight), drawn(whole)), folder / f"{kind}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
