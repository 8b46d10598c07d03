"""The report of a run: whole or not at all, and names of pictures that no task can bend."""

from __future__ import annotations

import json
import os

import pytest
from reports import whole_report

from hfkd.files import write_whole
from hfkd.report.written import accuracy_pictures, write_report


def test_report_reads_back(tmp_path):
    """Prevents a report that other programs can't read: fields, letters and the folder."""
    path = tmp_path / "new" / "report.json"
    write_report(path, {"k_shot": {"after": {"0": 0.958}}, "student": "größer"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"k_shot": {"after": {"0": 0.958}}, "student": "größer"}
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode, "others may read it as they may read any file"


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"path": object()}])
def test_a_bad_report_keeps_the_one_before(bad, tmp_path):
    """Prevents half a report, or NaN that isn't JSON, from taking the place of a good one."""
    path = tmp_path / "report.json"
    write_report(path, {"good": 1})
    with pytest.raises((TypeError, ValueError)):
        write_report(path, bad)
    assert json.loads(path.read_text()) == {"good": 1}


def test_a_failed_write_keeps_the_one_before(tmp_path, monkeypatch):
    """Prevents a full disk from leaving a torn report, or litter beside it."""
    path = tmp_path / "report.json"
    write_report(path, {"good": 1})

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, lambda stream: stream.write(b"{"))
    assert json.loads(path.read_text()) == {"good": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_task_names_its_picture_and_nothing_else():
    """Prevents a task's name from leading out of the folder, and two tasks from writing into one picture."""
    names = ["plural", "../../etc/passwd", "Plural!", "中文", "<b>", "x" * 90, "plural 2"]
    some = whole_report()["forgetting"][0]
    found = accuracy_pictures({"forgetting": [{**some, "task": name} for name in names]})
    assert found[:3] == ["accuracy.png", "accuracy-plural.png", "accuracy-etc-passwd.png"]
    assert len(set(found)) == len(names) + 1
    assert all(name == name.rpartition("/")[2] and len(name) < 70 for name in found)
