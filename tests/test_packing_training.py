"""Whole runs without padding: losses and updates are those of the padded run, whoever teaches, whatever is learned."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import tiny
from caches import make_dataset
from conftest import make_model, make_tokenizer
from test_cross_tokenizer import ROWS as CUT_ROWS
from test_cross_tokenizer import SHOWN, TERMS
from test_cross_tokenizer import make_teacher as make_cutting_teacher
from test_packing import mix_texts, rows_read
from test_several_teachers import NAMED, two
from training import ROWS, lora, make_trainer, run, worst_difference
from transformers import PreTrainedModel

from hfkd import SelfTeacher
from hfkd.data.collate import DistillationCollator
from hfkd.errors import PaddingFreeError
from hfkd.prefix import SharedPrefix
from hfkd.rollout import GenerationSettings, HFRollout
from hfkd.teachers import LocalTeacher, RoutedTeacher


def both(folder: Any, monkeypatch: pytest.MonkeyPatch, make: Any = dict, **settings: Any) -> list[int]:
    """Train padded and flat, and hold losses and updates against each other.

    Args:
        folder: Of the two runs.
        monkeypatch: Of the test.
        make: Gives what a run can't share with another: models, teachers.
        settings: Of the runs.

    Returns:
        The texts in each flat run of a model.
    """
    update, losses = run(folder / "padded", **make(), **settings)
    read = rows_read(monkeypatch)
    flat, found = run(folder / "flat", **make(), **settings, padding_free=True)
    assert found == pytest.approx(losses, rel=1e-5)
    assert worst_difference(update, flat) < 1e-5
    assert len(read) >= 2
    return read


def whole_prompts(**parts: Any) -> Any:
    """A self-teacher that reads its demonstrations with every row."""
    return lambda: {"teacher": SelfTeacher("adapter_off", reuse_prefix=False), "peft_config": lora(), **parts}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [8, 2, 1])
def test_a_full_student_learns_the_same(side, size, tmp_path, monkeypatch):
    """Prevents a loss or a gradient that depends on the padding, at any number of micro-batches."""
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    data = {"rows": make_dataset(demonstrations=[]), "data_collator": DistillationCollator(2, padding_side=side)}
    read = both(tmp_path, monkeypatch, lambda: {"teacher": make_model(seed=1)}, **data, **split)
    # Two checks, then teacher and student in each micro-batch of two steps.
    assert read == [max(2, min(size, 4))] * 2 + [size] * (2 * 2 * 8 // size)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [8, 2])
def test_an_adapter_learns_the_same_from_demonstrations(side, size, tmp_path, monkeypatch):
    """Prevents the teacher's rows from standing beside another token's than the student's."""
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    data = {"rows": make_dataset(), "data_collator": DistillationCollator(2, padding_side=side)}
    both(tmp_path, monkeypatch, whole_prompts(), **data, **split)


def test_a_teacher_that_reuses_its_prefix_stays_padded(tmp_path, monkeypatch):
    """Prevents the reuse, which saves more than padding costs, from being lost."""
    ran = []
    decode_rest = SharedPrefix.decode_rest
    monkeypatch.setattr(
        SharedPrefix, "decode_rest", lambda *parts: ran.append(parts[2].input_ids.shape[0]) or decode_rest(*parts)
    )
    demonstrations = [{"prompt": f"verb{place}", "completion": f"verb{place}ed"} for place in range(8)]
    read = both(tmp_path, monkeypatch, demonstrations=demonstrations)
    assert ran == [8, 8] * 2 and read == [4, 4, 8, 8]  # the two checks, and the student's two steps


@pytest.mark.parametrize(
    "objective",
    [
        [{"kind": "forward_kl"}, {"kind": "hidden_mse", "weight": 0.5}],
        [{"kind": "reverse_kl"}, {"kind": "relation", "weight": 0.5}],
        [{"kind": "span_correlation", "weight": 0.5}, {"kind": "cross_entropy"}],
    ],
    ids=["states", "relations", "spans"],
)
def test_losses_on_states_and_on_rows_together(objective, tmp_path, monkeypatch):
    """Prevents states, relations between rows and spans from being read off other positions than the rows'."""
    both(tmp_path, monkeypatch, whole_prompts(objective=objective))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"token_weights": lambda row, ids: [1.0 + place for place in range(len(ids))]},
        {"log_gradient_norms": True, "objective": [{"kind": "forward_kl"}, {"kind": "cross_entropy"}]},
        {"student_shots": (0, 1)},
    ],
    ids=["checkpointing", "weights", "norms", "shots"],
)
def test_other_settings_go_together_with_it(settings, tmp_path, monkeypatch):
    """Prevents a setting that is only right on padded batches."""
    both(tmp_path, monkeypatch, whole_prompts(), **settings)


def test_several_teachers_read_their_own_rows(tmp_path, monkeypatch):
    """Prevents a routed teacher that isn't told, or whose rows come back in another order."""

    def make() -> dict[str, Any]:
        return {"teacher": RoutedTeacher({name: LocalTeacher(one.model) for name, one in two().items()})}

    read = both(tmp_path, monkeypatch, make, rows=NAMED, demonstrations=[])
    assert read[:3] == [4, 4, 4] and read[5] == read[3] + read[4] == 8  # three checks, two members, the student


def test_a_teacher_with_another_tokenizer(tmp_path, monkeypatch):
    """Prevents spans that are looked up in a row where they no longer lie."""
    settings = {"objective": TERMS, "rows": CUT_ROWS, "demonstrations": SHOWN}
    settings["learning_rate"] = 5.0  # an update that is large beside the rounding of the weights that it is read off
    both(tmp_path, monkeypatch, lambda: {"teacher": make_cutting_teacher(reuse_prefix=False)}, **settings)


def test_text_of_the_students_own(tmp_path, monkeypatch):
    """Prevents what is written at each step from being written or read otherwise."""

    def make() -> dict[str, Any]:
        writing = GenerationSettings(max_new_tokens=6, temperature=0.0)
        return {**whole_prompts()(), "rollout": HFRollout(make_tokenizer(), writing), "answer": "student"}

    both(tmp_path, monkeypatch, make)


def test_evaluation_is_the_same(tmp_path):
    """Prevents an evaluation loss that isn't the padded one's."""
    settings = {"eval_dataset": ROWS[:5], "per_device_eval_batch_size": 3}
    padded, flat = (
        make_trainer(tmp_path / str(on), padding_free=on, **settings).evaluate()["eval_loss"] for on in (False, True)
    )
    assert flat == pytest.approx(padded, rel=1e-6) and padded > 0


def test_a_student_that_cannot_is_refused_before_training(tmp_path):
    """Prevents an hour of loading and tokenizing before the error."""
    for parts in ({"model": tiny("mamba")}, {"teacher": tiny("gemma2", vocab_size=384)}):
        with pytest.raises(PaddingFreeError, match="padding_free is on"):
            make_trainer(tmp_path, **{"teacher": make_model(seed=1), **parts}, padding_free=True)


def test_a_run_that_mixes_texts_ends_at_its_first_step(tmp_path, monkeypatch):
    """Prevents the check from being there and never asked, for the student or for the teacher."""
    mix_texts(monkeypatch)
    with pytest.raises(PaddingFreeError, match="apart"):
        make_trainer(tmp_path, teacher=make_model(seed=1), padding_free=True).train()
    checked: list[PreTrainedModel] = []
    monkeypatch.setattr("hfkd.student.check_segments", lambda model, view: checked.append(model))
    trainer = make_trainer(tmp_path, teacher=make_model(seed=1), padding_free=True)
    trainer.train()
    assert checked == [trainer.model, trainer.teacher.model]
