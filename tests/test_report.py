"""The report and the picture of a run: whole or not at all, and with the figures that they claim to show."""

from __future__ import annotations

import json
import stat

import matplotlib.image
import matplotlib.pyplot
import pytest
from matplotlib.figure import Figure

from hfkd.eval import report
from hfkd.eval.report import plot_run, write_report

HISTORY = [{"step": step, "loss": 2.0 / step, "learning_rate": 1e-4} for step in range(1, 6)] + [
    {"step": 5, "eval": 1}
]


def result(accuracy: float) -> dict:
    """What `KShotReport.to_dict` holds of one number of shots."""
    return {"accuracy": accuracy, "standard_error": 0.05, "most_frequent_share": 0.344, "items": 96}


K_SHOT = {
    "before": {"0": result(0.0), "1": result(0.5), "8": result(0.9)},
    "after": {"0": result(0.95), "8": result(1.0)},
    "gold": {"0": result(0.9), "1": result(0.9), "8": result(0.9)},
}


def test_report_reads_back(tmp_path):
    """Prevents a report that other programs can't read: fields, letters and the folder."""
    path = tmp_path / "new" / "report.json"
    write_report(path, {"k_shot": {"after": {"0": 0.958}}, "student": "größer"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"k_shot": {"after": {"0": 0.958}}, "student": "größer"}
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]
    assert path.stat().st_mode & stat.S_IRUSR and (path.stat().st_mode & 0o077) == (0o666 & ~report._umask() & 0o077)


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

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(path, {"good": 2})
    assert json.loads(path.read_text()) == {"good": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Catches the figures that are drawn."""
    figures = []

    class Caught(Figure):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(report, "Figure", Caught)
    return figures


def test_plot_shows_the_figures(tmp_path, drawn):
    """Prevents a bar under the wrong number of shots, or a picture without units or the most frequent answer."""
    path = tmp_path / "plots" / "run.png"
    plot_run(path, HISTORY, K_SHOT)
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 400 and image.shape[1] > 1200 and image.std() > 0.02
    loss, accuracy = drawn[0].axes
    assert "nats per token" in loss.get_ylabel() and loss.get_xlabel() == "Step"
    assert list(loss.lines[0].get_ydata()) == [2.0 / step for step in range(1, 6)]
    bars = {(round(bar.get_x() + bar.get_width() / 2), round(bar.get_height(), 3)) for bar in accuracy.patches}
    assert {(0, 0.0), (1, 0.5), (2, 0.9), (0, 0.95), (2, 1.0)} <= bars and len(accuracy.patches) == 8
    assert [label.get_text() for label in accuracy.get_xticklabels()] == ["0", "1", "8"]
    dashed = [line for line in accuracy.lines if line.get_linestyle() == "--"]
    assert list(dashed[0].get_ydata()) == [0.344, 0.344]
    legend = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert legend == ["before", "after", "fine-tuned on gold labels", "always the most frequent answer (34.4%)"]


def test_terms_get_lines_of_their_own(tmp_path, drawn):
    """Prevents one term from hiding another in the sum, and NaN or missing values from breaking the picture."""
    history = [{"step": s, "loss": 1.0, "loss/forward_kl": 0.7, "loss/cross_entropy": 0.3} for s in (1, 2)]
    history += [{"step": 3, "loss": float("nan"), "loss/forward_kl": 0.7}]
    plot_run(tmp_path / "run.png", history, {})
    assert len(drawn[0].axes) == 1
    lines = {line.get_label(): list(line.get_xdata()) for line in drawn[0].axes[0].lines}
    assert lines == {"all terms": [1, 2], "cross_entropy": [1, 2], "forward_kl": [1, 2, 3]}


def test_only_what_there_is_gets_drawn(tmp_path, drawn):
    """Prevents an evaluation without training from ending in an error, and an empty picture from being written."""
    plot_run(tmp_path / "run.png", [], {"student": {"4": {"accuracy": 0.5}}, "gold": {}})
    assert len(drawn[0].axes) == 1
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_run(tmp_path / "none.png", [{"step": 1, "eval_loss": 2.0}], {"before": {}})
    assert not (tmp_path / "none.png").exists()


def test_plots_leave_no_figure_open(tmp_path):
    """Prevents a notebook's own figures and backend from being touched, and memory from growing with each run."""
    before = matplotlib.pyplot.get_fignums(), matplotlib.get_backend()
    plot_run(tmp_path / "run.png", HISTORY, K_SHOT)
    assert (matplotlib.pyplot.get_fignums(), matplotlib.get_backend()) == before
