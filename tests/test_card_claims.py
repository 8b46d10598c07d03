"""What a card may claim: no step that wasn't made, no difference that the items don't show, no interval that promises
too much, no prompt that nobody read, and no data set that isn't the one.
"""

from __future__ import annotations

import json

import pytest
from card_rules import faults, metadata_of
from reports import difference, whole_report, whole_run

from hfkd.card import build_card
from hfkd.card.differences import difference_of
from hfkd.card.limits import limits

MINUS = "no difference that 48 items can show"


def limits_of(run: dict, report: dict) -> str:
    """The section of a card."""
    return build_card(run, report).split("## Limits")[1].split("## How to load")[0]


@pytest.mark.parametrize("status", ["started", "failed", "preempted", "torn", None])
def test_a_run_that_is_not_finished_says_so_first(status: str | None) -> None:
    """Who loads weights of a killed run believes that they are those of a whole one; nothing else tells."""
    run = whole_run()
    run["status"] = status
    text = build_card(run, {"loss_history": []})
    top = text.split("## What was done")[0]
    assert "> **Warning:** This run " in top and (status is None or "is not finished" in top)
    assert "This run " in limits_of(run, {}).splitlines()[2]
    assert "30 optimizer steps;" not in text and "30 optimizer steps." not in text
    assert "Up to 30 optimizer steps were asked for, and how many were made isn't recorded; 8 examples a step" in text
    run["status"] = "finished"
    text = build_card(run, {"loss_history": []})
    assert "Warning" not in text and "30 optimizer steps; 8 examples a step" in text


@pytest.mark.parametrize(
    ("status", "logged", "asked", "words"),
    [
        ("failed", 8, 10, "At least 8 optimizer steps of the 10 that were asked for;"),
        ("failed", 10, 10, "10 optimizer steps;"),
        ("finished", 20, 25, "25 optimizer steps;"),
        ("finished", 8, 25, "At least 8 optimizer steps of the 25 that were asked for;"),
        ("finished", 20, -1, "At least 20 optimizer steps;"),
        ("finished", 0, -1, "How many steps were made isn't recorded;"),
    ],
)
def test_steps_are_those_that_were_made(status: str, logged: int, asked: int, words: str) -> None:
    """What a recipe asks for is no proof that it was done."""
    run = whole_run()
    run["status"] = status
    run["recipe"]["training"] |= {"max_steps": asked, "logging_steps": 10}
    history = [{"step": logged, "loss": 1.0}] if logged else []
    assert f"were trained. {words}" in build_card(run, {"loss_history": history})


def test_paired_differences_decide_what_is_said() -> None:
    """Two intervals that overlap hide a difference that the same items show; and one item is no difference."""
    run, report = whole_run(), whole_report()
    said = limits_of(run, report)
    assert f"Before and after training, this is {MINUS}: with 8 demonstrations 89.6% before, 97.9% after, +8.3" in said
    assert "brought nothing there" not in said and "lost" not in said
    assert f"Against fine-tuning on the gold answers, at the same budget, this is {MINUS}" in said
    table = build_card(run, report).split("The same items, asked of both: diff")[1]
    assert "| 0 | +93.8 (+85.4 to +100.0) | under 0.001 | -2.1 (-8.3 to +4.2) | 0.300 |" in table
    assert "| 8 | -2.1 (-8.3 to +4.2) | 0.300 |" in table.split("### Another task: plural")[1]

    report["differences"] = [
        difference(8, 0.0833, (0.02, 0.167)),
        difference(0, -0.104, (-0.188, -0.021), start="gold"),
        difference(0, -0.4, (-0.5, -0.3), start="before"),
        difference(8, -0.146, (-0.25, -0.063), task="plural"),
    ]
    said = limits_of(run, report)
    assert "It became worse at its own task: with 0 demonstrations 0.0% before, 93.8% after, -40.0" in said
    assert "does better: with 0 demonstrations 95.8% by the gold answers, 93.8% by the teacher, -10.4" in said
    assert "On plural, which was not trained, it became worse: with 8 demonstrations" in said
    assert "89.6% before" not in said, "a gain that shows is no limit"


def test_an_interval_without_zero_is_not_enough() -> None:
    """A bootstrap of four items that changed leaves 0 out; the exact test says that it may be chance."""
    report = whole_report()
    report["differences"] = [difference(8, 0.0833, (0.02, 0.167)) | {"p_value": 0.125}]
    said = limits_of(whole_run(), report)
    assert f"Before and after training, this is {MINUS}: with 8 demonstrations" in said
    assert "+8.3 (+2.0 to +16.7) points, p 0.125" in said, "the reader sees why"


def test_changes_that_are_all_the_same_have_no_interval() -> None:
    """`+0.0 (+0.0 to +0.0)` reads as if it were certain that nothing was forgotten."""
    report = whole_report()
    report["differences"] = [difference(8, 0.0, (0.0, 0.0)), difference(0, 1.0, (1.0, 1.0)) | {"p_value": 0.5}]
    text = build_card(whole_run(), report)
    assert "| 8 | +0.0 (no interval: no item changed) | 0.300 |" in text
    assert "| 0 | +100.0 (no interval: each item changed) | 0.500 |" in text
    assert f"Before and after training, this is {MINUS}: with 0 demonstrations" in text, (
        "two items that changed prove nothing"
    )


def test_a_task_of_the_same_name_is_another_task() -> None:
    """The figures of another task read as those of the trained one."""
    report = whole_report()
    report["differences"] = [difference(8, 0.1, (0.0, 0.2), task="plural")]
    assert difference_of(report, "", "8", "before") is None
    assert difference_of(report, "plural", "8", "before").share == 0.1
    for torn in (None, "x", [None, 3], [{"task": "x"}], [{"shots": 8, "from": "before", "to": "after"}]):
        report["differences"] = torn
        assert "The same items" not in build_card(whole_run(), report)


def test_without_pairs_only_intervals_that_are_apart_say_anything() -> None:
    """45 and 46 of 48 right are no finding, nor is one item fewer of another task."""
    run, report = whole_run(), whole_report()
    del report["differences"]
    said = limits_of(run, report)
    assert "brought nothing there" not in said and "lost" not in said and "became worse" not in said
    assert said.count("the intervals overlap, so taken by themselves they show no difference") == 3
    details = report["forgetting"][0]["details"]
    details["after"]["8"] |= {"accuracy": 0.5, "interval": [0.36, 0.64]}
    assert "it became worse: with 8 demonstrations 93.8% before, 50.0% after." in limits_of(run, report)


def test_both_read_prompts_of_their_own() -> None:
    """A KL of 3 nats between two prompts reads as one between two models."""
    run, report = whole_run(), whole_report()
    text = build_card(run, report)
    assert "the teacher reads 8 demonstrations, the student 0 or 1 demonstrations, drawn for each text." in text
    assert "same text before each token" not in text
    data = run["recipe"]["data"]
    data["demonstrations"], data["student_shots"] = {"count": 0}, [0]
    assert "Neither reads demonstrations before them; whether" in build_card(run, report)
    run["data"]["privileged_context"] = {"rows": 0}
    text = build_card(run, report)
    assert "Both read the same text before each token." in text and "it read the same prompts as the student." in text
    del run["data"]["privileged_context"]
    data["whole_text"] = True
    assert "Both read the same text before each token." in build_card(run, report), "a whole text is read by both"


def test_a_context_that_the_teacher_alone_reads_is_told() -> None:
    """In a run of that kind it is all that made it a teacher."""
    run, report = whole_run(), whole_report()
    run["recipe"]["data"]["demonstrations"] = {"count": 0}
    run["data"]["privileged_context"] = {"rows": 104}
    text = build_card(run, report)
    assert "; it read the row's own context before each question." in text
    assert "the teacher reads the row's own context, the student 0 or 1" in text
    run["data"]["privileged_context"] = {"rows": 60}
    run["recipe"]["data"]["demonstrations"] = {"count": 1}
    text = build_card(run, report)
    assert "it read 1 demonstration and the row's own context (in 60 of 104 rows) before each question." in text
    del run["data"]["privileged_context"]
    run["recipe"]["data"] |= {"demonstrations": {"count": 0}}
    run["recipe"]["data"]["train"]["columns"] = {"privileged_context": "hint"}
    assert "; it read the row's own context before each question." in build_card(run, report)


def test_intervals_that_promise_too_much_are_left_out() -> None:
    """`100 % (100 to 100)` of four texts reads as a certainty, and the hub would show it as one."""
    run, report = whole_run(), whole_report()
    after = report["fidelity"]["after"]
    after |= {"agreement": 1.0, "agreement_interval": [1.0, 1.0]}
    text = build_card(run, report)
    assert "| same likeliest token | 51.2% (48.2 to 53.6) | 100.0% | - |" in text
    assert "- Student after: no interval for agreement, since all texts gave the same" in text
    assert "interval 1 to 1" not in text and "another than the teacher's" not in limits_of(run, report)
    for figures in report["fidelity"].values():
        figures["texts"] = 9
    text = build_card(run, report)
    assert "| KL(teacher to student), nats per token | 2.34 | 0.21 | - |" in text
    assert text.count("- 9 texts are too few for intervals") == 1
    (index,) = metadata_of(text)["model-index"]
    names = [metric["name"] for result in index["results"] for metric in result["metrics"]]
    assert not [name for name in names if "KL" in name and "interval" in name]


def test_notes_and_support_are_shown() -> None:
    """Divergences of 64 ids and a tail are smaller than those of the vocabulary, and nothing else says so."""
    run, report = whole_run(), whole_report()
    for figures in report["fidelity"].values():
        figures |= {"support": "likeliest ids and a tail", "notes": ["There is | something.", "", 3]}
    text = build_card(run, report)
    assert text.count("- There is \\| something.\n") == 1
    assert "- Divergences and entropies are taken on likeliest ids and a tail, and not on the" in text
    for figures in report["fidelity"].values():
        figures["notes"] = ["Known by its likeliest ids and a tail: no more."]
    assert "Divergences and entropies are taken on" not in build_card(run, report)


@pytest.mark.parametrize(
    "teacher",
    [
        {"kind": "ema", "decay": 0.9},
        {"kind": "snapshot", "every": 3},
        {"kind": "self", "weights": "live"},
        {"kind": "mixture", "members": {"one": {"kind": "ema"}, "two": {"kind": "local", "model": "org/x"}}},
        {"kind": "mine:Teacher"},
    ],
)
def test_a_teacher_that_moved_is_not_one_teacher(teacher: dict) -> None:
    """Held against a moving teacher a student seems to become worse where it only lags behind."""
    run, report = whole_run(), whole_report()
    run["recipe"]["teacher"] = teacher
    report["fidelity"]["after"]["forward_kl"] = 9.0
    report["fidelity"]["before"]["teacher"] |= {"perplexity": 3.21}
    text = build_card(run, report)
    assert "|  | student before | teacher before | student after | teacher after |" in text
    assert "| perplexity of the text | 9.4 | 3.21 | 1.62 | 1.48 |" in text
    assert text.count("The teacher moved: before and after are held against different weights") == 2
    assert "KL to its teacher is larger" not in text
    assert ("the student itself with more to read" in text) == (teacher.get("weights") == "live")


def test_a_teacher_that_stayed_is_compared() -> None:
    """The other way round: a distance that grew must be said."""
    run, report = whole_run(), whole_report()
    report["fidelity"]["after"] |= {"forward_kl": 9.0, "forward_kl_interval": [8.0, 10.0]}
    assert "Its KL to its teacher is larger than before training, beyond their intervals: 2.34 before, 9" in "\n".join(
        limits(run, report)
    )
    assert "The teacher moved" not in build_card(run, report)


def test_the_command_publishes_nothing_again() -> None:
    """A reader who tries the one command must not push over the model, join the first run, or tell its tracker."""
    run = whole_run()
    commit = run["origins"]["student"]["revision"]
    text = build_card(run, {}, files=["recipe.yaml"])
    assert f"training.output_dir=outputs/again student.revision={commit}\n" in text
    run["recipe"]["student"]["revision"] = commit
    assert "training.output_dir=outputs/again\n" in build_card(run, {}, files=["recipe.yaml"])
    run["recipe"]["student"]["revision"] = "main"
    run["recipe"]["hub"] = {"push": True, "repo_id": "me/published"}
    run["recipe"]["training"] |= {
        "run_policy": "resume",
        "report_to": ["wandb"],
        "push_to_hub": True,
        "resume_from_checkpoint": "x",
    }
    text = build_card(run, {}, files=["recipe.yaml"])
    assert (
        "training.output_dir=outputs/again hub.push=false training.push_to_hub=false training.run_policy=refuse "
        "training.report_to=none training.resume_from_checkpoint=null student.revision=12fd25f77366fa6b3b4b768ec305"
    ) in text


def with_rows(train: tuple[str, str], evaluation: tuple[str, str] | None, demonstrations=None) -> dict:
    """A run whose parts are from there: id and source of each."""
    run = whole_run()
    data = run["recipe"]["data"]
    data["train"] |= {"path": train[0], "split": "train"}
    given = {"train": train, "evaluation": evaluation, "demonstrations": demonstrations}
    for key, one in given.items():
        if one:
            run["origins"][key] = {"id": one[0], "source": one[1], "revision": None, "licence": "apache-2.0"}
    if evaluation:
        run["recipe"]["evaluation"] = {"path": evaluation[0], "split": "test", "name": "main"}
    if demonstrations:
        data["demonstrations"] |= {"path": demonstrations[0]}
    return run


GSM, FILE = ("openai/gsm8k", "hub"), ("data/my_eval", "folder")


@pytest.mark.parametrize(
    ("train", "evaluation", "named"),
    [
        (GSM, FILE, {"type": "local-my_eval", "name": "my_eval"}),
        (("x.jsonl", "file"), GSM, {"type": "openai/gsm8k", "name": "gsm8k", "split": "test", "config": "main"}),
        (GSM, None, {"type": "openai/gsm8k", "name": "gsm8k, rows held out of training", "split": "train"}),
        (("squad.jsonl", "file"), None, {"type": "local-squad", "name": "squad, rows held out of training"}),
        (("reasoning_gym:x", "generator"), None, {"type": "local-reasoning_gym-x", "name": "reasoning_gym:x, rows"}),
    ],
)
def test_the_index_names_data_sets_of_the_hub_alone(train, evaluation, named) -> None:
    """A figure of a local file would stand on the hub beside those of somebody else's data set."""
    text = build_card(with_rows(train, evaluation), whole_report())
    assert not faults(text)
    (index,) = metadata_of(text)["model-index"]
    own = index["results"][0]["dataset"]
    assert {**own, "name": own["name"][: len(named["name"])]} == named
    assert "local-plural" in [result["dataset"]["type"] for result in index["results"]]
    assert metadata_of(text).get("datasets") == (["openai/gsm8k"] if train == GSM else None)


def test_an_old_record_claims_no_data_set() -> None:
    """A record without the evaluation's origin doesn't say that its path is an id."""
    run = with_rows(GSM, GSM)
    del run["origins"]["evaluation"]
    (index,) = metadata_of(build_card(run, whole_report()))["model-index"]
    assert index["results"][0]["dataset"] == {"type": "local-gsm8k", "name": "gsm8k"}


def test_demonstrations_bear_on_the_licence_and_evaluation_items_do_not() -> None:
    """The model learned from what the teacher read; it was only asked the items."""
    run = with_rows(GSM, ("org/closed", "hub"), ("org/shown", "hub"))
    run["origins"]["evaluation"]["licence"] = "cc-by-nc-4.0"
    text = build_card(run, whole_report())
    assert metadata_of(text)["license"] == "apache-2.0"
    assert metadata_of(text)["datasets"] == ["openai/gsm8k", "org/shown"]
    assert "| demonstrations | `org/shown` | Hugging Face hub | not recorded | apache-2.0 |" in text
    assert "| evaluation items | `org/closed` | Hugging Face hub | not recorded | cc-by-nc-4.0 |" in text
    run["origins"]["demonstrations"]["licence"] = "mit"
    assert "demonstrations: mit" in build_card(run, {}) and "license" not in metadata_of(build_card(run, {}))
    del run["origins"]["demonstrations"]
    assert "license" not in metadata_of(build_card(run, {})), "they are from somewhere, and nobody knows their licence"


def test_the_divergence_is_shown_as_it_is_sorted() -> None:
    """A table whose first row has the lowest mean looks like a mistake, and hides that one token is half of it all."""
    text = build_card(whole_run(), whole_report())
    assert "by the sum over all times that a token occurs:" in text and "farthest from its teacher" not in text
    assert "| token of the text | times | mean KL, nats | total KL, nats | the teacher's" in text
    assert "| `'\\n'` | 11 | 0.95 | 10.45 |" in text


def test_a_report_of_texts_alone_is_no_empty_one() -> None:
    """A run without questions that measured the fidelity has evaluated something."""
    report = {"fidelity": whole_report()["fidelity"], "k_shot": {}, "k_shot_details": {}}
    text = build_card(whole_run(), report)
    assert "No question was asked; what was measured is how near" in text and "Nothing was evaluated" not in text
    assert json.dumps(metadata_of(text)).count("token_agreement") == 1
