"""Generation with vLLM, through the generation layer of TRL: in this process (colocate) or on a server.

The engine has weights of its own, which are those of the student after a synchronisation. vLLM and TRL's layer are
imported when a `VllmRollout` is made, and never before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hfkd.rollout.base import Completion, GenerationSettings, Rollout
from hfkd.rollout.decoding import TextEnds, eos_ids

_OURS = ("model", "accelerator", "processing_class", "temperature", "top_p", "max_completion_length", "logprobs")


class VllmRollout(Rollout):
    """Lets vLLM write with the student's weights.

    The engine starts at the first call, from the folder or hub id that the student was loaded from (`name_or_path`),
    so a student that was cut out of a larger model must be saved and loaded first. Its weights are synchronised when
    the step changes. Samples come from the engine's own random numbers: they are not a function of seed and prompt,
    as those of `HFRollout` are. `batch_size` is left to the engine.

    Args:
        tokenizer: Decodes what was written.
        settings: How completions are drawn.
        accelerator: Of the trainer; None makes one, which shares its state.
        options: More arguments of `trl.generation.vllm_generation.VLLMGeneration`: `mode` ("colocate" or "server"),
            `server_base_url`, `gpu_memory_utilization`, `max_model_length`, `enable_sleep_mode`, ...

    Raises:
        ImportError: vLLM isn't there.
        ValueError: An option doesn't exist, or is decided by the settings.
    """

    any_model = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings | None = None,
        accelerator: Accelerator | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._engine_class = engine_class()
        self.tokenizer, self.settings = tokenizer, settings or GenerationSettings()
        self.accelerator, self.options = accelerator, dict(options or {})
        self._check_options()
        self._engine: Any = None
        self._step: int | None = None
        self._synced: int | None = None
        self._frozen: dict[str, Tensor] = {}

    @contextmanager
    def at_step(self, step: int, seed: int = 0) -> Iterator[None]:
        """As in `Rollout`; inside, the weights are synchronised once for each step."""
        with super().at_step(step, seed):
            self._step = step
            try:
                yield
            finally:
                self._step = None

    def generate(
        self, model: nn.Module, prompts: Sequence[list[int]], description: str | None = None
    ) -> list[Completion]:
        """Write behind each prompt; see `Rollout.generate`. All processes must call it together.

        Raises:
            ValueError: A prompt is empty, or the model is another one than the first time.
        """
        if any(not prompt for prompt in prompts):
            raise ValueError("A prompt holds no token, and a model can't write behind nothing.")
        self._start(model)
        self._follow(model)
        # On a server all processes' prompts are put in a row and cut into equal parts, so all bring equally many.
        filler = list(prompts[0]) if prompts else [_any_token(self.tokenizer)]
        padded = [*map(list, prompts), *[filler] * (self._most_prompts(len(prompts)) - len(prompts))]
        if not padded:
            return []
        _, answers, *_ = self._engine.generate(padded, None, 1)
        ends = TextEnds(self.tokenizer, self.settings.stop, eos_ids(model, self.tokenizer))
        return [_ended(ends, list(ids)) for ids in answers[: len(prompts)]]

    def _check_options(self) -> None:
        known = [name for name in inspect.signature(self._engine_class).parameters if name not in _OURS]
        for name in self.options:
            if name in _OURS:
                raise ValueError(f"The vLLM option {name!r} is decided by the settings; set it there.")
            if name not in known:
                raise ValueError(f"vLLM has no option {name!r} here; expected one of {', '.join(known)}.")

    def _start(self, model: nn.Module) -> None:
        if self._engine is not None:
            if self._engine.model is not model:
                raise ValueError("VllmRollout follows the model of its first call; make another one for this model.")
            return
        settings, options = self.settings, dict(self.options)
        request = {"stop_token_ids": eos_ids(model, self.tokenizer)}
        if settings.stop:
            request["stop"] = list(settings.stop)
        self._engine = self._engine_class(
            model=model,
            accelerator=self.accelerator or Accelerator(),
            processing_class=self.tokenizer,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_completion_length=settings.max_new_tokens,
            logprobs=None,
            generation_kwargs={**request, **(options.pop("generation_kwargs", None) or {})},
            **options,
        )

    def _follow(self, model: nn.Module) -> None:
        """Give the engine the present weights, unless it has those of this step."""
        if self._step is not None and self._step == self._synced:
            return
        frozen = _under_adapters(model)
        if not self._frozen:
            self._frozen = {name: value.detach().to("cpu", copy=True) for name, value in frozen.items()}
        self._engine.sync_weights()
        with torch.no_grad():
            for name, value in frozen.items():
                value.copy_(self._frozen[name])
        self._synced = self._step

    def _most_prompts(self, count: int) -> int:
        return max(gather_object([count])) if self._engine.accelerator.num_processes > 1 else count


def engine_class() -> type:
    """TRL's layer over vLLM.

    Raises:
        ImportError: vLLM isn't there.
    """
    from trl.import_utils import is_vllm_available

    if not is_vllm_available():
        raise ImportError(
            "This run wants vLLM to write, and it isn't installed. Install it with `pip install hfkd[vllm]` (in an "
            "environment of its own: it brings its own torch), or generate with HFRollout (backend: transformers)."
        )
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration


def _under_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Frozen weights in half precision that adapters lie on.

    TRL merges adapters into them and takes them out again, which isn't exact in half precision: step by step the
    weights, and with them a teacher that is the base model, would drift.
    """
    return {
        name: value
        for name, value in model.named_parameters()
        if ".base_layer." in name and not value.requires_grad and value.dtype in (torch.float16, torch.bfloat16)
    }


def _ended(ends: TextEnds, ids: list[int]) -> Completion:
    """A completion that ends where it should, also where the engine wrote on behind a stop string."""
    if any(stop in ends.decode(ids) for stop in ends.stop) or ends.eos_ids & set(ids):
        for length in range(1, len(ids) + 1):
            if ends.ended(ids[max(0, length - ends.tail) : length]):
                return ends.completion(ids[:length], finished=True)
    return ends.completion(ids, finished=False)


def _any_token(tokenizer: PreTrainedTokenizerBase) -> int:
    return next((one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None), 0)
