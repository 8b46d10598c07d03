"""k-shot accuracy: the figures, the demonstrations behind them, and the words that say when they mean nothing."""

from __future__ import annotations

import io
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from datasets import Dataset
from rich.console import Console

from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.eval import k_shot
from hfkd.eval.k_shot import (
    KShotReport,
    chosen_demonstrations,
    evaluate_k_shot,
    gold_answer,
    score,
)
from hfkd.intervals import wilson_interval
from hfkd.rollout import Completion, HFRollout

DEMONSTRATIONS = [{"prompt": word, "completion": f" {word}ed"} for word in ("walk", "call", "jump", "look")]
ITEMS = [
    {"prompt": word, "completion": f" {word}ed", "answer": f"{word}ed"} for word in ("fill", "ask", "add", "miss")
]


class Builder:
    """Stands in for `PromptBuilder`: text prompts, and a record of the demonstrations of each."""

    def __init__(self, tokenizer, conversational: bool = False) -> None:
        self.tokenizer, self.conversational = tokenizer, conversational
        self.style = SimpleNamespace(style="text", stop=("\n",))
        self.shown: list[list[str]] = []

    def prompt(self, row, demonstrations=(), privileged=False):
        """Question and answer lines."""
        if self.conversational:
            return [{"role": "user", "content": row["prompt"]}]
        lines = [f"Question: {shown['prompt']}\nAnswer:{shown['completion']}\n" for shown in demonstrations]
        return "\n".join([*lines, f"Question: {row['prompt']}\nAnswer:"])

    def encode_prompt(self, row, demonstrations=(), privileged=False):
        """The ids of the text."""
        self.shown.append([shown["prompt"] for shown in demonstrations])
        return self.tokenizer(str(self.prompt(row, demonstrations)))["input_ids"]


@pytest.fixture
def says(monkeypatch):
    """Replaces generation: takes a function of the prompt's text, and records the settings."""
    seen = []

    def install(tokenizer, answer):
        def generate(self, model, prompts, description=None):
            seen.append((self.settings, description))
            return [Completion([], answer(tokenizer.decode(prompt)), finished=True) for prompt in prompts]

        monkeypatch.setattr(HFRollout, "generate", generate)
        return seen

    return install


def asked(text: str) -> str:
    """The last question of a prompt."""
    return re.findall(r"Question: (.*)\n", text)[-1]


def test_counts_right_answers_by_shots(tokenizer, says):
    """Prevents an accuracy from being booked under another number of demonstrations."""
    builder = Builder(tokenizer)
    seen = says(
        tokenizer, lambda text: f" {asked(text)}ed" if text.count("Question") > 1 or "ask" in text else " what?"
    )
    report = evaluate_k_shot(
        None,
        tokenizer,
        ITEMS,
        DEMONSTRATIONS,
        builder,
        shots=(2, 0),
        max_new_tokens=9,
        batch_size=3,
        description="Before",
    )
    assert list(report.results) == [0, 2]
    assert report.accuracies() == {"0": 0.25, "2": 1.0}
    assert report.results[0].standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    assert report.results[2].predictions == ["filled", "asked", "added", "missed"]
    settings, description = seen[0]
    assert (settings.max_new_tokens, settings.batch_size, settings.stop, settings.temperature) == (9, 3, ("\n",), 0.0)
    assert [words for _, words in seen] == ["Before, 0 shots", "Before, 2 shots"]
    assert builder.shown[:4] == [[]] * 4 and builder.shown[4:] == [["walk", "call"]] * 4


def test_datasets_are_as_good_as_lists(tokenizer, says):
    """Prevents column names from being shown as demonstrations: a slice of a `Dataset` is no list of rows."""
    builder = Builder(tokenizer)
    says(tokenizer, lambda text: "filled")
    items, shown = Dataset.from_list(ITEMS), Dataset.from_list(DEMONSTRATIONS)
    report = evaluate_k_shot(None, tokenizer, items, shown, builder, shots=(2,))
    assert report.accuracies() == {"2": 0.25} and builder.shown == [["walk", "call"]] * 4


def test_chat_prompts_have_no_text_stop(tokenizer, says):
    """Prevents the newline that ends a text answer from cutting the answers of a chat model."""
    seen = says(tokenizer, lambda text: "filled")
    evaluate_k_shot(None, tokenizer, ITEMS, [], Builder(tokenizer, conversational=True), shots=(0,))
    assert seen[0][0].stop == ()


def test_with_a_real_model(tokenizer):
    """Prevents the parts from failing together: the ids, the stop string and the order of answers."""
    model = make_model()
    builder = PromptBuilder(tokenizer, PromptStyle(answer="{completion}\n"))
    report = evaluate_k_shot(
        model, tokenizer, ITEMS, DEMONSTRATIONS, builder, shots=(0, 1, 4), max_new_tokens=6, batch_size=2
    )
    for shots, result in report.results.items():
        for row, prediction in zip(ITEMS, result.predictions, strict=True):
            shown = [f"Question: {one['prompt']}\nAnswer:{one['completion']}\n\n" for one in DEMONSTRATIONS[:shots]]
            ids = tokenizer("".join([*shown, f"Question: {row['prompt']}\nAnswer:"]))["input_ids"]
            new = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
            new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
            text = tokenizer.decode(new, skip_special_tokens=True).split("\n")[0].strip()
            assert prediction == (text.splitlines()[0].strip() if text else "")


def test_numbers_extracted_and_matched_with_tolerance(tokenizer, says):
    """Prevents a tolerance from being used where none was asked for, and a missing answer from counting as right."""
    says(tokenizer, lambda text: {"1+1": "so it is 2.04", "2+2": "4", "3+3": "no idea"}[asked(text)])
    items = [{"prompt": f"{n}+{n}", "answer": 2 * n} for n in (1, 2, 3)]

    def accuracy(**settings):
        builder = Builder(tokenizer)
        result = evaluate_k_shot(None, tokenizer, items, [], builder, shots=(0,), extract="last_number", **settings)
        return result.results[0]

    assert accuracy().accuracy == pytest.approx(1 / 3)
    assert accuracy(tolerance=0.05).accuracy == pytest.approx(2 / 3)
    assert accuracy().predictions == ["2.04", "4", ""]


def test_reshuffled_demonstrations_are_a_function_of_seed_and_item():
    """Prevents two evaluations of one model from differing by their demonstrations, and items from sharing them."""

    def choose(count, index, seed=0):
        return [row["prompt"] for row in chosen_demonstrations(DEMONSTRATIONS, count, index, seed, reshuffle=True)]

    assert choose(4, 1) == choose(4, 1)
    assert sorted(choose(4, 1)) == sorted(row["prompt"] for row in DEMONSTRATIONS)
    assert choose(4, 1)[:2] == choose(2, 1)
    assert len({tuple(choose(2, index)) for index in range(40)}) == 12
    assert [choose(2, index) for index in range(9)] != [choose(2, index, seed=1) for index in range(9)]
    assert chosen_demonstrations(DEMONSTRATIONS, 2, 7, 3) == DEMONSTRATIONS[:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": []}, "no items"),
        ({"shots": (5,)}, "asks for 5 demonstrations and there are 4"),
        ({"shots": ()}, "shots is"),
        ({"shots": (-1, 2)}, "shots is"),
        ({"extract": "last_nummber"}, "last_nummber.*last_number"),
        ({"demonstrations": [*DEMONSTRATIONS[:3], ITEMS[2]]}, "add"),
    ],
)
def test_bad_input(change, message, tokenizer, says):
    """Prevents a figure from being printed for an evaluation that can't mean anything; leakage above all."""
    says(tokenizer, lambda text: "")
    given = {"items": ITEMS, "demonstrations": DEMONSTRATIONS, "shots": (0, 4), **change}
    with pytest.raises(ValueError, match=message):
        evaluate_k_shot(None, tokenizer, given.pop("items"), given.pop("demonstrations"), Builder(tokenizer), **given)


def test_gold_answers_of_all_row_kinds():
    """Prevents a conversational row from being scored against the text of a Python list."""
    assert gold_answer({"answer": 4}) == "4"
    assert gold_answer({"completion": " went\n"}) == "went"
    assert gold_answer({"completion": [{"role": "assistant", "content": " went "}]}) == "went"
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "went"}]
    assert gold_answer({"messages": turns, "answer": None}) == "went"
    with pytest.raises(ValueError, match="completion"):
        gold_answer({"prompt": "go"})


LETTERS = ["1"] * 33 + ["2"] * 30 + ["3"] * 20 + ["0"] * 13


def test_a_collapse_is_called_one():
    """Prevents the trap: 34.4 % looks like learning, and is what saying "1" to everything earns."""
    result = score(0, ["1"] * 96, LETTERS)
    assert result.accuracy == pytest.approx(33 / 96) and result.distinct_answers == 1
    assert (
        result.verdict == "collapsed: answers '1' to 100% of the questions, and always answering '1' would score 34.4%"
    )
    assert "collapsed: answers '2' to 100%" in score(0, ["2"] * 96, LETTERS).verdict
    two = score(0, ["1", "2"] * 48, LETTERS)
    assert two.distinct_answers == 2 and two.verdict.startswith("collapsed: answers '1' to 50%")
    assert score(0, [None] * 96, LETTERS).verdict.startswith("collapsed: gives no answer to 100%")


def test_chance_is_called_no_better_than_the_prior():
    """Prevents answers that vary, and are wrong, from passing as a result."""
    answers = [str(place % 4) for place in range(96)]
    assert score(8, answers, LETTERS).verdict == "no better than always answering '1' (34.4%)"
    yes_no = ["yes", "no"] * 24
    guesses = ["yes", "yes", "no", "no"] * 12
    assert score(0, guesses, yes_no).verdict == "no better than always answering 'yes' (50.0%)"
    assert score(0, ["no"] * 48, yes_no).verdict.startswith("collapsed: answers 'no' to 100%")
    assert score(0, ["what?"] * 4, ["a", "b", "c", "d"]).verdict.startswith("collapsed")


def test_a_good_result_has_no_verdict():
    """Prevents a warning on each table, which nobody would read; perfect scores have a standard error of 0."""
    golds = [f"{word}ed" for word in range(48)]
    assert score(0, golds, golds).verdict == ""
    assert score(0, golds[:40] + ["x"] * 8, golds).verdict == ""
    assert score(0, ["yes", "no"] * 24, ["yes", "no"] * 24).verdict == ""
    better = LETTERS[:60] + ["1"] * 36
    assert score(0, better, LETTERS).verdict == ""
    assert score(0, ["yes"] * 9, ["yes"] * 9).verdict != "", "with one gold answer nothing can be shown"
    few = ["yes"] * 8 + ["no"]
    assert score(0, few, few).verdict == "no better than always answering 'yes' (88.9%)", "9 items show too little"


def test_two_standard_errors_are_the_border():
    """Prevents the border from moving: a result just inside it is noise, one just outside isn't."""
    golds = ["1"] * 25 + [str(place) for place in range(2, 77)]

    def verdict(right):
        return score(0, [gold if place < right else "x" for place, gold in enumerate(golds)], golds).verdict

    border = next(p for p in range(26, 60) if p / 100 - 0.25 > 2 * math.sqrt(p / 100 * (1 - p / 100) / 100))
    assert verdict(border - 1) and not verdict(border)


def test_answers_are_counted_as_they_are_compared():
    """Prevents case and spaces from making one answer look like many."""
    result = score(0, ["Went", "went ", "WENT."], ["went", "Went", "gone"])
    assert (result.distinct_answers, result.top_answer, result.top_answer_share) == (1, "Went", 1.0)
    assert result.distinct_gold_answers == 2 and result.most_frequent_share == pytest.approx(2 / 3)


def printed(report: KShotReport, width: int = 100) -> str:
    """The table as a terminal shows it."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.table("[before]"))
    return console.export_text()


def test_table_shows_what_has_to_be_read_together():
    """Prevents an accuracy from being printed alone, and an answer in brackets from being eaten as markup."""
    good = score(8, [gold if place < 80 else "[b]" for place, gold in enumerate(LETTERS)], LETTERS)
    text = printed(KShotReport({0: score(0, ["1"] * 96, LETTERS), 8: good}))
    assert "34.4% ± 4.8%" in text and "'1' 34.4%" in text and "'1' 100.0%" in text and "1 / 4" in text
    assert " ".join("0 shots: collapsed: answers '1' to 100% of the questions".split()) in " ".join(text.split())
    assert "8 shots:" not in text
    assert "'[b]' 100.0%" in printed(KShotReport({0: score(0, ["[b]"] * 96, LETTERS)}))
    assert "34.4% ± 4.8%" in printed(KShotReport({0: score(0, ["1"] * 96, LETTERS)}), width=80)


def test_cut_answers_are_mentioned(tokenizer, monkeypatch):
    """Prevents a limit that is too low for reasoning from being read as a model that can't reason."""
    cut = [Completion([], "filled", finished=place > 0) for place in range(4)]
    monkeypatch.setattr(HFRollout, "generate", lambda *_, **__: cut)
    report = evaluate_k_shot(None, tokenizer, ITEMS, [], Builder(tokenizer), shots=(0,))
    assert report.results[0].cut == 1
    assert "1 of 4 answers were cut" in " ".join(report.notes())


def test_each_answer_is_kept_as_it_was_written(tokenizer, says):
    """Prevents two runs from being compared by what an extractor left of them, and a right answer from being another
    item's."""
    says(tokenizer, lambda text: f" {asked(text)}ed \n" if "ask" in text or "add" in text else " what?")
    result = evaluate_k_shot(None, tokenizer, ITEMS, [], Builder(tokenizer), shots=(0,)).results[0]
    assert result.texts == [" what?", " asked \n", " added \n", " what?"]
    assert result.right == [False, True, True, False]
    assert result.predictions == ["what?", "asked", "added", "what?"]
    assert result.interval == wilson_interval(2, 4)


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    [(5, 10, 0.236593, 0.763407), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (81, 263, 0.255306, 0.366191)],
)
def test_wilsons_interval(right, items, low, high):
    """Prevents an interval of width 0 for a model that answered ten questions of ten. 81 of 263 is Newcombe's (1998)
    example; 5 of 10 and 0 of 10 are the formula by hand."""
    assert wilson_interval(right, items) == pytest.approx((low, high), abs=2e-4)


def test_report_is_json():
    """Prevents a report that can't be written after an hour of training."""
    report = KShotReport({0: score(0, ["1", None], ["1", "2"]), 1: score(1, ["1", "2"], ["1", "2"])})
    back = json.loads(json.dumps(report.to_dict()))
    assert back["1"]["accuracy"] == 1.0 and back["0"]["predictions"] == ["1", ""]
    assert set(back) == {"0", "1"} and k_shot.EXTRACTORS
