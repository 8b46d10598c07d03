"""Fidelity of a student to its teacher: every figure against plain loops, and nothing of the trainer changed."""

from __future__ import annotations

import io
import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import build, make_dataset
from conftest import make_model
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from training import DEMONSTRATIONS, ROWS, make_trainer, trained_weights

from hfkd import LocalTeacher
from hfkd.cache.codecs import Hidden, TopK
from hfkd.cache.sampling import Sampled
from hfkd.data.collate import DistillationCollator
from hfkd.eval.fidelity import FidelityReport, measure_fidelity
from hfkd.teachers import CachedTeacher

VOCAB = 384
SHARP = {"initializer_range": 1.0}
"""Weights so large that a model is sure of some tokens, and two models agree on some."""


def local(seed: int = 1, **settings: Any) -> LocalTeacher:
    return LocalTeacher(make_model(seed=seed, **settings))


def measure(folder: Any, rows: Any = None, top_k: int = 64, **settings: Any) -> FidelityReport:
    side = settings.pop("padding", "right")
    trainer = make_trainer(folder, **{"teacher": local(), "demonstrations": [], **settings})
    trainer.data_collator = DistillationCollator(2, side)
    return measure_fidelity(trainer, ROWS[:13] if rows is None else rows, top_k=top_k)


def tilted(seed: int = 0) -> Any:
    """A model that is near to that of the same seed, but not it."""
    model = make_model(seed=seed, **SHARP)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter += 0.08 * torch.randn(parameter.shape, generator=noise)
    return model


def by_hand(folder: Any, student: Any, teacher: Any, rows: list[dict]) -> list[dict[str, Any]]:
    """Each token's distributions in float64, one text at a time, from the models' own logits."""
    views = make_trainer(folder, teacher=LocalTeacher(make_model(seed=4)), demonstrations=[], rows=rows).train_dataset
    tokens = []
    for text in range(len(views)):
        encoded = views[text]["student"]
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            sides = [model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (student, teacher)]
        places = [at for at in range(1, ids.shape[1]) if encoded["labels"][at] != -100]
        for position, at in enumerate(places):
            pair = [side[at - 1].tolist() for side in sides]
            tokens.append({"text": text, "position": position, "target": encoded["labels"][at], "pair": pair})
    return tokens


def kl(first: list[float], second: list[float]) -> float:
    return sum(math.exp(p) * (p - q) for p, q in zip(first, second, strict=True))


def likeliest(row: list[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def one_side(tokens: list[dict[str, Any]], side: int) -> dict[str, float]:
    """What a report says of one model."""
    rows = [(token["pair"][side], token["target"]) for token in tokens]
    right = [likeliest(row) == target for row, target in rows]
    sure = [math.exp(max(row)) for row, _ in rows]
    bins = defaultdict(list)
    for confidence, hit in zip(sure, right, strict=True):
        bins[min(int(10 * confidence), 9)].append((confidence, hit))
    gap = sum(abs(sum(one - hit for one, hit in each)) for each in bins.values())
    scores = [sum((math.exp(p) - (v == target)) ** 2 for v, p in enumerate(row)) for row, target in rows]
    return {
        "accuracy": mean(right),
        "perplexity": math.exp(-mean(row[target] for row, target in rows)),
        "expected_calibration_error": gap / len(rows),
        "brier": mean(scores),
        "bins": len(bins),
    }


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[FidelityReport, list[dict[str, Any]]]:
    """A report of two sharp models that agree on some tokens, and the same tokens by hand."""
    folder = tmp_path_factory.mktemp("known")
    student, teacher = tilted(), make_model(seed=0, **SHARP)
    tokens = by_hand(folder / "hand", student, teacher, ROWS[:13])
    report = measure(
        folder, model=student, teacher=LocalTeacher(teacher), per_device_eval_batch_size=4, top_k=5, chunk_size=7
    )
    return report, tokens


def test_agreement_and_divergences_are_those_of_the_definitions(known: Any) -> None:
    """A mean over batches instead of tokens, the two directions exchanged, or a row beside the wrong token."""
    report, tokens = known
    agreed = [likeliest(token["pair"][0]) == likeliest(token["pair"][1]) for token in tokens]
    wrong = [likeliest(token["pair"][1]) != token["target"] for token in tokens]
    assert (report.texts, report.tokens) == (13, len(tokens))
    assert 0.1 < mean(agreed) < 0.95, "the two models must agree on some tokens, or nothing is tested"
    assert report.agreement == pytest.approx(mean(agreed))
    assert report.teacher_wrong == sum(wrong) > 0
    both = [hit for hit, miss in zip(agreed, wrong, strict=True) if miss]
    assert report.agreement_when_teacher_wrong == pytest.approx(mean(both))
    assert report.forward_kl == pytest.approx(
        mean(kl(token["pair"][1], token["pair"][0]) for token in tokens), rel=1e-4
    )
    assert report.reverse_kl == pytest.approx(
        mean(kl(token["pair"][0], token["pair"][1]) for token in tokens), rel=1e-4
    )
    assert abs(report.forward_kl - report.reverse_kl) > 0.01


def test_mass_and_entropy_are_those_of_the_definitions(known: Any) -> None:
    """The student's own likeliest tokens in place of the teacher's: a mass that is always large."""
    report, tokens = known
    masses = [[], []]
    for token in tokens:
        row = token["pair"][1]
        top = sorted(range(VOCAB), key=row.__getitem__)[-5:]
        for mass, side in zip(masses, token["pair"], strict=True):
            mass.append(sum(math.exp(side[number]) for number in top))
    student, teacher = (pytest.approx(mean(mass), rel=1e-4) for mass in masses)
    assert report.captured_mass == {"k": 5, "student": student, "teacher": teacher}
    ours, theirs = (mean(-sum(math.exp(p) * p for p in token["pair"][side]) for token in tokens) for side in range(2))
    assert report.entropy["student"] == pytest.approx(ours, rel=1e-4)
    assert report.entropy["teacher"] == pytest.approx(theirs, rel=1e-4)
    assert report.entropy["gap"] == pytest.approx(ours - theirs, abs=1e-4)


def test_calibration_and_perplexity_are_those_of_the_definitions(known: Any) -> None:
    """A Brier score over the likeliest token only, bins that lose their edges, a perplexity of mean probabilities."""
    report, tokens = known
    for side, found in enumerate((report.student, report.teacher)):
        expected = one_side(tokens, side)
        bins = found["reliability"]
        assert len(bins) == expected.pop("bins") > 2
        assert sum(each["tokens"] for each in bins) == report.tokens
        assert all(each["low"] <= each["confidence"] <= each["high"] for each in bins)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4), name


def test_positions_and_worst_tokens_are_those_of_the_definitions(known: Any) -> None:
    """A position counted from the start of the prompt, or tokens of different words added up."""
    report, tokens = known
    places, costs = defaultdict(list), defaultdict(list)
    for token in tokens:
        cost = kl(token["pair"][1], token["pair"][0])
        pair = [likeliest(side) for side in token["pair"]]
        places[token["position"]].append((pair[0] == pair[1], cost))
        costs[token["target"]].append((cost, *pair))
    assert [each["first"] for each in report.by_position] == sorted(places)
    for each in report.by_position:
        found = places[each["first"]]
        assert (each["last"], each["tokens"]) == (each["first"], len(found))
        assert each["agreement"] == pytest.approx(mean(hit for hit, _ in found))
        assert each["forward_kl"] == pytest.approx(mean(cost for _, cost in found), rel=1e-4, abs=1e-6)
    ordered = sorted(costs.values(), key=lambda found: -sum(cost for cost, *_ in found))
    assert len(report.worst_tokens) == 10
    for each, found in zip(report.worst_tokens, ordered, strict=False):
        assert each["tokens"] == len(found)
        assert each["total"] == pytest.approx(sum(cost for cost, *_ in found), rel=1e-4)
        assert each["forward_kl"] == pytest.approx(each["total"] / each["tokens"])
    assert report.worst_tokens[0]["text"] == "ed"
    most = Counter(student for _, student, _ in ordered[0]).most_common(2)
    assert len(most) == 1 or most[0][1] > most[1][1], "a tie tests nothing"


def test_the_objective_says_the_same(tmp_path: Path) -> None:
    """Two truths about one student: the loss that is trained on, and the figure that the card shows. The teacher reads
    demonstrations here, and the student doesn't.
    """
    trainer = make_trainer(tmp_path, teacher=local(), log_agreement=True, per_device_eval_batch_size=5)
    metrics = trainer.evaluate(ROWS[:16])
    report = measure_fidelity(trainer, ROWS[:16])
    assert report.forward_kl == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert report.agreement == pytest.approx(metrics["eval_teacher/agreement"])
    shown = measure(tmp_path / "without", ROWS[:16], teacher=local())
    assert abs(shown.forward_kl - report.forward_kl) > 1e-3


def test_identical_models_agree_on_everything(tmp_path: Path) -> None:
    """Rounding, padding or a shifted row shows as a difference that isn't there."""
    report = measure(tmp_path, teacher=local(seed=0), per_device_eval_batch_size=3)
    assert report.agreement == 1.0 and report.agreement_interval is None, "nothing is known to be 100 % for sure"
    assert "All texts have the same agreement" in report.notes[0]
    assert 0 <= report.forward_kl < 1e-7 and 0 <= report.reverse_kl < 1e-7
    assert report.entropy["gap"] == pytest.approx(0, abs=1e-6)
    assert report.captured_mass["student"] == pytest.approx(report.captured_mass["teacher"], abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"per_device_eval_batch_size": 1}, {"chunk_size": 3}, {"padding_free": True}, {"padding": "left"}],
)
def test_batches_chunks_and_padding_change_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A mean of batch means, in which short answers weigh more."""
    model = {"model": make_model(seed=0, attn_implementation="sdpa")}
    expected = measure(tmp_path / "a", **model).to_dict()
    found = measure(tmp_path / "b", **model, **settings).to_dict()
    for name in ("texts", "tokens", "agreement", "teacher_wrong"):
        assert found[name] == expected[name]
    for name in ("forward_kl", "reverse_kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
        assert found[f"{name}_interval"] == pytest.approx(expected[f"{name}_interval"], rel=1e-4)


class Widest(TorchDispatchMode):
    """The most rows of the vocabulary that any tensor has."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() > 1 and result.shape[-1] == VOCAB:
            self.rows = max(self.rows, result.numel() // VOCAB)
        return result


def test_no_tensor_holds_all_logits(tmp_path: Path) -> None:
    """Logits of a whole batch: gigabytes for a real vocabulary, in an evaluation after hours of training."""
    trainer = make_trainer(tmp_path, teacher=local(), demonstrations=[], chunk_size=20, per_device_eval_batch_size=16)
    with Widest() as widest:
        report = measure_fidelity(trainer, trainer.train_dataset)
    assert report.tokens > 100
    assert 0 < widest.rows <= 33, "the head's weight has 32 rows"


def test_nothing_of_the_trainer_is_changed(tmp_path: Path) -> None:
    """A run that is measured before and after must be the run that isn't: its random numbers, modes, demonstrations,
    and whether accelerate still has to wrap the student.
    """
    updates = []
    for place in range(2):
        trainer = make_trainer(tmp_path / str(place), student_shots=[0, 2], bf16_full_eval=True)
        trainer.train_dataset.set_epoch(3)
        trainer.model.train()
        trainer.model.base_model.model.model.layers[1].eval()
        modes = [module.training for module in trainer.model.modules()]
        known = set(vars(trainer.model)), set(vars(trainer.callback_handler))
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if place:
            measure_fidelity(trainer, trainer.train_dataset)
        assert [module.training for module in trainer.model.modules()] == modes
        assert trainer.train_dataset.epoch == 3
        assert (set(vars(trainer.model)), set(vars(trainer.callback_handler))) == known
        assert "prediction_step" not in vars(trainer) and not trainer.accelerator._models
        drawn = random.random(), np.random.rand(), float(torch.rand(()))
        trainer.train()
        updates.append((trained_weights(trainer), drawn))
    assert updates[0][1] == updates[1][1]
    assert all(torch.equal(value, updates[1][0][name]) for name, value in updates[0][0].items())


def test_a_failed_measurement_leaves_the_trainer_whole(tmp_path: Path) -> None:
    """A run goes on after its fidelity couldn't be measured, with the prediction step of someone else."""
    trainer = make_trainer(tmp_path, teacher=local(), demonstrations=[])
    expected = trainer.evaluate(ROWS[:8])["eval_loss"]
    signal, trainer.teacher.signal = trainer.teacher.signal, None
    with pytest.raises(TypeError):
        measure_fidelity(trainer, ROWS[:8])
    trainer.teacher.signal = signal
    assert trainer.evaluate(ROWS[:8])["eval_loss"] == expected


# --- teachers


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of the tiny teacher, which reads no demonstrations."""
    folder = tmp_path_factory.mktemp("caches")
    dataset = make_dataset(demonstrations=[])
    codecs = {"all": TopK(k=VOCAB), "few": TopK(k=8), "hidden": Hidden(), "drawn": Sampled(rounds=20)}
    for name, codec in codecs.items():
        build(folder / name, codec, dataset)
    build(folder / "warm", TopK(k=8), dataset, temperature=2.0)
    return folder


def cached(folder: Path, caches: Path, name: str, top_k: int = 64) -> FidelityReport:
    return measure(folder / name, ROWS[:16], top_k, teacher=CachedTeacher(caches / name))


@pytest.mark.parametrize(("name", "error"), [("hidden", 1e-5), ("all", 1e-2)])
def test_a_cache_that_keeps_all_is_as_good_as_the_teacher(
    tmp_path: Path, caches: Path, name: str, error: float
) -> None:
    """Figures that depend on whether the teacher is in memory, but for the rounding of what was kept."""
    live, found = measure(tmp_path, ROWS[:16]).to_dict(), cached(tmp_path, caches, name).to_dict()
    assert found["support"] == "vocabulary" and found["notes"] == live["notes"]
    for key in ("agreement", "forward_kl", "reverse_kl"):
        assert found[key] == pytest.approx(live[key], rel=error)
    for key in ("accuracy", "brier", "perplexity", "expected_calibration_error"):
        assert found["teacher"][key] == pytest.approx(live["teacher"][key], rel=error), key


def test_a_cache_of_likeliest_ids_says_what_it_can(tmp_path: Path, caches: Path) -> None:
    """Figures of ids that nobody kept: a Brier score, a perplexity, a mass over more ids than there are."""
    live, found = measure(tmp_path, ROWS[:16], top_k=8), cached(tmp_path, caches, "few")
    assert found.agreement == live.agreement and found.teacher_wrong == live.teacher_wrong
    assert found.captured_mass["k"] == 8
    assert found.captured_mass["student"] == pytest.approx(live.captured_mass["student"], rel=1e-3)
    assert found.captured_mass["teacher"] == pytest.approx(live.captured_mass["teacher"], rel=1e-2)
    assert 0 < found.forward_kl < live.forward_kl and 0 < found.reverse_kl < live.reverse_kl
    assert found.entropy["teacher"] < live.entropy["teacher"]
    assert (
        found.student["brier"] == live.student["brier"] and found.student["perplexity"] == live.student["perplexity"]
    )
    assert found.teacher["brier"] is None and found.teacher["perplexity"] is None
    assert found.teacher["expected_calibration_error"] == pytest.approx(
        live.teacher["expected_calibration_error"], rel=1e-2
    )
    assert found.support == "8 likeliest ids and a tail"
    note = found.notes[0]
    assert "Brier" in note and "perplexity" in note and found.support in note
    assert "unknown" in text_of(found)


def test_the_tail_is_compared_too(tmp_path: Path, caches: Path) -> None:
    """A student that puts its mass where the teacher's list ends would look perfect."""
    found = cached(tmp_path, caches, "few")
    student, teacher = make_model(seed=0), make_model(seed=1)
    expected = []
    for token in by_hand(tmp_path / "hand", student, teacher, ROWS[:16]):
        ours, theirs = token["pair"]
        top = sorted(range(VOCAB), key=theirs.__getitem__)[-8:]
        p, q = ([math.exp(row[number]) for number in top] for row in (theirs, ours))
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
        expected.append(sum(one * math.log(one / other) for one, other in zip(p, q, strict=True)))
    assert found.forward_kl == pytest.approx(mean(expected), rel=5e-3)


def test_more_ids_than_the_list_has_are_not_asked_for(tmp_path: Path, caches: Path) -> None:
    """A mass over 64 ids of a list of 8, which is smaller than the true one."""
    assert cached(tmp_path, caches, "few", top_k=64).captured_mass["k"] == 8
    assert measure(tmp_path, top_k=10_000).captured_mass["student"] == pytest.approx(1)


class Foreign(LocalTeacher):
    other_vocabulary = True


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("drawn", "drawn ids only"),
        ("warm", "made at temperature 2.0"),
        (None, "this trainer has none"),
        ("foreign", "another vocabulary"),
        ("broken", "no finite figure"),
    ],
)
def test_what_can_not_be_measured_is_refused(tmp_path: Path, caches: Path, name: Any, message: str) -> None:
    """Figures that mean nothing are printed on a card."""
    objective: Any = "forward_kl"
    if name is None:
        teacher, objective = None, "cross_entropy"
    elif name == "warm":
        teacher, objective = CachedTeacher(caches / name), [{"kind": "forward_kl", "temperature": 2.0}]
    elif name in ("foreign", "broken"):
        teacher, objective = Foreign(make_model(seed=1)) if name == "foreign" else local(), "cross_entropy"
    else:
        teacher = CachedTeacher(caches / name)
    if name == "broken":
        teacher.model.lm_head.weight.data[5] = math.nan
    trainer = make_trainer(tmp_path, teacher=teacher, demonstrations=[], objective=objective)
    with pytest.raises(ValueError, match=message):
        measure_fidelity(trainer, ROWS[:16])


def test_top_k_is_at_least_one(tmp_path: Path) -> None:
    """A mass over no ids is 0 for everyone."""
    with pytest.raises(ValueError, match="top_k is 0"):
        measure(tmp_path, top_k=0)


# --- the report


def text_of(report: FidelityReport) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(report.table("Fidelity"))
    return console.export_text()


def test_the_report_is_plain_data_and_a_table(known: Any) -> None:
    """A card, a page and a comparison read these keys from a file."""
    report, _ = known
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain == report.to_dict()
    assert plain.keys() >= {
        "texts", "tokens", "agreement", "agreement_interval", "agreement_when_teacher_wrong", "teacher_wrong",
        "forward_kl", "forward_kl_interval", "reverse_kl", "reverse_kl_interval", "captured_mass", "entropy",
        "student", "teacher", "by_position", "worst_tokens",
    }  # fmt: skip
    text = text_of(report)
    assert f"{report.agreement:.1%}" in text and f"{report.teacher['perplexity']:.3f}" in text
    assert f"{report.forward_kl_interval[0]:.3f} to {report.forward_kl_interval[1]:.3f}" in text


def test_intervals_are_over_texts(known: Any) -> None:
    """Tokens of one text are no independent draws: an interval over tokens is too narrow."""
    report, tokens = known
    sums = [[kl(t["pair"][1], t["pair"][0]) for t in tokens if t["text"] == text] for text in range(13)]
    draw, ratios = random.Random(0), []
    for _ in range(4000):
        chosen = [draw.choice(sums) for _ in sums]
        ratios.append(sum(map(sum, chosen)) / sum(map(len, chosen)))
    ratios.sort()
    low, high = report.forward_kl_interval
    width = ratios[3899] - ratios[99]
    assert low < report.forward_kl < high
    assert low == pytest.approx(ratios[99], abs=0.15 * width) and high == pytest.approx(ratios[3899], abs=0.15 * width)


@pytest.mark.parametrize(("texts", "words"), [(1, "There is one text: too few"), (9, "There are 9 texts: too few")])
def test_few_texts_have_no_interval(tmp_path: Path, texts: int, words: str) -> None:
    """Four texts that are drawn anew are the same four texts: an interval of theirs looks like certainty."""
    report = measure(tmp_path, ROWS[:texts], model=tilted(), teacher=local(seed=0, **SHARP))
    assert (report.agreement_interval, report.forward_kl_interval, report.reverse_kl_interval) == (None, None, None)
    assert len(report.notes) == 1 and report.notes[0].startswith(words)
    assert words in text_of(report) and "None" not in text_of(report)


def test_ten_texts_have_an_interval(tmp_path: Path) -> None:
    """A rule that takes all intervals away."""
    report = measure(tmp_path, ROWS[:10], model=tilted(), teacher=local(seed=0, **SHARP))
    assert report.forward_kl_interval[0] < report.forward_kl < report.forward_kl_interval[1]
    assert report.agreement_interval[0] < report.agreement < report.agreement_interval[1]
    assert not report.notes


def test_heads_are_held_against_the_models_once(tmp_path: Path) -> None:
    """Whole forwards of both models over again for each measurement: a fifth of its time on a CPU."""
    trainer = make_trainer(tmp_path, teacher=local(), demonstrations=[])
    asked: Counter[str] = Counter()
    for owner, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        model.lm_head.register_forward_hook(lambda *_, owner=owner: asked.update([owner]))
    first = measure_fidelity(trainer, ROWS[:13])
    assert asked == {"student": 1, "teacher": 1}
    assert measure_fidelity(trainer, ROWS[:13]) == first
    trainer.train()
    measure_fidelity(trainer, ROWS[:13])
    assert asked == {"student": 1, "teacher": 1}


def test_a_teacher_that_training_does_not_ask_is_checked(tmp_path: Path) -> None:
    """A loss without a teacher checks the student's head alone, and figures would be taken from a wrong one."""
    trainer = make_trainer(tmp_path, teacher=local(), demonstrations=[], objective="cross_entropy", max_steps=1)
    trainer.train()
    asked = []
    trainer.teacher.model.lm_head.register_forward_hook(lambda *_: asked.append("teacher"))
    measure_fidelity(trainer, ROWS[:4])
    assert asked == ["teacher"]


def test_demonstrations_of_the_task_are_left_out(tmp_path: Path) -> None:
    """Items that the teacher's prompt shows with their answer."""
    report = measure(tmp_path, [*DEMONSTRATIONS[:2], *ROWS[:3]], demonstrations=DEMONSTRATIONS)
    assert report.texts == 3
