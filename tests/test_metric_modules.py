"""The metrics of the package: each equals a case that was computed by hand, and loads as `evaluate` loads metrics."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer

import hfkd.eval.metrics
from hfkd import measures
from hfkd.eval.canaries import canary_exposure, log_perplexities
from hfkd.eval.metrics import METRICS, load_metric, metric_path
from hfkd.eval.similarity import rouge_l

HALF, NINE = [math.log(0.5), math.log(0.5)], [math.log(0.9), math.log(0.1)]
LN2, LN3 = math.log(2), math.log(3)
FORWARD = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)  # KL((.9, .1) || (.5, .5))
REVERSE = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5)  # KL((.5, .5) || (.9, .1))
WALKED, TALKED = "the cat walked to the big house", "the cat talked to the old house"


def compute(name: str, **inputs: Any) -> dict[str, Any]:
    return load_metric(name).compute(**inputs)


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "token_agreement",
        {"predictions": [1, 5, 9], "references": [1, 2, 9], "gold": [1, 2, 3]},
        {"agreement": 2 / 3, "agreement_when_teacher_wrong": 1, "teacher_wrong": 1, "student_accuracy": 1 / 3}
        | {"teacher_accuracy": 2 / 3, "chance": 2 / 9, "tokens": 3},
    ),
    (
        "kl_divergence",
        {"predictions": [HALF, NINE], "references": [NINE, NINE]},
        {"forward_kl": FORWARD / 2, "reverse_kl": REVERSE / 2, "tokens": 2},
    ),
    (
        "captured_mass",  # the teacher's two likeliest ids are 0 and 2; the student has 0.1 and 0.2 there
        {"predictions": np.log([[0.1, 0.7, 0.2]]), "references": np.log([[0.6, 0.1, 0.3]]), "k": 2},
        {"k": 2, "student": 0.3, "teacher": 0.9, "tokens": 1},
    ),
    (
        "entropy_gap",
        {
            "predictions": [[0.0, 0.0], [0.0, -1e9]],
            "references": [
                [
                    0.0,
                    0.0,
                ][:2],
                [3.0, 3.0],
            ],
        },
        {"student": LN2 / 2, "teacher": LN2, "gap": -LN2 / 2, "tokens": 2},
    ),
    (
        "calibration",  # sure by 0.92 twice, once right: |0.92 - 0.5|; sure by 0.65 once, wrong: 0.65
        {"predictions": np.log([[0.92, 0.08], [0.92, 0.08], [0.65, 0.35]]), "references": [0, 1, 1]},
        {"expected_calibration_error": (2 * 0.42 + 0.65) / 3, "brier": (0.0128 + 1.6928 + 0.845) / 3}
        | {"accuracy": 1 / 3}
        | {
            "tokens": 3,
            "reliability": [
                {"low": 0.6, "high": 0.7, "tokens": 1, "confidence": 0.65, "accuracy": 0.0},
                {"low": 0.9, "high": 1.0, "tokens": 2, "confidence": 0.92, "accuracy": 0.5},
            ],
        },
    ),
    (
        "perplexity",
        {"predictions": [-LN2, -2 * LN2]},
        {"perplexity": 2**1.5, "surprise": 1.5 * LN2, "tokens": 2},
    ),
    (
        "worst_tokens",
        {"predictions": [HALF, NINE, HALF], "references": [NINE, NINE, NINE], "gold": [1, 1, 0], "count": 1},
        {
            "worst_tokens": [
                {"text": "0", "tokens": 1, "forward_kl": FORWARD, "total": FORWARD, "student": "0", "teacher": "0"}
            ]
        },
    ),
    (
        "answer_agreement",
        {"predictions": ["1", "5", "9"], "references": ["1", "2", "9.0"], "gold": [1, 2, 3]},
        {"agreement": 2 / 3, "agreement_when_teacher_wrong": 1, "teacher_wrong": 1, "student_accuracy": 1 / 3}
        | {"teacher_accuracy": 2 / 3, "items": 3, "both_unanswered": 0}
        | {"agreement_interval": [0.2076596, 0.9385081]},  # Wilson, 2 of 3
    ),
    (
        "rationale_similarity",  # 5 of 7 words, 2 of 6 pairs, of triples and fours smoothed 1/(2*5) and 1/(4*4)
        {"predictions": [WALKED], "references": [TALKED]},
        {"bleu": 100 * (5 / 7 * 2 / 6 * 1 / 10 * 1 / 16) ** 0.25, "rouge_l": 5 / 7, "texts": 1},
    ),
    (
        "forgetting",
        {"predictions": [1, 0, 0, 1], "references": [1, 1, 1, 0]},
        {"before": 3 / 4, "after": 2 / 4, "change": -1 / 4, "lost": 2, "gained": 1, "items": 4},
    ),
    (
        "canary_exposure",
        {"predictions": [float(number) for number in range(10_000)], "references": [1] + [0] * 9_999},
        {"exposure": 13.2877, "largest": 13.2877, "rank": 1, "candidates": 10_000, "maximum": 13.2877},
    ),
]


def close(expected: Any) -> Any:
    """Numbers up to float32, in lists and dictionaries too."""
    if isinstance(expected, dict):
        return {key: close(value) for key, value in expected.items()}
    if isinstance(expected, list):
        return [close(value) for value in expected]
    return pytest.approx(expected, rel=1e-5, abs=1e-6) if isinstance(expected, float) else expected


@pytest.mark.parametrize(("name", "inputs", "expected"), CASES, ids=[name for name, *_ in CASES])
def test_each_metric_is_the_hand_computed_one(name: str, inputs: dict, expected: dict) -> None:
    """A wrong direction, base of a logarithm, divisor or edge of a bin makes a figure that looks just as good."""
    found = compute(name, **inputs)
    assert {key: found[key] for key in expected} == close(expected)
    assert found.keys() - expected.keys() <= {"change_interval"}
    json.dumps(found, allow_nan=False)


def test_every_metric_has_a_case_and_a_file() -> None:
    """A metric in a file that nobody can load by its name, or without a case."""
    folder = Path(hfkd.eval.metrics.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "inputs"}
    assert files == set(METRICS) == {name for name, *_ in CASES}


LOAD_ALL = """
import json, sys
import evaluate
from hfkd.eval.metrics import METRICS, metric_path
found = {}
for name in METRICS:
    metric = evaluate.load(metric_path(name))
    found[name] = [type(metric).__module__.split(".")[0], metric.name, bool(metric.inputs_description)]
metric = evaluate.load(metric_path("token_agreement"))
metric.add_batch(predictions=[1, 2], references=[1, 3])
found["agreement"] = metric.compute(predictions=[4], references=[4])["agreement"]
print(json.dumps(found))
"""


def test_evaluate_loads_them_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate.load` copies the file and runs it elsewhere: an import beside it, or a download, fails only there."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run([sys.executable, "-c", LOAD_ALL], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("agreement") == pytest.approx(2 / 3)
    assert found == {name: ["evaluate_modules", name, True] for name in METRICS}


def test_an_unknown_metric_is_named() -> None:
    """A typing error that becomes a search of the hub."""
    for function in (load_metric, metric_path):
        with pytest.raises(ValueError, match="no metric 'token_agrement'; expected one of token_agreement"):
            function("token_agrement")


# --- the ends of the scale


def test_identical_models_give_agreement_one_and_no_divergence() -> None:
    """A floor of rounding below which no student can come."""
    rows = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 5
    found = compute("kl_divergence", predictions=rows, references=rows.numpy())
    assert found["forward_kl"] == found["reverse_kl"] == 0
    assert compute("entropy_gap", predictions=rows, references=rows)["gap"] == 0
    ids = rows.argmax(dim=-1)
    assert compute("token_agreement", predictions=ids, references=ids)["agreement"] == 1
    texts = ["walked", "", "the answer is 4"]
    assert compute("rationale_similarity", predictions=texts, references=texts) == {
        "bleu": 100, "rouge_l": 1, "texts": 3
    }  # fmt: skip
    found = compute("answer_agreement", predictions=texts, references=texts)
    assert found["agreement"] == 1 and found["both_unanswered"] == 1


def test_a_shuffled_teacher_gives_chance() -> None:
    """An agreement that most of comes from both saying the most frequent word."""
    draw = np.random.default_rng(0)
    student = draw.choice(6, size=4000, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    teacher = np.where(draw.random(4000) < 0.8, student, draw.integers(0, 6, 4000))
    shuffled = draw.permutation(teacher)
    honest, chance = (compute("token_agreement", predictions=student, references=ids) for ids in (teacher, shuffled))
    assert honest["agreement"] > 0.8 and 0.25 < honest["chance"] < 0.4
    assert chance["chance"] == pytest.approx(honest["chance"])
    assert chance["agreement"] == pytest.approx(honest["chance"], abs=4 * math.sqrt(0.3 * 0.7 / 4000))
    answers = [list(map(str, ids)) for ids in (student, shuffled)]
    found = compute("answer_agreement", predictions=answers[0], references=answers[1])
    assert found["agreement"] == chance["agreement"]


def test_a_probability_of_zero_costs_much_and_stays_finite() -> None:
    """log 0: the mean of a whole set is infinite or no number because of one token, or 1e-9 hides it."""
    certain = [[0.0, -math.inf]]
    found = compute("kl_divergence", predictions=certain, references=[HALF])
    assert found["forward_kl"] == pytest.approx(0.5 * 1e4, rel=1e-3)
    assert found["reverse_kl"] == pytest.approx(LN2)
    assert compute("kl_divergence", predictions=certain, references=certain)["forward_kl"] == 0


def test_a_sure_model_has_its_bin() -> None:
    """A confidence of exactly 1 falls off the last bin, one at an edge is counted twice."""
    bins = measures.reliability([1.0, 0.5, 0.0], [True, False, False], bins=2)
    assert [(each["low"], each["tokens"]) for each in bins] == [(0.0, 1), (0.5, 2)]
    assert measures.calibration_error(bins) == pytest.approx((0 + 2 * abs(0.75 - 0.5)) / 3)


def test_a_teacher_that_is_never_wrong() -> None:
    """A share of nothing is no 0, which would read as never agreeing."""
    found = compute("token_agreement", predictions=[1, 2], references=[1, 1], gold=[1, 1])
    assert found["agreement_when_teacher_wrong"] is None and found["teacher_wrong"] == 0


@pytest.mark.parametrize("longest", [1, 2, 31, 32, 33, 34, 40, 64, 100, 1000, 100_000])
def test_a_table_by_position_is_short_and_whole(longest: int) -> None:
    """A report of a hundred thousand lines, or positions that are in no range or in two."""
    edges = measures.position_ranges(longest)
    assert edges[0] == 0 and edges[-1] == longest and (np.diff(edges) > 0).all()
    assert len(edges) - 1 <= 32
    assert list(edges[:16]) == list(range(16))[: len(edges[:16])]
    positions = np.unique(np.r_[0, longest // 2, longest - 1])
    table = measures.by_position(positions, positions == 0, positions)
    assert sum(each["tokens"] for each in table) == len(positions)
    assert all(each["first"] <= each["last"] for each in table) and table[-1]["last"] == longest - 1
    assert table[0]["agreement"] == 1 and (longest < 3 or table[-1]["agreement"] == 0)


def test_the_bootstrap_finds_the_interval_of_a_mean() -> None:
    """An interval of the wrong level, or of items that weren't drawn together."""
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    low, high = measures.bootstrap(values, np.ones(400), resamples=4000)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert measures.bootstrap(values, np.ones(400)) == measures.bootstrap(values, np.ones(400))
    narrow = measures.bootstrap(values, np.ones(400), resamples=4000, level=0.5)
    assert low < narrow[0] < narrow[1] < high


@pytest.mark.parametrize(
    ("parts", "known"),
    [([0.0, 1.0] * 4 + [1.0], False), ([0.0, 1.0] * 5, True), ([1.0] * 40, False), ([0.1] * 40, False)],
    ids=["nine", "ten", "all right", "all alike"],
)
def test_an_interval_without_width_is_none(parts: list[float], known: bool) -> None:
    """100 % (100 to 100): what few or equal texts can't say is published as certain."""
    found = measures.interval(np.array(parts) * 3, np.full(len(parts), 3))
    assert found == list(measures.bootstrap(parts, np.ones(len(parts)))) if known else found is None
    change = compute("forgetting", predictions=parts, references=[0.0] * len(parts))["change_interval"]
    assert (change is not None) == known


def test_forgetting_is_paired() -> None:
    """Two runs that differ on few items look alike when their intervals are taken apart."""
    before = np.tile([1, 0], 100)
    after = before.copy()
    after[:20] = 0
    found = compute("forgetting", predictions=after, references=before)
    assert (found["lost"], found["gained"], found["change"]) == (10, 0, pytest.approx(-0.05))
    low, high = found["change_interval"]
    assert -0.1 < low < -0.05 < high < 0, "unpaired, each mean is known to 0.07 only"


def test_rouge_l_keeps_the_order_of_words() -> None:
    """Words counted in any order, or only where they touch."""
    assert rouge_l("a b c d", "d c b a") == pytest.approx(2 * 1 / 8)
    assert rouge_l("a x b y c", "a b c") == pytest.approx(2 * 3 / 8)
    assert rouge_l("A, b!", "a b") == 1 and rouge_l("", "") == 1 and rouge_l("a", "") == 0
    assert rouge_l("a a b", "a b a") == pytest.approx(2 * 2 / 6)
    long = " ".join(str(number % 7) for number in range(300))
    assert rouge_l(long, long) == 1


# --- what isn't given


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_says_what_it_needs(name: str) -> None:
    """A `NoneType has no len()` from inside a library."""
    metric = load_metric(name)
    with pytest.raises(ValueError, match=f"The metric {name} needs predictions") as caught:
        metric.compute()
    assert "Args:" in str(caught.value) and "Returns:" in str(caught.value)
    with pytest.raises(ValueError, match="There are no predictions|needs references"):
        load_metric(name).compute(predictions=[])
    if "references" in metric.features:
        with pytest.raises(ValueError, match=f"The metric {name} needs references"):
            load_metric(name).compute(predictions=CASES[list(METRICS).index(name)][1]["predictions"])


ROW = [[0.1, 0.2, 0.3]]


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("worst_tokens", {"predictions": ROW, "references": ROW}, "needs gold="),
        ("worst_tokens", {"predictions": ROW, "references": ROW, "gold": [3]}, "ids from 3 to 3, and the rows have 3"),
        ("token_agreement", {"predictions": [1], "references": [1], "gold": [1, 2]}, r"gold has the shape \[2\]"),
        ("calibration", {"predictions": ROW, "references": [-100]}, "aren't learned"),
        ("calibration", {"predictions": ROW, "references": [0], "bins": 0}, "bins is 0"),
        ("kl_divergence", {"predictions": ROW, "references": [[0.1, 0.2]]}, "3 ids and the teacher's .* 2"),
        ("kl_divergence", {"predictions": [[0.1], [0.2, 0.3]], "references": [[0.1], [0.2, 0.3]]}, "1 to 2 entries"),
        ("kl_divergence", {"predictions": [[0.3, 0.7]], "references": [[0.5, 0.5]]}, "these are probabilities"),
        ("kl_divergence", {"predictions": [[math.nan, 0.7]], "references": [[0.1, 0.5]]}, "holds NaN"),
        ("kl_divergence", {"predictions": ROW, "references": [*ROW, *ROW]}, "Mismatch in the number"),
        ("captured_mass", {"predictions": ROW, "references": ROW, "k": 4}, "k is 4, and the rows have 3"),
        ("perplexity", {"predictions": [0.5]}, "expected log-probabilities"),
        ("answer_agreement", {"predictions": ["1"], "references": ["1"], "gold": []}, "0 gold answers and 1"),
        ("forgetting", {"predictions": [math.nan], "references": [1.0]}, "1 of 1 predictions aren't finite"),
        ("canary_exposure", {"predictions": [1.0, 2.0], "references": [0, 0]}, "at least one was inserted"),
        *(
            ("canary_exposure", {"predictions": [wrong, 2.0], "references": [1, 0]}, "1 of 2 predictions")
            for wrong in (math.nan, math.inf, -math.inf, None)
        ),
        ("forgetting", {"predictions": [1.0], "references": [None]}, "1 of 1 references aren't finite"),
        ("perplexity", {"predictions": [math.nan, -1.0]}, "1 of 2 predictions aren't finite"),
        ("token_agreement", {"predictions": [None, 1], "references": [None, 1]}, "predictions holds None"),
        ("token_agreement", {"predictions": [1], "references": [1], "gold": [None]}, "gold holds None"),
        ("calibration", {"predictions": ROW, "references": [None]}, "references holds None"),
        ("calibration", {"predictions": [[math.inf, 0.0]], "references": [0]}, "holds NaN or infinity"),
        ("kl_divergence", {"predictions": [[math.inf, 0.7]], "references": [[0.1, 0.5]]}, "predictions holds NaN or"),
        ("kl_divergence", {"predictions": ROW, "references": [[math.inf, 0.5, 0.1]]}, "references holds NaN or"),
        ("kl_divergence", {"predictions": [[-math.inf] * 3], "references": ROW}, "rules out all ids"),
        ("captured_mass", {"predictions": [[math.inf, 0.1]], "references": [[0.1, 0.2]]}, "holds NaN or infinity"),
        ("entropy_gap", {"predictions": [[0.1, 0.2]], "references": [[math.inf, 0.1]]}, "holds NaN or infinity"),
        ("worst_tokens", {"predictions": [[math.inf, 0.1]], "references": [[0.1, 0.2]], "gold": [0]}, "infinity"),
        ("answer_agreement", {"predictions": ["nan"], "references": ["1"], "gold": [math.nan]}, "None or NaN"),
        ("answer_agreement", {"predictions": ["None"], "references": ["1"], "gold": [None]}, "None or NaN"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, inputs: dict, message: str) -> None:
    """A figure of probabilities taken for logits, or of labels that aren't learned, looks like any other."""
    with pytest.raises(ValueError, match=message):
        compute(name, **inputs)


def test_processes_share_a_metric(tmp_path: Path) -> None:
    """What several processes add is computed together: `num_process` must not be ours to break."""
    settings = {"num_process": 1, "process_id": 0, "experiment_id": "shared", "cache_dir": str(tmp_path)}
    metric = load_metric("token_agreement", keep_in_memory=False, **settings)
    metric.add_batch(predictions=[1], references=[1])
    metric.add(prediction=2, reference=3)
    assert metric.compute()["agreement"] == 0.5
    assert isinstance(metric, evaluate.Metric)


# --- canaries


def test_exposure_of_ends_and_ties() -> None:
    """A model that finds all candidates alike exposes nothing, though none is ahead of the canary."""
    marks = [False] * 9_999 + [True]
    last = measures.exposure(range(10_000), marks)
    assert last["exposure"] == 0 and last["rank"] == 10_000
    alike = measures.exposure([3.0] * 10_000, marks)
    assert alike["exposure"] == pytest.approx(1, abs=1e-3)
    several = measures.exposure([1.0, 2.0, 3.0, 4.0], [True, False, False, True])
    assert several["exposure"] == pytest.approx(1.0) and several["largest"] == pytest.approx(2.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_model_without_numbers_has_no_exposure(wrong: float) -> None:
    """A run that overflowed gets a clean bill: candidates that are no numbers rank as if all were alike."""
    model, tokenizer = make_model(), make_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.fill_(wrong)
    with pytest.raises(ValueError, match="71 of 71 candidates have no finite log-perplexity"):
        canary_exposure(model, tokenizer, "the code is 42!", [f"the code is {number}" for number in range(10, 80)])
    with pytest.raises(ValueError, match="1 of 3 candidates"):
        measures.exposure([1.0, wrong, 3.0], [True, False, False])


def test_log_perplexities_are_those_of_the_model() -> None:
    """Scores of the prompt, of the padding, or without the first token; a mean in place of a sum."""
    model, tokenizer = make_model(), make_tokenizer()
    texts = ["the code is 4821", "the code is 1", "walked"]
    for prompt, before in (("", [tokenizer.bos_token_id]), ("Answer:", tokenizer("Answer:")["input_ids"])):
        found = log_perplexities(model, tokenizer, texts, prompt=prompt, batch_size=2)
        for text, score in zip(texts, found, strict=True):
            ids = tokenizer(text)["input_ids"]
            with torch.no_grad():
                rows = model(input_ids=torch.tensor([[*before, *ids]])).logits[0].double().log_softmax(-1)
            expected = -sum(float(rows[len(before) - 1 + at, number]) for at, number in enumerate(ids))
            assert score == pytest.approx(expected, rel=1e-5)


def test_a_memorised_secret_is_exposed() -> None:
    """An exposure that doesn't rise when the model has seen the canary a hundred times."""
    model, tokenizer = make_model(), make_tokenizer()
    candidates = [f"the code is {number:04d}" for number in range(0, 10_000, 40)]
    canary = candidates[123]
    before = canary_exposure(model, tokenizer, canary, candidates)
    assert before["candidates"] == len(candidates) == 250
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(canary)["input_ids"]]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.train()
    after = canary_exposure(model, tokenizer, canary, candidates[:123] + candidates[124:])
    assert model.training
    assert before["exposure"] < after["exposure"] == after["maximum"] == math.log2(250)
    assert after["log_perplexity"] < before["log_perplexity"]


def test_a_canary_needs_candidates() -> None:
    """The first of one has rank 1."""
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(ValueError, match="no candidate besides the canary"):
        canary_exposure(model, tokenizer, "the code is 1", ["the code is 1"])
    with pytest.raises(ValueError, match="has no token"):
        canary_exposure(model, tokenizer, "the code is 1", [""])
