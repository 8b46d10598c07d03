"""Generation: the same text whatever the batch, padding and shared prefix, and a model left as it was found."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from hfkd.prefix import SharedPrefix
from hfkd.rollout import GenerationSettings, HFRollout
from hfkd.rollout.decoding import SeededSampling, draws_for

DEMONSTRATIONS = "".join(
    f"Question: {a}\nAnswer: {b}\n\n" for a, b in (("walk", "walked"), ("go", "went"), ("call", "called"))
)
WORDS = ["sing", "a much longer question than the others", "no", "the quick brown fox", "yes"]


def make_learned_positions() -> GPT2LMHeadModel:
    """A GPT-2 of two layers: positions are looked up in a table, so a wrong one can't hide."""
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=384, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = None
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def prompts(tokenizer) -> list[list[int]]:
    """Prompts of several lengths that share more than `SharedPrefix.MINIMUM` tokens."""
    ids = [tokenizer(f"{DEMONSTRATIONS}Question: {word}\nAnswer:")["input_ids"] for word in WORDS]
    assert len(tokenizer(DEMONSTRATIONS)["input_ids"]) >= SharedPrefix.MINIMUM
    return ids


def one_by_one(model, prompts, new_tokens: int) -> list[list[int]]:
    """Greedy ids, written out from the definition: no cache, no padding, no batch."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(new_tokens):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def checkpointed(model) -> bool:
    """Whether any layer would be computed again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def without_eos(model, tokenizer):
    """A tokenizer and a model that name no end, so that every row runs to the limit."""
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    model.generation_config.eos_token_id = None
    return bare


@pytest.mark.parametrize("make", [make_model, make_learned_positions])
@pytest.mark.parametrize("reuse_prefix", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equals_one_by_one(make, reuse_prefix, batch_size, tokenizer, prompts):
    """Prevents padding, sorting or the shared prefix from changing what is written, or from mixing up the rows."""
    model = make()
    bare = without_eos(model, tokenizer)
    rollout = HFRollout(bare, GenerationSettings(max_new_tokens=7, batch_size=batch_size), reuse_prefix)
    got = [completion.ids for completion in rollout.generate(model, prompts)]
    assert got == one_by_one(model, prompts, 7)
    assert len({tuple(ids) for ids in got}) > 1, "all rows alike: nothing was tested"


def test_prefix_is_run_once(tokenizer, prompts, model, monkeypatch):
    """Prevents the reuse from being lost in silence: it is the time of an evaluation with many demonstrations."""
    seen = []
    forward = type(model.model).forward

    def counted(self, input_ids=None, **kwargs):
        seen.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", counted)
    HFRollout(tokenizer, GenerationSettings(max_new_tokens=3, batch_size=3)).generate(model, prompts)
    rows, width = seen[0]
    assert rows == 1 and width >= SharedPrefix.MINIMUM
    assert sum(shape[0] * shape[1] for shape in seen[1:]) < len(prompts) * (max(map(len, prompts)) - width + 3)


def test_identical_prompts_share_all_but_one_token(tokenizer, model):
    """Prevents an empty forward where the prompts are the same: the last token is never inside the prefix."""
    prompt = tokenizer(DEMONSTRATIONS)["input_ids"]
    rollout = HFRollout(without_eos(model, tokenizer), GenerationSettings(max_new_tokens=4))
    got = [completion.ids for completion in rollout.generate(model, [prompt, prompt])]
    assert got == one_by_one(model, [prompt, prompt], 4)


def test_sliding_window_runs_prompts_whole(tokenizer, prompts, caplog):
    """Prevents padding inside a window from hiding real tokens, and says once why the prompts take longer."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=24, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    rollout = HFRollout(without_eos(model, tokenizer), GenerationSettings(max_new_tokens=5, batch_size=8))
    with caplog.at_level(logging.WARNING):
        first = [completion.ids for completion in rollout.generate(model, prompts)]
        rollout.generate(model, prompts)
    assert first == one_by_one(model, prompts, 5)
    assert sum("looks back" in record.message for record in caplog.records) == 1


def test_peft_model_with_adapter_on_and_off(tokenizer, prompts, model):
    """Prevents the self-teacher from answering with the student's adapter, or the student without it."""
    bare = without_eos(model, tokenizer)
    plain = one_by_one(model, prompts, 5)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    rollout = HFRollout(bare, GenerationSettings(max_new_tokens=5, batch_size=3))
    on = [completion.ids for completion in rollout.generate(adapted, prompts)]
    with adapted.disable_adapter():
        off = [completion.ids for completion in rollout.generate(adapted, prompts)]
    assert off == plain
    assert on != plain and on == one_by_one(adapted.eval(), prompts, 5)


def test_stop_strings_end_each_row_by_itself(tokenizer, prompts, model):
    """Prevents one row's stop string from cutting the others, and text behind it from reaching a score."""
    settings = GenerationSettings(max_new_tokens=12, batch_size=8)
    bare = without_eos(model, tokenizer)
    free = HFRollout(bare, settings).generate(model, prompts)
    stop = next(text for text in (c.text[4:6] for c in free) if len(text) == 2 and "\ufffd" not in text)
    stopped = HFRollout(bare, GenerationSettings(max_new_tokens=12, batch_size=8, stop=(stop, "never"))).generate(
        model, prompts
    )
    assert {completion.finished for completion in stopped} == {True, False}, "want rows that stop and rows that go on"
    for before, after in zip(free, stopped, strict=True):
        assert not before.finished and len(before.ids) == 12
        assert after.text == before.text.split(stop)[0]
        assert after.finished == (stop in before.text)
        assert after.ids == before.ids[: len(after.ids)]
        assert (len(after.ids) == 12) or stop in bare.decode(after.ids)


def test_every_declared_eos_ends_a_row(tokenizer, prompts, model):
    """Prevents text behind the second of several EOS tokens, or the tokenizer's own, from counting as answer."""
    free = HFRollout(without_eos(model, tokenizer), GenerationSettings(max_new_tokens=8)).generate(model, prompts)
    tokens = [token for completion in free for token in completion.ids]
    first = tokens[0]
    second = next(token for token in tokens if any(token in c.ids and first not in c.ids for c in free))
    model.generation_config.eos_token_id = [first, second]
    ended = HFRollout(tokenizer, GenerationSettings(max_new_tokens=8)).generate(model, prompts)
    assert {first, second} <= {completion.ids[-1] for completion in ended}, "want rows that end at either token"
    for before, after in zip(free, ended, strict=True):
        cut = [place for place, token in enumerate(before.ids) if token in (first, second, tokenizer.eos_token_id)]
        expected = before.ids[: cut[0] + 1] if cut else before.ids
        assert after.ids == expected and after.finished == bool(cut)
        assert after.text == tokenizer.decode(expected[:-1] if cut else expected, skip_special_tokens=True)


def test_defaults_of_the_model_do_not_leak(tokenizer, prompts, model, caplog, recwarn):
    """Prevents an author's sampling flags, penalty or limits from changing a greedy result, or from warnings."""
    plain = HFRollout(tokenizer, GenerationSettings(max_new_tokens=6)).generate(model, prompts)
    defaults = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 5, "repetition_penalty": 5.0}
    for name, value in {**defaults, "max_length": 30, "pad_token_id": None}.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config
    with caplog.at_level(logging.WARNING):
        assert HFRollout(tokenizer, GenerationSettings(max_new_tokens=6)).generate(model, prompts) == plain
    assert model.generation_config is before
    assert [record.message for record in caplog.records if "transformers" in record.name] == []
    assert [str(warning.message) for warning in recwarn if "generat" in str(warning.message)] == []


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails, tokenizer, prompts, model, monkeypatch):
    """Prevents a run from going on without dropout or with the cache on after it generated, or failed to."""
    model.train()
    model.model.layers[0].eval()  # a part that its owner froze stays as it is
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    assert checkpointed(model)
    rollout = HFRollout(tokenizer, GenerationSettings(max_new_tokens=2))
    inside = []

    def generate(**kwargs):
        inside.append((model.training, checkpointed(model), model.config.use_cache))
        if fails:
            raise RuntimeError("out of memory")
        return type(model).generate(model, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    try:
        rollout.generate(model, prompts)
    except RuntimeError:
        assert fails
    assert inside[0] == (False, False, True)
    assert [module.training for module in model.modules()] == modes
    assert checkpointed(model) and model.config.use_cache is False


def test_samples_depend_on_seed_and_prompt_only(tokenizer, prompts, model):
    """Prevents a resumed or differently batched run from training on other samples than the straight one."""

    def sample(seed=0, batch_size=8, chosen=prompts, reuse_prefix=True):
        settings = GenerationSettings(max_new_tokens=8, temperature=1.5, batch_size=batch_size, seed=seed)
        return [c.ids for c in HFRollout(tokenizer, settings, reuse_prefix).generate(model, chosen)]

    state = torch.get_rng_state()
    first = sample()
    assert torch.equal(torch.get_rng_state(), state), "sampling moved the random state of training"
    assert sample(batch_size=2, reuse_prefix=False) == first
    assert sample(chosen=prompts[::-1]) == first[::-1]
    assert sample(seed=1) != first
    twice = sample(chosen=[prompts[0], prompts[0]])
    assert twice[0] == first[0] and twice[1] != twice[0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sampled_frequencies_are_the_distribution(temperature, top_p):
    """Prevents a sampler that is reproducible and wrong: counts against probabilities worked out by hand."""
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    probabilities = (logits / temperature).softmax(-1)
    kept, mass = [], 0.0
    for index in sorted(range(5), key=lambda i: -logits[i]):
        if mass < top_p:
            kept.append(index)
        mass += float(probabilities[index])
    expected = torch.zeros(5)
    expected[kept] = probabilities[kept]
    expected /= expected.sum()
    rows = 20_000
    draws = torch.rand(rows, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = SeededSampling(draws, 0, temperature, top_p)(torch.zeros(rows, 0), logits.expand(rows, -1))
    counts = torch.bincount(scores.argmax(-1), minlength=5) / rows
    assert torch.allclose(counts, expected, atol=0.012)
    assert (counts[expected == 0] == 0).all()


def test_draws_are_uniform_and_apart():
    """Prevents neighbouring seeds or prompts from getting related random numbers."""
    draws = draws_for([[1, 2], [1, 3], [1, 2]], GenerationSettings(max_new_tokens=400, temperature=1.0))
    assert draws.shape == (3, 400) and 0 <= draws.min() and draws.max() < 1
    assert torch.corrcoef(draws)[~torch.eye(3, dtype=torch.bool)].abs().max() < 0.2
    assert (draws.mean(-1) - 0.5).abs().max() < 0.1


def test_bad_input_says_what_to_change(tokenizer, model):
    """Prevents a crash deep inside a model, or a silent cut, where the prompts or the settings can't work."""
    rollout = HFRollout(tokenizer, GenerationSettings(max_new_tokens=4))
    assert rollout.generate(model, []) == []
    with pytest.raises(ValueError, match="Prompt 1 holds no token"):
        rollout.generate(model, [[1, 2], []])
    with pytest.raises(ValueError, match="256 positions"):
        rollout.generate(make_learned_positions(), [[1] * 253])
    with pytest.raises(ValueError, match="can't generate"):
        rollout.generate(torch.nn.Linear(2, 2), [[1]])


@pytest.mark.parametrize(
    "settings",
    [{"stop": "\n"}, {"stop": ("",)}, {"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"batch_size": 0}],
)
def test_bad_settings_are_refused(settings):
    """Prevents a wrong setting from being taken for another: a stop given as text would stop at each letter."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        GenerationSettings(**settings)


def test_progress_counts_prompts(tokenizer, prompts, model, capsys):
    """Prevents a bar that never ends, which reads as a hang."""
    HFRollout(tokenizer, GenerationSettings(max_new_tokens=2, batch_size=2)).generate(model, prompts, "Answers")
    assert "Answers" in capsys.readouterr().out
