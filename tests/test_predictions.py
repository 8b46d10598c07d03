"""Single answers on disk: found again by item, told apart from damage, and silent about questions and paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfkd.eval.k_shot import KShotReport, score
from hfkd.eval.predictions import item_hash, prediction_lines, read_predictions, write_predictions
from hfkd.masking import shareable
from hfkd.report.written import accuracy_pictures

ITEMS = [{"prompt": "secret walk", "completion": " walked"}, {"prompt": "go", "completion": "goed", "answer": "went"}]


def report() -> KShotReport:
    results = {shots: score(shots, ["walked", None], ["walked", "went"]) for shots in (0, 2)}
    for result in results.values():
        result.texts = [" walked\n", ""]
    return KShotReport(results)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """An answer that changes on the way, or is booked under another item, makes every comparison wrong."""
    lines = prediction_lines("verbs", "after", report(), ITEMS)
    assert len(lines) == 4
    assert lines[0] == {
        **{"task": "verbs", "stage": "after", "shots": 0, "item": item_hash(ITEMS[0]), "gold": "walked"},
        **{"prediction": "walked", "text": " walked\n", "right": True},
    }
    assert (lines[3]["shots"], lines[3]["gold"], lines[3]["prediction"], lines[3]["right"]) == (2, "went", "", False)
    path = write_predictions(tmp_path / "new" / "predictions.jsonl", lines)
    assert read_predictions(path) == lines
    assert "secret" not in path.read_text()
    assert read_predictions(write_predictions(path, [])) == []


def test_an_item_is_its_prompt_and_its_gold_answer() -> None:
    """The same question in another file is the same item; another answer key makes it another one."""
    first = item_hash({"prompt": "Walk  now", "completion": "walked"})
    assert len(first) == 16 and int(first, 16) >= 0
    assert item_hash({"prompt": [{"role": "user", "content": "walk now"}], "answer": "walked"}) == first
    assert item_hash({"prompt": "walk now", "completion": "walks"}) != first


def test_no_path_of_this_machine(tmp_path: Path) -> None:
    """Where the data lay is nobody's business, and the runs of two machines should have tasks of one name."""
    (tmp_path / "verbs.jsonl").touch()
    lines = prediction_lines(str(tmp_path / "verbs.jsonl"), "before", report(), ITEMS)
    assert {line["task"] for line in lines} == {"verbs.jsonl"}


@pytest.mark.parametrize(
    "name", ["verbs", "org/verbs (2)", "recipes/verbs.jsonl", "/data/a client/verbs", "~/a/verbs"]
)
def test_a_task_has_one_name_in_predictions_report_and_pictures(name: str) -> None:
    """Two files of one run that can't be joined by their tasks, and a folder's name in that of an uploaded picture."""
    (known,) = {line["task"] for line in prediction_lines(name, "after", report(), ITEMS)}
    assert known == shareable({"task": name})["task"]
    assert {line["task"] for line in prediction_lines(known, "after", report(), ITEMS)} == {known}
    kept = {"forgetting": [{"task": known, "details": {"after": {"0": {"accuracy": 0.5, "items": 2}}}}]}
    picture = accuracy_pictures(kept)[1]
    assert picture.startswith("accuracy-") and "verbs" in picture and "client" not in picture


def test_other_items_are_refused() -> None:
    """Answers beside the wrong questions look like any others."""
    with pytest.raises(ValueError, match="2 texts and there are 1 items"):
        prediction_lines("verbs", "after", report(), ITEMS[:1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "line 4"),
        (lambda text: text.replace('"right": true', '"right": 1', 1), "line 1: right is 1, not a bool"),
        (lambda text: text.replace('"item"', '"id"', 1), "line 1: item is None, not a str"),
        (lambda text: "[1]\n" + text, "line 1: got a list"),
    ],
)
def test_damage_is_named(tmp_path: Path, change, words: str) -> None:
    """Half a file would be compared as a run of half the items."""
    path = write_predictions(tmp_path / "p.jsonl", prediction_lines("verbs", "after", report(), ITEMS))
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=words):
        read_predictions(path)


def test_a_failure_keeps_the_file_before(tmp_path: Path) -> None:
    """A full disk in the middle of the second run must not take the first one's answers with it."""
    lines = prediction_lines("verbs", "after", report(), ITEMS)
    path = write_predictions(tmp_path / "p.jsonl", lines)
    with pytest.raises(TypeError):
        write_predictions(path, [*lines, {"item": object()}])
    assert read_predictions(path) == lines
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]
    assert json.loads(path.read_text().splitlines()[0])["task"] == "verbs"
