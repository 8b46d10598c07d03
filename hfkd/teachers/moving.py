"""The student as it was: an average of its past weights, or its weights at some earlier moment.

Both keep a shadow of the parameters that learn and nothing else: what is frozen is shared with the student, so under
an adapter the shadow is as small as the adapter. Which prompt they read is decided elsewhere: their own (privileged)
one, or the student's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkd.rows import Head
from hfkd.teachers.base import evaluating
from hfkd.teachers.local import ModelTeacher

_COUNT = "changes."
_SHADOW = "shadow."
_HALF = (torch.float16, torch.bfloat16)


class ShadowTeacher(ModelTeacher):
    """The part that all teachers with a shadow of the student share; a subclass says when and how it follows.

    The shadow is of the parameters that learn when `prepare` is called, by name. It is no part of the model, so it is
    neither trained nor saved with it. While the teacher speaks or writes it stands in the parameters' place, whatever
    their number of users (tied weights); afterwards the student's own are back, bit for bit.

    Args:
        reuse_prefix: See `ModelTeacher`. The prefix is run anew when the shadow has changed.
    """

    begins_as_student = True

    averages: ClassVar[bool] = False
    """Whether it adds small changes up: then a shadow of half-precision parameters is float32, where they aren't lost
    in the rounding.
    """

    def __init__(self, reuse_prefix: bool = True) -> None:
        super().__init__(reuse_prefix)
        self._model: nn.Module | None = None
        self._shadow: dict[str, Tensor] = {}
        self.changes = 0

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        """Remember the student, and copy what it learns.

        Raises:
            ValueError: Nothing of the student learns.
        """
        learning = {name: one for name, one in student.named_parameters() if one.requires_grad}
        if not learning:
            raise ValueError(
                f"{type(self).__name__} keeps a copy of what the student learns, but none of its parameters requires "
                "a gradient. Give the student an adapter, or unfreeze what is to learn before the trainer is made."
            )
        self._model, self.changes = student, 0
        copies = {name: one.detach().clone() for name, one in learning.items()}
        self._shadow = {name: _wide(one) for name, one in copies.items()} if self.averages else copies
        self._forget_prefix()

    @contextmanager
    def weights(self) -> Iterator[PreTrainedModel]:
        """The student's model with the shadow in force."""
        if self._model is None:
            raise RuntimeError(
                f"{type(self).__name__} doesn't know its student yet: call `prepare` first (the trainer does)."
            )
        parameters = self._parameters()
        own = [parameter.data for parameter in parameters]
        with evaluating(self._model):
            try:
                _put(parameters, self._shadow.values())
                yield self._model
            finally:
                _put(parameters, own)

    def head_at(self, model: PreTrainedModel, device: torch.device) -> Head:
        """The output head that is in force, which stays the teacher's when the student's weights are back."""
        return super().head_at(model, device).detached()

    def describe(self) -> dict[str, Any]:
        """Whether the shared prefix is used."""
        return {"reuse_prefix": self.reuse_prefix}

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow, and how often it has changed; empty before `prepare`."""
        if not self._shadow:
            return {}
        return {self._count: torch.tensor(self.changes), **{_SHADOW + name: one for name, one in self._shadow.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back a shadow of the same student and the same kind.

        Raises:
            ValueError: It is that of another class, or of other parameters: names or shapes differ.
        """
        wanted = {name: tuple(one.shape) for name, one in self.state_dict().items()}
        given = {name: tuple(one.shape) for name, one in state.items()}
        wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        if wrong:
            first = wrong[0]
            found = given.get(first, "none (it is missing)")
            raise ValueError(
                f"The saved state of {type(self).__name__} belongs to another student or another kind of teacher: "
                f"{len(wrong)} entries differ, first {first!r}, which has shape {found} in the checkpoint; expected "
                f"{wanted.get(first, 'no such entry')}. Resume with the model, the adapter and the teacher "
                "that the checkpoint was made with."
            )
        self.changes = int(state[self._count])
        for name, shadow in self._shadow.items():
            shadow.copy_(state[_SHADOW + name])
        self._forget_prefix()

    @property
    def _count(self) -> str:
        """The name of the counter in a checkpoint; that of a class, so that one kind isn't continued as another."""
        return _COUNT + type(self).__name__

    def _follow(self, decay: float) -> None:
        """shadow = decay * shadow + (1 - decay) * student."""
        shadow = list(self._shadow.values())
        student = [
            parameter.detach().to(kept.device, kept.dtype)
            for parameter, kept in zip(self._parameters(), shadow, strict=True)
        ]
        with torch.no_grad():
            if decay == 0:
                torch._foreach_copy_(shadow, student)
            else:
                torch._foreach_lerp_(shadow, student, 1 - decay)
        self.changes += 1
        self._forget_prefix()

    def _forget_prefix(self) -> None:
        if self.prefix is not None:
            self.prefix.invalidate()

    def _parameters(self) -> list[nn.Parameter]:
        """The student's parameters beside the shadow, in its order; looked up each time, since a model may be given
        new ones.
        """
        found = dict(self._model.named_parameters()) if self._model is not None else {}
        for name, shadow in self._shadow.items():
            if name not in found or found[name].shape != shadow.shape:
                now = f"has shape {tuple(found[name].shape)}" if name in found else "is gone"
                raise RuntimeError(
                    f"{type(self).__name__} keeps a copy of the student's {name} with shape {tuple(shadow.shape)}, "
                    f"but that {now}: the model was changed or sharded after `prepare`. Expected the parameters that "
                    "were there. Take a frozen teacher for a sharded student."
                )
        return [found[name] for name in self._shadow]


class EmaTeacher(ShadowTeacher):
    """An exponential moving average of the student: teacher = decay * teacher + (1 - decay) * student.

    It begins as the student before the first step. On the student's own prompt it says what the student says, so a
    divergence alone would teach nothing: give it demonstrations or a privileged context, or a term that fits the text.

    Under LoRA, A and B are averaged each for itself. The product of two averages is not the average of the products
    B A, so the teacher's weights are not the average of the student's merged ones; where a run is short against
    1 / (1 - decay) the two hardly differ.

    Args:
        decay: What is kept of the average at each update, from 0 (the student as it was after the last update) up to
            below 1. About 1 / (1 - decay) updates are remembered.
        interval: Optimizer steps from one update to the next.
        reuse_prefix: See `ModelTeacher`. The prefix is run anew after every update.

    Raises:
        ValueError: A decay or an interval outside its limits.

    Paper:
        Tarvainen and Valpola (Mean Teacher), 2017, https://arxiv.org/abs/1703.01780.
    """

    averages = True

    def __init__(self, decay: float = 0.999, interval: int = 1, reuse_prefix: bool = True) -> None:
        super().__init__(reuse_prefix)
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ValueError(
                f"The teacher's decay is {decay!r}; expected a number from 0 up to below 1, such as 0.999. For a "
                "teacher that never moves take SelfTeacher('frozen_copy')."
            )
        self.decay = float(decay)
        self.interval = _whole(interval, "The teacher's interval", "optimizer steps between two updates")

    def after_step(self, step: int) -> None:
        """Move towards the student."""
        if step % self.interval == 0:
            self._follow(self.decay)

    def describe(self) -> dict[str, Any]:
        """How it moves."""
        return {"kind": "ema", "decay": self.decay, "interval": self.interval, **super().describe()}


class SnapshotTeacher(ShadowTeacher):
    """The student as it was at the last snapshot; before the first one, as it was before the first step.

    With the previous epoch as teacher, cross-entropy with weight 1 - a and `forward_kl` with weight a have the
    gradient of PS-KD, whose targets are (1 - a) of the text's token and a of the teacher's distribution. There a grows
    with the epochs and is 0 in the first: two weights with `schedule: stairs` (see `hfkd.schedules`).

    Args:
        every: `epoch`, or a number of optimizer steps.
        reuse_prefix: See `ModelTeacher`. The prefix is run anew after every snapshot.

    Raises:
        ValueError: `every` is neither.

    Paper:
        Kim et al. (PS-KD), 2020, https://arxiv.org/abs/2006.12000.
    """

    def __init__(self, every: Literal["epoch"] | int = "epoch", reuse_prefix: bool = True) -> None:
        super().__init__(reuse_prefix)
        self.every = every
        if every != "epoch":
            self.every = _whole(every, "The teacher's every", "`epoch` or a number of optimizer steps")

    def after_step(self, step: int) -> None:
        """Take a snapshot if it is time."""
        if self.every != "epoch" and step % self.every == 0:
            self._follow(0.0)

    def after_epoch(self, epoch: float) -> None:
        """Take a snapshot if they are taken by the epoch."""
        if self.every == "epoch":
            self._follow(0.0)

    def describe(self) -> dict[str, Any]:
        """When it is renewed."""
        return {"kind": "snapshot", "every": self.every, **super().describe()}


def _put(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    """Give parameters other values. Autocast keeps casts of parameters by their identity: it must forget those of the
    values that they had.
    """
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.to(parameter.device, parameter.dtype)
    torch.clear_autocast_cache()


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in _HALF else values


def _whole(value: Any, what: str, meaning: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} is {value!r}; expected {meaning}, a whole number of at least 1.")
    return value
