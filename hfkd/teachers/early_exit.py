"""The student's own lower layer as a teacher: its states read through a norm and the output head, as if the model
ended there (the logit lens).

Knows the model's blocks and its final norm. What the lower layer is good for is the recipe's business: alone it is a
weak teacher, since what it says is less sure and more often wrong than what the model says itself.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkd.batch import Batch, View, predicted
from hfkd.data.collate import DistillationCollator
from hfkd.data.views import DistillationDataset
from hfkd.distributed import same_everywhere
from hfkd.errors import StateError
from hfkd.packing import run_view
from hfkd.rows import Head, base_model_of, input_device, supervised
from hfkd.states import block_list, recording, state_count
from hfkd.teachers.self_teacher import SelfTeacher
from hfkd.zero import zero_stage

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 128
_TEXTS_A_STEP = 8
_TOKENS_A_STEP = 512
_LEARNING_RATE = 0.01
_NORM = "norm."


class EarlyExitTeacher(SelfTeacher):
    """What the student would say if it ended at a lower layer.

    Args:
        layer: The block behind which it ends, from 1 to the last but one; None takes the one in the middle.
        norm: What the states go through before the head: `final`, the model's own last norm, or `trained`, a copy of
            it that is fitted to the training texts before the first step, so that what comes out is near to what the
            model's last layer says (least KL(last layer || exit)).
        fit_steps: Steps of that fit, of 8 texts each.
        only_where_layers_disagree: Where the exit and the last layer have the same likeliest token, speak with the
            last layer: with `live` weights on the student's own prompt that is what the student says itself, so that
            a divergence is 0 there.
        weights: Whose layers these are, see `SelfTeacher`. `live`, the student as it is at each step, is what the
            papers below have; a trained norm stays as it was fitted before the first one.
        reuse_prefix: See `ModelTeacher`.

    Raises:
        ValueError: A layer, a norm or a number of steps that can't be.

    Paper:
        Park et al., 2024, https://arxiv.org/abs/2406.09719: lower layers teach the last one of a classifier. There
        each of them has a trained head, and the confidence on ambiguous samples is calibrated in a second phase; here
        the head is the model's own and there is no such phase. The fit is after the tuned lens, Belrose et al., 2023,
        https://arxiv.org/abs/2303.08112, whose affine map of each layer is here the scale of a norm. USKD, Yang et
        al., 2023, https://arxiv.org/abs/2303.13005, has a weak head in the middle, too, but other soft labels.
    """

    begins_as_student = False

    def __init__(
        self,
        layer: int | None = None,
        norm: Literal["final", "trained"] = "final",
        fit_steps: int = 50,
        only_where_layers_disagree: bool = False,
        weights: Literal["adapter_off", "live", "frozen_copy"] = "adapter_off",
        reuse_prefix: bool = True,
    ) -> None:
        super().__init__(weights, reuse_prefix)
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 1):
            raise ValueError(
                f"The early exit's layer is {layer!r}; expected the number of a block, 1 or more, or null for the one "
                "in the middle."
            )
        if norm not in ("final", "trained"):
            raise ValueError(f"The early exit's norm is {norm!r}; expected final or trained.")
        if isinstance(fit_steps, bool) or not isinstance(fit_steps, int) or fit_steps < 1:
            raise ValueError(f"The early exit's fit_steps is {fit_steps!r}; expected a whole number of at least 1.")
        self.layer, self.norm, self.fit_steps = layer, norm, fit_steps
        self.only_where_layers_disagree = only_where_layers_disagree
        self.needs_second_view = False  # a lower layer has something of its own to say of the student's prompt
        self._last: nn.Module | None = None
        self._trained: nn.Module | None = None
        self._fitted = False

    @property
    def writes(self) -> bool:
        """It speaks of texts that are there; generation would run the whole model."""
        return False

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        """Remember the student, and find its last norm.

        Raises:
            ValueError: It has no such layer, or is spread over the processes.
            StateError: Its blocks or its last norm can't be found.
        """
        cut = any(getattr(accelerator, name, False) for name in ("is_fsdp2", "is_zero3"))
        if cut or zero_stage(accelerator) == 3:
            raise ValueError(
                "An early exit reads the student's own layers and norm, which it can't do while they are spread over "
                "the processes. Launch with recipes/accelerate/ddp.yaml, or take SelfTeacher."
            )
        count = state_count(student)
        self.layer = count // 2 if self.layer is None else self.layer
        if not 1 <= self.layer < count:
            raise ValueError(
                f"The early exit's layer is {self.layer}; expected 1 to {count - 1}, because the student has {count} "
                "blocks and the last one is what it says itself."
            )
        super().prepare(accelerator, student)
        self._last, self._fitted = final_norm(self._model), False
        if self.norm == "trained":
            self._trained = _wide_copy(self._last)

    def meet(self, dataset: DistillationDataset, training: bool = True) -> None:
        """Fit the norm to the training texts, once."""
        if self._trained is None or self._fitted or not training:
            return
        before, after = self._fit(dataset)
        self._fitted = True
        same_everywhere(self._trained.parameters())
        logger.info(
            "The early exit behind block %d: KL(last layer || exit) is %.3f nats per token, %.3f before the fit.",
            *(self.layer, after, before),
        )

    def check_heads(self, check: Callable[[PreTrainedModel], None]) -> None:
        """Hold the norm that was found against what the model itself does between its last block and its head.

        Raises:
            RuntimeError: The norm is to be trained, and has met no texts.
            StateError: The model does something else there.
        """
        if self._trained is not None and not self._fitted:
            raise RuntimeError(
                "The early exit's norm is to be trained, and has met no texts: call `meet` with a DistillationDataset "
                "(the trainer does). With a collator of your own take norm='final'."
            )
        with self.weights() as model, _watching(block_list(model)[-1]) as block, _watching(self._last) as norm:
            with _watching(base_model_of(model).base_model) as decoder:
                super().check_heads(check)
        whole = norm and torch.equal(norm["in"], block["out"]) and torch.equal(norm["out"], decoder["out"])
        if not whole:
            raise StateError(
                f"{type(base_model_of(model)).__name__} does more between its last block and its output head than its "
                "last norm, so a lower layer can't be read as if it ended there. Take another teacher."
            )

    def describe(self) -> dict[str, Any]:
        """Where it ends, and how it is read."""
        told = {
            "kind": "early_exit",
            "weights": self.kind,
            "layer": self.layer,
            "norm": self.norm,
            "only_where_layers_disagree": self.only_where_layers_disagree,
            "reuse_prefix": self.reuse_prefix,
        }
        if self.norm == "trained":
            told["fit_steps"] = self.fit_steps
        return told

    def state_dict(self) -> dict[str, Tensor]:
        """The trained norm."""
        state = {} if self._trained is None else self._trained.state_dict()
        return {_NORM + name: value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the trained norm back.

        Raises:
            ValueError: It is that of another model, or there is none.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"The saved early exit holds {sorted(state)}, and this one {sorted(self.state_dict())}. Resume with "
                "the model and the `norm` that the checkpoint was made with."
            )
        if self._trained is not None:
            self._trained.load_state_dict({name.removeprefix(_NORM): value for name, value in state.items()})
            self._fitted = True

    def _run(
        self, model: PreTrainedModel, view: View, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        """As in `ModelTeacher`, with what stands behind the exit in the place of the last hidden states."""
        hidden, states, labels = super()._run(model, view, (*layers, self.layer))
        left = self._leave(states[self.layer])
        if self.only_where_layers_disagree:
            left = self._or_last(self.head_at(model, hidden.device), left, hidden, labels.to(hidden.device))
        return left, {layer: states[layer] for layer in layers}, labels

    def _leave(self, states: Tensor) -> Tensor:
        """States of the exit's layer, [..., H], as the head is to read them."""
        if self._trained is None:
            return self._last(states)
        return self._trained(states.float()).to(states.dtype)

    def _or_last(self, head: Head, left: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        """What stands behind the exit, or where both find the same token likeliest, what stands behind the last block;
        [B, T, H], looked at where a token is learned.
        """
        where = predicted(labels)
        pairs = zip(left[:, :-1][where].split(_ROWS_AT_ONCE), hidden[:, :-1][where].split(_ROWS_AT_ONCE), strict=True)
        spoken = []
        for below, above in pairs:
            same = head.logits(below).argmax(dim=-1) == head.logits(above).argmax(dim=-1)
            spoken.append(torch.where(same[:, None], above, below))
        mixed = left.clone()
        mixed[:, :-1][where] = torch.cat(spoken)
        return mixed

    def _fit(self, dataset: DistillationDataset) -> tuple[float, float]:
        """Bring the trained norm's exit near to the last layer.

        Returns:
            KL(last layer || exit), in nats per token, on texts of its own (where there are enough), before and after.
        """
        batches = self._batches(dataset)
        below, above = self._rows(next(batches))
        before, kept = self._distance(below, above).item(), copy.deepcopy(self._trained.state_dict())
        self._trained.requires_grad_(True)
        optimizer = torch.optim.Adam(self._trained.parameters(), lr=_LEARNING_RATE)
        with torch.enable_grad():
            for step in range(self.fit_steps):
                optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - step / self.fit_steps)
                optimizer.zero_grad()
                self._distance(*self._rows(next(batches))).backward()
                optimizer.step()
        self._trained.requires_grad_(False)
        after = self._distance(below, above).item()
        if not after <= before:
            logger.warning(
                "Fitting the early exit's norm made it worse (%.3f nats before, %.3f after %d steps): the model's own "
                "last norm is used. Take norm 'final', or other fit_steps.",
                *(before, after, self.fit_steps),
            )
            self._trained.load_state_dict(kept)
        return before, after

    def _batches(self, dataset: DistillationDataset) -> Iterator[View]:
        """Views of some texts, the same in each run, without end."""
        collate, draw = DistillationCollator(0), random.Random(0)
        while True:
            order = draw.sample(range(len(dataset)), len(dataset))
            for start in range(0, len(order), _TEXTS_A_STEP):
                examples = [dataset[number] for number in order[start : start + _TEXTS_A_STEP]]
                yield Batch.from_inputs(collate(examples)).teacher_view

    def _rows(self, view: View) -> tuple[Tensor, Tensor]:
        """[n, H] the states of the exit's layer and those behind the last block, of some supervised tokens."""
        with torch.no_grad(), self.weights() as model:
            device = input_device(model)
            view = View(*(part.to(device) for part in (view.input_ids, view.attention_mask, view.labels)))
            with recording(model, [self.layer]) as recorder:
                hidden, labels = run_view(model, view, self.padding_free)
            below = recorder.finish(hidden)[self.layer]
            labels = labels.to(hidden.device)
            rows = supervised(below, labels), supervised(hidden, labels)
        every = -(-len(rows[0]) // _TOKENS_A_STEP)
        return rows[0][::every], rows[1][::every]

    def _distance(self, below: Tensor, above: Tensor) -> Tensor:
        """KL(last layer || exit), the mean over rows, in nats."""
        with self.weights() as model:
            head = Head.of(model).detached()
        exit_rows = torch.log_softmax(head.logits(self._leave(below)).float(), dim=-1)
        last_rows = torch.log_softmax(head.logits(above).float(), dim=-1)
        return (last_rows.exp() * (last_rows - exit_rows)).sum(dim=-1).mean()


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between a decoder's last block and the output head.

    Args:
        model: A causal LM or a PEFT model around one.

    Raises:
        StateError: There is none, or several could be it.
    """
    base = base_model_of(model)
    blocks = block_list(model)
    inside = {id(module) for module in blocks.modules()}
    modules = list(base.base_model.modules())
    behind = next(place for place, module in enumerate(modules) if module is blocks)
    found = [
        (place, module)
        for place, module in enumerate(modules)
        if "norm" in type(module).__name__.lower() and id(module) not in inside and not list(module.children())
    ]
    if len(found) > 1:  # one stands before the blocks: behind the embeddings
        found = [(place, module) for place, module in found if place > behind]
    if len(found) != 1:
        raise StateError(
            f"{type(base).__name__} has {len(found)} norms that could stand between its last block and its output "
            "head; expected exactly one, to read a lower layer with. Take another teacher."
        )
    return found[0][1]


def _wide_copy(norm: nn.Module) -> nn.Module:
    """A copy in float32 that doesn't learn yet."""
    copied = copy.deepcopy(norm)
    for name, parameter in list(copied.named_parameters(recurse=False)):
        setattr(copied, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
    return copied


@contextmanager
def _watching(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What goes in and out of a module at its latest run."""
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.update({"in": inputs[0]} if inputs else {})
        seen["out"] = output[0] if isinstance(output, tuple | list) else getattr(output, "last_hidden_state", output)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
