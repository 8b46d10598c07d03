"""Rows of the six public question sets, shaped as their publishers store them; the rows are of our own writing."""

from __future__ import annotations

import pytest

from hfkd.data.formats import FORMATS
from hfkd.eval.answers import EXTRACTORS, match

GSM8K = {
    "question": "Mo packs 24 jars in boxes of 6.  He then fills 2 more boxes.\n\nHow many boxes are there?",
    "answer": "He fills 24/6=<<24/6=4>>4 boxes first.\n\nThen there are 4+2=<<4+2=6>>6 boxes\n#### 6",
}
ARC = {
    "question": "Which of these gives off its own light?",
    "choices": {"text": ["the Moon", "a mirror", "the Sun", "a window"], "label": ["A", "B", "C", "D"]},
    "answerKey": "C",
}
CSQA = {
    "question": "Where would you keep milk cold?",
    "question_concept": "milk",
    "choices": {"text": ["oven", "drawer", "fridge", "shoe", "lamp"], "label": ["A", "B", "C", "D", "E"]},
    "answerKey": "C",
}
AQUA = {
    "question": "A rope of 20 m is cut into 4 equal parts. How long is each?",
    "options": ["A)4 m", "B)5 m", "C)6 m", "D) 8 m", "E)10 m"],
    "rationale": "20/4 = 5\n\nAnswer: B",
    "correct": "B",
}
SVAMP = {
    "Body": "Ina had 8 pens. She gave away 3 pens.",
    "Question": "How many pens are left?",
    "Answer": "5.0",
    "Equation": "( 8.0 - 3.0 )",
    "Type": "Subtraction",
}
COIN = {
    "inputs": "Q: A coin is heads up. ina flips the coin.  mo does not flip the coin.  Is the coin still heads up?",
    "targets": "no",
}
ROWS = {"gsm8k": GSM8K, "arc": ARC, "commonsense_qa": CSQA, "aqua_rat": AQUA, "svamp": SVAMP, "coin_flip": COIN}
EXTRACT = {
    "gsm8k": "gsm8k",
    "arc": "choice",
    "commonsense_qa": "choice",
    "aqua_rat": "choice",
    "svamp": "gsm8k",
    "coin_flip": "yes_no",
}


def without(row: dict, *columns: str) -> dict:
    """A copy of a row that lacks some columns."""
    return {name: value for name, value in row.items() if name not in columns}


def test_every_format_has_a_row_here() -> None:
    """A format that no test reads can be wrong for as long as nobody trains on it."""
    assert set(FORMATS) == set(ROWS)


@pytest.mark.parametrize("name", list(FORMATS))
def test_completion_states_the_answer_in_the_one_form_and_is_scored_right(name: str) -> None:
    """Two ways to state an answer in training and in evaluation would make a trained model fail its own test."""
    row = FORMATS[name](ROWS[name])
    assert set(row) == {"prompt", "completion", "answer"}
    assert row["completion"].count("The answer is ") == 1
    assert row["completion"].endswith(".")
    assert match(EXTRACTORS[EXTRACT[name]](row["completion"]), row["answer"])


@pytest.mark.parametrize("name", list(FORMATS))
def test_no_text_holds_an_empty_line_or_loose_spaces(name: str) -> None:
    """An empty line is the stop string of these recipes: inside a rationale it would cut every answer there."""
    row = FORMATS[name](ROWS[name])
    for text in row.values():
        assert "\n\n" not in text
        assert "  " not in text
        assert text == text.strip()


def test_gsm8k_takes_out_the_calculator_marks() -> None:
    """<<24/6=4>> left in would be learned as part of the language."""
    row = FORMATS["gsm8k"](GSM8K)
    assert row["completion"] == "He fills 24/6=4 boxes first.\nThen there are 4+2=6 boxes. The answer is 6."
    assert row["answer"] == "6"
    assert row["prompt"] == "Mo packs 24 jars in boxes of 6. He then fills 2 more boxes.\nHow many boxes are there?"


def test_gsm8k_answers_lose_their_commas() -> None:
    """'1,234' as gold would never equal a number that an extractor returns as text."""
    assert FORMATS["gsm8k"]({"question": "How many?", "answer": "#### 1,234"}) == {
        "prompt": "How many?",
        "completion": "The answer is 1234.",
        "answer": "1234",
    }


@pytest.mark.parametrize("answer", ["It is 6", "It is 6 ####", "#### "])
def test_gsm8k_without_a_final_answer_is_an_error(answer: str) -> None:
    """A rationale taken for an answer would make every prediction wrong."""
    with pytest.raises(ValueError, match="####"):
        FORMATS["gsm8k"]({"question": "How many?", "answer": answer})


def test_options_are_lines_with_bracketed_letters() -> None:
    """Without the options in the prompt the letter cannot be known."""
    assert FORMATS["arc"](ARC) == {
        "prompt": "Which of these gives off its own light?\n(A) the Moon\n(B) a mirror\n(C) the Sun\n(D) a window",
        "completion": "The answer is (C).",
        "answer": "C",
    }
    assert FORMATS["commonsense_qa"](CSQA)["prompt"].splitlines()[-1] == "(E) lamp"


def test_arc_labels_that_are_digits_become_letters() -> None:
    """Rows labelled 1 to 4 would ask for a digit that the choice extractor never returns."""
    row = dict(ARC, choices={"text": ARC["choices"]["text"], "label": ["1", "2", "3", "4"]}, answerKey="3")
    assert FORMATS["arc"](row) == FORMATS["arc"](ARC)


def test_arc_rows_may_have_three_or_five_options() -> None:
    """A fixed number of options would drop or misletter some rows."""
    row = dict(ARC, choices={"text": ["ice", "steam", "snow"], "label": ["A", "B", "C"]}, answerKey="B")
    assert FORMATS["arc"](row)["answer"] == "B"


@pytest.mark.parametrize("name", ["arc", "commonsense_qa"])
@pytest.mark.parametrize("key", ["", " ", None])
def test_rows_without_an_answer_key_are_an_error(name: str, key: str | None) -> None:
    """The unlabelled test split would otherwise score every model 0 without a word."""
    with pytest.raises(ValueError, match="empty answer key"):
        FORMATS[name](dict(ROWS[name], answerKey=key))


def test_commonsense_qa_says_which_split_has_keys() -> None:
    """An error that does not say the way out costs the user a search."""
    with pytest.raises(ValueError, match="split: validation"):
        FORMATS["commonsense_qa"](without(CSQA, "answerKey"))


@pytest.mark.parametrize(
    ("name", "column"), [("arc", "answerKey"), ("commonsense_qa", "answerKey"), ("aqua_rat", "correct")]
)
def test_a_key_that_is_not_among_the_labels_is_an_error(name: str, column: str) -> None:
    """A key outside the options would silently become another letter, or a crash far from here."""
    with pytest.raises(ValueError, match="'Z'"):
        FORMATS[name](dict(ROWS[name], **{column: "Z"}))


def test_choices_of_another_shape_are_an_error() -> None:
    """Zipping unequal lists would drop the last options in silence."""
    with pytest.raises(ValueError, match="3 texts and 4 labels"):
        FORMATS["arc"](dict(ARC, choices={"text": ["a", "b", "c"], "label": ["A", "B", "C", "D"]}))
    with pytest.raises(ValueError, match="lists `text` and `label`"):
        FORMATS["arc"](dict(ARC, choices=["a", "b"]))


def test_aqua_options_lose_their_own_letters() -> None:
    """'(A) A)4 m' would show every letter twice."""
    row = FORMATS["aqua_rat"](AQUA)
    assert row["prompt"].splitlines()[1:] == ["(A) 4 m", "(B) 5 m", "(C) 6 m", "(D) 8 m", "(E) 10 m"]
    assert row["completion"] == "20/4 = 5\nAnswer: B. The answer is (B)."
    assert row["answer"] == "B"


def test_aqua_options_without_letters_are_an_error() -> None:
    """Guessing the letters of unlettered options may point the key at a wrong one."""
    with pytest.raises(ValueError, match="'21'"):
        FORMATS["aqua_rat"](dict(AQUA, options=["21", "22"]))


def test_aqua_without_a_rationale_still_has_an_answer() -> None:
    """A row without a rationale must not begin with a space, which would be another token."""
    assert FORMATS["aqua_rat"](without(AQUA, "rationale"))["completion"] == "The answer is (B)."


@pytest.mark.parametrize(
    ("answer", "expected"), [("8.0", "8"), (8.0, "8"), (8, "8"), ("2.50", "2.5"), ("100", "100"), ("0.0", "0")]
)
def test_svamp_numbers_lose_an_empty_decimal_part(answer: object, expected: str) -> None:
    """'8.0' as the text to learn would teach decimals in a set of whole numbers."""
    assert FORMATS["svamp"](dict(SVAMP, Answer=answer))["answer"] == expected


def test_svamp_uses_the_equation_as_its_rationale() -> None:
    """Brackets and '.0' of the stored equation are not language that a demonstration uses."""
    row = FORMATS["svamp"](SVAMP)
    assert row["prompt"] == "Ina had 8 pens. She gave away 3 pens. How many pens are left?"
    assert row["completion"] == "8 - 3 = 5. The answer is 5."
    nested = FORMATS["svamp"](dict(SVAMP, Equation="( ( 8.0 - 3.0 ) * 2.0 )", Answer="10.0"))
    assert nested["completion"] == "( ( 8 - 3 ) * 2 ) = 10. The answer is 10."
    assert FORMATS["svamp"](without(SVAMP, "Equation"))["completion"] == "The answer is 5."


def test_coin_flip_loses_its_prefix() -> None:
    """'Question: Q: ...' would put a second, foreign marker into every prompt."""
    row = FORMATS["coin_flip"](COIN)
    assert row["prompt"].startswith("A coin is heads up. ina flips the coin. mo does not")
    assert row["prompt"].endswith("flip the coin. Is the coin still heads up?")
    assert row["completion"] == "The answer is no."
    assert FORMATS["coin_flip"](dict(COIN, targets=" Yes. "))["answer"] == "yes"


def test_coin_flip_with_another_target_is_an_error() -> None:
    """A target such as 'heads' can never be matched by the yes-or-no extractor."""
    with pytest.raises(ValueError, match="'heads'"):
        FORMATS["coin_flip"](dict(COIN, targets="heads"))


REQUIRED = [
    ("gsm8k", "question"),
    ("gsm8k", "answer"),
    ("arc", "choices"),
    ("commonsense_qa", "question"),
    ("aqua_rat", "options"),
    ("aqua_rat", "correct"),
    ("svamp", "Body"),
    ("svamp", "Answer"),
    ("coin_flip", "inputs"),
    ("coin_flip", "targets"),
]


@pytest.mark.parametrize(("name", "column"), REQUIRED)
def test_a_missing_column_is_named_with_the_columns_that_are_there(name: str, column: str) -> None:
    """A format chosen for the wrong file must say so, and not fail with a bare KeyError."""
    with pytest.raises(ValueError, match=rf"format '{name}' needs.*no {column}"):
        FORMATS[name](without(ROWS[name], column))
    with pytest.raises(ValueError, match=rf"no {column}"):
        FORMATS[name](dict(ROWS[name], **{column: None}))


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_format_leaves_its_row_alone(name: str) -> None:
    """A row changed in place would change the data set under everybody who reads it later."""
    import copy

    row = copy.deepcopy(ROWS[name])
    FORMATS[name](row)
    assert row == ROWS[name]
