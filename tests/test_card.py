"""Model cards: drafts that say what the two files say, and no more."""

from __future__ import annotations

import copy

import pytest
from huggingface_hub import ModelCard

from hfkd.card import _formula, _term, build_card
from hfkd.losses import LOSSES, STATE_LOSSES
from hfkd.recipe.schema import Recipe


def result(accuracy: float, verdict: str = "") -> dict:
    return {
        "accuracy": accuracy,
        "standard_error": 0.07,
        "most_frequent_share": 0.02,
        "distinct_answers": 47,
        "items": 48,
        "verdict": verdict,
    }


@pytest.fixture
def run() -> dict:
    recipe = Recipe.model_validate(
        {
            "student": {"model": "org/small", "revision": "abc", "lora": {}},
            "teacher": {"kind": "self"},
            "data": {
                "train": {"path": "recipes/past_tense.jsonl"},
                "demonstrations": {"count": 8},
                "student_shots": [0, 1],
                "answer": "teacher",
            },
            "training": {"max_steps": 30},
        }
    )
    return {
        "recipe": recipe.resolved(),
        "student": {"source": "hub"},
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "hardware": {"device": "cpu", "count": 1, "processes": 1},
        "data": {"train": {"rows": 67, "sha256": "0123456789abcdef0"}, "teacher_answers": {"rows": 66, "empty": 1}},
        "objective": [{"name": "forward_kl", "kind": "forward_kl", "weight": 1.0, "temperature": 2.0}],
        "command": ["hfkd", "train", "recipes/past_tense.yaml", "data.prompt.system=Be brief"],
    }


@pytest.fixture
def report() -> dict:
    details = {"before": {"0": result(0.0), "1": result(0.542)}, "after": {"0": result(0.958), "1": result(0.979)}}
    details["before"]["8"] = result(0.979)
    details["gold"] = {"0": result(0.9), "1": result(0.9)}
    forgotten = {"before": {"1": result(0.292)}, "after": {"1": result(0.167)}}
    scores = {name: {shots: one["accuracy"] for shots, one in found.items()} for name, found in forgotten.items()}
    return {
        "k_shot_details": details,
        "forgetting": [{"task": "plural", "k_shot": scores, "details": forgotten}],
        "loss_history": [{"step": 1, "loss": 2.5}, {"step": 30, "loss": 0.25}],
    }


def test_the_metadata_is_what_the_hub_reads(run: dict, report: dict) -> None:
    """A card whose metadata can't be parsed is refused by the hub, after the run."""
    card = ModelCard(build_card(run, report))
    assert card.data.base_model == "org/small"
    assert card.data.library_name == "peft"
    assert {"hfkd", "knowledge-distillation", "self-teacher", "lora"} == set(card.data.tags)
    assert card.data.license is None, "nobody has said which licence it is"


def test_the_card_says_what_was_done(run: dict, report: dict) -> None:
    """A card without its teacher, data, loss and errors is an advertisement."""
    text = build_card(run, report)
    for words in (
        "# small, distilled on past_tense",
        "A LoRA adapter (rank 16, alpha 32) was trained on `org/small` at revision `abc`",
        "30 optimizer steps; the logged loss went from 2.5 to 0.25 nats per token.",
        "the student's own weights with the adapter switched off; it read 8 demonstrations",
        "The student read 0 or 1 demonstrations",
        "With them it answers 97.9% ± 7.0% of the held-out items rightly itself.",
        "Accuracy on 48 held-out items, by",
        "of a task that was not trained, on 48 items:",
        "| 8 | 97.9% ± 7.0% | - | - | 2.0% | 47 / - / - |",
        "| train | 67 | `0123456789abcdef` |",
        "The answers are the teacher's own.",
        "Rows left out because the teacher's answer was empty: 1.",
        "- 1 x `forward_kl`: `KL(teacher || student) = sum_v p(v) (log p(v) - log q(v)), p the teacher,",
        "q the student.` (temperature 2.0)",
        "| shots | before | after | fine-tuned on gold answers | most frequent answer, always | distinct",
        "| 0 | 0.0% ± 7.0% | 95.8% ± 7.0% | 90.0% ± 7.0% | 2.0% | 47 / 47 / 47 |",
        "### Another task: plural",
        "On plural it lost 12.5% of the items with 1 demonstrations in the prompt.",
        "were written by the teacher and were not checked",
        "AutoPeftModelForCausalLM.from_pretrained(folder)",
        "hfkd train recipes/past_tense.yaml 'data.prompt.system=Be brief'",
        "torch 2.13.0, on cpu, 1 process.",
    ):
        assert words in text, words
    assert text.count("**TO FILL IN**") >= 4
    assert "\n\n\n" not in text


def test_a_collapse_is_told(run: dict, report: dict) -> None:
    """A student that always says one thing can look like one that learned."""
    report["k_shot_details"]["after"]["0"]["verdict"] = "collapsed: answers '1' to 98% of the questions"
    text = build_card(run, report)
    assert "- after, 0-shot: collapsed: answers '1' to 98% of the questions" in text
    assert "Some figures are no better than a constant answer" in text


def test_a_bare_run_has_a_card_too(run: dict) -> None:
    """No evaluation, no adapter, a local folder: the card says so and doesn't fail at the end of a long run."""
    run = copy.deepcopy(run)
    run["recipe"]["student"].update(lora=None, revision=None, model="models/mine")
    run["recipe"]["teacher"].update(kind="none")
    run.update(student={"source": "folder"}, data={}, objective=[], command=[])
    text = build_card(run, {})
    assert ModelCard(text).data.base_model is None
    assert "All weights of `models/mine` were trained" in text
    assert "There was no teacher" in text
    assert "by distillation" not in text
    assert "Nothing was evaluated." in text
    assert "What the model forgot of other tasks was not measured." in text
    assert "AutoModelForCausalLM.from_pretrained(folder)" in text


def test_a_local_base_is_pointed_out(run: dict, report: dict) -> None:
    """An adapter that names a folder of one machine can't be loaded on another."""
    run["student"] = {"source": "folder"}
    assert "The adapter was trained on a local folder, `org/small`" in build_card(run, report)


def test_another_model_as_the_teacher_is_named(run: dict, report: dict) -> None:
    """No card of the field names its teacher; the licence of the result hangs on it."""
    run["recipe"]["teacher"].update(kind="local", model="org/big", revision="r1")
    assert "The teacher is `org/big` at revision `r1`; it read 8 demonstrations" in build_card(run, report)


def test_every_loss_has_a_formula() -> None:
    """A new loss must not appear on cards as a bare name."""
    assert all(_formula(kind) for kind in {**LOSSES, **STATE_LOSSES})
    assert _formula("forward_kl").startswith("KL(teacher || student) = sum_v")
    assert _formula("my_losses:Mine") == ""


def test_a_schedule_is_said_in_words() -> None:
    """A card must not crash on a weight that changes, nor show it as a dictionary."""
    schedule = {"schedule": "linear", "start": 1.0, "end": 0.25, "start_step": 0, "end_step": None}
    shown = _term({"kind": "forward_kl", "weight": schedule, "temperature": {**schedule, "end_step": 9}})
    assert shown["weight"] == "(linear, 1 to 0.25 by the last step)"
    assert "temperature (linear, 1 to 0.25 by step 9)" in shown["settings"]
