"""Reading answers out of texts, and comparing them: each case is a way for an accuracy to be wrong in silence."""

from __future__ import annotations

import pytest

from hfkd.eval.answers import EXTRACTORS, match


def test_the_extractors_that_recipes_name_are_there() -> None:
    """A renamed extractor would break recipes only once a model has been trained."""
    assert list(EXTRACTORS) == ["text", "last_number", "gsm8k", "choice", "yes_no"]


@pytest.mark.parametrize("name", list(EXTRACTORS))
@pytest.mark.parametrize("text", ["", "   \n\n ", "\n", "I cannot say."])
def test_a_text_without_an_answer_gives_none(name: str, text: str) -> None:
    """An extractor that guesses gives a silent model the accuracy of its guess."""
    if name == "text" and text.strip():
        assert EXTRACTORS[name](text) == text
    else:
        assert EXTRACTORS[name](text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("walked", "walked"),
        (" walked \n", "walked"),
        ("\n\n walked\nQuestion: go", "walked"),
        ("two words\nmore", "two words"),
        ("walked\r\nmore", "walked"),
    ],
)
def test_text_is_the_first_line_that_says_something(text: str, expected: str) -> None:
    """Spaces, or a question that the model goes on to invent, would make right answers wrong."""
    assert EXTRACTORS["text"](text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", "42"),
        ("It is 42.", "42"),
        ("first 3, then 42!", "42"),
        ("1,234", "1234"),
        ("12,345,678 people", "12345678"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("$1,234.50.", "1234.5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        (r"\$18", "18"),
        ("€7", "7"),
        ("50%", "50"),
        ("8.0", "8"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("100", "100"),
        ("-7", "-7"),
        ("\u22127", "-7"),
        ("+7", "7"),
        ("(-7)", "-7"),
        ("x=-7", "-7"),
        ("-0", "0"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("a 24-hour day", "24"),
        ("pages 3-4", "4"),
        ("5km", "5"),
        ("H2O", None),
        ("**9**", "9"),
        (r"\boxed{9}", "9"),
        ("version 3.5.2", "3.5"),
        ("123456789012345678901", "123456789012345678901"),
    ],
)
def test_last_number_reads_numbers_as_people_write_them(text: str, expected: str | None) -> None:
    """A comma, a minus or a full stop read wrongly scores right answers as wrong, or 10-3 as minus three."""
    assert EXTRACTORS["last_number"](text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 + 3 = 8. The answer is 8.", "8"),
        ("The answer is: 8", "8"),
        ("the ANSWER IS 8", "8"),
        ("Answer: 8", "8"),
        ("so #### 8", "8"),
        ("####8", "8"),
        ("The answer is #### 8", "8"),
        ("The answer is 3 apples.", "3"),
        ("The answer is 3 apples out of 10.", "3"),
        ("The answer is $1,234.50. He has 7 left.", "1234.5"),
        ("The answer is 3 + 4 = 7.", "7"),
        ("The answer is 3 + 4 = 7 apples.", "7"),
        ("The answer is 7 = 3 + 4.", "7"),
        ("The answer is -4.", "-4"),
        ("The answer is **8**.", "8"),
        ("The answer is $\\boxed{8}$.", "8"),
        ("The answer is 42. There were 17 boxes and 3 lids, as said above, and it takes a while to say so.", "42"),
        ("The answer is 42. Again: the answer is 42. In 1999 there were 5.", "42"),
        ("The answer is 5. No, that is wrong. The answer is 6.", "6"),
        ("The answer is\n 8", "8"),
        ("The answer is 8\n9", "8"),
        ("The answer is clear. 3 + 4 = 7", "7"),
        ("The answer is 5. The answer is clear.", "5"),
        ("I think 3 and then 7.", "7"),
        ("answered 3 times, so 9", "9"),
    ],
)
def test_gsm8k_reads_the_stated_answer_wherever_it_stands(text: str, expected: str) -> None:
    """Reading the last few tokens only, or the last number, misses the answer of a model that goes on talking."""
    assert EXTRACTORS["gsm8k"](text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is (B).", "B"),
        ("The answer is B.", "B"),
        ("The answer is: (B)", "B"),
        ("the answer is (b)", "B"),
        ("ANSWER: B", "B"),
        ("Answer: (B)", "B"),
        ("The answer is option C", "C"),
        ("The answer is **(D)**.", "D"),
        (r"The answer is $\boxed{D}$", "D"),
        ("The answer is (B). Option (C) is too cold and (D) too hot.", "B"),
        ("The answer is (A). Wait. The answer is (E).", "E"),
        ("It is not (A), so (C)", "C"),
        ("The answer is not (B) but (C)", "C"),
        ("B", "B"),
        (" B.\n", "B"),
        ("(B) a lake", "B"),
        ("B) a lake", "B"),
        ("B: a lake", "B"),
        ("B\n(C) something else", "B"),
        ("The answer is a dog", None),
        ("The answer is Amsterdam", None),
        ("The answer is I don't know", None),
        ("A dog barks", None),
        ("(a) small letters are a list", None),
        ("Bring me (something)", None),
        ("b", None),
    ],
)
def test_choice_reads_the_stated_letter(text: str, expected: str | None) -> None:
    """An article read as option A, or the last option discussed read as the choice, moves accuracy by far."""
    assert EXTRACTORS["choice"](text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("The answer is yes.", "yes"),
        ("The answer is: NO", "no"),
        ("The answer is **no**.", "no"),
        ('The answer is "yes"', "yes"),
        ("There is no flip, so yes", "yes"),
        ("No flips happen at all. Therefore yes", "yes"),
        ("Yes, since no one flips the coin.", "yes"),
        ("The answer is yes. No one flips it.", "yes"),
        ("The answer is no. So: the answer is yes.", "yes"),
        ("nobody knows, none of it is noted, yesterday", None),
        ("The answer is unknown.", None),
    ],
)
def test_yes_no_reads_words_and_not_parts_of_words(text: str, expected: str | None) -> None:
    """ "no" inside "know" or "no one flips" would turn half of the coin-flip answers around."""
    assert EXTRACTORS["yes_no"](text) == expected


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("walked", "walked"),
        (" Walked ", "walked"),
        ("walked.", "walked"),
        ("two   words", "two words"),
        ("8", "8.0"),
        ("8.", "8"),
        ("1,234", "1234"),
        ("$5", "5"),
        ("50%", "50"),
        ("-3", "\u22123"),
        ("007", "7"),
        ("B", "(B)"),
        ("(b)", "B"),
        ("B)", "B"),
        ("(B).", "b"),
        ("Yes", "yes"),
    ],
)
def test_the_same_answer_written_differently_matches(prediction: str, gold: str) -> None:
    """Spelling of the same answer (case, brackets, .0) must not count as a mistake."""
    assert match(prediction, gold)
    assert match(gold, prediction)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        (None, "walked"),
        ("", "walked"),
        ("95", "100"),
        ("99.9999", "100"),
        ("100", "95"),
        ("-3", "3"),
        ("3 apples", "3"),
        ("walk", "walked"),
        ("walkeds", "walked"),
        ("A", "B"),
        ("nan", "5"),
        ("inf", "5"),
        ("5", "nan"),
        ("1_000", "1000"),
        ("1,23", "123"),
        ("12345678901234567890", "12345678901234567891"),
        (".", "walked"),
        ("yes", "no"),
        ("0.5", "50%"),
    ],
)
def test_different_answers_do_not_match(prediction: str | None, gold: str) -> None:
    """A tolerance that nobody asked for counts 95 as right for 100; a float comparison merges long integers."""
    assert not match(prediction, gold)


def test_none_never_matches_even_an_empty_gold_answer() -> None:
    """A model that gave no answer must not be right where the data has none either."""
    assert not match(None, "")


@pytest.mark.parametrize(
    ("prediction", "gold", "tolerance", "expected"),
    [
        ("95", "100", 0.1, True),
        ("95", "100", 0.05, True),
        ("94.9", "100", 0.05, False),
        ("0.04", "0", 0.05, True),
        ("0.06", "0", 0.05, False),
        ("-95", "-100", 0.05, True),
        ("105", "-100", 0.05, False),
        ("walkd", "walked", 0.5, False),
        ("3 apples", "3", 0.5, False),
    ],
)
def test_a_tolerance_is_relative_to_the_gold_answer_and_absolute_below_one(
    prediction: str, gold: str, tolerance: float, expected: bool
) -> None:
    """A tolerance relative to the prediction, or applied to words, would reward large or garbled answers."""
    assert match(prediction, gold, tolerance) is expected


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_without_meaning_is_refused(tolerance: float) -> None:
    """An infinite tolerance would call every number right; a NaN every number wrong."""
    with pytest.raises(ValueError, match="tolerance"):
        match("1", "1", tolerance)


@pytest.mark.parametrize(
    ("name", "completion", "gold"),
    [
        ("gsm8k", "12 - 5 = 7. The answer is 7.", "7"),
        ("choice", "Ice melts. The answer is (C).", "C"),
        ("yes_no", "Heads, then tails. The answer is no.", "no"),
        ("text", "walked", "walked"),
        ("last_number", "The answer is 1234.", "1,234"),
    ],
)
def test_a_gold_completion_is_scored_as_right(name: str, completion: str, gold: str) -> None:
    """If extractor and match disagree about form, a perfect student scores 0."""
    assert match(EXTRACTORS[name](completion), gold)
