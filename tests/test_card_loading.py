"""The code on a card, run as it stands: it gives the very model that was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from reports import whole_run
from transformers import PreTrainedModel

from hfkd.card import build_card, card_of_folder
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.student import keep_layers

IDS = torch.tensor([[5, 9, 17, 30]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapted(base: PreTrainedModel, folder: Path) -> torch.Tensor:
    """Save an adapter that changes something on that base, with a tokenizer; what the two say together."""
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return logits(model)


def run_code(card: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict:
    """Run the blocks of Python in their order, in the folder of the card; their names."""
    monkeypatch.chdir(folder)
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL):
        exec(compile(block, "card", "exec"), names)  # the code under test
    return names


def record(folder: Path, **student: object) -> dict:
    """A record whose student section is this one."""
    run = whole_run()
    run["recipe"]["student"] = {"model": None, "init": None, "revision": None, "lora": None, **student}
    run["student"], run["origins"] = {"source": "folder"}, {}
    run["recipe"]["data"]["prompt"] = {"style": "text", "question": 'Say "{prompt}"\n', "stop": ["\n"]}
    (folder / "run.json").write_text(json.dumps(run))
    return run


def test_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing that a reader does with a card is to copy this block."""
    model = make_model(3)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    record(tmp_path, model="models/mine")
    card, missing = card_of_folder(tmp_path)
    assert not [line for line in missing if "safetensors" in line or "tokenizer" in line], missing
    names = run_code(card, monkeypatch, tmp_path)
    assert torch.equal(logits(names["model"]), logits(model))
    assert names["prompt"] == 'Say "YOUR QUESTION"\n'


def test_an_adapter_on_a_base_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter on another base, or merged twice, answers like neither model."""
    make_model(3).save_pretrained(tmp_path / "base-model")
    run_folder = tmp_path / "run"
    expected = adapted(make_model(3), run_folder)
    run = record(run_folder, model="../base-model", lora={"r": 4, "alpha": 8.0})
    names = run_code(build_card(run, {}), monkeypatch, run_folder)
    assert (run_folder / "merged" / "model.safetensors").exists()
    assert not isinstance(names["model"], PeftModel)
    assert torch.allclose(logits(names["model"]), expected, atol=1e-4)
    assert not torch.allclose(logits(make_model(3)), expected, atol=1e-2), "the adapter changes something"


def test_an_adapter_on_a_part_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the whole model, whose name the card bears, the adapter of its part is wrong or doesn't load at all."""
    base = keep_layers(make_model(3), [0])
    base.save_pretrained(tmp_path / "base")
    expected = adapted(base, tmp_path)
    run = record(tmp_path, init={"from": "org/whole", "keep_layers": 1}, lora={"r": 4, "alpha": 8.0})
    run["student"] = {"source": "hub", "kept_layers": [0], "layers_before": 2}
    card = build_card(run, {})
    assert "`base/` beside it" in card and "base_model_relation: finetune" in card
    assert "# whole (1 of 2 blocks), distilled on" in card
    names = run_code(card, monkeypatch, tmp_path)
    assert torch.allclose(logits(names["model"]), expected, atol=1e-4)


def test_a_chat_model_is_asked_as_it_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model asked in another form than it learned looks worse than it is."""
    make_model(3).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    run = record(tmp_path, model="models/mine")
    run["recipe"]["data"]["prompt"] = {"style": "chat", "system": 'Be "brief"'}
    names = run_code(build_card(run, {}), monkeypatch, tmp_path)
    assert names["messages"] == [
        {"role": "system", "content": 'Be "brief"'},
        {"role": "user", "content": "YOUR QUESTION"},
    ]
    assert names["inputs"]["input_ids"].shape[1] < names["output"].shape[1] + 1


def test_a_builder_of_ones_own_has_no_example(tmp_path: Path) -> None:
    """A form that isn't the one that was trained on is worse than none."""
    run = record(tmp_path, model="org/x")
    run["recipe"]["data"]["prompt"]["builder"] = "mine:Builder"
    assert "YOUR QUESTION" not in build_card(run, {})


def test_a_student_that_never_saw_a_question_alone_is_shown_examples(tmp_path: Path, monkeypatch) -> None:
    """Asked without examples, a model that always had some looks as if it had learned nothing."""
    make_model(3).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    run = record(tmp_path, model="models/mine")
    style = {"style": "text", "system": "Be brief", "question": "Q {prompt}\n", "answer": "A {completion}\n"}
    run["recipe"]["data"] |= {"student_shots": [2, 1], "prompt": {**style, "separator": "--\n", "stop": ["\n"]}}
    card = build_card(run, {})
    assert "trained on, with 1 demonstration before the question" in card
    names = run_code(card, monkeypatch, tmp_path)
    rows = [{"prompt": "A QUESTION", "completion": "ITS ANSWER"}, {"prompt": "YOUR QUESTION"}]
    builder = PromptBuilder(make_tokenizer(), PromptStyle(**style, separator="--\n"))
    assert names["prompt"] == builder.prompt(rows[1], rows[:1])
    run["recipe"]["data"]["prompt"] = {"style": "chat"}
    names = run_code(build_card(run, {}), monkeypatch, tmp_path)
    assert [one["role"] for one in names["messages"]] == ["user", "assistant", "user"]
    assert [one["content"] for one in names["messages"]] == ["A QUESTION", "ITS ANSWER", "YOUR QUESTION"]
    run["recipe"]["data"]["student_shots"] = [0, 1]
    assert "Asked in the form that it was trained on:\n" in build_card(run, {})


@pytest.mark.parametrize("student", [{"lora": {"r": 4}}, {}, {"init": {"from": "org/x"}, "lora": {"r": 4}}])
def test_code_of_the_model_is_asked_for_and_pointed_out(student: dict, tmp_path: Path) -> None:
    """Without the setting the code on the card fails; with it a reader runs code that he should have read."""
    run = record(tmp_path, model="org/x", **student)
    assert "trust_remote_code" not in build_card(run, {}).split("## Citations")[0]
    run["recipe"]["student"]["trust_remote_code"] = True
    card = build_card(run, {})
    assert "# trust_remote_code runs Python that comes with the model: read it before you do." in card
    calls = re.findall(r"Auto\w+\.from_pretrained\(.*\)", card)
    assert len(calls) >= 2 and all(", trust_remote_code=True)" in call for call in calls)
    for block in re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL):
        compile(block, "card", "exec")
