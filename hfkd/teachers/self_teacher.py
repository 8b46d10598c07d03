"""The student as its own teacher, behind another prompt: the same weights, heavily prompted, teach themselves to
answer with less.

Three sets of weights: the adapter switched off, the weights of this very step, or a copy of the first ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from hfkd.teachers.base import evaluating
from hfkd.teachers.local import ModelTeacher

_KINDS = ("adapter_off", "live", "frozen_copy")


class SelfTeacher(ModelTeacher):
    """The student's own weights, reading the teacher's view.

    Args:
        weights: `adapter_off`: the base model under a PEFT student, one copy of the weights in all. `live`: the
            student as it is at this step, dropout off; its targets move. `frozen_copy`: a copy of the student as it
            was before the first step, which takes its memory once more.
        reuse_prefix: See `ModelTeacher`. With `live` the prefix is run anew after every optimizer step.
    """

    begins_as_student = True

    def __init__(
        self, weights: Literal["adapter_off", "live", "frozen_copy"] = "adapter_off", reuse_prefix: bool = True
    ) -> None:
        super().__init__(reuse_prefix)
        if weights not in _KINDS:
            raise ValueError(f"The self-teacher's weights are {weights!r}; expected one of {', '.join(_KINDS)}.")
        self.kind = weights
        self.frozen, self.needs_adapter = weights != "live", weights == "adapter_off"
        # A copy of the first weights moves away from the student, which may read the same prompt.
        self.needs_second_view = weights != "frozen_copy"
        self._model: nn.Module | None = None

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        """Remember the student, or copy it."""
        if self.kind == "adapter_off" and not hasattr(student, "disable_adapter"):
            raise ValueError(
                f"weights='adapter_off' needs a student with an adapter, but the student is a plain "
                f"{type(student).__name__}: "
                "nothing could be switched off. Pass a `peft_config`, or take weights='frozen_copy' or 'live'."
            )
        self._model = student
        if self.kind == "frozen_copy":
            self._model = copy.deepcopy(student).requires_grad_(False).eval()
            self.place(self._model, accelerator)

    @contextmanager
    def weights(self) -> Iterator[PreTrainedModel]:
        """The student's model with the teacher's weights in force."""
        if self._model is None:
            raise RuntimeError(
                "The self-teacher doesn't know its student yet: call `prepare` first (the trainer does)."
            )
        off = _switched_off(self._model) if self.kind == "adapter_off" else nullcontext()
        with evaluating(self._model), off:
            yield self._model

    def after_step(self, step: int) -> None:
        """Forget the prefix where the weights that made it have changed."""
        if self.kind == "live" and self.prefix is not None:
            self.prefix.invalidate()

    def describe(self) -> dict[str, Any]:
        """Which weights teach."""
        return {"kind": "self", "weights": self.kind, "reuse_prefix": self.reuse_prefix}


@contextmanager
def _switched_off(model: nn.Module) -> Iterator[None]:
    """PEFT's own context; it leaves every parameter of the active adapter learning, so what was frozen is frozen
    again.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
