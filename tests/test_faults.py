"""What stops a run in mid-course: signals, losses and gradients that are no numbers, a full disk."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import make_trainer, trained_weights
from transformers import TrainerCallback

from hfkd import Divergence, Objective
from hfkd import preemption as preemption_module
from hfkd.errors import NonFiniteGradient, NonFiniteLoss, Preempted
from hfkd.faults import save_step
from hfkd.record import checkpoints
from hfkd.terms import Term


class At(TrainerCallback):
    """Does something when a step begins or ends."""

    def __init__(self, step, action, begins=False):
        self.step, self.action, self.begins = step, action, begins

    def on_step_begin(self, args, state, control, **kwargs):
        if self.begins and state.global_step == self.step - 1:
            self.action()

    def on_step_end(self, args, state, control, **kwargs):
        if not self.begins and state.global_step == self.step:
            self.action()


def kill(number=signal.SIGTERM):
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def handlers():
    """What the signals do now."""
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_after_the_step_and_ends_with_its_own_code(tmp_path, number):
    """A pre-empted job that ends like a failure isn't started again, and one that doesn't save begins anew."""
    before = handlers()
    trainer = make_trainer(tmp_path, max_steps=6, callbacks=[At(3, kill(number), begins=True)])
    with pytest.raises(Preempted) as caught:
        trainer.train()
    assert caught.value.code == 75 and trainer.state.global_step == 3
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-3"] == [caught.value.checkpoint]
    assert signal.Signals(number).name in str(caught.value) and "checkpoint-3" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert handlers() == before
    straight = make_trainer(tmp_path / "straight", max_steps=6)
    straight.train()
    resumed = make_trainer(tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    for name, value in trained_weights(straight).items():
        assert torch.equal(value, trained_weights(resumed)[name])


def test_nothing_but_the_checkpoint_comes_after_the_signal(tmp_path):
    """The time that is left belongs to the checkpoint: an evaluation would be what the kill interrupts."""
    happened = []

    class Listen(TrainerCallback):
        def on_evaluate(self, *args, **kwargs):
            happened.append("evaluate")

        def on_epoch_end(self, *args, **kwargs):
            happened.append("epoch")

        def on_save(self, *args, **kwargs):
            happened.append("save")

        def on_train_end(self, *args, **kwargs):
            happened.append("end")

    rows = make_trainer(tmp_path / "rows").train_dataset
    trainer = make_trainer(
        tmp_path / "run",
        max_steps=6,
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="epoch",
        callbacks=[At(1, kill(), begins=True), Listen()],
    )
    with pytest.raises(Preempted):
        trainer.train()
    assert happened == ["save", "end"]


def test_a_second_signal_ends_at_once_but_an_echo_of_the_first_does_not(tmp_path, monkeypatch):
    """Launchers pass on what the scheduler sent to all; a step that hangs must still be ended by a second request."""
    ended = []
    previous = signal.signal(signal.SIGTERM, lambda *_: ended.append(trainer.state.global_step))
    try:
        trainer = make_trainer(tmp_path / "echo", callbacks=[At(1, kill(), True), At(1, kill(signal.SIGUSR1))])
        with pytest.raises(Preempted):
            trainer.train()
        assert ended == []
        monkeypatch.setattr(preemption_module, "SAME_REQUEST_SECONDS", 0.0)
        trainer = make_trainer(tmp_path / "second", callbacks=[At(1, kill(), True), At(1, kill())])
        with pytest.raises(Preempted):
            trainer.train()
        assert ended == [1]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_handlers_of_others_stay(tmp_path):
    """A signal that somebody else uses, or that is ignored on purpose, isn't ours to take."""
    mine = signal.signal(signal.SIGUSR1, lambda *_: None)
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        before, seen = handlers(), []
        trainer = make_trainer(tmp_path, callbacks=[At(1, lambda: seen.append(handlers()))])
        trainer.train()
        assert seen == [before] and handlers() == before
    finally:
        signal.signal(signal.SIGUSR1, mine)
        signal.signal(signal.SIGTERM, ignored)


def test_training_in_a_thread_needs_no_handlers(tmp_path):
    """Python allows handlers in the main thread only; a trainer in another one must still train."""
    trainer = make_trainer(tmp_path)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(60)
    assert trainer.state.global_step == 2


def test_a_forked_child_ends_when_it_is_told_to(tmp_path):
    """A worker that inherits the handler ignores its pool's SIGTERM, and the pool waits for it for ever."""
    codes = []

    def fork():
        context = multiprocessing.get_context("fork")
        running = context.Event()
        child = context.Process(target=lambda: (running.set(), time.sleep(60)))
        child.start()
        assert running.wait(20)  # Python forgets a signal that comes while it forks
        child.terminate()
        child.join(20)
        codes.append(child.exitcode)
        child.kill()

    make_trainer(tmp_path, callbacks=[At(1, fork)]).train()
    assert codes == [-signal.SIGTERM]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_other_ends_leave_handlers_and_checkpoints_as_they_were(tmp_path, error):
    """A notebook goes on after Ctrl-C: with our handler it could no longer be ended."""

    def fail():
        raise error("stop")

    before = handlers()
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, callbacks=[At(3, fail, True)])
    with pytest.raises(error, match="stop"):
        trainer.train()
    assert handlers() == before
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_a_signal_that_comes_too_late_is_not_lost(tmp_path):
    """One that arrives when the last step is over must still end the process, before long evaluations."""
    ended = []
    previous = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))

    class Late(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            kill()()

    try:
        make_trainer(tmp_path, callbacks=[Late()]).train()
        assert ended == [True]
    finally:
        signal.signal(signal.SIGTERM, previous)


# --- numbers that are none


class BreaksAt(Divergence):
    """A forward KL whose value or gradient is spoilt from one call on."""

    def __init__(self, call, what, times=1):
        super().__init__()
        self.call, self.what, self.times, self.calls = call, what, times, 0

    def between(self, student, teacher):
        self.calls += 1
        value = (teacher.exp() * (teacher - student)).sum(-1)
        if not self.call <= self.calls < self.call + self.times:
            return value
        if self.what == "value":
            return value + math.inf  # its gradient is as before
        value.register_hook(lambda gradient: gradient * math.nan)
        return value


def breaking(folder, call, what, **settings):
    """A trainer whose loss breaks at a call; checkpoints after each step."""
    objective = Objective([Term("spoilt", BreaksAt(call, what, settings.pop("times", 1)))])
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, **settings}
    return make_trainer(folder, objective=objective, **settings)


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("what, error", [("value", NonFiniteLoss), ("gradient", NonFiniteGradient)])
def test_it_stops_before_the_weights_change_and_keeps_the_batches(tmp_path, what, error, limit):
    """A NaN in the weights is noticed hours later, when all checkpoints that are kept hold it too."""
    trainer = breaking(tmp_path, 4, what, max_grad_norm=limit, logging_nan_inf_filter=True)
    weights = {}
    trainer.add_callback(At(3, lambda: weights.update(trained_weights(trainer))))
    with pytest.raises(error, match="step 4") as caught:
        trainer.train()
    message, folder = str(caught.value), tmp_path / "_nonfinite-step-4" / "process-0"
    assert all(torch.equal(value, trained_weights(trainer)[name]) for name, value in weights.items()) and weights
    assert str(tmp_path / "checkpoint-3") in message and str(folder) in message
    assert ("spoilt" in message) == (what == "value")
    inputs = load_file(folder / "batch-0.safetensors")
    assert inputs["input_ids"].shape[0] == 8 and (inputs["labels"] != -100).any()
    report = json.loads((folder / "report.json").read_text())
    assert report["step"] == 4 and report["gradient_norm"] in ("nan", "inf")
    assert not list(tmp_path.rglob(".process-*"))
    if what == "gradient":
        assert "lora" in message and report["losses"][0]["sum"] > 0
    else:
        assert report["losses"][0]["terms"]["spoilt"] == "inf"


def test_only_the_parameters_that_broke_are_named(tmp_path):
    """Clipping by a NaN makes all gradients NaN: what is named after it says nothing."""
    trainer = make_trainer(tmp_path, max_grad_norm=1.0)
    learned = [(name, value) for name, value in trainer.model.named_parameters() if value.requires_grad]
    name, parameter = learned[5]
    parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteGradient) as caught:
        trainer.train()
    message = str(caught.value)
    assert name in message and not any(other in message for other, _ in learned if other != name)
    assert "no good checkpoint" in message


def test_every_micro_batch_of_the_step_is_kept(tmp_path):
    """The batch that broke is one of several, and the report says which."""
    trainer = breaking(
        tmp_path, 6, "value", per_device_train_batch_size=2, gradient_accumulation_steps=4, save_strategy="no"
    )
    with pytest.raises(NonFiniteLoss, match="step 2"):
        trainer.train()
    folder = tmp_path / "_nonfinite-step-2" / "process-0"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [f"batch-{n}.safetensors" for n in range(4)]
    sums = [one["sum"] for one in json.loads((folder / "report.json").read_text())["losses"]]
    assert [isinstance(one, str) for one in sums] == [False, True, False, False]


def test_a_checkpoint_with_nan_in_it_is_not_called_good(tmp_path):
    """An optimizer can overflow the weights with a finite gradient: the checkpoint after that step is lost too."""
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)

    def overflow():
        with torch.no_grad():
            next(value for value in trainer.model.parameters() if value.requires_grad).fill_(math.nan)

    trainer.add_callback(At(2, overflow))
    with pytest.raises(NonFiniteLoss, match="step 3") as caught:
        trainer.train()
    assert "checkpoint-2" not in str(caught.value) and str(tmp_path / "checkpoint-1") in str(caught.value)


@pytest.mark.parametrize("times, stops", [(9, False), (10, True)])
def test_float16_skips_steps_but_not_for_ever(tmp_path, times, stops):
    """A scale that is still too high overflows by design; a run that skips every step trains nothing."""
    trainer = breaking(tmp_path, 2, "gradient", times=times, max_steps=12, save_strategy="no")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    if not stops:
        trainer.train()
        assert trainer.state.global_step == 12
        assert all(torch.isfinite(value).all() for value in trained_weights(trainer).values())
        assert trainer.accelerator.scaler.get_scale() == 2.0 ** (16 - times)
        return
    with pytest.raises(NonFiniteGradient, match=r"step 11 .* 9 steps before"):
        trainer.train()


def test_a_loss_that_breaks_is_no_overflow_of_float16(tmp_path):
    """Skipping the step in silence would hide a broken loss, once for each time that it comes."""
    trainer = breaking(tmp_path, 2, "value")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with pytest.raises(NonFiniteLoss, match="step 2"):
        trainer.train()


def test_an_evaluation_stops_at_once(tmp_path):
    """No gradient follows an evaluation, so nothing else would tell."""
    trainer = breaking(tmp_path, 1, "value", times=99)
    with pytest.raises(NonFiniteLoss, match="spoilt"):
        trainer.evaluate(trainer.train_dataset)


def test_batches_that_cannot_be_written_do_not_hide_the_error(tmp_path):
    """On a full disk the message is all that is left."""
    trainer = breaking(tmp_path, 1, "value", save_strategy="no")
    (tmp_path / "_nonfinite-step-1").write_text("in the way")
    with pytest.raises(NonFiniteLoss, match=r"spoilt.*couldn't be saved"):
        trainer.train()


def test_half_a_step_is_not_left_behind(tmp_path):
    """Half of the batches looks like all of them."""
    batches = [{"input_ids": torch.ones(2, 3)}, {"input_ids": torch.ones(2, 3).to_sparse()}]
    with pytest.raises((ValueError, RuntimeError)):
        save_step(tmp_path / "process-0", batches, {})
    assert not list(tmp_path.iterdir())


# --- a full disk

FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from training import make_trainer
from test_faults import At

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trainer = make_trainer(sys.argv[1], max_steps=4, save_strategy="steps", save_steps=1, optim="adamw_torch")
limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
trainer.add_callback(At(3, limit, begins=True))
trainer.train()
"""


@pytest.mark.parametrize("room", [0, 5_000])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, room):
    """Half a checkpoint in the place of a whole one, or instead of it, is a lost run."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(Path(__file__).parent), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "checkpoint-3 couldn't be written" in done.stderr and "checkpoint-2, is untouched" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    make_trainer(tmp_path, max_steps=4, optim="adamw_torch").train(resume_from_checkpoint=True)
