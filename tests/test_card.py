"""Model cards: they say what the files of a run say, with what speaks against the model, and no more."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from card_rules import faults, metadata_of
from huggingface_hub import ModelCard
from reports import whole_report, whole_run

from hfkd.card import build_card, is_untouched
from hfkd.card.citations import PAPERS, arxiv_ids
from hfkd.card.objective import docstring_part, formula_of, paper_of, term_lines
from hfkd.losses import LOSSES, STATE_LOSSES
from hfkd.losses.base import docstring_section
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
    assert card.data.base_model_relation == "adapter"
    assert card.data.license is None, "nobody has said which licence it is"
    assert not faults(build_card(run, report))
    assert is_untouched(build_card(run, report))


def test_the_card_says_what_was_done(run: dict, report: dict) -> None:
    """A card without its teacher, data, loss and errors is an advertisement."""
    text = build_card(run, report)
    for words in (
        "# small, distilled on past_tense",
        "A LoRA adapter (rank 16, alpha 32) was trained on `org/small` at revision `abc`",
        "30 optimizer steps; the logged loss went from 2.5 to 0.25 nats per token.",
        "the student's own weights with the adapter switched off; it read 8 demonstrations",
        "The student read 0 or 1 demonstrations",
        "With 8 of them it answers 97.9% (89.1 to 99.6) of the held-out items rightly itself.",
        "Accuracy on 48 held-out items, by",
        "of a task that was not trained, on 48 items:",
        "| 8 | 97.9% (89.1 to 99.6) | - | - | 2.0% | 47 / - / - |",
        "| train | 67 | `0123456789abcdef` |",
        "The answers are the teacher's own, written greedily.",
        "at most 2048 tokens for the student; longer ones end the run with an error.",
        "Rows left out because the teacher's answer was empty: 1.",
        "- 1 x `forward_kl`: `KL(teacher || student) = sum_v p(v) (log p(v) - log q(v)), p the teacher, "
        "q the student.` (temperature 2) From: Hinton, Vinyals and Dean, 2015, <https://arxiv.org/abs/1503.02531>.",
        "next token, both at temperature 2:",
        "| shots | before | after | fine-tuned on gold answers | most frequent answer, always | distinct",
        "| 0 | 0.0% (0.0 to 7.4) | 95.8% (86.0 to 98.8) | 90.0% (78.3 to 95.7) | 2.0% | 47 / 47 / 47 |",
        "### Another task: plural",
        "On plural, which was not trained: the intervals overlap, so taken by themselves they show no difference "
        "(with 1 demonstration 29.2% before, 16.7% after).",
        "were written by the teacher and were not checked",
        'base = AutoModelForCausalLM.from_pretrained("org/small", revision="abc")',
        "model = PeftModel.from_pretrained(base, where)",
        "merged = model.merge_and_unload()",
        'stop_strings=["\\n"]',
        "hfkd train recipes/past_tense.yaml 'data.prompt.system=Be brief'",
        "python 3.11, torch 2.13.0",
        "- Hardware: cpu, 1 process",
        "- Time: not recorded",
        "- Energy: not measured",
        "@misc{hinton2015distilling,",
        "@misc{wang2024secokd,",
        "@misc{hu2021lora,",
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
    assert "model = AutoModelForCausalLM.from_pretrained(where)" in text
    assert "PeftModel" not in text


def test_a_local_base_is_pointed_out(run: dict, report: dict) -> None:
    """An adapter that names a folder of one machine can't be loaded on another."""
    run["student"] = {"source": "folder"}
    text = build_card(run, report)
    assert "The adapter was trained on a local folder, `org/small`" in text
    assert 'from_pretrained("org/small")  # a folder of the machine that trained it' in text
    assert "base_model" not in metadata_of(text)


def test_another_model_as_the_teacher_is_named(run: dict, report: dict) -> None:
    """No card of the field names its teacher; the licence of the result hangs on it."""
    run["recipe"]["teacher"].update(kind="local", model="org/big", revision="r1")
    assert "The teacher is `org/big` at revision `r1`; it read 8 demonstrations" in build_card(run, report)


def test_every_loss_has_a_formula_and_a_paper() -> None:
    """A new loss must not appear on cards as a bare name, nor with another text than its own docstring's."""
    for kind, loss in {**LOSSES, **STATE_LOSSES}.items():
        assert formula_of({"kind": kind})
        for name in ("Formula", "Paper"):
            assert docstring_part(kind, name) == docstring_section(loss, name), (kind, name)
    assert formula_of({"kind": "forward_kl"}).startswith("KL(teacher || student) = sum_v")
    assert formula_of({"kind": "my_losses:Mine"}) == ""
    assert paper_of({"kind": "hinge_ranking"}).startswith("None: the pairwise hinge"), "it says whose idea it is"


def test_a_recorded_formula_is_believed() -> None:
    """A loss of the user's own is in no file of ours, and a later version may compute something else."""
    term = {"kind": "mine:Loss", "formula": "(p - q)^2", "paper": "Me, 2020, https://arxiv.org/abs/2001.00001."}
    (line,) = term_lines([{**term, "weight": 0.5}])
    assert line == "0.5 x `mine:Loss`: `(p - q)^2` From: Me, 2020, <https://arxiv.org/abs/2001.00001>."


def test_a_schedule_is_said_in_words(run: dict, report: dict) -> None:
    """A card must not crash on a weight that changes, nor show it as a dictionary."""
    schedule = {"schedule": "linear", "start": 1.0, "end": 0.25, "start_step": 0, "end_step": None}
    run["objective"] = [{"kind": "forward_kl", "weight": schedule, "temperature": {**schedule, "end_step": 9}}]
    text = build_card(run, report)
    assert "- (linear, 1 to 0.25 by the last step) x `forward_kl`" in text
    assert "temperature (linear, 1 to 0.25 by step 9)" in text


def test_papers_are_papers_of_the_losses_or_of_the_method() -> None:
    """A wrong number beneath a right title sends every reader to another paper."""
    ours = {one for loss in {**LOSSES, **STATE_LOSSES}.values() for one in arxiv_ids(docstring_section(loss, "Paper"))}
    assert {"1503.02531", "2306.08543", "2402.17110"} <= ours & set(PAPERS)
    page = (Path(__file__).parent.parent / "docs/papers.md").read_text("utf-8")
    others = {number for number in set(PAPERS) - ours if number not in page}
    assert others == {"2106.09685", "2402.03300"}  # LoRA and GRPO, which are borrowed
    assert len({paper.key for paper in PAPERS.values()}) == len(PAPERS)


def test_a_whole_record_is_told(run: dict) -> None:
    """Every figure of a report that isn't on its card is one that nobody reads."""
    report = whole_report()
    text = build_card(whole_run(), report, files=["plots/loss.png", "plots/reliability.png", "weights.bin", "x/y.png"])
    assert not faults(text)
    for words in (
        "| same likeliest token | 51.2% (48.2 to 53.6) | 89.3% (86.3 to 91.7) | - |",
        "| the same where the teacher is wrong (138 tokens) | - | 71.0% | - |",
        "| mass on the teacher's 64 likeliest tokens | 74.4% | 98.1% | 99.2% |",
        "| expected calibration error | 19.0% | 3.4% | 2.1% |",
        "| Brier score (0 to 2) | 0.64 | 0.21 | 0.18 |",
        "on 48 held-out texts (1132 tokens)",
        "| `' walked'` | 12 | 1.9 | 22.8 | `' walked'` | `' walk'` |",
        "](plots/loss.png)",
        "](plots/reliability.png)",
        "its likeliest token is another than the teacher's: it is not its teacher.",
        "Of 138 tokens on which the teacher is wrong it says the same wrong one on 98.",
    ):
        assert words in text, words
    assert "weights.bin" not in text and "x/y.png" not in text
    results = {(one.dataset_type, one.metric_type, one.metric_name): one for one in ModelCard(text).data.eval_results}
    values = [one.metric_value for (_, kind, _), one in results.items() if kind == "token_agreement"]
    assert values == [0.893]
    shots = [one for one in results.values() if one.metric_type == "accuracy" and one.dataset_type != "local-plural"]
    assert [one.metric_value for one in shots] == [0.9375, 0.9583, 0.9792]
    assert shots[0].metric_name.startswith("0-shot accuracy (95% interval 0.8") and shots[0].metric_args["items"] == 48
    low, high = shots[0].metric_args["interval_95"]
    assert low < 0.9375 < high


def test_only_the_trained_model_is_in_the_index(run: dict, report: dict) -> None:
    """The hub would rank this model by the figures of its baseline."""
    report["k_shot_details"] = {"before": {"8": result(0.9)}, "gold": {"8": result(0.95)}}
    report["forgetting"] = []
    assert "model-index" not in metadata_of(build_card(run, report))


def with_origins(run: dict, **licences: str | None) -> dict:
    """The run with the origins of its parts."""
    return {
        **run,
        "origins": {
            name: {"id": f"org/{name}", "source": "hub", "licence": one, "revision": "r" * 40}
            for name, one in licences.items()
        },
    }


@pytest.mark.parametrize(
    ("licences", "kind", "named"),
    [
        ({"student": "apache-2.0", "train": "apache-2.0"}, "self", "apache-2.0"),
        ({"student": "apache-2.0", "train": "mit"}, "self", None),
        ({"student": "apache-2.0", "train": None}, "self", None),
        ({"student": "apache-2.0", "train": "apache-2.0"}, "local", None),
        ({"student": "mit", "train": "mit", "teacher": "llama3"}, "local", None),
        ({"student": "mit", "train": "mit", "teacher": "mit"}, "local", "mit"),
        ({"student": "Our Terms v2", "train": "Our Terms v2"}, "self", "other"),
    ],
)
def test_a_licence_is_named_only_where_all_agree(run, report, licences, kind, named) -> None:
    """A card that says Apache-2.0 over a teacher that forbids it makes everybody who trusts it break a licence."""
    run["recipe"]["teacher"].update(kind=kind, model="org/teacher" if kind == "local" else None)
    text = build_card(with_origins(run, **licences), report)
    assert metadata_of(text).get("license") == named
    assert not faults(text)
    assert ("- Licence: none is named" in text) == (named is None)
    assert metadata_of(text)["datasets"] == ["org/train"]


def test_teachers_of_a_mixture_are_named_with_their_licences(run: dict, report: dict) -> None:
    """With several teachers every one of their licences bears on the student."""
    members = {name: {"kind": "local", "model": f"org/{name}", "weight": 1.0} for name in ("one", "two")}
    run["recipe"]["teacher"].update(kind="mixture", members=members)
    old = build_card(run, report)
    assert "| teacher two | `org/two` | not recorded | not recorded | not recorded |" in old
    run = with_origins(run, **{"student": "mit", "train": "mit", "teacher.one": "mit", "teacher.two": "llama3"})
    text = build_card(run, report)
    assert "| teacher two | `org/teacher.two` | Hugging Face hub |" in text and "| llama3 |" in text
    assert "license" not in metadata_of(text)


def test_what_speaks_against_it_is_said(run: dict, report: dict) -> None:
    """A card is trusted for its limits, and nobody writes them by hand."""
    report.update(copy.deepcopy(whole_report()))
    report["k_shot_details"]["teacher"]["8"]["verdict"] = "no better than always answering 'blew' (2.1%)"
    report["fidelity"]["after"]["student"]["expected_calibration_error"] = 0.3
    run["status"] = "failed"
    text = build_card(run, report).split("## Limits")[1].split("## How")[0]
    for words in (
        "its record says 'failed'",
        "48 items are few",
        "Before and after training, this is no difference that 48 items can show: with 8 demonstrations 89.6% before, "
        "97.9% after, +8.3 (-2.1 to +18.8) points, p 0.300.",
        "Against fine-tuning on the gold answers, at the same budget, this is no difference that 48 items can show: ",
        "The teacher itself is not better than a constant answer with 8 demonstrations",
        "Its expected calibration error is larger than before training, without an interval, that may be chance: 0.19 "
        "before, 0.3 after.",
        "On plural, which was not trained, this is no difference that 48 items can show: with 8 demonstrations 93.8%",
        "Some answers were cut",
        "Left out of training: 0 examples that were too long, 1 that the teacher gave no answer to.",
    ):
        assert words in text, words
    assert "with 0 demonstrations 0.0% before" not in text, "that change is beyond doubt"
    assert "KL to its teacher is larger" not in text


def test_an_unmeasured_fidelity_says_why(run: dict, report: dict) -> None:
    """Silence would read as if there were nothing to know."""
    report["fidelity"] = {"unavailable": "the teacher is a cache of drawn ids."}
    text = build_card(run, report)
    assert "Not measured: the teacher is a cache of drawn ids." in text
    assert "was not measured: the teacher is a cache of drawn ids." in text


def test_energy_says_what_it_covers(run: dict, report: dict) -> None:
    """A figure of the whole package read as that of the process alone is wrong on any shared machine."""
    run["energy"] = {"joules": 7200.0, "devices": ["cpu package 0"], "source": "rapl", "seconds": 120.0}
    text = build_card(run, report)
    assert "- Energy: 7200 J (0.002 kWh) in 120 s, counted by rapl for cpu package 0: all that these devices" in text


def test_a_card_needs_no_torch() -> None:
    """Cards are made where no GPU and no training environment is, and in the blink of an eye."""
    code = (
        "import sys; from hfkd.card import build_card; build_card({'objective': [{'kind': 'forward_kl'}]}, {});"
        "print([name for name in ('torch', 'transformers', 'datasets', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
