"""What each of two processes runs: a training that is left alone and one that goes on from a checkpoint of it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from conftest import make_tokenizer
from training import lora, make_trainer, trained_weights

from hfkd import DistillationConfig, GenerationSettings, HFRollout, OffPolicyBuffer
from hfkd.errors import CheckpointError
from hfkd.record import checkpoints

SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}


def trainer_of(folder: Path):
    """Dropout, which each process draws for itself, and texts, which each keeps for itself."""
    rollout = HFRollout(make_tokenizer(), GenerationSettings(max_new_tokens=4, temperature=1.0, stop=("\n",)))
    own = {"answer": "student", "rollout": rollout, "buffer": OffPolicyBuffer(16, 0.5)}
    dropout = {"peft_config": lora(lora_dropout=0.3), "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    return make_trainer(folder, **SETTINGS, ddp_backend="gloo", **dropout, **own)


def same_twice(folder: Path) -> None:
    """The second run finds a checkpoint with a damaged file of the second process, and one that is whole."""
    state = PartialState()
    straight = trainer_of(folder / "straight")
    straight.train()
    if state.is_main_process:
        for step in (2, 4):
            shutil.copytree(folder / "straight" / f"checkpoint-{step}", folder / "again" / f"checkpoint-{step}")
        (folder / "again" / "checkpoint-4" / "rng_state_1.pth").write_bytes(b"")
    state.wait_for_everyone()
    torch.manual_seed(state.process_index)
    again = trainer_of(folder / "again")
    again.train(resume_from_checkpoint=True)
    assert again._initial_global_step == 2 and again.state.global_step == 6
    ours, theirs = trained_weights(straight), trained_weights(again)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert torch.equal(torch.get_rng_state(), torch.load(_random_state(folder), weights_only=False)["cpu"])
    for name, value in straight.writer.state_dict().items():
        assert torch.equal(value, again.writer.state_dict()[name]), name


def _random_state(folder: Path) -> Path:
    return folder / "straight" / "checkpoint-6" / f"rng_state_{PartialState().process_index}.pth"


def go_on(folder: Path) -> None:
    """From a checkpoint of one process."""
    trainer = make_trainer(folder, **SETTINGS, per_device_train_batch_size=4, ddp_backend="gloo")
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    if PartialState().is_main_process:
        torch.save(trained_weights(trainer), folder / "weights.pt")


def disks(folder: Path) -> None:
    """Each process on a machine of its own, with a disk of its own: what isn't shared is said, and not gone on from,
    by either way of asking; where each machine saves all, each keeps its limit and goes on.
    """
    DistillationConfig.local_process_index = property(lambda self: 0)
    rank, said = int(os.environ["RANK"]), []
    logging.getLogger("hfkd.long_runs").addFilter(lambda record: said.append(record.getMessage()) or True)
    mine = folder / f"disk-{rank}"
    options = {"per_device_train_batch_size": 4, "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 1}
    make_trainer(mine, **options).train()
    assert [path.name for path in checkpoints(mine)] == ([] if rank else ["checkpoint-1", "checkpoint-2"])
    assert not (mine / "_unfinished").exists()
    assert rank or "isn't one folder for all machines: process 0 doesn't see what processes [1]" in said[0]
    for wanted in (True, str(mine)):
        try:
            make_trainer(mine, **options).train(resume_from_checkpoint=wanted)
        except CheckpointError as error:
            assert "can be gone on from" in str(error), error
        else:
            raise AssertionError("went on from a checkpoint that only one machine has")
    assert rank or any("no such folder (on the machine of process 1)" in text for text in said)
    own = {**options, "save_on_each_node": True, "save_total_limit": 1}
    for steps in (2, 3):
        trainer = make_trainer(folder / f"own-{rank}", max_steps=steps, **own)
        trainer.train(resume_from_checkpoint=steps == 3)
        assert [path.name for path in checkpoints(trainer.args.output_dir)] == [f"checkpoint-{steps}"]
    assert trainer._initial_global_step == 2
    make_trainer(folder / "shared", max_steps=1, **options).train()
    shared = make_trainer(folder / "shared", **options)
    shared.train(resume_from_checkpoint=True)
    assert shared._initial_global_step == 1 and not shared._apart


if __name__ == "__main__":
    {"same_twice": same_twice, "go_on": go_on, "disks": disks}[sys.argv[2]](Path(sys.argv[1]))
