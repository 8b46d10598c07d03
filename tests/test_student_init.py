"""A student cut out of a larger model: by `keep_layers`, and by `student.init` of a recipe."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from architectures import VOCABULARY, tiny
from conftest import make_model, make_tokenizer
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from hfkd.recipe import RecipeError, load_recipe
from hfkd.run import run_recipe
from hfkd.run.evaluation import evaluate_recipe
from hfkd.student import keep_layers, kept_layers

KEPT = [0, 2, 5]


def qwen2(**overrides) -> Qwen2ForCausalLM:
    """Six blocks, of which the upper three look back at eight tokens only; the config lists them block by block."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    settings = {**sizes, **window, "num_key_value_heads": 2, "initializer_range": 0.2, "num_hidden_layers": 6}
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**settings, **overrides})).eval()


def six_blocks(kind: str, **overrides) -> PreTrainedModel:
    if kind == "qwen2":
        return qwen2(**overrides)
    return tiny(kind, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 6}, **overrides)


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def ids(length: int = 20) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["llama", "gpt2", "qwen2", "gemma2"])
def large(request: pytest.FixtureRequest) -> PreTrainedModel:
    return six_blocks(request.param)


def test_the_kept_blocks_do_what_they_did(large: PreTrainedModel) -> None:
    """Blocks under a wrong number, or with another block's kind of attention, make a student of noise."""
    small = keep_layers(large, KEPT)
    with torch.no_grad():
        logits = small(ids()).logits
        blocks = block_list(large)
        passed = [blocks[number] for number in KEPT]
        for block in blocks:
            if all(block is not other for other in passed):
                # a block that is left out hands on what it was given
                block.forward = lambda hidden, *args, **kwargs: hidden
        skipped = large(ids(), use_cache=False).logits
    assert small.config.num_hidden_layers == 3
    assert not torch.equal(logits, torch.zeros_like(logits))
    torch.testing.assert_close(logits, skipped, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded(large: PreTrainedModel, tmp_path: Path) -> None:
    """A config that still tells of the large model loads random blocks, or the wrong kind of them."""
    small = keep_layers(large, KEPT)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, small(ids()).logits)
    assert kept_layers(again.config) == (KEPT, 6)
    assert kept_layers(large.config) is None and large.config.num_hidden_layers == 6


def test_generation_with_a_cache(large: PreTrainedModel) -> None:
    """Attention that still has its old number writes to a place of the cache that isn't there, or to another's."""
    small = keep_layers(large, [1, 4])
    prompt, settings = ids(12), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = small.generate(prompt, use_cache=True, **settings)
    assert with_cache.shape == (2, 24)
    assert torch.equal(with_cache, small.generate(prompt, use_cache=False, **settings))


def test_lists_of_the_config_are_cut(tmp_path: Path) -> None:
    """A list with an entry a block that keeps its first entries gives the upper blocks the lower ones' attention."""
    assert keep_layers(qwen2(), [0, 4, 5]).config.layer_types == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
    ]


def test_nothing_is_shared(large: PreTrainedModel) -> None:
    """A student that shares a weight with its teacher trains the teacher too."""
    small = keep_layers(large, 3)
    theirs = {parameter.data_ptr() for parameter in large.parameters()}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in small.parameters())
    before = [parameter.clone() for parameter in large.parameters()]
    small(ids(), labels=ids()).loss.backward()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.sub_(0.1 * parameter.grad)
    assert all(torch.equal(old, new) for old, new in zip(before, large.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in large.parameters())


def test_state_and_type_are_kept() -> None:
    """A student in another type, or a draw of random numbers that changes the run's, is a surprise."""
    large = six_blocks("llama").to(torch.bfloat16).train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    small = keep_layers(large, 2)
    assert torch.equal(torch.rand(1), expected)
    assert small.dtype == torch.bfloat16 and small.training
    assert small.get_output_embeddings().weight is not large.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("layers", "numbers"), [(2, [0, 5]), (3, [0, 3, 5]), (6, [0, 1, 2, 3, 4, 5]), ([0], [0]), ((1, 3), [1, 3])]
)
def test_numbers(layers: object, numbers: list[int]) -> None:
    """An even spread that forgets the last block loses the one that feeds the head."""
    assert kept_layers(keep_layers(six_blocks("llama"), layers).config) == (numbers, 6)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (7, "got 7; expected 2 to 6 of the 6 blocks"),
        (1, r"\[0\] keeps the first alone"),
        (0, "got 0"),
        ([0, 6], r"got \[0, 6\]; expected numbers from 0 to 5"),
        ([-1, 3], r"got \[-1, 3\]"),
        ([0, 3, 3], "each larger than the one before"),
        ([3, 0], "each larger than the one before"),
        ([], r"got \[\]"),
        ([0, True], "expected numbers"),
        (True, "got True"),
        ("03", "got '03'"),
    ],
)
def test_wrong_numbers(layers: object, words: str) -> None:
    """A block that is taken twice, or from behind, is a slip that no loss curve shows."""
    with pytest.raises(ValueError, match=words):
        keep_layers(six_blocks("llama"), layers)


def test_blocks_that_depend_on_their_number_are_refused() -> None:
    """Where the number decides what a block does, a saved student would be another one than the trained one."""
    scaled = six_blocks("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="block 2 would become block 1.*scaling"):
        keep_layers(scaled, KEPT)
    assert keep_layers(scaled, [0, 1]).config.num_hidden_layers == 2


def test_an_adapter_is_refused() -> None:
    """The adapter's blocks would be lost without a word."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="has an adapter"):
        keep_layers(adapted, [0])


# --- recipes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model of six blocks, verbs and a recipe of a second's length."""
    monkeypatch.chdir(tmp_path)
    make_model(num_hidden_layers=6).save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    verbs = ["walk", "talk", "jump", "look", "call", "ask", "work", "play"]
    Path("verbs.jsonl").write_text("".join(json.dumps({"prompt": v, "completion": v + "ed"}) + "\n" for v in verbs))
    recipe = {
        "student": {"init": {"from": "model", "keep_layers": [0, 2, 5]}},
        "teacher": {"kind": "local", "model": "model"},
        "data": {"train": {"path": "verbs.jsonl"}},
        "training": {
            "output_dir": "out",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "learning_rate": 0.01,
            "disable_tqdm": True,
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def run(*overrides: str) -> str:
    words = io.StringIO()
    run_recipe(load_recipe("recipe.yaml", overrides), console=Console(file=words, width=200))
    return words.getvalue()


def test_a_run(folder: Path) -> None:
    """What was kept must stand where a reader of the result looks, and the result must load."""
    words = run()
    assert "Student     3 of the 6 blocks of model, all weights are trained" in words
    record = json.loads(Path("out/run.json").read_text())
    assert record["student"].pop("weights").startswith("model@")
    assert record["student"] == {"source": "folder", "kept_layers": [0, 2, 5], "layers_before": 6}
    assert record["recipe"]["student"]["init"] == {
        **{"from": "model", "keep_layers": [0, 2, 5]},
        **{"heads": None, "intermediate": None},
    }
    assert "3 of the 6 blocks (0, 2, 5; counted from 0) of `model`" in Path("out/README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == 3
    before, after = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("model", "out"))
    change = before["model.layers.5.mlp.up_proj.weight"] - after["model.layers.2.mlp.up_proj.weight"]
    assert 0 < change.abs().max() < 0.1  # trained, and two steps from where it began


def test_a_written_recipe_is_a_recipe(folder: Path) -> None:
    """The recipe beside a card must run as it stands, `from` and all."""
    resolved = load_recipe("recipe.yaml", ["student.init.keep_layers=3"]).resolved()
    Path("again.yaml").write_text(yaml.safe_dump(resolved))
    assert load_recipe("again.yaml").resolved() == resolved
    assert resolved["student"]["model"] is None


def test_whole_text_with_another_model(folder: Path) -> None:
    """Both models read the same text there, so each of its tokens can be compared."""
    run("data.whole_text=true")
    first = json.loads(Path("out/report.json").read_text())["loss_history"][0]
    assert first["loss"] > 0


def test_an_adapter_on_a_cut_student(folder: Path) -> None:
    """An adapter that names the whole model as its base would be loaded onto the wrong blocks, without a word."""
    from peft import AutoPeftModelForCausalLM

    more = ["student.lora={r: 2}", "evaluation={size: 2, shots: 0, max_new_tokens: 3}"]
    run(*more)
    loaded = AutoPeftModelForCausalLM.from_pretrained("out")
    assert loaded.get_base_model().config.num_hidden_layers == 3
    assert json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == "out/base"
    assert "which lies in `base/` beside it" in Path("out/README.md").read_text()
    details = json.loads(Path("out/report.json").read_text())["k_shot_details"]["after"]
    console = Console(file=io.StringIO())
    found = evaluate_recipe(load_recipe("recipe.yaml", more), adapter=Path("out"), console=console)
    assert found["results"]["after"]["k_shot"]["result"]["details"] == details


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["student.model=model"], "student: expected model (a whole model) or init"),
        (["student.init=null"], "got neither"),
        (["student.init.keep_layers=[2, 1]"], "student.init.keep_layers: got [2, 1]; expected how many blocks"),
        (["student.init.keep_layers=[1, 1]"], "student.init.keep_layers: got [1, 1]"),
        (["student.init.keep_layers=0"], "student.init.keep_layers: got 0"),
        (["student.init.keep_layers=true"], "student.init.keep_layers: got True"),
        (["student.init.keep_layers=[]"], "student.init.keep_layers: got []"),
        (
            ["student.init.form=x"],
            "student.init.form: unknown key; did you mean from? (known here: from, keep_layers, heads, intermediate)",
        ),
        (["student.init={keep_layers: 3}"], "student.init.from: is required"),
    ],
)
def test_wrong_recipes(folder: Path, overrides: list[str], words: str) -> None:
    """A slip must be told before a model is loaded."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", overrides)
    assert words in str(caught.value)


def test_blocks_that_are_not_there(folder: Path) -> None:
    """How many there are is known once the model is; the message must still name the key."""
    with pytest.raises(ValueError, match=r"student.init.keep_layers: got \[0, 6\]; expected numbers from 0 to 5"):
        run("student.init.keep_layers=[0, 6]")
    with pytest.raises(OSError, match="tokenizer of student.init.from nowhere/it"):
        run("student.init.from=nowhere/it", "teacher.model=nowhere/it")
