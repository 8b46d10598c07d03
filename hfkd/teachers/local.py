"""A teacher that is a model in this process: its forward pass, with the shared prefix of its prompts run once."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkd.batch import Batch, View
from hfkd.distributed import run_inside
from hfkd.errors import HeadError, UnsupportedCache
from hfkd.loading import commit_of, fetch, load_causal_lm, load_tokenizer_of
from hfkd.packing import drop_padding, run_view
from hfkd.prefix import SharedPrefix
from hfkd.rows import DenseRows, Head, base_model_of, input_device, supervised
from hfkd.sharding import is_sharded, one_process_at_a_time, place
from hfkd.signal import DISTRIBUTION, STATES, TeacherSignal
from hfkd.states import recording
from hfkd.teachers.base import Teacher, evaluating
from hfkd.teachers.vocabulary import check_embeddings

logger = logging.getLogger(__name__)


class ModelTeacher(Teacher):
    """The part that all teachers with a model share; a subclass says which weights are in force.

    Args:
        reuse_prefix: Run the tokens that all prompts begin with once (from 32 tokens on) and keep their keys and
            values.
    """

    provides = frozenset({DISTRIBUTION, STATES})

    state_layers: tuple[int, ...] = ()
    """The layers whose states it shows to losses that ask for states."""

    own_model: nn.Module | None = None
    """The model that it holds besides the student's weights, once prepared; None where there is none."""

    frozen: bool = False
    """Whether its weights stay what they are."""

    padding_free: bool = False
    """Whether it runs whole views as one row without padding."""

    def __init__(self, reuse_prefix: bool = True) -> None:
        self.reuse_prefix = reuse_prefix
        self.prefix: SharedPrefix | None = None
        self._wrapped: nn.Module | None = None
        self._copied: Head | None = None

    @abstractmethod
    def weights(self) -> Any:
        """A context that yields the model with the teacher's weights in force, in eval mode."""

    def share_prefix(self, ids: Sequence[int]) -> None:
        """Keep the prefix if it is long enough to pay and wanted."""
        self.prefix = SharedPrefix(ids) if self.reuse_prefix and len(ids) >= SharedPrefix.MINIMUM else None

    def drop_padding(self) -> None:
        """Run whole views as one row from now on; what follows a shared prefix stays padded."""
        with self.weights() as model:
            drop_padding(model)
        self.padding_free = True

    def keep_states(self, layers: Sequence[int]) -> None:
        """Remember the layers."""
        self.state_layers = tuple(sorted(set(layers)))

    def signal(self, batch: Batch, needs: frozenset[str]) -> TeacherSignal:
        """Run the model on the teacher's view, without a graph, and keep the supervised rows of its last hidden states
        and of the states that were asked for.
        """
        layers = self.state_layers if STATES in needs else ()
        view, home = batch.teacher_view, batch.student.input_ids.device
        with torch.no_grad(), self.weights() as model:
            view = _moved(view, home if self._wrapped is not None else input_device(model))
            hidden, states, labels, head = run_inside(self._wrapped or model, model, self._speak, model, view, layers)
            rows = DenseRows(_rows_at(hidden, labels, home), head)
        kept = {layer: _rows_at(state, labels, home) for layer, state in states.items()}
        return TeacherSignal(rows, kept if STATES in needs else None)

    def head_at(self, model: PreTrainedModel, device: torch.device) -> Head:
        """The model's output head on a device; one of frozen weights is copied there once.

        Raises:
            HeadError: It isn't in memory.
        """
        head = Head.of(model)
        if head.weight.device == device:
            return head
        if head.weight.device.type == "meta":
            raise HeadError(
                "The teacher's output head is offloaded. Keep it on a device: `device_map={..., 'lm_head': 0}`."
            )
        if self._copied is None or not self.frozen or self._copied.weight.device != device:
            bias = None if head.bias is None else head.bias.to(device)
            self._copied = replace(head, weight=head.weight.to(device), bias=bias)
        return self._copied

    def check_heads(self, check: Callable[[PreTrainedModel], None]) -> None:
        """Let the one model be looked at."""
        with self.weights() as model:
            run_inside(self._wrapped or model, model, check, model)

    def place(self, model: nn.Module, launch: Any, offload: bool = False) -> None:
        """Put a model that is the teacher's own where it can speak, see `hfkd.sharding.place`."""
        wrapped, self.own_model = place(model, launch, offload), model
        self._wrapped = wrapped if is_sharded(model) else None

    def _speak(
        self, model: PreTrainedModel, view: View, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor], Tensor, Head]:
        """What `_run` gives, and the head. One that is in shards is whole only in here: a copy leaves, gathered once
        for all chunks.
        """
        if self.prefix is not None and is_sharded(model):
            self._prepare_prefix(model)  # on all processes alike, whatever their rows begin with
        hidden, states, labels = self._run(model, view, layers)
        head = self.head_at(model, view.input_ids.device)
        return hidden, states, labels, head if self._wrapped is None else head.copy()

    def _prepare_prefix(self, model: PreTrainedModel) -> None:
        try:
            self.prefix.cache_for(model, 1)
        except UnsupportedCache as error:
            self._give_up_prefix(error)

    def _give_up_prefix(self, error: UnsupportedCache) -> None:
        logger.warning("The teacher's shared prefix of %d tokens isn't reused: %s", len(self.prefix), error)
        self.prefix = None

    def _run(
        self, model: PreTrainedModel, view: View, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        """Last hidden states, states by layer, and the labels that stand beside them: of the whole rows, or of what
        follows the shared prefix.
        """
        rest = None if self.prefix is None else self.prefix.rest_of(view)
        if rest is not None:
            try:
                with recording(model, layers) as recorder:
                    hidden = self.prefix.decode_rest(model, rest)
                return hidden, recorder.finish(hidden), rest.labels
            except UnsupportedCache as error:
                self._give_up_prefix(error)
        with recording(model, layers) as recorder:
            hidden, labels = run_view(model, view, self.padding_free)
        return hidden, recorder.finish(hidden), labels


class LocalTeacher(ModelTeacher):
    """Any causal LM, frozen.

    Args:
        model: A loaded model, or a hub id or folder to load at `prepare`.
        revision: Of a hub id.
        dtype: Of the weights when they are loaded: a torch dtype, its name, or `auto`.
        trust_remote_code: Whether code from the model's repository may run; off by default.
        reuse_prefix: See `ModelTeacher`.
        offload: Keep the weights in CPU memory and bring them to the device a layer at a time (see
            `hfkd.sharding.place`).
        load_kwargs: More arguments of `from_pretrained`, a `quantization_config` for 4 or 8 bits, say.
        tokenizer: Its tokenizer; loaded beside the weights where `model` is an id. Compared with the student's.
    """

    frozen = True

    def __init__(
        self,
        model: PreTrainedModel | str,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        reuse_prefix: bool = True,
        offload: bool = False,
        load_kwargs: dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(reuse_prefix)
        self.model = None if isinstance(model, str) else model
        self.name = model if isinstance(model, str) else getattr(model, "name_or_path", "") or type(model).__name__
        self.revision, self.dtype, self.trust_remote_code = revision, dtype, trust_remote_code
        self.load_kwargs, self.offload = dict(load_kwargs or {}), offload
        self.tokenizer = tokenizer
        self._commit: str | None = None

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        """Load the model if it was given by name, freeze it and place it as the student is placed: in shards where
        the student is sharded, else on its device.

        Raises:
            ValueError: It is the student itself, or can't be sharded.
        """
        if self.model is None and getattr(accelerator, "is_fsdp2", False):
            fetch(self.name, self.loading)  # not in a turn: those who wait for theirs would run into a timeout
        with one_process_at_a_time(accelerator):
            self._prepare(accelerator, student)

    def _prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        if self.model is None:
            self._load()
        if base_model_of(self.model) is base_model_of(student):
            raise ValueError(
                "The teacher is the student itself, and freezing it would stop the student from learning. Take "
                "SelfTeacher for the same weights behind another prompt, or load the model twice."
            )
        self.model.requires_grad_(False).eval()
        sharded = getattr(accelerator, "is_fsdp2", False)
        settled = getattr(self.model, "hf_device_map", None) or getattr(self.model, "is_quantized", False)
        if sharded or not settled:
            self.place(self.model, accelerator, self.offload)

    def _load(self) -> None:
        self.model = load_causal_lm(self.name, "the teacher", **{"dtype": self.dtype, **self.loading})
        self._commit = commit_of(self.name, self.loading)
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer_of(self.name, self.loading)

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments that model and tokenizer are loaded with."""
        shared = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return {**shared, **self.load_kwargs}

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compare the tokens, and make sure that the model can read all of them."""
        super().check_vocabulary(tokenizer)
        if not self.other_vocabulary:
            check_embeddings(tokenizer, self.model)

    @contextmanager
    def weights(self) -> Iterator[PreTrainedModel]:
        """The teacher's own model."""
        if self.model is None:
            raise RuntimeError("The teacher isn't loaded yet: call `prepare` first (the trainer does).")
        with evaluating(self.model):
            yield self.model

    def describe(self) -> dict[str, Any]:
        """Name, revision and dtype. Once the model is loaded by its hub id, the revision is the commit it is of."""
        return {
            "kind": "local",
            "model": self.name,
            "revision": self._commit or self.revision,
            "dtype": str(self.dtype if self.model is None else self.model.dtype).removeprefix("torch."),
            "reuse_prefix": self.reuse_prefix,
        }


def _moved(view: View, device: torch.device) -> View:
    if view.input_ids.device == device:
        return view
    return View(view.input_ids.to(device), view.attention_mask.to(device), view.labels.to(device))


def _rows_at(states: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """The supervised rows on the student's device; only they travel."""
    return supervised(states, labels.to(states.device)).to(device)
