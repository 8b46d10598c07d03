"""Verifiers: what is right, and what they must not get away with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hfkd.data.load import Source, load_rows
from hfkd.data.verify import as_verifier
from hfkd.errors import VerifierError

ROW = {"prompt": "2 + 2 =", "completion": "4", "answer": "4"}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("exact", " 4\n", 1.0),
        ("exact", "44", 0.0),
        ("contains", "It is 4.", 1.0),
        ("contains", "five", 0.0),
        ("contains", "14 or 40", 0.0),
        ("contains", "4,", 1.0),
    ],
)
def test_built_in_ones(name: str, text: str, value: float) -> None:
    """A filter that takes every text, or none, would be noticed last."""
    assert as_verifier(name)(ROW, text) == value
    assert as_verifier("contains")({"prompt": "?", "answer": "Paris"}, "It is PARIS.") == 1.0


def test_the_checkers_of_reasoning_gym() -> None:
    """Tasks give part marks and know several right answers; a comparison of texts doesn't."""
    rows = list(load_rows(Source("reasoning_gym:chain_sum,letter_counting", size=4, seed=1)))
    assert [row["domain"] for row in rows] == ["chain_sum"] * 2 + ["letter_counting"] * 2
    verifier = as_verifier("reasoning_gym")
    assert all(verifier(row, f" {row['answer']}\n") == 1.0 for row in rows)
    assert all(verifier(row, "no number") < 1.0 for row in rows)
    with pytest.raises(VerifierError, match="no `verification`"):
        verifier(ROW, "4")


def test_options_of_several_tasks() -> None:
    """Options go by the task's name, and a name that isn't there is a slip."""
    options = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    rows = load_rows(Source("reasoning_gym:chain_sum,letter_counting", size=6, seed=1, options=options))
    asked = [row["prompt"].split(":")[-1].split() for row in rows if row["domain"] == "chain_sum"]
    assert len(asked) == 3 and all(len(parts) == 4 for parts in asked)  # "3 + 4 ="
    with pytest.raises(ValueError, match="did you mean chain_sum"):
        load_rows(Source("reasoning_gym:chain_sum,letter_counting", size=6, options={"chain_sun": {}}))
    with pytest.raises(ValueError, match="names a task twice"):
        load_rows(Source("reasoning_gym:chain_sum,chain_sum", size=6))
    assert len(load_rows(Source("reasoning_gym:chain_sum,letter_counting", size=2, options={"chain_sum": None}))) == 2
    with pytest.raises(ValueError, match="at least one each"):
        load_rows(Source("reasoning_gym:chain_sum,letter_counting", size=1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.5, "1", None, True + 1, torch.tensor([1.0])])
def test_no_number_from_0_to_1_is_an_error(value: object) -> None:
    """A NaN reward becomes NaN advantages for a whole group, silently."""
    with pytest.raises(VerifierError, match=r"the row '2 \+ 2 ='; expected a number from 0"):
        as_verifier(lambda row, text: value)(ROW, "4")


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.25), torch.tensor(0.75)])
def test_numbers_of_all_kinds_will_do(value: object) -> None:
    """Verifiers return what their library gives."""
    assert as_verifier(lambda row, text: value)(ROW, "4") == float(value)


def test_a_verifier_that_raises_names_the_row() -> None:
    """After an hour of rollouts the user must know which text did it."""

    def broken(row: dict, text: str) -> float:
        raise ZeroDivisionError("by zero")

    with pytest.raises(VerifierError, match=r"broken.*ZeroDivisionError.*2 \+ 2.*'five'"):
        as_verifier(broken)(ROW, "five")


def test_unknown_names() -> None:
    """The known ones are listed."""
    with pytest.raises(ValueError, match="exact, contains, reasoning_gym"):
        as_verifier("exakt")


@pytest.mark.parametrize("task", ["arc_agi", "rearc"])
def test_a_checker_that_cannot_read_what_is_kept_says_so(task: str) -> None:
    """Written as JSON, tuples become lists, and these two checkers then give right answers next to nothing."""
    row = next(iter(load_rows(Source(f"reasoning_gym:{task}", size=1))))
    with pytest.raises(VerifierError, match=r"arc_agi and rearc can't"):
        as_verifier("reasoning_gym")(row, row["answer"])
