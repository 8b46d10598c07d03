"""Tasks of lm_eval: asked of the model that is meant, offline, and refused in one sentence without the package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer

from hfkd.eval.comparison.compare import compare_sides
from hfkd.eval.comparison.sides import load_sides
from hfkd.eval.harness import HarnessSettings, check_harness, run_harness
from hfkd.eval.results import Results

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval: lm_eval")
WORDS = "walk talk jump look call ask work play".split()


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task over a file that lies beside it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": word, "choices": [f" {word}ed", " it was"], "label": 0} for word in WORDS]
    (folder / "verbs.json").write_text(json.dumps(rows))
    task = {
        **{"task": "hfkd_verbs", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
        "dataset_kwargs": {"data_files": {"test": str(folder / "verbs.json")}},
        **{"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_target": "label", "doc_to_choice": "choices"},
        **{"target_delimiter": "", "metric_list": [{"metric": "acc"}]},
    }
    (folder / "verbs.yaml").write_text(yaml.safe_dump(task))
    return folder


def likeliest(model, tokenizer, word: str) -> int:
    """Which of the two choices the model finds likelier, by its own log-probabilities."""
    scores = []
    prompt = tokenizer(f"Question: {word}\nAnswer:", add_special_tokens=False)["input_ids"]
    for choice in (f" {word}ed", " it was"):
        whole = tokenizer(f"Question: {word}\nAnswer:{choice}", add_special_tokens=False)["input_ids"]
        assert whole[: len(prompt)] == prompt
        with torch.no_grad():
            rows = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(float(rows[place - 1, whole[place]]) for place in range(len(prompt), len(whole))))
    return scores.index(max(scores))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError after the k-shot evaluation would be a late answer, and no help."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; install it with pip install 'hfkd\[eval\]'"):
        check_harness(HarnessSettings(("hellaswag",)))


@installed
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": ()}, "names no task"),
        ({"tasks": ("hellaswog",)}, "no task 'hellaswog'; did you mean hellaswag"),
        ({"tasks": ("hfkd_verbs",)}, "no task 'hfkd_verbs'"),
        ({"tasks": ("hellaswag",), "limit": 0}, "limit is 0; expected at least 1"),
        ({"tasks": ("hellaswag",), "include": Path("nowhere")}, "nowhere is no folder"),
    ],
)
def test_what_cannot_be_asked(settings: dict, words: str) -> None:
    """A misspelt task must be found before a model is loaded."""
    with pytest.raises(ValueError, match=words):
        check_harness(HarnessSettings(**settings))


@installed
def test_the_model_that_is_meant_is_asked(tasks: Path, tmp_path: Path) -> None:
    """The harness must read our weights, and its documents must be paired with another run's."""
    tokenizer, paths, rights = make_tokenizer(), [], []
    settings = HarnessSettings(("hfkd_verbs",), limit=6, include=tasks)
    check_harness(settings)
    for seed in (0, 2):
        model = make_model(seed)
        found = run_harness(model, tokenizer, "hfkd_verbs", settings, batch_size=4)
        right = [float(likeliest(model, tokenizer, word) == 0) for word in WORDS[:6]]
        assert found["tasks"]["hfkd_verbs"]["figures"]["acc"]["value"] == pytest.approx(sum(right) / 6)
        assert found["tasks"]["hfkd_verbs"]["documents"] == 6
        assert [score for _, score in found["scores"]["hfkd_verbs"]["acc"]] == right
        rights.append(right)
        results = Results(tmp_path / f"{seed}.json", {"after": "w"})
        results.put("after", "lm_eval.hfkd_verbs", "f", found, 1.0)
        paths.append(results.path)
    assert rights[0] != rights[1], "two models that answer alike would show nothing"
    row = compare_sides(load_sides(paths))["rows"][0]
    assert (row["task"], row["measure"], row["shared"]) == ("lm_eval.hfkd_verbs", "acc", 6)
    assert row["difference"] == pytest.approx((sum(rights[1]) - sum(rights[0])) / 6)


@installed
def test_what_decides_a_result(tasks: Path) -> None:
    """A task whose file was changed, or asked with another limit, is another task."""
    known = HarnessSettings(("hfkd_verbs",), include=tasks).describe("hfkd_verbs")
    assert HarnessSettings(("hfkd_verbs", "more"), include=tasks).describe("hfkd_verbs") == known
    assert HarnessSettings(("hfkd_verbs",), 3, include=tasks).describe("hfkd_verbs") != known
    (tasks / "verbs.json").write_text("[]")
    assert HarnessSettings(("hfkd_verbs",), include=tasks).describe("hfkd_verbs") != known
