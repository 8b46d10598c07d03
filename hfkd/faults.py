"""Stops a training whose loss or gradient is no number, before the weights are changed, and keeps what is needed to
find out why: the batches of the step, and the name of the last checkpoint that is good. And says what to do about a
checkpoint that couldn't be written.

A loss that isn't finite turns the gradient into NaN, which the processes share with it: all of them see it when the
gradient's norm is taken, and all stop in the same step, instead of one that leaves and others that wait for it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Trainer

from hfkd.checkpoint import inspect, last_whole
from hfkd.distributed import average_gradients, total_over_processes
from hfkd.errors import NonFiniteGradient, NonFiniteLoss
from hfkd.objective import LossSum
from hfkd.record import BATCHES, checkpoints

# Float16's loss scale is halved by each step that is skipped; after so many the gradient itself is broken.
SKIPPED_IN_A_ROW = 10
NAMED = 5
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MEASURED_HERE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


class StepWatch:
    """What is kept of the step under way until its gradient has turned out finite."""

    def __init__(self) -> None:
        self.batches: Sequence[Mapping[str, Any]] = []
        self._sums: list[LossSum] = []
        self._skipped = 0
        self._checked: Tensor | None = None

    def begin(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Forget the last step.

        Args:
            batches: The micro-batches of the step that begins.
        """
        self.batches, self._sums, self._checked = batches, [], None

    def add(self, result: LossSum, loss: Tensor) -> Tensor:
        """Keep the sums of a micro-batch, without waiting for the device.

        Args:
            result: What the objective said.
            loss: What goes into backward, a scalar.

        Returns:
            The same loss, whose gradient is NaN where the sum isn't finite.
        """
        total = result.total.detach()
        parts = {name: part.detach() for name, part in result.parts.items()}
        self._sums.append(LossSum(total, parts, result.tokens))
        return loss * torch.where(torch.isfinite(total), 1.0, math.nan).to(loss.dtype)

    def check(self, trainer: Trainer, model: nn.Module, norm: Tensor | float | None) -> None:
        """Stop where the gradient isn't finite; all processes call it with the same norm.

        Args:
            trainer: Whose step it is.
            model: Whose gradients they are.
            norm: Of the student's whole gradient; None where it isn't known. That of what the losses learn is
                looked at beside it, but isn't clipped.

        Raises:
            NonFiniteLoss: The loss of a micro-batch wasn't finite, here or on another process.
            NonFiniteGradient: All losses were finite, but the gradient isn't. Where float16's loss is scaled, only
                after `SKIPPED_IN_A_ROW` steps.
        """
        if norm is None or norm is self._checked:
            return
        self._checked = norm if isinstance(norm, Tensor) else None
        learned = [parameter.grad for parameter in trainer.objective.parameters() if parameter.grad is not None]
        if math.isfinite(norm) and learned:
            norm = get_total_norm(learned)
        if math.isfinite(norm):
            self._skipped = 0
            return
        wrong = [place for place, one in enumerate(self._sums) if not bool(torch.isfinite(one.total))]
        processes = _processes_with(bool(wrong), trainer.args.device)
        if not processes and _loss_is_scaled(trainer):
            self._skipped += 1
            if self._skipped < SKIPPED_IN_A_ROW:
                return
        step = trainer.state.global_step + 1
        named = [*_without_numbers(model), *(f"objective.{name}" for name in _without_numbers(trainer.objective))]
        if processes:
            error, what = NonFiniteLoss, _words_of_loss([self._sums[place] for place in wrong], step, processes)
        else:
            seen = bool(self._sums)
            error, what = NonFiniteGradient, _words_of_gradient(float(norm), step, named, self._skipped, seen)
        facts = {"step": step, "what": what, "gradient_norm": float(norm), "parameters": named}
        where = self._save(trainer, facts)
        raise error(f"{what} {where} {last_good(trainer, model)}")

    def _save(self, trainer: Trainer, facts: Mapping[str, Any]) -> str:
        process = PartialState().process_index
        folder = Path(trainer.args.output_dir) / f"{BATCHES}{facts['step']}" / f"process-{process}"
        losses = [
            {"sum": float(one.total), "tokens": int(one.tokens), "terms": {k: float(v) for k, v in one.parts.items()}}
            for one in self._sums
        ]
        facts = {**facts, "process": process, "learning_rate": trainer._get_learning_rate(), "losses": losses}
        try:
            save_step(folder, self.batches, facts)
        except OSError as error:
            return f"The step's batches couldn't be saved ({error})."
        return f"The step's batches are in {folder}."


def check_sum(result: LossSum, step: int) -> None:
    """Refuse a loss that isn't finite at once, where no gradient follows that would tell the others.

    Args:
        result: Of one batch.
        step: The step under way, or at which it is evaluated, from 1.

    Raises:
        NonFiniteLoss: Names the step and the terms.
    """
    if not bool(torch.isfinite(result.total)):
        raise NonFiniteLoss(
            f"{_words_of_loss([result], step, [])} Lower the learning rate, or look at the data; no checkpoint was "
            "changed."
        )


def clipped(trainer: Trainer, model: nn.Module, watch: StepWatch, limit: float | None) -> Tensor | None:
    """The norm of the gradient, checked before clipping, which would spread a NaN over all gradients and leave nothing
    to be named. The gradients of what the losses learn are brought together before.

    Args:
        trainer: Whose step it is.
        model: Whose gradients they are; clipped in place.
        watch: Is shown the norm.
        limit: The largest norm; None leaves the gradients as they are.

    Returns:
        The norm before clipping; None where Accelerate or DeepSpeed must take it.

    Raises:
        NonFiniteLoss: See `StepWatch.check`.
        NonFiniteGradient: See `StepWatch.check`.
    """
    average_gradients(trainer.objective.parameters())  # a NaN of one process is then one of all
    accelerator = trainer.accelerator
    learned = [parameter for parameter in model.parameters() if parameter.grad is not None]
    meshes = {one.grad.device_mesh if isinstance(one.grad, DTensor) else None for one in learned}
    kind = accelerator.distributed_type
    if kind not in _MEASURED_HERE or len(meshes) > 1 or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        return None
    accelerator.unscale_gradients()
    norm = get_total_norm([parameter.grad for parameter in learned])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    watch.check(trainer, model, whole)
    if limit is not None:
        clip_grads_with_norm_(learned, limit, norm)
    return whole


def save_step(folder: Path, batches: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write the inputs of a step, whole or not at all: `batch-0.safetensors` and on, and `report.json`.

    Args:
        folder: Is replaced.
        batches: What the collator returned.
        facts: For the report, which also holds the inputs that are no tensors.

    Raises:
        OSError: They can't be written.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    draft.mkdir(parents=True, exist_ok=True)
    try:
        others = []
        for place, batch in enumerate(batches):
            tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            kept = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
            _write(draft / f"batch-{place}.safetensors", kept)
            others.append({name: value for name, value in batch.items() if name not in tensors})
        report = json.dumps(_plain({**facts, "other_inputs": others}), indent=2, ensure_ascii=False, default=str)
        (draft / "report.json").write_text(report + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def not_saved(final: Path, error: Exception) -> str:
    """What to say of a checkpoint that couldn't be written.

    Args:
        final: Its place.
        error: What was raised: by the disk, or by a part of the training that couldn't say its state.
    """
    left = last_whole(final.parent)
    before = f"The last checkpoint, {left}, is untouched" if left else "There is no checkpoint before it"
    # PyTorch's writer and safetensors' have no error of their own for a full disk.
    full = type(error) in (RuntimeError, SafetensorError) or getattr(error, "errno", None) in _FULL
    advice = "Make room on the disk (save_total_limit keeps fewer)" if full else "Mend the cause"
    return (
        f"{final} couldn't be written: {type(error).__name__}: {error}. {before}; what was written of the new one is "
        f"removed. {advice} and go on with resume_from_checkpoint=True or --resume."
    )


def last_good(trainer: Trainer, model: nn.Module) -> str:
    """In words, the newest checkpoint that is whole and, where the weights at hand hold NaN or infinities, doesn't.

    Args:
        trainer: Whose output folder it is.
        model: Its weights. What the losses learned and the teacher's state are looked at too.
    """
    folder = Path(trainer.args.output_dir)
    states = {"": dict(model.named_parameters()), "objective.": trainer.objective.state_dict()}
    if trainer.teacher is not None:
        states["teacher."] = trainer.teacher.state_dict()
    broken = [
        prefix + name
        for prefix, values in states.items()
        for name, value in values.items()
        if not bool(torch.isfinite(_local(value)).all())
    ]
    found: Path | None = None
    if total_over_processes(len(broken), trainer.args.device) == 0:
        found = last_whole(folder)
    elif PartialState().is_main_process:
        newest_first = reversed(checkpoints(folder))
        found = next(
            (one for one in newest_first if inspect(one, digests=False).kind == "whole" and _finite(one)), None
        )
    else:
        return "The weights themselves aren't finite; process 0 says which checkpoint is good."
    weights = f"The weights of {broken[:NAMED]} aren't finite either. " if broken else ""
    if found is None:
        return f"{weights}There is no good checkpoint yet: lower the learning rate and start anew."
    return (
        f"{weights}The last good checkpoint is {found}. Going on from it meets the same batch again: look at it "
        "first, or start anew with a lower learning rate."
    )


def _processes_with(it: bool, device: torch.device) -> list[int]:
    state = PartialState()
    found = total_over_processes(
        [float(it and place == state.process_index) for place in range(state.num_processes)], device
    )
    return [place for place, count in enumerate(found.tolist()) if count]


def _loss_is_scaled(trainer: Trainer) -> bool:
    """Whether steps with overflow are skipped by design, by PyTorch's scaler or DeepSpeed's."""
    engine = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None)
    if engine is not None:
        return bool(engine.engine.fp16_enabled())
    return trainer.accelerator.scaler is not None


def _words_of_loss(sums: Sequence[LossSum], step: int, processes: Sequence[int]) -> str:
    among = f" on process {', '.join(map(str, processes))}" if PartialState().num_processes > 1 and processes else ""
    if not sums:
        return f"The loss of step {step} isn't finite{among}, so all processes stop."
    parts = {name: part for one in sums for name, part in one.parts.items() if not bool(torch.isfinite(part))}
    value = float(sums[0].total)
    return f"The loss of step {step} is {value}{among}; terms that aren't finite: {list(parts) or 'none alone'}."


def _words_of_gradient(norm: float, step: int, named: Sequence[str], skipped: int, seen: bool) -> str:
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    names = f"{', '.join(named[:NAMED])}{more}" if named else "none on this process"
    if skipped:
        return (
            f"The gradient of step {step} isn't finite (norm {norm}), nor were those of the {skipped - 1} steps "
            f"before, although float16's loss scale was lowered each time; parameters: {names}. Use bf16."
        )
    though = ", though the objective's value is" if seen else ""  # an overridden compute_loss may have changed it
    return (
        f"The gradient of step {step} isn't finite (norm {norm}){though}; parameters: {names}. "
        "The weights weren't changed by it."
    )


def _without_numbers(model: nn.Module) -> list[str]:
    return [
        name.removeprefix("module.")
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(_local(parameter.grad)).all())
    ]


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value.detach()


def _finite(checkpoint: Path) -> bool:
    """Whether no tensor of the checkpoint's safetensors files holds NaN or an infinity."""
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                value = file.get_tensor(name)
                if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    return False
    return True


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # says what the system said, in words of its own
        raise OSError(str(error)) from error


def _plain(value: Any) -> Any:
    """NaN and infinities as text: they are no JSON."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
