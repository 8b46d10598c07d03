"""Kills a training again and again (`kill -9`), resumes it each time, and compares it with one that was left alone.

    python scripts/chaos.py                      # 60 steps, 20 kills, on one CPU core
    python scripts/chaos.py --kills 3 --steps 12

The moments are drawn over the time that the undisturbed run took, so that saves are hit as often as they take time.
Each run is a process of its own, forked after the imports. The model is tiny and random, with an adapter with dropout
on it, AdamW, an average of the student as its teacher, and demonstrations drawn anew: all that has a state. Nothing is
downloaded. Ends with exit code 1 where the weights differ, something half-written is found or too much was lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # threads don't survive a fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from transformers.trainer_callback import PrinterCallback, TrainerCallback  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from hfkd import DistillationConfig, DistillationTrainer, EmaTeacher, PromptStyle  # noqa: E402
from hfkd.checkpoint import inspect  # noqa: E402
from hfkd.record import UNFINISHED, checkpoints  # noqa: E402

SAVING, TRAINING = 1, 0
ROWS = [{"prompt": f"word{place}", "completion": f"word{place}" + "ed" * (1 + place % 3)} for place in range(40)]


class Board:
    """A page of memory that parent and child share: the step that is done, and whether a checkpoint is written now."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self.write(-1, TRAINING)

    def write(self, step: int, phase: int) -> None:
        """In one go, so that no reader sees half of it."""
        self._page[:8] = struct.pack("<ii", step, phase)

    def read(self) -> tuple[int, int]:
        """Step and phase; a step of -1 before training."""
        return struct.unpack("<ii", self._page[:8])


class Watched(DistillationTrainer):
    """A trainer that says on a board where it is."""

    board: Board

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.board.write(self.state.global_step, SAVING)
        super()._save_checkpoint(model, trial)
        self.board.write(self.state.global_step, TRAINING)


class Clock(TrainerCallback):
    """Writes the step on the board and keeps the time of each."""

    def __init__(self, board: Board) -> None:
        self.board, self.times = board, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first or resumed step."""
        self.board.write(state.global_step, TRAINING)
        self.times.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One more."""
        self.board.write(state.global_step, TRAINING)
        self.times.append(time.perf_counter())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(["<end>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_trainer(folder: Path, board: Board, options: argparse.Namespace) -> Watched:
    """The same trainer each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    settings = DistillationConfig(
        str(folder),
        max_steps=options.steps,
        save_steps=options.save_steps,
        save_total_limit=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Watched.board = board
    return Watched(
        LlamaForCausalLM(config),
        EmaTeacher(decay=0.9),
        [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.5}],
        settings,
        train_dataset=ROWS[4:],
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM"),
        demonstrations=ROWS[:4],
        student_shots=(0, 2),
        prompts=PromptStyle(),
        callbacks=[Clock(board)],
    )


def run(folder: Path, board: Board, options: argparse.Namespace) -> None:
    """Train from where the folder stands to the end; writes the weights and the time of each step beside them."""
    torch.set_num_threads(1)
    trainer = make_trainer(folder, board, options)
    trainer.remove_callback(PrinterCallback)
    started = checkpoints(folder)
    trainer.train(resume_from_checkpoint=bool(started))
    trainer.save_model(str(folder / "final"))
    clock = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Clock))
    (folder / "times.json").write_text(json.dumps([when - clock.times[0] for when in clock.times]))


def fork(work: Callable[[], None]) -> int:
    """Run something in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - nothing may climb into the parent's code
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def finish(work: Callable[[], None], name: str) -> None:
    """Run something in a process of its own to its end.

    Raises:
        RuntimeError: It failed; it has printed why.
    """
    _, status = os.waitpid(fork(work), 0)
    if status:
        raise RuntimeError(f"{name} failed with exit code {os.waitstatus_to_exitcode(status)}; its error is above.")


@dataclass
class Kill:
    """What one kill met."""

    step: int
    saving: bool
    resumed_from: int = 0
    unfinished: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Steps that have to be done again."""
        return self.step - self.resumed_from


def moments(times: list[float], kills: int, seed: int) -> list[tuple[int, float]]:
    """Moments of the undisturbed run, in order: the step that was done, and seconds after it."""
    draw = random.Random(seed)
    drawn = sorted(draw.uniform(0, times[-1]) for _ in range(kills))
    steps = [sum(when <= moment for when in times) - 1 for moment in drawn]
    return [(step, moment - times[step]) for step, moment in zip(steps, drawn, strict=True)]


def kill_at(folder: Path, board: Board, moment: tuple[int, float], options: argparse.Namespace) -> Kill | None:
    """Start or resume, kill at the moment, and look at what is left; None where the run was over before."""
    board.write(-1, TRAINING)
    child = fork(lambda: run(folder, board, options))
    while board.read()[0] < moment[0]:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended and status:
            raise RuntimeError(f"A resumed run failed by itself before step {moment[0]}; its error is above.")
        if ended:
            return None
        time.sleep(0.0002)
    time.sleep(moment[1])
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        if status:
            raise RuntimeError(f"A resumed run failed by itself after step {moment[0]}; its error is above.")
        return None
    step, phase = board.read()
    found = checkpoints(folder)
    unfinished = sorted(path.name for path in folder.glob(f"{UNFINISHED}/*"))
    damaged = [f"{path.name}: {look.reason}" for path in found if (look := inspect(path)).kind != "whole"]
    resumed_from = int(found[-1].name.rpartition("-")[2]) if found else 0
    return Kill(step, phase == SAVING, resumed_from, unfinished, damaged)


def table_of(kills: list[Kill]) -> Table:
    """A line for each kill."""
    table = Table("kill", "step", "during", "resumed from", "steps lost", "left unfinished", "damaged")
    for place, kill in enumerate(kills, 1):
        during = "a save" if kill.saving else "a step"
        start = f"checkpoint-{kill.resumed_from}" if kill.resumed_from else "the beginning"
        cells = (place, kill.step, during, start, kill.lost, ", ".join(kill.unfinished), ", ".join(kill.damaged))
        table.add_row(*map(str, cells))
    return table


def differences(one: Path, other: Path) -> list[str]:
    """The names of weights that aren't the same to the last bit."""
    ours, theirs = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (one, other))
    return sorted(name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name]))


@contextmanager
def working_folder(wanted: Path | None) -> Any:
    """The one that was asked for, or one that is removed afterwards."""
    if wanted is not None:
        wanted.mkdir(parents=True)
        yield wanted
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def chaos(folder: Path, options: argparse.Namespace, console: Console) -> int:
    """The undisturbed run, the disturbed one, and what became of it; returns the exit code."""
    board, alone, disturbed = Board(), folder / "alone", folder / "disturbed"
    finish(lambda: run(alone, board, options), "The undisturbed run")
    times = json.loads((alone / "times.json").read_text())
    kills = []
    for moment in moments(times, options.kills, options.seed):
        if (kill := kill_at(disturbed, board, moment, options)) is not None:
            kills.append(kill)
    finish(lambda: run(disturbed, board, options), "The last resume")
    console.print(table_of(kills))
    faults = []
    if len(kills) < options.kills:
        faults.append(f"only {len(kills)} of {options.kills} kills met a run under way")
    if different := differences(alone, disturbed):
        faults.append(f"{len(different)} weights differ, first {different[0]}")
    if broken := sum(bool(kill.damaged) for kill in kills):
        faults.append(f"after {broken} kills a half-written checkpoint was found")
    if (worst := max((kill.lost for kill in kills), default=0)) > options.save_steps:
        faults.append(f"{worst} steps were lost, more than save_steps={options.save_steps}")
    if (disturbed / UNFINISHED).exists():
        faults.append("something unfinished is left at the end")
    saves = sum(kill.saving for kill in kills)
    console.print(
        f"{options.steps} steps, {len(kills)} kills, {saves} of them during a save; at most {worst} steps lost "
        f"(save_steps={options.save_steps}). "
        + ("; ".join(faults) or "The weights are those of the undisturbed run, to the last bit.")
    )
    return 1 if faults else 0


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-steps", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Where the runs write, and stay; it mustn't exist.")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    logging.getLogger("hfkd").setLevel(logging.ERROR)  # twenty times what was cleaned up; the table says it
    warnings.simplefilter("ignore")
    with working_folder(options.folder) as folder:
        return chaos(folder, options, Console(width=120))


if __name__ == "__main__":
    sys.exit(main())
