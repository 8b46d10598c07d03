"""Parts of a data set, and the guard against leakage."""

from __future__ import annotations

import pytest
from datasets import Dataset

from hfkd.data.messages import prompt_key
from hfkd.data.select import LeakageError, check_leakage, split_rows, visited

ROWS = [{"prompt": f"verb {n}", "completion": "x"} for n in range(20)]


def test_parts_have_their_sizes_and_share_no_prompt() -> None:
    """A prompt in two parts is a label seen in training or shown in the prompt of its own question."""
    doubled = [*ROWS, *({**row, "prompt": f"  VERB   {n}"} for n, row in enumerate(ROWS))]
    splits = split_rows(doubled, demonstrations=4, evaluation=6, seed=0)
    keys = [{prompt_key(row) for row in part} for part in (splits.demonstrations, splits.evaluation, splits.train)]
    assert [len(splits.demonstrations), len(splits.evaluation)] == [4, 6] == [len(keys[0]), len(keys[1])]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert set.union(*keys) == {prompt_key(row) for row in ROWS}


def test_split_is_a_function_of_the_seed_and_takes_a_dataset() -> None:
    """Two processes, or a resumed run, must agree on what is held out."""
    first = split_rows(ROWS, demonstrations=2, evaluation=3, seed=1)
    assert first == split_rows(Dataset.from_list(ROWS), demonstrations=2, evaluation=3, seed=1)
    assert first != split_rows(ROWS, demonstrations=2, evaluation=3, seed=2)


@pytest.mark.parametrize(("demonstrations", "evaluation"), [(20, 0), (8, 12), (30, 30)])
def test_too_few_rows(demonstrations: int, evaluation: int) -> None:
    """A training set that became empty, or fewer items than asked for, must not pass."""
    with pytest.raises(ValueError, match="20 rows with 20 different prompts are too few"):
        split_rows(ROWS, demonstrations=demonstrations, evaluation=evaluation, seed=0)
    with pytest.raises(ValueError, match="no negative"):
        split_rows(ROWS, demonstrations=-1, evaluation=0, seed=0)


@pytest.mark.parametrize(
    "item",
    [
        {"prompt": " Go\n home ", "completion": "y"},
        {"prompt": [{"role": "user", "content": "GO home"}], "completion": []},
        {"messages": [{"role": "user", "content": "go home"}, {"role": "assistant", "content": "z"}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "go  home"}]}], "completion": []},
    ],
)
def test_leakage_is_found_whatever_the_form(item: dict) -> None:
    """An evaluation item whose answer stands in the prompt measures copying."""
    shown = [{"prompt": "sing", "completion": "x"}, {"prompt": "go home", "completion": "x"}]
    with pytest.raises(LeakageError, match="evaluation item 1 has the prompt of demonstration 1: 'go home'"):
        check_leakage(shown, [{"prompt": "walk", "completion": "x"}, item])
    check_leakage(shown, [{"prompt": "go homes", "completion": "x"}])


def test_visited_is_all_or_a_seeded_choice() -> None:
    """A teacher that answers prompts which training never visits wastes most of a short run."""
    assert visited(ROWS, 20, seed=0) == visited(ROWS, 100, seed=3) == ROWS
    chosen = visited(ROWS, 5, seed=0)
    assert len(chosen) == 5 and chosen == visited(ROWS, 5, seed=0) != visited(ROWS, 5, seed=1)
    assert [ROWS.index(row) for row in chosen] == sorted(ROWS.index(row) for row in chosen)
    with pytest.raises(ValueError, match="visits 0 examples"):
        visited(ROWS, 0, seed=0)
