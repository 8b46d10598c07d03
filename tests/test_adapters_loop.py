"""Asking two ways until they agree: what ends the loop, which answer is reported, and what is counted."""

from __future__ import annotations

import pytest

from hfkd.adapters.loop import Outcome, Round, consistency_loop, majority, summary
from hfkd.adapters.rows import asked, deep, deep_question, intuitive, knowledge

ROW = {
    "question": "Two pens cost 6. One pen?",
    "rationale": "6 / 2 = 3. The answer is 3.",
    "knowledge": ["Divide the cost.", "By the number."],
    "answer": 3,
}


def says(*answers: object):
    """A stub that gives one answer a round, whatever it is asked; after the last one it says nothing."""

    def write(questions, *rest):
        number = rest[-1]
        answer = answers[number - 1] if number <= len(answers) else None
        return ["I don't know." if answer is None else f"The answer is {answer}."] * len(questions)

    return write


def rules(questions, number):
    return [f"rule {number}"] * len(questions)


def loop(first, second, rounds: int = 20) -> Outcome:
    (outcome,) = consistency_loop(["q"], says(*first), rules, says(*second), rounds)
    return outcome


def test_an_answer_of_an_earlier_round_counts():
    """A loop that compares the answers of one round alone asks on, for up to sixty texts, though both have said 7."""
    outcome = loop([5, 7], [6, 7])
    assert (outcome.answer, outcome.agreed, len(outcome.rounds), outcome.common) == ("7", True, 2, ["7"])
    crossed = loop([5, 6, 8], [6, 9, 8])
    assert (crossed.answer, len(crossed.rounds)) == ("6", 2), "5, 6 and 6, 9 have 6 in common, from different rounds"


def test_of_several_common_answers_one_is_reported():
    """Counting a question as right if any common answer is would be a score that no single answer earns."""
    outcome = loop([5, 6], [6, 5])
    assert outcome.agreed and len(outcome.rounds) == 2 and sorted(outcome.common) == ["5", "6"]
    assert outcome.answer == "5", "both were given twice; the intuitive way gave 5 first"


def test_the_most_frequent_common_answer_is_reported():
    """The first common answer is a matter of luck; the votes of both ways are there to be counted."""
    outcome = Outcome("q", rounds=[Round("", "", "", "5", "6"), Round("", "", "", "6", "9")])
    assert majority(["5", "6", "6", "9"]) == "6"
    assert loop([5, 6], [6, 6]).answer == "6"
    three = loop([5, 7, 6], [6, 6, 5])
    assert sorted(three.common) == ["5", "6"] and len(three.rounds) == 3
    assert three.answer == "6", "given three times by both together; by the intuitive way alone 5 would be first"
    assert summary([outcome])["rounds"]["mean"] == 2


def test_without_agreement_the_intuitive_majority_is_reported():
    """An item without agreement must neither be lost nor be called agreed on."""
    outcome = loop([5, 4, 4, 5, 4], [1, 2, 3, 1, 1], rounds=5)
    assert (outcome.answer, outcome.agreed, len(outcome.rounds), outcome.common) == ("4", False, 5, [])
    assert loop([5, 4], [1, 2], rounds=2).answer == "5", "equally frequent: the first one"


def test_texts_without_an_answer_agree_on_nothing():
    """None equals None: two ways that say nothing would be in perfect agreement in the first round."""
    silent = loop([], [], rounds=3)
    assert (silent.answer, silent.agreed, len(silent.rounds)) == (None, False, 3)
    assert loop([], [2, 2, 3], rounds=3).answer == "2", "what the other way found is better than nothing"


def test_one_number_in_two_spellings_is_one_answer():
    """8 and 8.0 are no disagreement; a set of texts would take them for one."""
    assert loop(["8.0"], ["8"]).agreed
    assert loop(["1,200"], ["1200"]).agreed


def test_open_questions_alone_are_asked_again():
    """Each round costs three texts a question: those that are settled must not be paid for again."""
    asked_in: dict[int, list[str]] = {}

    def first(questions, number):
        asked_in[number] = list(questions)
        return [f"The answer is {2 if question == 'b' and number < 3 else 1}." for question in questions]

    def second(questions, knowledge, number):
        assert knowledge == [f"rule {number}"] * len(questions), "knowledge of another round or question"
        return ["The answer is 1."] * len(questions)

    outcomes = consistency_loop(["a", "b", "c"], first, rules, second)
    assert asked_in == {1: ["a", "b", "c"], 2: ["b"], 3: ["b"]}
    assert [len(outcome.rounds) for outcome in outcomes] == [1, 3, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_rounds": 0}, "max_rounds is 0; expected a whole number of at least 1"),
        ({"max_rounds": True}, "max_rounds is True"),
        ({"extract": "gsm8"}, "there is no extractor 'gsm8'; expected text, last_number, gsm8k"),
        ({"knowledge": lambda questions, number: []}, "knowledge gave 0 texts for 1 questions"),
        ({"intuitive": lambda questions, number: "text"}, "intuitive gave one text for 1 questions"),
    ],
)
def test_bad_arguments(change, words):
    """A stub of one text for all questions would be read letter by letter."""
    settings = {"intuitive": says(1), "knowledge": rules, "deep": says(1), **change}
    with pytest.raises(ValueError, match=words):
        consistency_loop(["q"], **settings)


def test_the_summary_tells_cost_and_every_way_of_counting():
    """The published way of counting beside the honest one: on these four, 75 % against 50 %."""
    outcomes = [
        loop([5, 6], [6, 5]),  # reported 5, gold 6: wrong, though 6 is among the common ones
        loop([3], [3]),
        loop([4, 4], [1, 2], rounds=2),
        loop([7, 7], [8, 8], rounds=2),
    ]
    found = summary(outcomes, ["6", "3", "4", "9"])
    assert (found["questions"], found["graded"], found["agreed"]) == (4, 4, 0.5)
    assert found["rounds"] == {"mean": 1.75, "histogram": {"1": 1, "2": 3}}
    assert found["texts"] == 5.25
    assert (found["accuracy"], found["accuracy_agreed"], found["accuracy_not_agreed"]) == (0.5, 0.5, 0.5)
    assert (found["first_intuitive"], found["first_deep"], found["any_common"]) == (0.5, 0.5, 0.5)
    assert found["interval"][0] < 0.5 < found["interval"][1]
    assert found["most_frequent"] == {"answer": "5", "share": 0.25}
    without = summary(outcomes)
    assert "accuracy" not in without and "accuracy" not in summary(outcomes, [None] * 4)
    assert summary(outcomes, ["6", None, None, None])["graded"] == 1
    with pytest.raises(ValueError, match="got 4 outcomes and 1 golds"):
        summary(outcomes, ["6"])


def test_any_common_is_more_generous_than_the_accuracy():
    """If both were computed from the reported answer, the difference that they are there to show would be lost."""
    found = summary([loop([5, 6], [6, 5])], ["6"])
    assert (found["accuracy"], found["any_common"]) == (0.0, 1.0)


def test_a_row_is_read_by_three_roles():
    """The deep reasoner's prompt in training must be, letter for letter, that of when it is asked."""
    assert intuitive(ROW) == {"prompt": ROW["question"], "completion": ROW["rationale"], "answer": "3"}
    assert knowledge(ROW) == {"prompt": ROW["question"], "completion": "Divide the cost. By the number."}
    written = " Divide the cost.\nBy the number. "  # as a model may write it
    assert deep(ROW)["prompt"] == deep_question(ROW["question"], written)
    assert deep(ROW)["prompt"].endswith("One pen?\nKnowledge: Divide the cost. By the number.")
    assert deep_question("q", " ") == "q\nKnowledge:"
    assert asked({"prompt": "q"}) == {"prompt": "q"}
    assert asked({"question": "q", "answer": "6 / 2 = <<6/2=3>>3\n#### 3"}) == {"prompt": "q", "answer": "3"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": None}, "the column 'question' holds None"),
        ({"knowledge": []}, "the column 'knowledge' holds ''"),
        ({"knowledge": ["a", 3]}, r"holds \['a', 3\]; expected a text, or a list of texts"),
        ({"rationale": " "}, "the column 'rationale' holds ' '"),
    ],
)
def test_rows_without_what_a_role_needs(change, words):
    """An empty text in a prompt trains without a word of complaint."""
    with pytest.raises(ValueError, match=words):
        deep({**ROW, **change})
