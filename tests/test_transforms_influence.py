"""The transform `influence`: gradients of rows held against those of clean ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import get_peft_model
from training import ROWS, lora, make_trainer, trained_weights

from hfkd.data.prompts import PromptBuilder
from hfkd.teachers import LocalTeacher, SelfTeacher
from hfkd.transforms import Workshop, influence
from hfkd.transforms.influence import InfluenceWeights

CLEAN = ROWS[12:16]


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder(make_tokenizer())


def adapted(seed: int = 0) -> torch.nn.Module:
    """A student whose adapter is not zero."""
    torch.manual_seed(seed + 5)
    return get_peft_model(make_model(seed=seed), lora())


def workshop(builder: PromptBuilder, student: torch.nn.Module | None, teacher=None, **settings) -> Workshop:
    return Workshop(student, teacher, builder, held_out=settings.pop("held_out", CLEAN), **settings)


def weights(rows: list[dict]) -> list[float]:
    return [row["token_weights"] for row in rows]


def slow_gradient(model: torch.nn.Module, builder: PromptBuilder, rows: list[dict]) -> torch.Tensor:
    """The gradient of the mean cross-entropy of all answers' tokens, by the model's own logits and `backward`."""
    losses = []
    for row in rows:
        prompt, answer = builder.encode_prompt(row), builder.encode_completion(row)
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    model.zero_grad()
    torch.cat(losses).mean().backward()
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return torch.cat(found)


def test_weights_are_the_cosines_of_gradients(builder):
    """Prevents weights by another formula than the documented one: 1 + strength * cosine, clipped."""
    student = adapted()
    clean = slow_gradient(student, builder, CLEAN)
    each = [slow_gradient(student, builder, [row]) for row in ROWS[:6]]
    cosines = [float(one @ clean / one.norm() / clean.norm()) for one in each]
    found = InfluenceWeights(strength=2.0).apply(ROWS[:6], workshop(builder, student))
    assert weights(found) == pytest.approx([min(2.0, max(0.0, 1 + 2 * cosine)) for cosine in cosines], abs=1e-4)
    assert len({round(one, 3) for one in weights(found)}) > 3


def test_centered_weights_are_about_one(builder):
    """Prevents weights that only make the whole loss larger, where all rows point the same way."""
    student = adapted()
    plain = weights(InfluenceWeights().apply(ROWS[:6], workshop(builder, student)))
    found = weights(InfluenceWeights(centered=True).apply(ROWS[:6], workshop(builder, student)))
    mean = sum(plain) / 6
    assert found == pytest.approx([1 + one - mean for one in plain], abs=1e-6) and abs(mean - 1) > 0.01
    long = [*ROWS[:6], {"prompt": "long " * 60, "completion": "yes"}]
    transform = InfluenceWeights(centered=True, max_length=40)
    assert weights(transform.apply(long, workshop(builder, student)))[-1] == 1.0


def test_a_flipped_label_has_the_lowest_weight(builder):
    """Prevents weights that raise what should be lowered: in a convex problem, where only the output head learns, the
    one row with a wrong answer must come last.
    """
    student = make_model(seed=0, tie_word_embeddings=False).requires_grad_(False)
    student.lm_head.weight.requires_grad_(True)
    rows = [{"prompt": row["prompt"], "completion": "yes"} for row in ROWS[:10]]
    rows[4] = {**rows[4], "completion": "no"}
    clean = [{"prompt": row["prompt"], "completion": "yes"} for row in CLEAN]
    found = weights(InfluenceWeights().apply(rows, workshop(builder, student, held_out=clean)))
    assert found.index(min(found)) == 4 and sorted(found)[1] - found[4] > 0.1
    kept = InfluenceWeights(strength=0, drop=0.1).apply(rows, workshop(builder, student, held_out=clean))
    assert kept == rows[:4] + rows[5:], "the wrong row is left out, and the others stay as they are"


def test_the_teachers_gradient_is_that_of_the_divergence(builder):
    """Prevents rows weighed by their labels where the teacher is what is learned."""
    student, teacher = adapted(), LocalTeacher(make_model(seed=1))
    clean, cosines = slow_gradient(student, builder, CLEAN), []
    for row in ROWS[:3]:
        prompt, answer = builder.encode_prompt(row), builder.encode_completion(row)
        both = [
            model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            for model in (student, teacher.model)
        ]
        ours, theirs = (logits.log_softmax(-1) for logits in both)
        student.zero_grad()
        (theirs.exp() * (theirs - ours)).sum(-1).mean().backward()
        one = torch.cat([parameter.grad.flatten() for parameter in student.parameters() if parameter.requires_grad])
        cosines.append(float(one @ clean / one.norm() / clean.norm()))
    student.zero_grad()
    found = InfluenceWeights(loss="forward_kl").apply(ROWS[:3], workshop(builder, student, teacher))
    assert weights(found) == pytest.approx([1 + cosine for cosine in cosines], abs=1e-4)


def test_a_projection_keeps_the_cosines(builder):
    """Prevents a sketch whose products have nothing to do with those of the gradients, or that differs from row to
    row.
    """
    student = adapted()
    exact = weights(InfluenceWeights().apply(ROWS[:8], workshop(builder, student)))
    near = weights(InfluenceWeights(projection=2048).apply(ROWS[:8], workshop(builder, student)))
    gaps = [abs(one - other) for one, other in zip(exact, near, strict=True)]
    assert 0 < max(gaps) < 5 / 2048**0.5
    again = weights(InfluenceWeights(projection=2048).apply(ROWS[:8], workshop(builder, student)))
    assert again == near


def test_a_row_with_weights_keeps_them_as_factors(builder):
    """Prevents weights of the user's own from being overwritten."""
    plain = weights(InfluenceWeights().apply(ROWS[:2], workshop(builder, adapted())))
    rows = [{**ROWS[0], "token_weights": 0.5}, {**ROWS[1], "token_weights": [1.0, 3.0]}]
    found = weights(InfluenceWeights().apply(rows, workshop(builder, adapted())))
    assert found[0] == pytest.approx(0.5 * plain[0]) and found[1] == pytest.approx([plain[1], 3 * plain[1]])
    assert "token_weights" not in ROWS[0] and rows[0]["token_weights"] == 0.5


def test_a_row_that_is_too_long_keeps_its_weight(builder):
    """Prevents that a row that wasn't looked at is dropped, or that one long row ends the run."""
    rows = [ROWS[0], {"prompt": "long " * 60, "completion": "yes"}, ROWS[1]]
    transform = InfluenceWeights(max_length=40, drop=0.6)
    found = transform.apply(rows, workshop(builder, adapted()))
    assert found[-1]["token_weights"] == 1.0 or found[0]["token_weights"] == 1.0
    assert len(found) == 2 and transform.describe()["measured"] == 2


def test_clean_rows_of_a_file(builder, tmp_path: Path):
    """Prevents that a file of clean rows is named and the evaluation's rows are read instead."""
    path = tmp_path / "clean.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in CLEAN))
    student = adapted()
    named = InfluenceWeights(path=str(path)).apply(ROWS[:4], workshop(builder, student, held_out=ROWS[8:9]))
    held_out = InfluenceWeights().apply(ROWS[:4], workshop(builder, student))
    assert weights(named) == pytest.approx(weights(held_out), abs=1e-5)


def test_a_resumed_run_reads_what_was_found(builder, tmp_path: Path, monkeypatch):
    """Prevents hours of gradients being taken again at each resume; and numbers of another student being believed."""
    first = InfluenceWeights().apply(ROWS[:4], workshop(builder, adapted(), folder=tmp_path))
    taken = []
    gradient = influence._Reader.gradient
    monkeypatch.setattr(influence._Reader, "gradient", lambda *args: taken.append(1) or gradient(*args))
    assert InfluenceWeights().apply(ROWS[:4], workshop(builder, adapted(), folder=tmp_path)) == first
    assert not taken
    other = InfluenceWeights().apply(ROWS[:4], workshop(builder, adapted(seed=3), folder=tmp_path))
    assert len(taken) == 4 + len(CLEAN) and other != first
    for kept in (tmp_path / "transforms").glob("influence-*.safetensors"):
        kept.write_bytes(b"half a file")
    assert InfluenceWeights().apply(ROWS[:4], workshop(builder, adapted(), folder=tmp_path)) == first


def test_two_of_one_kind_keep_their_own_figures(builder, tmp_path: Path, monkeypatch):
    """Prevents that each of two transforms overwrites what the other found, so that all is paid again at a resume; and
    that other settings are read into old figures.
    """
    other, teacher = {"held_out": ROWS[8:12]}, LocalTeacher(make_model(seed=1))
    calls = [({}, {}), ({}, other), ({"projection": 64}, {}), ({"loss": "forward_kl"}, {"teacher": teacher})]
    calls += [({"projection": 64}, {"seed": 5})]

    def found() -> list[list[float]]:
        return [
            weights(
                InfluenceWeights(**settings).apply(ROWS[:4], workshop(builder, adapted(), folder=tmp_path, **shop))
            )
            for settings, shop in calls
        ]

    first = found()
    assert len({tuple(one) for one in first}) == len(calls) and len(list((tmp_path / "transforms").iterdir())) == 5
    monkeypatch.setattr(influence._Reader, "gradient", None)
    assert found() == first


def test_the_student_is_left_as_it_was(builder, tmp_path: Path):
    """Prevents that looking at gradients changes the training: the weights after two steps are the same to the bit."""
    ends = []
    for looked in (False, True):
        trainer = make_trainer(tmp_path / str(looked), objective="cross_entropy", teacher=None, peft_config=lora())
        if looked:
            trainer.model.train()
            state = torch.get_rng_state()
            InfluenceWeights(projection=64).apply(ROWS[:4], workshop(builder, trainer.model))
            assert trainer.model.training and torch.equal(state, torch.get_rng_state())
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
        trainer.train()
        ends.append(trained_weights(trainer))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_weights_reach_the_loss(builder, tmp_path: Path):
    """Prevents a column that nothing reads: a row of weight 0 teaches nothing."""
    rows = [{**row, "token_weights": float(place % 2)} for place, row in enumerate(ROWS[:16])]
    updates = []
    for given in (rows, [{**row, "completion": "other"} if not row["token_weights"] else row for row in rows]):
        settings = {"rows": given, "token_weights": "token_weights", "objective": "cross_entropy", "teacher": None}
        trainer = make_trainer(tmp_path / str(len(updates)), peft_config=lora(), max_steps=1, **settings)
        before = trained_weights(trainer)
        trainer.train()
        updates.append({name: value - before[name] for name, value in trained_weights(trainer).items()})
    name = next(iter(updates[0]))
    one, other = (update[name].flatten() for update in updates)
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 1 - 1e-4  # the token count differs


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strength": -1}, "strength is -1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"drop": 1.0}, "drop is 1.0"),
        ({"strength": 0}, "nothing would change"),
        ({"highest": 0.5}, "highest is 0.5"),
        ({"clean": 0}, "clean is 0"),
        ({"projection": 0}, "projection is 0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 64.0}, "max_length is 64.0"),
        ({"path": "no_such.jsonl"}, "no such file"),
        ({"loss": "cros_entropy"}, "There is no loss"),
        ({"loss": "hidden_mse"}, "would stand alone|reads hidden states"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(settings, words):
    """Prevents a fault that shows only after the models were loaded."""
    with pytest.raises(ValueError, match=words):
        InfluenceWeights(**settings)


@pytest.mark.parametrize("path", ["org/data.v2", "https://some.where/clean.jsonl", "reasoning_gym:chain_sum"])
def test_clean_rows_that_are_no_file_here(path):
    """Prevents that an id of the hub with a dot in it, or an address, is taken for a file that is missing."""
    assert InfluenceWeights(path=path).path == path


def test_what_it_asks_for_follows_from_its_settings():
    """Prevents a recipe without a teacher from being refused for weights by labels, and a column that isn't read."""
    assert (InfluenceWeights().needs_teacher, InfluenceWeights(loss="forward_kl").needs_teacher) == (False, True)
    assert InfluenceWeights().writes == ("token_weights",) and InfluenceWeights(0.0, drop=0.5).writes == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shop: setattr(shop, "student", None), "there is none here"),
        (lambda shop: setattr(shop, "held_out", []), "no clean row"),
        (lambda shop: shop.student.requires_grad_(False), "no parameter of the student learns"),
    ],
)
def test_what_it_cannot_work_with_is_said(builder, change, words):
    """Prevents an error in the words of autograd."""
    shop = workshop(builder, adapted())
    change(shop)
    with pytest.raises(ValueError, match=words):
        InfluenceWeights().apply(ROWS[:2], shop)


def test_a_loss_that_asks_a_teacher_needs_one(builder):
    """Prevents rows weighed by a teacher that isn't there."""
    with pytest.raises(ValueError, match="set loss to cross_entropy"):
        InfluenceWeights(loss="reverse_kl").apply(ROWS[:2], workshop(builder, adapted()))


def test_weights_that_are_all_nothing_are_refused(builder):
    """Prevents a run whose every loss is 0: the clean rows say the contrary of all training rows."""
    student = make_model(seed=0, tie_word_embeddings=False).requires_grad_(False)
    student.lm_head.weight.requires_grad_(True)
    rows = [{"prompt": row["prompt"], "completion": "yes"} for row in ROWS[:2]]
    with pytest.raises(ValueError, match="all 2 weights are 0"):
        InfluenceWeights(strength=1e6).apply(rows, workshop(builder, student, held_out=_opposed(student, builder)))


def _opposed(student: torch.nn.Module, builder: PromptBuilder) -> list[dict]:
    """An answer whose gradient points away from that of "yes"."""
    wanted = slow_gradient(student, builder, [{"prompt": ROWS[0]["prompt"], "completion": "yes"}])
    words = ("no", "never", "is", "the", "answer", "42", "A", "fox", "walked", "one", "two", "three", "jumps")
    found = {
        word: slow_gradient(student, builder, [{"prompt": ROWS[0]["prompt"], "completion": word}]) for word in words
    }
    worst = min(words, key=lambda word: float(found[word] @ wanted / found[word].norm()))
    assert float(found[worst] @ wanted) < 0
    return [{"prompt": ROWS[0]["prompt"], "completion": worst}]


def test_a_self_teacher_may_speak_of_the_rows(builder):
    """Prevents that asking the student with its adapter off leaves it off, or frozen."""
    student, teacher = adapted(), SelfTeacher("adapter_off")
    teacher.prepare(None, student)
    shown = [{"prompt": f"verb{place}", "completion": f"verb{place}ed"} for place in range(2)]
    shop = workshop(builder, student, teacher, demonstrations=shown)
    found = InfluenceWeights(loss="forward_kl").apply(ROWS[:3], shop)
    assert len(set(weights(found))) == 3 and slow_gradient(student, builder, CLEAN).norm() > 0
