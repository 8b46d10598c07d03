"""Runs beside each other: the arithmetic by hand and by brute force, and what must not be compared."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from hfkd.cli.compare import compare
from hfkd.eval.comparison.compare import Series, Side, bootstrap_interval, compare_sides, sign_test
from hfkd.eval.comparison.sides import load_sides
from hfkd.eval.comparison.tables import fidelity_table, print_comparison
from hfkd.eval.predictions import write_predictions
from hfkd.eval.results import Results


def lines(right: str, stage: str = "after", *, task: str = "verbs", first: int = 0, shots: int = 0) -> list[dict]:
    """Predictions from a word such as "110": one item a letter, whose hash is its place."""
    return [
        {"task": task, "stage": stage, "shots": shots, "item": f"{place + first:016x}", "gold": "yes"}
        | {"prediction": "yes" if letter == "1" else "no", "text": "yes", "right": letter == "1"}
        for place, letter in enumerate(right)
    ]


def run(folder: Path, name: str, *parts: list[dict]) -> Path:
    """The folder of a run with these answers."""
    write_predictions(folder / name / "predictions.jsonl", [line for part in parts for line in part])
    return folder / name


def side(name: str, values: list[float], first: int = 0) -> Side:
    return Side(name, [Series("verbs", "0-shot", {(str(place + first), 0): one for place, one in enumerate(values)})])


def call(*arguments: object) -> SimpleNamespace:
    app = typer.Typer()
    app.command()(compare)
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr, exception=result.exception)


@pytest.mark.parametrize("values", [[1, 0, -1, 0, 1, 1, 0, 0, 1, 0] * 6, list(np.linspace(-1, 2, 37))])
def test_the_interval_is_that_of_drawing_items(values: list[float]) -> None:
    """Drawing counts of values in the place of items must give the distribution of drawing items."""
    random, data = np.random.default_rng(7), np.array(values, dtype=float)
    means = data[random.integers(0, len(data), size=(40_000, len(data)))].mean(axis=1)
    expected = np.percentile(means, [2.5, 97.5])
    assert bootstrap_interval(values, draws=40_000) == pytest.approx(tuple(expected), abs=0.02)
    assert bootstrap_interval(values) == bootstrap_interval(values), "the same seed gives the same interval"
    if len(set(values)) > 3:  # the means of three values are few
        assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """An interval that is too narrow calls noise a result: 95 % of them must hold the true mean of 0.1."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        values = random.choice([-1.0, 0.0, 1.0], p=[0.2, 0.5, 0.3], size=120)
        low, high = bootstrap_interval(values, draws=2000)
        held += low <= 0.1 <= high
    assert 0.91 <= held / 300 <= 0.98


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    [(9, 1, 2 * 11 / 1024), (1, 9, 2 * 11 / 1024), (5, 5, 1.0), (0, 0, 1.0), (6, 0, 1 / 32)],
)
def test_the_sign_test_by_hand(gained: int, lost: int, expected: float) -> None:
    """A p-value of one tail would be half as large."""
    assert sign_test(gained, lost) == pytest.approx(expected)


def test_pairs_are_compared_and_not_means() -> None:
    """What is hard about an item must drop out: two runs that differ on two of a hundred items differ by that."""
    base = [1.0] * 50 + [0.0] * 50
    found = compare_sides([side("a", base), side("b", [1.0] * 52 + [0.0] * 48)])["rows"][0]
    assert (found["first_score"], found["score"], found["difference"]) == (0.5, 0.52, pytest.approx(0.02))
    assert (found["gained"], found["lost"], found["p_value"]) == (2, 0, 0.5)
    low, high = found["interval"]
    assert 0 <= low < 0.02 < high < 0.06, "two separate intervals of 50 % would be 0.2 wide"


def test_only_shared_items_are_compared() -> None:
    """An average over other items is another exam; what was left out must be said, with its count."""
    found = compare_sides([side("a", [1.0, 1.0, 0.0, 0.0]), side("b", [0.0, 1.0, 1.0], first=2)])
    assert found["rows"][0]["shared"] == 2 and found["rows"][0]["difference"] == pytest.approx(0.5)
    assert "a was asked 4 items and b 3; the 2 that both were asked are compared" in " ".join(found["warnings"])
    with pytest.raises(ValueError, match="a and b have no item in common"):
        compare_sides([side("a", [1.0]), side("b", [1.0], first=9)])


def test_several_runs_are_held_against_the_first(tmp_path: Path) -> None:
    """Three seeds are three runs; each must have its own line and its own figures."""
    runs = [run(tmp_path, f"seed{number}", lines(right)) for number, right in enumerate(["1100", "1110", "1111"])]
    found = compare_sides(load_sides(runs))
    assert [(row["side"], row["difference"]) for row in found["rows"]] == [("seed1", 0.25), ("seed2", 0.5)]
    assert found["first"] == "seed0"
    agreement = found["rows"][1]["answer_agreement"]
    assert (agreement["agreement"], agreement["first_wrong"], agreement["agreement_when_first_wrong"]) == (0.5, 2, 0.0)


def test_tasks_and_shots_are_kept_apart(tmp_path: Path) -> None:
    """The forgetting task's answers must not be mixed into the trained one's, nor 8 shots into none."""
    parts = [lines("10"), lines("11", shots=8), lines("00", task="other", first=50)]
    more = [lines("11"), lines("01", shots=8), lines("01", task="renamed", first=50)]
    found = compare_sides(load_sides([run(tmp_path, "a", *parts), run(tmp_path, "b", *more)]))
    rows = {(row["task"], row["measure"]): row["difference"] for row in found["rows"]}
    assert rows == {("verbs", "0-shot"): 0.5, ("verbs", "8-shot"): -0.5, ("other", "0-shot"): 0.5}


def test_one_run_is_compared_with_itself_before(tmp_path: Path) -> None:
    """What training changed is the first question that anybody has."""
    one = run(tmp_path, "one", lines("1000", "before"), lines("1111"), lines("1100", "gold"))
    (one / "report.json").write_text(
        json.dumps({"fidelity": {"before": {"agreement": 0.2}, "after": {"agreement": 0.7}}})
    )
    found = compare_sides(load_sides([one]))
    assert [(row["side"], row["difference"]) for row in found["rows"]] == [("after", 0.75), ("gold", 0.25)]
    assert found["fidelity"] == {"before": {"agreement": 0.2}, "after": {"agreement": 0.7}}
    with pytest.raises(ValueError, match="holds after; one run alone is compared with itself before training"):
        load_sides([run(tmp_path, "two", lines("11"))])
    with pytest.raises(ValueError, match="has no answers of teacher; it has before, after, gold"):
        load_sides([one, one], stage="teacher")
    names = [side.name for side in load_sides([one, one / "predictions.jsonl"], stage="before")]
    assert names == ["one (1)", "one (2)"], "two columns of one name can't be told apart"


def test_a_question_asked_twice_is_two_items(tmp_path: Path) -> None:
    """A dictionary by hash alone would drop the second answer."""
    twice = [lines("1")[0], lines("0")[0]]
    found = compare_sides(load_sides([run(tmp_path, "a", twice), run(tmp_path, "b", lines("1") + lines("1"))]))
    assert found["rows"][0]["shared"] == 2 and found["rows"][0]["gained"] == 1


def test_results_of_hfkd_evaluate_are_compared(tmp_path: Path) -> None:
    """A run of before answers were kept is evaluated anew; the harness's documents are paired like ours."""
    paths = []
    for name, right, scores in (("x", "10", [0.5, 2.0, 1.5]), ("y", "11", [1.0, 2.5, 1.5])):
        results = Results(tmp_path / f"{name}.json", {"after": "w"})
        results.put("after", "k_shot", "f", {"predictions": lines(right)}, 1.0)
        pairs = [[f"{place}", score] for place, score in enumerate(scores)]
        harness = {"tasks": {}, "scores": {"arc": {"logprob": pairs}}}
        results.put("after", "lm_eval.arc", "f", harness, 1.0)
        results.put("after", "fidelity", "f", {"agreement": 0.5, "agreement_interval": [0.4, 0.6]}, 1.0)
        paths.append(tmp_path / f"{name}.json")
    found = compare_sides(load_sides(paths))
    rows = {row["task"]: row for row in found["rows"]}
    assert rows["verbs"]["difference"] == 0.5
    assert rows["lm_eval.arc"]["difference"] == pytest.approx(1 / 3) and rows["lm_eval.arc"]["p_value"] is None
    assert set(found["fidelity"]) == {"x", "y"}


def test_long_texts_are_held_against_each_other(tmp_path: Path) -> None:
    """Two runs that give the same number for other reasons are not the same run; single words have no reasons."""
    texts = ["first we add two and two which is four", "then we add it to ten and have fourteen"]
    told = [{**line, "text": text} for line, text in zip(lines("11"), texts, strict=True)]
    other = [{**told[0]}, {**told[1], "text": "then we take ten away and have nothing left at all"}]
    sides = load_sides([run(tmp_path, "a", told), run(tmp_path, "b", told), run(tmp_path, "c", other)])
    same, differ = (row["rationale_similarity"] for row in compare_sides(sides)["rows"])
    assert same["bleu"] == pytest.approx(100) and same["rouge_l"] == pytest.approx(1)
    assert differ["bleu"] < 90 and differ["rouge_l"] < 0.9
    short = load_sides([run(tmp_path, "d", lines("11")), run(tmp_path, "e", lines("11"))])
    assert "rationale_similarity" not in compare_sides(short)["rows"][0]


def test_what_is_printed(tmp_path: Path) -> None:
    """A difference without its interval, or a name eaten as markup, is worse than no table."""
    runs = [run(tmp_path, "[a]", lines("1" * 10 + "0" * 30)), run(tmp_path, "[b]", lines("1" * 30 + "0" * 10))]
    found = compare_sides(load_sides(runs))
    console = Console(width=100, record=True, file=io.StringIO())
    print_comparison(found, console)
    text = console.export_text()
    assert "verbs (40 items): [b] beside [a]" in text and "25.0 → 75.0" in text and "+50.0 [+3" in text
    assert "20 / 0" in text and "< 0.001" in text


def test_a_figure_without_an_interval_is_printed_without_one() -> None:
    """A table that fails on a report of few texts, or an older one that says 100 % (100 to 100)."""
    one = {"agreement": 1.0, "agreement_interval": None, "forward_kl": 0.25, "forward_kl_interval": [0.25, 0.25]}
    other = {"agreement": 0.5, "agreement_interval": [0.4, 0.6], "reverse_kl": 0.5}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(fidelity_table({"a": one, "b": other}))
    text = console.export_text()
    assert "100.0%" in text and "50.0% [40.0%, 60.0%]" in text and "0.250" in text
    assert text.count("[") == 1


def test_the_command(tmp_path: Path) -> None:
    """The whole way from folders to a table and a file, and one message where it can't be gone."""
    runs = [run(tmp_path, "a", lines("1100")), run(tmp_path, "b", lines("1111"))]
    result = call(*runs, "--json", tmp_path / "out.json", "--draws", 500)
    assert result.code == 0, result.err
    assert "b beside a" in result.out and "50.0 → 100.0" in result.out and "+50.0 [" in result.out
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["kind"], written["draws"], written["rows"][0]["difference"]) == ("hfkd comparison", 500, 0.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.mkdir(), "has no predictions.jsonl.*hfkd evaluate .* --base --json FILE"),
        (lambda folder: folder.write_text("{}"), "is JSON of another kind"),
        (lambda folder: folder.write_text("{"), "is no JSON"),
        (lambda folder: None, "No such file"),
        (
            lambda folder: Results(folder, {"after": "w"}).put("after", "k_shot", "f", {"predictions": [{}]}, 0),
            "damaged",
        ),
    ],
)
def test_what_is_no_run(tmp_path: Path, make, words: str) -> None:
    """A user who names an older run must learn what to do, not see a KeyError."""
    import re

    make(tmp_path / "old")
    result = call(run(tmp_path, "a", lines("1")), tmp_path / "old")
    assert result.code == 2 and result.err.startswith("Error: ") and re.search(words, result.err), result.err


def test_a_damaged_report_is_named(tmp_path: Path) -> None:
    """Fidelity that is left out in silence reads as fidelity that there wasn't."""
    one = run(tmp_path, "a", lines("1", "before"), lines("1"))
    (one / "report.json").write_text("[1]")
    with pytest.raises(ValueError, match="report.json is damaged"):
        load_sides([one])


def test_no_answer_is_not_the_same_answer(tmp_path: Path) -> None:
    """Two collapsed models that say nothing agree on everything, which reads as two models that are alike."""
    silent = [{**line, "prediction": "", "right": False} for line in lines("000")]
    one, other = (
        run(tmp_path, "a", [*silent, *lines("1", first=9)]),
        run(tmp_path, "b", [*silent, *lines("1", first=9)]),
    )
    found = compare_sides(load_sides([one, other]))
    assert found["rows"][0]["answer_agreement"]["both_unanswered"] == 3
    assert "on 3 of 4 items neither a nor b gave an answer" in " ".join(found["warnings"])
    spoken = compare_sides(load_sides([run(tmp_path, "c", lines("10")), run(tmp_path, "d", lines("10"))]))
    assert "neither" not in " ".join(spoken["warnings"])


def test_a_task_is_not_compared_with_another_one(tmp_path: Path) -> None:
    """One item that happens to be in both would stand as the forgetting of a run that was never asked."""
    mine = run(tmp_path, "x", lines("10", task="main"), lines("00", task="forget", first=1))
    found = compare_sides(load_sides([mine, run(tmp_path, "y", lines("11", task="main"))]))
    assert [row["task"] for row in found["rows"]] == ["main"]
    assert "y has nothing like forget, 0-shot." in found["warnings"]
    both = run(tmp_path, "z", lines("111", task="main"), lines("11", task="forget", first=2))
    rows = compare_sides(load_sides([mine, both]))["rows"]
    assert [(row["task"], row["shared"]) for row in rows] == [("main", 2), ("forget", 1)], "its own name goes first"


def test_another_name_is_said(tmp_path: Path) -> None:
    """Whether a renamed task is the same one is for the reader to judge."""
    runs = [run(tmp_path, "x", lines("10", task="verbs")), run(tmp_path, "y", lines("11", task="words"))]
    found = compare_sides(load_sides(runs))
    assert "what x calls verbs is compared with what y calls words" in " ".join(found["warnings"])


def asked(folder: Path, **evaluation: object) -> Path:
    """Write how a run asked its questions into its folder."""
    recipe = {
        "data": {"prompt": {"question": "Q: {prompt}", "stop": ["\n"]}},
        "evaluation": {"extract": "text", "max_new_tokens": 16, "seed": 0, "forgetting": [{"extract": None}]}
        | evaluation,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "report.json").write_text(json.dumps({"forgetting": [{"task": "other", "k_shot": {"after": {"0": 1}}}]}))
    return folder


def test_another_way_of_asking_is_said(tmp_path: Path) -> None:
    """A limit of 4 tokens instead of 16, or another way to read an answer, looks like a worse model."""
    parts = [lines("10"), lines("11", task="other", first=50)]
    one, same = (asked(run(tmp_path, name, *parts)) for name in ("a", "same"))
    words = "a and b were asked in other ways, which may be all that differs: "
    assert not [line for line in compare_sides(load_sides([one, same]))["warnings"] if "other ways" in line]
    for change, told in (
        ({"max_new_tokens": 4}, "evaluation.max_new_tokens is 16 and 4."),
        ({"extract": "number", "forgetting": [{"extract": "text"}]}, "evaluation.extract is 'text' and 'number'."),
        ({"forgetting": [{"extract": "number"}]}, "evaluation.extract is 'text' and 'number'."),
    ):
        other = asked(run(tmp_path, "b", *parts), **change)
        for second in (other, other / "predictions.jsonl"):
            warnings = compare_sides(load_sides([one, second]))["warnings"]
            assert [line for line in warnings if "other ways" in line] == [words + told]
    reseeded = asked(run(tmp_path, "b", *parts), seed=1)
    assert "other ways" not in " ".join(compare_sides(load_sides([one, reseeded]))["warnings"]), "no demonstrations"
    shots = [asked(run(tmp_path, name, lines("10", shots=2), parts[1]), seed=n) for n, name in enumerate("ab")]
    assert words + "evaluation.seed is 0 and 1." in compare_sides(load_sides(shots))["warnings"]


def test_the_files_of_hfkd_evaluate_say_how_they_asked(tmp_path: Path) -> None:
    """Two files of other settings are compared as easily as two folders, and a file with a folder."""
    paths = []
    for number, name in enumerate("xy"):
        results = Results(tmp_path / f"{name}.json", {"after": "w"})
        way = {"evaluation.max_new_tokens": 16 + number, "data.prompt.question": "Q: {prompt}"}
        results.put("after", "k_shot", "f", {"predictions": lines("10"), "asked": way}, 1.0)
        paths.append(results.path)
    told = " ".join(compare_sides(load_sides(paths))["warnings"])
    assert "evaluation.max_new_tokens is 16 and 17." in told
    folder = asked(run(tmp_path, "z", lines("10"), lines("1", task="other", first=5)))
    assert "max_new_tokens is 17 and 16." in " ".join(compare_sides(load_sides([paths[1], folder]))["warnings"])


def test_tasks_of_one_name_are_not_one_task(tmp_path: Path) -> None:
    """What was trained and what was forgotten, in one figure, is the figure of neither."""
    merged = asked(run(tmp_path, "a", lines("111", task="ds"), lines("00", task="ds", first=50)))
    with pytest.raises(ValueError, match=r"has 2 tasks under 1 names \(ds\).*hfkd evaluate .* --base --json FILE"):
        load_sides([merged, merged])
    results = Results(tmp_path / "both.json", {"after": "w"})
    results.put("after", "k_shot", "f", {"predictions": lines("111", task="ds")}, 1.0)
    results.put("after", "forgetting.ds", "f", {"predictions": lines("00", task="ds", first=50)}, 1.0)
    rows = compare_sides(load_sides([results.path, results.path]))["rows"]
    assert [(row["task"], row["shared"]) for row in rows] == [("ds", 3), ("ds (forgetting.ds)", 2)]
