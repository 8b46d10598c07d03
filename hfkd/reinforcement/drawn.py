"""The answers of a generation while they are learned: how many of their tokens each optimizer step has, how a
checkpoint between two of its steps keeps them, and what of the teacher's term is logged.

Knows the micro-batches into which TRL cuts a generation; it knows no model and no teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl import GRPOTrainer

from hfkd.distributed import total_over_processes
from hfkd.errors import CheckpointError

COUNTS = {"tokens_in_step": "completion_mask", "taught_in_step": "taught"}
"""What a micro-batch is told of its step, and the mask [B, T] whose tokens are counted."""
_FILE = "drawn.{process}.safetensors"
_DONE, _SHAPE = "micro_batches", "shape"


def count_steps(batches: Sequence[dict[str, Tensor]], per_step: int, device: torch.device) -> None:
    """Tell each micro-batch how many tokens its optimizer step has on all processes, by the names of `COUNTS`.

    Args:
        batches: Of one generation, in the order in which they are learned; changed in place.
        per_step: How many make a step.
        device: Where the collective runs.
    """
    steps = [batches[start : start + per_step] for start in range(0, len(batches), per_step)]
    here = [[float(sum(one[mask].sum() for one in step)) for mask in COUNTS.values()] for step in steps]
    for step, totals in zip(steps, total_over_processes(here, device).float(), strict=True):
        for one in step:
            one.update(zip(COUNTS, totals, strict=True))


class Drawn:
    """What a checkpoint keeps of a generation, so that a run goes on exactly, also between two steps that learn from
    the same answers: how many micro-batches are done, and where some are left, all of them as they were drawn.

    TRL's trainer holds both (`_step`, `_buffered_inputs`) and saves neither.

    Args:
        trainer: Whose answers they are; each process keeps its own.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer

    def save(self, folder: str) -> None:
        """Write this process's file into a checkpoint."""
        Path(folder).mkdir(parents=True, exist_ok=True)  # another process may be here first
        save_file(self.state_dict(), self._file(folder))

    def load(self, folder: str) -> None:
        """Take back what `save` wrote.

        Raises:
            CheckpointError: It wrote nothing for this process, or for generations of another size.
        """
        if not self._file(folder).exists():
            raise CheckpointError(
                f"{folder} has no {self._file(folder).name}, so its place among the answers isn't known. Resume a "
                f"rewarded run on the number of processes that it was made with (here {PartialState().num_processes}),"
                " or start a new run from the weights."
            )
        self.load_state_dict(load_file(self._file(folder)))

    @staticmethod
    def _file(folder: str) -> Path:
        return Path(folder) / _FILE.format(process=PartialState().process_index)

    def state_dict(self) -> dict[str, Tensor]:
        """Counts, and the tensors of the micro-batches by place and name where a generation isn't used up."""
        args, done = self.trainer.args, self.trainer._step
        shape = [args.steps_per_generation, args.num_iterations]
        state = {_DONE: torch.tensor(done), _SHAPE: torch.tensor(shape)}
        held = self.trainer._buffered_inputs
        if held is not None and done % (shape[0] * shape[1]):
            for place, batch in enumerate(held):
                state |= {
                    f"{place}.{name}": one.cpu().clone() for name, one in batch.items() if isinstance(one, Tensor)
                }
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what was kept.

        Raises:
            CheckpointError: The generations of the run that made the checkpoint were of another size.
        """
        args = self.trainer.args
        made, now = state[_SHAPE].tolist(), [args.steps_per_generation, args.num_iterations]
        if made != now:
            raise CheckpointError(
                f"The checkpoint was made with steps_per_generation {made[0]} and num_iterations {made[1]}, and this "
                f"run has {now[0]} and {now[1]}: its place in the answers would mean nothing. Go on with those, or "
                "start a new run from the weights."
            )
        held: list[dict[str, Tensor]] = [{} for _ in range(made[0])]
        for key, value in state.items():
            place, _, name = key.partition(".")
            if name:
                held[int(place)][name] = value.to(args.device)
        self.trainer._step = int(state[_DONE])
        self.trainer._buffered_inputs = held if held[0] else None


class Tally:
    """Sums over the micro-batches of an optimizer step, for figures that are means over its tokens."""

    def __init__(self) -> None:
        self._sums = [0.0, 0.0, 0.0]

    def add(self, value: Tensor, taught: Tensor, mask: Tensor) -> None:
        """Take in a micro-batch.

        Args:
            value: The sum of the teacher's term (nats) over its taught tokens.
            taught: [B, T] marks them.
            mask: [B, T] marks all tokens of the answers.
        """
        here = (float(value), float(taught.sum()), float(mask.sum()))
        self._sums = [before + new for before, new in zip(self._sums, here, strict=True)]

    def figures(self, device: torch.device) -> dict[str, float]:
        """Begin anew, and give what the step had on all processes: `share`, of its tokens those that are taught, and
        `loss`, their mean; none where nothing is taught, since a 0 would read as a student like its teacher.
        """
        (summed, taught, tokens), self._sums = total_over_processes(self._sums, device).tolist(), [0.0, 0.0, 0.0]
        return {"share": taught / max(tokens, 1.0), **({"loss": summed / taught} if taught else {})}
