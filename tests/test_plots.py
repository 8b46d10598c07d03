"""The pictures of a run: drawn where the figures are there, and with the figures that they claim to show."""

from __future__ import annotations

import matplotlib
import matplotlib.image
import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib.figure import Figure
from reports import details, fidelity, history, shot_result, whole_report

from hfkd.report import drawing
from hfkd.report.drawing import LOOKS, looks_of, shown_name
from hfkd.report.fidelity_plots import draw_agreement, draw_reliability
from hfkd.report.plots import draw_accuracy, draw_comparison, draw_loss, draw_plots

WHOLE = ["loss.png", "accuracy.png", "accuracy-plural.png", "reliability.png", "agreement.png"]


@pytest.fixture
def coarse(monkeypatch) -> None:
    """Fewer pixels, for tests that don't look at them."""
    monkeypatch.setattr(drawing, "_PIXELS_PER_INCH", 40)


@pytest.fixture
def drawn(monkeypatch, coarse) -> list[Figure]:
    """Catches the figures that are drawn."""
    figures = []

    class Caught(Figure):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(drawing, "Figure", Caught)
    return figures


def words(axes) -> dict[str, str]:
    """The rows below the accuracies: label to figures, from left to right."""
    rows = {}
    for text in axes.texts:
        rows.setdefault(text.xyann[1], []).append((text.xy[0] if text.get_ha() == "center" else -1, text.get_text()))
    found = {}
    for row in rows.values():
        label, *cells = [text for _, text in sorted(row, key=lambda each: each[0])]
        found[label] = [cell for cell in cells if "%" in cell]
    return found


def test_all_pictures_of_a_whole_report(tmp_path):
    """Prevents a part of the report from having no picture, and a picture that is empty or too small to read."""
    written = draw_plots(tmp_path / "plots", whole_report())
    assert [path.name for path in written] == WHOLE
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(WHOLE)
    for path in written:
        image = matplotlib.image.imread(path)
        assert image.shape[1] == 1600 and image.shape[0] > 800, path.name
        assert image[:4, :4, :3].min() == 1.0 and image[..., -1].min() == 1.0, "not on opaque white"
        assert image.std() > 0.05, path.name


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("loss_history", ["loss.png"]),
        ("forgetting", ["accuracy-plural.png"]),
        ("fidelity", ["agreement.png", "reliability.png"]),
    ],
)
def test_only_what_there_is_gets_drawn(missing, gone, tmp_path, coarse):
    """Prevents a run without a part, a loss or a teacher say, from ending in an error or an empty picture."""
    less = {path.name for path in draw_plots(tmp_path, {**whole_report(), missing: None})}
    assert sorted(set(WHOLE) - less) == gone


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"fidelity": {"unavailable": "the teacher has another tokenizer"}},
        {"loss_history": [{"step": 1, "grad_norm": 2.0}, {"loss": 1.0}, "torn"], "k_shot_details": {"before": {}}},
        {"k_shot_details": {"after": {"x": 1, "0": {"accuracy": "much"}}}, "forgetting": [3, {"task": None}]},
        {"fidelity": {"after": {"by_position": [{"first": "a"}], "student": {"reliability": [{}, None]}}}},
    ],
)
def test_nothing_to_draw_writes_nothing(report, tmp_path):
    """Prevents a report that is torn or that says little from breaking the end of a run, or from an empty picture."""
    assert draw_plots(tmp_path, report) == [] and not list(tmp_path.iterdir())


def test_the_loss_by_term(tmp_path, drawn):
    """Prevents one term from hiding another in the sum, a term's side figure (a mass of 90) from being drawn as a
    loss, and lines or units that can't be told apart.
    """
    entries = history(30)
    entries[3]["eval_loss"] = 0.7
    assert draw_loss(tmp_path / "loss.png", entries)
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["all terms", "cross_entropy", "forward_kl", "held out"]
    assert list(lines["forward_kl"].get_ydata()) == [entry["loss/forward_kl"] for entry in entries]
    assert list(lines["held out"].get_xdata()) == [4]
    styles = {(line.get_color(), line.get_marker()) for line in lines.values()}
    assert len(styles) == 4 and "nats per token" in axes.get_ylabel() and axes.get_ylim()[0] == 0


def test_a_single_term_is_the_loss(tmp_path, drawn):
    """Prevents two lines that lie on each other where there is one term."""
    assert draw_loss(tmp_path / "loss.png", history(5, terms=False))
    assert [line.get_label() for line in drawn[0].axes[0].lines] == ["loss"]


def test_what_is_no_number_is_a_gap(tmp_path, drawn):
    """Prevents a step whose loss was NaN from being bridged as if nothing had happened, and from
    breaking the scale.
    """
    entries = history(8, terms=False)
    entries[3]["loss"], entries[5]["loss"] = float("nan"), None
    assert draw_loss(tmp_path / "loss.png", entries)
    values = drawn[0].axes[0].lines[0].get_ydata()
    assert list(np.isnan(values)) == [False, False, False, True, False, True, False, False]
    assert not draw_loss(tmp_path / "none.png", [{"step": 1, "loss": float("inf")}])


@pytest.mark.parametrize("count", [1, 2, 60, 61, 400])
def test_short_and_long_histories(count, tmp_path, drawn):
    """Prevents a lone point from being invisible, and hundreds of noisy ones from hiding where the loss goes."""
    entries = history(count, terms=False)
    assert draw_loss(tmp_path / "loss.png", entries)
    raw, *smooth = drawn[0].axes[0].lines
    assert len(raw.get_xdata()) == count and raw.get_marker() not in ("None", None)
    assert len(smooth) == (count > 60)
    for line in smooth:
        jumps = [np.abs(np.diff(each.get_ydata())).mean() for each in (line, raw)]
        assert jumps[0] < 0.7 * jumps[1]


def test_a_term_a_thousand_times_larger_hides_no_other(tmp_path, drawn):
    """Prevents a loss on hidden states from pressing the divergence into the axis."""
    entries = [{**entry, "loss/hidden_mse": 3000.0} for entry in history(20)]
    assert draw_loss(tmp_path / "loss.png", entries)
    assert drawn[0].axes[0].get_yscale() == "log"


def test_accuracies_stand_where_they_belong(tmp_path, drawn):
    """Prevents a point above the wrong number of demonstrations, a figure in the wrong row, whiskers that aren't the
    interval, and a picture without the most frequent answer.
    """
    found = details(before={0: 0.0, 8: 0.875}, after={1: 0.5, 8: 1.0})
    found["after"]["1"]["interval"] = [0.2, 0.9]
    assert draw_accuracy(tmp_path / "accuracy.png", found, "held-out items")
    (axes,) = drawn[0].axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "8"]
    curves = {
        line.get_color(): line for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata()) == 2
    }
    before, after = curves[LOOKS["before"].colour], curves[LOOKS["after"].colour]
    assert [round(place) for place in before.get_xdata()] == [0, 2] and list(before.get_ydata()) == [0.0, 0.875]
    assert [round(place) for place in after.get_xdata()] == [1, 2] and list(after.get_ydata()) == [0.5, 1.0]
    assert words(axes) == {
        "demonstrations": [],
        "before": ["0.0%", "87.5%"],
        "after": ["50.0%", "100.0%"],
        "most frequent answer": ["2.1%"],
    }
    ends = [segment[:, 1] for segment in axes.collections[1].get_segments()]
    assert np.allclose(ends, [found["after"][shots]["interval"] for shots in ("1", "8")])
    assert "48 held-out items" in drawn[0].get_suptitle()


def test_an_interval_follows_from_the_items_of_an_old_report(tmp_path, drawn):
    """Prevents reports from before there were intervals in them from being drawn as if they were exact."""
    result = {key: value for key, value in shot_result(0, 0.5).items() if key != "interval"}
    assert draw_accuracy(tmp_path / "a.png", {"after": {"0": result}}, "held-out items")
    (segment,) = drawn[0].axes[0].collections[0].get_segments()
    assert np.allclose(segment[:, 1], shot_result(0, 0.5)["interval"], atol=1e-4)


def test_reliability_of_student_and_teacher(tmp_path, drawn):
    """Prevents a model from being drawn as another, and bins without the number of tokens behind them."""
    found = {"before": fidelity("before"), "after": fidelity("after")}
    assert draw_reliability(tmp_path / "reliability.png", found)
    upper, lower = drawn[0].axes
    curves = {
        line.get_color(): line for line in upper.lines if len(line.get_xdata()) == 9 and line.get_marker() in "os^"
    }
    for name, model in (("after", found["after"]["student"]), ("teacher", found["after"]["teacher"])):
        line = curves[LOOKS[name].colour]
        assert list(line.get_xdata()) == [each["confidence"] for each in model["reliability"]]
        assert list(line.get_ydata()) == [each["accuracy"] for each in model["reliability"]]
    counts = [bar.get_height() for bar in lower.patches]
    assert counts == 3 * [each["tokens"] for each in found["after"]["student"]["reliability"]]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend[1] == "student after: expected calibration error 3.4%, Brier score 0.210" and len(legend) == 3
    assert not draw_reliability(tmp_path / "none.png", {"unavailable": "no teacher"})


def test_a_teacher_that_moved_is_drawn_twice(tmp_path, drawn):
    """Prevents the student before training from being held against the teacher of after."""
    found = {"before": fidelity("before"), "after": fidelity("after")}
    found["before"]["teacher"] |= {"perplexity": 5.0}
    assert draw_reliability(tmp_path / "reliability.png", found)
    legend = [text.get_text().split(":")[0] for text in drawn[0].legends[0].get_texts()]
    assert legend == ["student before", "student after", "teacher before", "teacher after"]


def test_agreement_by_place_in_the_answer(tmp_path, drawn):
    """Prevents a place that has no figure from being bridged, places that are counted from 0, and ranges whose name
    is that of one token.
    """
    found = fidelity("after")
    found["by_position"][2]["agreement"] = None
    assert draw_agreement(tmp_path / "agreement.png", {"after": found})
    shares, distances, counts = drawn[0].axes
    (line,) = shares.lines
    assert np.isnan(line.get_ydata()[2]) and line.get_ydata()[0] == found["by_position"][0]["agreement"]
    assert list(distances.lines[0].get_ydata()) == [each["forward_kl"] for each in found["by_position"]]
    assert [bar.get_height() for bar in counts.patches] == [each["tokens"] for each in found["by_position"]]
    names = [tick.get_text() for tick in counts.get_xticklabels()]
    assert names[:2] == ["1", "2"] and names[-1] == "25–40"


def test_names_from_recipes_and_rows_are_only_words(tmp_path, drawn):
    """Prevents a dollar sign from being set as a formula, or an odd name from breaking or widening the picture."""
    names = ["$\\frac{$", "_hidden", "a" * 300, "two\nlines", "", "\u202eabc"]
    found = {name: {"0": shot_result(0, 0.5)} for name in names}
    assert draw_accuracy(tmp_path / "a.png", found, "items of $x_")
    assert [shown_name(name) for name in names[1:5]] == ["hidden", "a" * 27 + "…", "two lines", "?"]
    assert {"$\\frac{$", "?abc"} <= set(words(drawn[0].axes[0]))
    terms = {f"loss/{name}": 1.0 for name in names if name}
    assert draw_loss(tmp_path / "l.png", [{"step": 1, "loss": 2.0, **terms}])
    assert matplotlib.image.imread(tmp_path / "l.png").shape[1] == 320


def test_many_demonstrations_and_many_runs(tmp_path, drawn):
    """Prevents figures that lie on each other, and runs that look the same."""
    runs = {f"outputs/run.{place}": details(after={shots: shots / 20 for shots in range(20)}) for place in range(7)}
    assert draw_comparison(tmp_path / "comparison.png", runs)
    assert len(set(looks_of(list(runs)).values())) == 7
    assert list(words(drawn[0].axes[0]))[1:8] == list(runs)
    assert not draw_comparison(tmp_path / "none.png", {"one": {}, "other": {"before": {}}})


def test_a_failed_picture_keeps_the_one_before(tmp_path, monkeypatch):
    """Prevents a torn PNG where a drawing or a disk fails midway."""
    path = tmp_path / "loss.png"
    draw_loss(path, history(3))
    good = path.read_bytes()

    def torn(self, stream, **kwargs):
        stream.write(b"\x89PNG")
        raise MemoryError("no room for the picture")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(MemoryError):
        draw_loss(path, history(4))
    assert path.read_bytes() == good and [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]


def test_plots_touch_nobody_elses_figures_and_style(tmp_path, coarse):
    """Prevents a notebook's figures, backend or style from being changed, and its dark style from making the words
    of a picture invisible.
    """
    draw_plots(tmp_path / "plain", whole_report())
    state = lambda: (matplotlib.pyplot.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams))  # noqa: E731
    with matplotlib.rc_context(
        {
            "text.color": "white",
            "figure.facecolor": "black",
            "axes.facecolor": "black",
            "font.size": 30,
            "savefig.dpi": 30,
        }
    ):
        before = state()
        draw_plots(tmp_path / "dark", whole_report())
        assert state() == before
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "dark" / path.name).read_bytes(), path.name
