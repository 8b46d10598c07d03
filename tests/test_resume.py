"""A run that is gone on from a checkpoint is the run that was never stopped, to the last bit; and what isn't that run
is refused.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import IterableDataset
from training import ROWS, lora, make_trainer, trained_weights
from transformers import EarlyStoppingCallback, TrainerCallback

from hfkd import DistillationTrainer, EmaTeacher, GenerationSettings, HFRollout, LocalTeacher, OffPolicyBuffer
from hfkd.checkpoint import FORMAT, MANIFEST, inspect
from hfkd.data.collate import DistillationCollator
from hfkd.errors import CheckpointError, CheckpointNotSaved, NothingToLearn, Preempted
from hfkd.losses import Divergence
from hfkd.objective import Objective, Term
from hfkd.publishing import PublishingTrainer
from hfkd.record import UNFINISHED
from hfkd.rollout.base import Completion
from hfkd.rollout.watch import Watch

COMMON = {
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "max_steps": 8,
    "optim": "adamw_torch",
}
"""Four steps an epoch, so that step 4 ends one and step 6 is inside one."""


class Leaning(Divergence):
    """Forward KL with a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def between(self, student, teacher):
        """Scaled."""
        return self.factor * (teacher.exp() * (teacher - student)).sum(-1)


def adapter(**more: Any) -> dict[str, Any]:
    return {"peft_config": lora(lora_dropout=0.3), "learning_rate": 1e-2, **more}


def whole_student(**more: Any) -> dict[str, Any]:
    model = make_model(seed=0, attention_dropout=0.2)
    return {"model": model, "teacher": LocalTeacher(make_model(seed=1)), "learning_rate": 1e-3, **more}


def written() -> dict[str, Any]:
    rollout = HFRollout(make_tokenizer(), GenerationSettings(max_new_tokens=4, temperature=1.0, stop=("\n",)))
    return adapter(answer={"student": 0.8, "dataset": 0.2}, rollout=rollout, buffer=OffPolicyBuffer(24, 0.5))


CASES = {
    "adapter with dropout": adapter,
    "full student": whole_student,
    "accumulation": lambda: adapter(gradient_accumulation_steps=4, per_device_train_batch_size=1),
    "average of the student": lambda: {**adapter(), "teacher": EmaTeacher(decay=0.5)},
    "a loss that learns": lambda: whole_student(objective=Objective([Term("leaning", Leaning())])),
    "demonstrations drawn anew": lambda: adapter(student_shots=(0, 2)),
    "texts of its own": written,
    "cosine, workers": lambda: adapter(lr_scheduler_type="cosine", warmup_steps=2, dataloader_num_workers=1),
    "evaluation after each epoch": lambda: adapter(eval_dataset=ROWS[:4], eval_strategy="epoch"),
}


def state_of(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    """All that a step changes: what learns, the optimizer, the losses, the teacher, the texts."""
    state = dict(trained_weights(trainer))
    for place, entry in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{place}.{name}": value for name, value in entry.items()}
    for name, owner in (("objective", trainer.objective), ("teacher", trainer.teacher), ("writer", trainer.writer)):
        state |= {f"{name}.{key}": value for key, value in (owner.state_dict() if owner is not None else {}).items()}
    state["random"] = torch.get_rng_state()
    return state


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs that were never stopped, by case, each made once."""
    made: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def of(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if name not in made:
            folder = tmp_path_factory.mktemp("straight")
            trainer = make_trainer(folder, **{**COMMON, **CASES[name]()})
            before = trained_weights(trainer)
            trainer.train()
            after = trained_weights(trainer)
            assert all(not torch.equal(before[key], after[key]) for key in before), "a parameter didn't move"
            made[name] = folder, state_of(trainer)
        return made[name]

    return of


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("name", CASES)
def test_resumed_is_straight_to_the_last_bit(tmp_path: Path, straight: Any, name: str, step: int) -> None:
    """Whatever isn't in a checkpoint, or is drawn from where nobody puts it back, makes another run of it."""
    folder, wanted = straight(name)
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    torch.manual_seed(99)
    trainer = make_trainer(tmp_path, **{**COMMON, **CASES[name]()})
    trainer.train(resume_from_checkpoint=True)
    found = state_of(trainer)
    assert trainer.state.global_step == 8 and found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []


def test_a_run_that_is_over_stays_as_it_is(tmp_path: Path, straight: Any) -> None:
    """Trainer looks whether it is done after a step: each resume would train one step more, with others' rates."""
    shutil.copytree(straight("adapter with dropout")[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    trainer = make_trainer(tmp_path, **{**COMMON, **adapter(), "max_steps": 6})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    kept = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    found = trained_weights(trainer)
    assert kept and all(torch.equal(kept[name.replace(".default.", ".")], found[name]) for name in found)


def test_callbacks_remember(tmp_path: Path) -> None:
    """Early stopping that begins to count anew stops later than the run that was never stopped."""
    options = {"eval_dataset": ROWS[:4], "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}

    def patient() -> DistillationTrainer:
        stopping = EarlyStoppingCallback(2)
        return short(tmp_path, max_steps=8, callbacks=[stopping], greater_is_better=True, **options)

    alone = patient()
    alone.train()
    stopped_at = alone.state.global_step
    assert stopped_at < 8
    shutil.rmtree(tmp_path / f"checkpoint-{stopped_at}")
    again = patient()
    again.train(resume_from_checkpoint=True)
    assert again._initial_global_step == stopped_at - 1 and again.state.global_step == stopped_at


# --- which checkpoint is taken


def short(folder: Path, **more: Any) -> DistillationTrainer:
    """Four steps of an adapter, saved at each."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "per_device_train_batch_size": 4}
    return make_trainer(folder, **{**settings, **more})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("stopped")
    short(folder).train()
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    """The checkpoints of steps 2 and 3 of a run of four."""
    for step in (2, 3):
        shutil.copytree(stopped / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def begins_at(trainer: DistillationTrainer, resume: Any) -> int:
    """The step that a training goes on from."""
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 4
    return trainer._initial_global_step


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that loses a block must cost some steps, not the run, and nobody may be left to guess."""
    with (folder / "checkpoint-3" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    (folder / UNFINISHED / "checkpoint-4").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert begins_at(short(folder), True) == 2
    told = "\n".join(record.message for record in caplog.records)
    assert "checkpoint-3 is damaged: optimizer.pt has 100 bytes instead of" in told
    assert "left unfinished: checkpoint-4" in told
    assert inspect(folder / "checkpoint-3").kind == "whole", "the step was done again, and its checkpoint written anew"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_none_is_whole(folder: Path, tmp_path: Path) -> None:
    """To begin anew in silence, in the folder of a run of days, is to lose it."""
    for step in (2, 3):
        (folder / f"checkpoint-{step}" / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-2, checkpoint-3 are damaged. Start anew"):
        short(folder).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="there is none"):
        short(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_one_that_is_asked_for_by_name_is_that_one(folder: Path) -> None:
    """Who names a checkpoint doesn't want another one."""
    assert begins_at(short(folder), str(folder / "checkpoint-2")) == 2
    shutil.rmtree(folder / "checkpoint-4")
    assert begins_at(short(folder.parent / "elsewhere"), str(folder)) == 3
    (folder / "checkpoint-3" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match="trainer_state.json is missing.*checkpoint-2.* beside it"):
        short(folder).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        short(folder).train(resume_from_checkpoint=str(folder / "checkpoint-9"))


def test_one_of_an_older_hfkd_is_taken_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An update must not strand the runs that are under way."""
    for step in (2, 3):
        (folder / f"checkpoint-{step}" / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        assert begins_at(short(folder), True) == 3
    assert any("checkpoint-3 can't be verified" in record.message for record in caplog.records)


def test_one_of_a_newer_hfkd_is_refused(folder: Path) -> None:
    """What it holds may mean something else by then; an older one in its place would be a silent step back."""
    path = folder / "checkpoint-3" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT + 1}))
    with pytest.raises(CheckpointError, match=f"in format {FORMAT + 1}; this one reads up to {FORMAT}. Update hfkd"):
        short(folder).train(resume_from_checkpoint=True)


def test_one_of_an_earlier_run_is_not_taken(folder: Path) -> None:
    """A run that began anew in a used folder and was stopped would be gone on from where the old one had come."""
    short(folder, max_steps=1).train()
    assert begins_at(short(folder), True) == 1
    shutil.rmtree(folder / "checkpoint-4")
    assert begins_at(short(folder), True) == 3, "what went on is the same run"


def test_the_model_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    """Trainer goes on from it without a word, with a new optimizer and the learning rate of the first step."""

    class Told(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted, match="checkpoint-1. It holds the model only.*start a new run from its weights"):
        short(tmp_path / "alone", save_only_model=True, callbacks=[Told()]).train()
    with pytest.raises(CheckpointError, match="checkpoint-1 holds the model only.*save_only_model"):
        short(tmp_path / "alone").train(resume_from_checkpoint=True)


def test_another_objective_or_teacher_is_refused(folder: Path) -> None:
    """A recipe's keys are compared; who writes Python would go on with another loss and never hear of it."""
    with pytest.raises(CheckpointError, match="The objective isn't the one .*forward_kl.* is .*reverse_kl"):
        short(folder, objective="reverse_kl").train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="The teacher isn't the one .*adapter_off.* is .*ema"):
        short(folder, teacher=EmaTeacher(decay=0.5), peft_config=lora()).train(resume_from_checkpoint=True)


def test_data_without_a_length_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their second pass isn't found again: the rows that are skipped are counted from the first one's beginning."""
    views = short(tmp_path).train_dataset

    class Stream(IterableDataset):
        def __iter__(self):
            return (views[place] for place in range(len(views)))

    for steps in (1, 2):
        own = {"rows": Stream(), "data_collator": DistillationCollator(0), "demonstrations": ()}
        with caplog.at_level(logging.WARNING):
            short(tmp_path, max_steps=steps, **own).train(resume_from_checkpoint=steps == 2)
    assert sum("have no length" in record.message for record in caplog.records) == 1


def test_other_data_are_refused(folder: Path) -> None:
    """The place in the data is a number: of other rows it skips those that were never learned."""
    changed = [{**row, "completion": row["completion"] + "!"} for row in ROWS[:16]]
    for rows in (changed, ROWS[:15], ROWS[:16][::-1]):
        with pytest.raises(CheckpointError, match="training data aren't those that .*checkpoint-3 was made with"):
            short(folder, rows=rows).train(resume_from_checkpoint=True)
    assert begins_at(short(folder, rows=changed, ignore_data_skip=True), True) == 3


def test_another_size_of_a_step_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half as many rows a step are a run of other steps; the same rows in smaller batches are the same run."""
    with pytest.raises(CheckpointError, match=r"had 4 rows \(1 process x batch 4 x accumulation 1\).* has 2 "):
        short(folder, per_device_train_batch_size=2).train(resume_from_checkpoint=True)
    smaller = short(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    with caplog.at_level(logging.WARNING):
        assert begins_at(smaller, True) == 3
    assert any("1 process x batch 2 x accumulation 2: the same rows a step" in each.message for each in caplog.records)


# --- writing beside the rest of Trainer


def test_the_best_checkpoint_stays_and_is_loaded(tmp_path: Path) -> None:
    """A path into the folder that it was written in leads nowhere once it is moved."""
    options = {"eval_dataset": ROWS[:4], "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    trainer = short(tmp_path, load_best_model_at_end=True, save_total_limit=1, greater_is_better=True, **options)
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 4, "want a best one that isn't the last"
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    state = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{best}"]
    kept = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    name = next(name for name in kept if name.endswith("q_proj.lora_B.weight"))
    assert torch.equal(kept[name], trainer.model.state_dict()[name.replace("lora_B.", "lora_B.default.")])


def test_what_is_pushed_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload begins while training goes on: of a folder that is about to be moved it would find nothing."""
    pushed = []
    monkeypatch.setattr(PublishingTrainer, "init_hf_repo", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        PublishingTrainer, "_push_from_checkpoint", lambda self, path: pushed.append(inspect(Path(path)).kind)
    )
    trainer = short(tmp_path, push_to_hub=True, save_only_model=True, max_steps=2)
    trainer.push_in_progress = None
    trainer.train()
    assert pushed == ["whole", "whole"]
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()


def test_a_save_that_fails_names_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says of a full disk that it is an "enforce fail": neither what happened nor what is left."""
    save, trainer = torch.save, short(tmp_path)

    def full(content: Any, path: Any, *args: Any) -> None:
        save(content, path, *args)
        if "checkpoint-3" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointNotSaved, match="checkpoint-3 couldn't be written.*last checkpoint, .*checkpoint-2, is"
    ):
        trainer.train()
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert begins_at(short(tmp_path), True) == 2


def test_a_folder_that_cannot_be_written_into_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found at the first checkpoint, it has cost the hours before it."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="output folder .*file/out can't be written into .*training.output_dir"):
        short(tmp_path / "file" / "out")

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(OSError, match=r"can't be written into \(Permission denied\)"):
        short(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_warnings_of_what_is_written_count_on() -> None:
    """A run that is interrupted every hour would never hear that its answers are blank."""
    one, other, blank = Watch(), Watch(), [Completion(ids=[], text=" ", finished=False)]
    for _ in range(Watch.BLANK_STEPS - 1):
        one.judge(blank, None)
    other.load_state_dict(one.state_dict())
    with pytest.raises(NothingToLearn, match="3 steps in a row"):
        other.judge(blank, None)
    assert torch.equal(other.state_dict()["cut"], torch.ones(3, 2, dtype=torch.int64))
