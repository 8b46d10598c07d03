"""vLLM through TRL's generation layer: TRL's own code runs here, on an engine that is a tiny model."""

from __future__ import annotations

import copy
import importlib
import inspect
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from peft import LoraConfig, get_peft_model
from test_writer import batches_of, rows_of, views, writer
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from hfkd.rollout import GenerationSettings, HFRollout, VllmRollout

SETTINGS = GenerationSettings(max_new_tokens=6)
import_utils = importlib.import_module("trl.import_utils")  # the package's lazy module doesn't show it


class Engine:
    """As much of `vllm.LLM` as TRL's layer uses: it writes greedily with weights that only `load_weights` changes."""

    def __init__(self, tokenizer) -> None:
        self.model = make_model(seed=9)  # other weights than the student's, until they are synchronised
        self.tokenizer, self.loads, self.requests = tokenizer, 0, []
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        )

    def load(self, weights) -> None:
        """Take parameters by their names in the model."""
        parameters = dict(self.model.named_parameters())
        for name, value in weights:
            self.loads += name == "model.norm.weight"
            parameters[name].data.copy_(value)

    def reset_prefix_cache(self) -> None:
        """Nothing is kept."""

    def generate(self, prompts, sampling_params, use_tqdm):
        """Greedy, behind stop strings too: an engine may write on for a while."""
        self.requests.append((prompts, sampling_params))
        rollout = HFRollout(self.tokenizer, GenerationSettings(max_new_tokens=sampling_params["max_tokens"]))
        done = rollout.generate(self.model, [prompt["prompt_token_ids"] for prompt in prompts])
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[SimpleNamespace(token_ids=tuple(one.ids), logprobs=None)],
            )
            for prompt, one in zip(prompts, done, strict=True)
        ]


@pytest.fixture
def engines(monkeypatch, tokenizer) -> list[Engine]:
    """The engines that are made."""
    made: list[Engine] = []

    def start(self) -> None:
        self.llm = Engine(tokenizer)
        made.append(self.llm)

    monkeypatch.setattr(import_utils, "is_vllm_available", lambda: True)
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", start)
    monkeypatch.setattr(vllm_generation, "SamplingParams", lambda **settings: settings, raising=False)
    return made


@pytest.fixture
def prompts(tokenizer) -> list[list[int]]:
    """Three prompts of unequal length."""
    return [tokenizer(text)["input_ids"] for text in ("Question: sing\nAnswer:", "The quick", "walk")]


def test_without_vllm_the_way_in_is_named(tokenizer, monkeypatch):
    """An ImportError of a module that nobody asked for by name helps nobody."""
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install hfkd\[vllm\]"):
        VllmRollout(tokenizer)


def test_nothing_is_imported_before_it_is_asked_for():
    """Importing TRL's layer or vLLM takes seconds, and fails where a GPU's libraries are missing."""
    code = "import sys, hfkd.rollout; sys.exit(any(name.split('.')[0] in ('vllm', 'trl') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_it_writes_with_the_students_weights_of_each_step(tokenizer, engines, prompts):
    """Weights of an older step write older text: on-policy in name only."""
    model = make_model(seed=0)
    rollout, plain = VllmRollout(tokenizer, SETTINGS, Accelerator(cpu=True)), HFRollout(tokenizer, SETTINGS)
    with rollout.at_step(0):
        assert rollout.generate(model, prompts) == plain.generate(model, prompts)
        rollout.generate(model, prompts[:1])
    assert engines[0].loads == 1, "once for a step"
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-2)
    with rollout.at_step(1):
        assert rollout.generate(model, prompts) == plain.generate(model, prompts)
        rollout.generate(model, prompts[:1])
    assert engines[0].loads == 2 and len(engines) == 1
    rollout.generate(model, prompts)
    assert engines[0].loads == 3, "outside a step the weights may have changed"
    assert rollout.generate(model, []) == []
    with pytest.raises(ValueError, match="another one for this model"):
        rollout.generate(make_model(seed=0), prompts)
    with pytest.raises(ValueError, match="holds no token"):
        rollout.generate(model, [[]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_write_too_and_leave_the_base_as_it_was(dtype, tokenizer, engines, prompts):
    """A student without its adapter is the teacher; a base that drifts with each merge is nobody's teacher."""
    adapted = get_peft_model(
        make_model(seed=0).to(dtype), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    base = {name: value.detach().clone() for name, value in adapted.named_parameters()}
    rollout = VllmRollout(tokenizer, SETTINGS, Accelerator(cpu=True))
    for step in range(3):
        with rollout.at_step(step):
            got = rollout.generate(adapted, prompts)
    merged = copy.deepcopy(adapted).merge_and_unload().float()
    assert got == HFRollout(tokenizer, SETTINGS).generate(merged, prompts)
    with adapted.disable_adapter():
        assert got != HFRollout(tokenizer, SETTINGS).generate(adapted, prompts)
    exact = dtype == torch.bfloat16
    for name, value in adapted.named_parameters():
        assert torch.equal(value, base[name]) if exact else torch.allclose(value, base[name], atol=1e-6)


def test_texts_end_where_they_should(tokenizer, engines, prompts):
    """Text behind a stop string is no answer; a cut answer that counts as finished hides that it never ends."""
    model = make_model(seed=0)
    free = HFRollout(tokenizer, SETTINGS).generate(model, prompts)
    stop = next(one.text[2:4] for one in free if "\ufffd" not in one.text[2:4] and len(one.text) > 3)
    settings = GenerationSettings(max_new_tokens=6, stop=(stop,))
    rollout = VllmRollout(tokenizer, settings, Accelerator(cpu=True))
    got = rollout.generate(model, prompts)
    assert got == HFRollout(tokenizer, settings).generate(model, prompts)
    assert {one.finished for one in got} == {True, False}, "want texts that end and texts that are cut"


def test_settings_and_options_arrive(tokenizer, engines, prompts):
    """A temperature that gets lost writes other text than the recipe says, in silence."""
    settings = GenerationSettings(max_new_tokens=5, temperature=0.7, top_p=0.9, stop=("\n\n",))
    options = {"gpu_memory_utilization": 0.3, "generation_kwargs": {"frequency_penalty": 0.1}}
    rollout = VllmRollout(tokenizer, settings, Accelerator(cpu=True), options)
    rollout.generate(make_model(seed=0), prompts)
    (_, request), *_ = engines[0].requests
    wanted = {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "stop": ["\n\n"], "frequency_penalty": 0.1, "n": 1}
    assert wanted.items() <= request.items() and request["stop_token_ids"] == [2]
    assert rollout._engine.gpu_memory_utilization == 0.3 and rollout._engine.mode == "colocate"


@pytest.mark.parametrize(("name", "words"), [("modus", "no option 'modus'"), ("top_p", "decided by the settings")])
def test_wrong_options_are_refused(name, words, tokenizer, engines):
    """A misspelt option is found when a run begins, not when the engine starts."""
    with pytest.raises(ValueError, match=words):
        VllmRollout(tokenizer, SETTINGS, options={name: 1})


def test_a_server_gets_as_many_prompts_of_each_process(tokenizer, engines, prompts, monkeypatch):
    """TRL's layer cuts the server's answers into equal parts: with unequal ones each row gets another's answer."""
    rollout = VllmRollout(tokenizer, SETTINGS, Accelerator(cpu=True))
    monkeypatch.setattr(rollout, "_most_prompts", lambda count: 5)
    model = make_model(seed=0)
    assert rollout.generate(model, prompts) == HFRollout(tokenizer, SETTINGS).generate(model, prompts)
    assert rollout.generate(model, []) == []
    assert [len(asked) for asked, _ in engines[0].requests] == [5, 5]


def test_the_layer_still_has_what_is_used():
    """Another TRL may take other arguments, or give its answers in another order."""
    arguments = inspect.signature(VLLMGeneration).parameters
    for name in ("model", "accelerator", "processing_class", "mode", "temperature", "top_p", "max_completion_length"):
        assert name in arguments
    assert list(inspect.signature(VLLMGeneration.generate).parameters)[:4] == [
        "self", "prompts", "images", "num_generations",
    ]  # fmt: skip
    assert not [*inspect.signature(VLLMGeneration.sync_weights).parameters][1:]


def test_a_step_of_training_is_written(tokenizer, engines):
    """The writer must tell the engine of the step, or the weights stay those of the first one."""
    model = make_model(seed=0)
    rollout = VllmRollout(tokenizer, SETTINGS, Accelerator(cpu=True))
    one = writer("student", rollout, student=lambda: nullcontext(model))
    batches = batches_of(views())
    new = [one.rewrite(batches, step) for step in (0, 1)]
    assert engines[0].loads == 2
    plain = writer("student", HFRollout(tokenizer, SETTINGS), student=lambda: nullcontext(model))
    for ours, theirs in zip(new[0], plain.rewrite(batches, 0), strict=True):
        assert rows_of(ours) == rows_of(theirs)
