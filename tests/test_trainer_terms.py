"""What terms bring to a training run: states, schedules, token weights, heads of their own, gradient norms."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from training import DEMONSTRATIONS, ROWS, make_trainer, run, trained_weights, worst_difference

from hfkd import LocalTeacher, Teacher
from hfkd.losses import HiddenMSE
from hfkd.rows import TopKRows
from hfkd.signal import TeacherSignal

LADDER = {"schedule": "linear", "start": 1.0, "end": 0.0, "end_step": 2}


def narrow_teacher() -> LocalTeacher:
    """A teacher of another width, so that states need a projection."""
    return LocalTeacher(make_model(seed=1, hidden_size=24, intermediate_size=48))


def student_run(folder: Path, objective, **overrides):
    """Train a full student under a local teacher."""
    settings = {"teacher": narrow_teacher(), "demonstrations": [], "learning_rate": 0.3, "objective": objective}
    return make_trainer(folder, **{**settings, **overrides})


def logged(trainer, name: str) -> list[float]:
    """A figure, one for each logged step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


STATES = [{"kind": "forward_kl"}, {"kind": "hidden_mse", "weight": 0.1}]


def test_states_and_projections_learn_and_stay_out_of_the_student(tmp_path):
    """Prevents a projection that is never trained, and one that is pushed to the hub as a part of the model."""
    trainer = student_run(tmp_path, STATES, save_strategy="steps", save_steps=1)
    projectors = trainer.objective.losses[1].projectors
    before = [one.weight.detach().clone() for one in projectors]
    assert len(before) == make_model(seed=0).config.num_hidden_layers
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert all((now.weight - then).abs().max() > 0 for now, then in zip(projectors, before, strict=True))
    assert logged(trainer, "loss/hidden_mse")[0] > 0
    assert not (tmp_path / "final" / "objective.safetensors").exists()
    names = load_file(tmp_path / "final" / "model.safetensors")
    assert not [name for name in names if "projector" in name]
    assert "losses.1.projectors.0.weight" in load_file(tmp_path / "checkpoint-2" / "objective.safetensors")


def test_a_run_with_projections_resumes_to_the_last_bit(tmp_path):
    """Prevents projections that begin anew when a run is resumed."""
    straight = student_run(tmp_path / "a", STATES, max_steps=4, save_strategy="steps", save_steps=2)
    straight.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed = student_run(tmp_path / "b", STATES, max_steps=4, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (name, one), other in zip(straight.objective.named_parameters(), resumed.objective.parameters(), strict=True):
        assert torch.equal(one, other), name
    for (name, one), other in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("kind", ["hidden_mse", "hidden_cosine", "relation", "norm_direction"])
def test_accumulation_does_not_change_the_update_of_states(tmp_path, kind):
    """Prevents a loss on states that is averaged per micro-batch, so that short answers weigh more."""
    objective = [{"kind": "forward_kl"}, {"kind": kind, "weight": 0.1}]
    changes = {}
    for size in (8, 2):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        parts = {"teacher": narrow_teacher(), "demonstrations": [], "learning_rate": 0.3, "objective": objective}
        changes[size] = run(tmp_path / str(size), **parts, **shape)
    assert worst_difference(changes[8][0], changes[2][0]) < 3e-5  # a vector's length in float32, over two steps
    assert changes[8][1] == pytest.approx(changes[2][1], rel=1e-5)


def test_the_self_teacher_shows_its_states(tmp_path):
    """Prevents states that are read with the adapter on, where student and teacher would be the same."""
    trainer = make_trainer(tmp_path, objective=[{"kind": "forward_kl"}, {"kind": "hidden_cosine", "layers": "last"}])
    trainer.train()
    assert logged(trainer, "loss/hidden_cosine")[0] > 1e-4


def test_a_teacher_without_states_is_refused(tmp_path):
    """Prevents an error at the first step, after the models were loaded and the data tokenized."""

    class Words(Teacher):
        def signal(self, batch, needs):
            raise AssertionError("never asked")

    with pytest.raises(ValueError, match=r"need .*states.*but Words provides \['distribution'\]"):
        student_run(tmp_path, STATES, teacher=Words())


def test_layers_out_of_range_name_the_term(tmp_path):
    """Prevents an index error inside a hook."""
    wrong = [{"kind": "forward_kl"}, {"kind": "hidden_mse", "layers": [[1, 99]]}]
    with pytest.raises(ValueError, match=r"hidden_mse.*\[1, 99\].*0 to"):
        student_run(tmp_path, wrong)


def test_more_ids_than_there_are_name_the_term(tmp_path):
    """Prevents a support that is cut in silence."""
    wrong = [{"kind": "forward_kl"}, {"kind": "sinkhorn", "support": 10_000, "name": "transport"}]
    with pytest.raises(ValueError, match=r"'transport'.*10000.*vocabulary has 384"):
        student_run(tmp_path, wrong)


# ---------------------------------------------------------------------------------- schedules


def test_weights_follow_their_schedule(tmp_path):
    """Prevents a schedule that stands in the recipe and never moves a weight."""
    weights = {"cross_entropy": LADDER, "forward_kl": {**LADDER, "start": 0.0, "end": 1.0}}
    trainer = student_run(
        tmp_path, [{"kind": kind, "weight": weight} for kind, weight in weights.items()], max_steps=3
    )
    trainer.train()
    parts = {name: logged(trainer, f"loss/{name}") for name in weights}
    for step, (share, loss) in enumerate(zip((1.0, 0.5, 0.0), logged(trainer, "loss"), strict=True)):
        expected = share * parts["cross_entropy"][step] + (1 - share) * parts["forward_kl"][step]
        assert loss == pytest.approx(expected, rel=1e-4)


def test_a_temperature_follows_its_schedule(tmp_path):
    """Prevents a temperature that stays where it began."""
    schedule = {"schedule": "step", "start": 4.0, "end": 1.0, "end_step": 1}
    seen = []
    trainer = student_run(tmp_path, [{"kind": "forward_kl", "temperature": schedule}])
    between = trainer.objective.losses[0].between
    trainer.objective.losses[0].between = lambda *pair: (
        seen.append(trainer.objective.losses[0].temperature) or between(*pair)
    )
    trainer.train()
    assert sorted(set(seen)) == [1.0, 4.0] and seen[0] == 4.0 and seen[-1] == 1.0
    assert trainer.objective.describe()[0]["temperature"]["start"] == 4.0


def test_a_resumed_schedule_goes_on_where_it_was(tmp_path):
    """Prevents a warm-up that begins anew after an interruption."""
    terms = [{"kind": "forward_kl", "weight": {**LADDER, "end_step": None, "end": 0.2}}]
    straight = student_run(tmp_path / "a", terms, max_steps=4, save_strategy="steps", save_steps=2)
    straight.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed = student_run(tmp_path / "b", terms, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert logged(straight, "loss")[2:] == pytest.approx(logged(resumed, "loss")[-2:], rel=1e-6)


def test_a_schedule_that_begins_after_the_run_is_refused_at_once(tmp_path):
    """Prevents a weight that never moves because the run is shorter than its author thought."""
    terms = [{"kind": "forward_kl", "weight": {**LADDER, "start_step": 50, "end_step": None}}]
    with pytest.raises(ValueError, match=r"starts at step 50.*2 steps"):
        student_run(tmp_path, terms).train()


# ---------------------------------------------------------------------------------- weights of tokens


def test_token_weights_from_a_column_and_from_a_function_are_the_same(tmp_path):
    """Prevents weights that one of the two ways drops or shifts by a token."""
    heavy = [{**row, "token_weights": 0.5 + place % 3} for place, row in enumerate(ROWS[:16])]

    def by_word(row, ids):
        return [row["token_weights"]] * len(ids)

    parts = {"rows": heavy, "demonstrations": DEMONSTRATIONS}
    plain, _ = run(tmp_path / "none", **parts)
    updates = []
    for name, source in (("column", "token_weights"), ("function", by_word)):
        trainer = make_trainer(tmp_path / name, **parts, token_weights=source)
        before = trained_weights(trainer)
        trainer.train()
        updates.append({key: value - before[key] for key, value in trained_weights(trainer).items()})
    assert worst_difference(updates[0], updates[1]) == 0.0
    assert worst_difference(plain, updates[0]) > 0.05


def test_the_place_of_a_weight_is_the_place_of_its_token(tmp_path):
    """Prevents a shift by one between weights and tokens, which no total would show."""
    only_last = make_trainer(
        tmp_path, token_weights=lambda row, ids: [0.0] * (len(ids) - 1) + [1.0], objective="cross_entropy"
    )
    example = only_last.train_dataset[0]
    weighted = [place for place, weight in enumerate(example["token_weights"]) if weight]
    assert weighted == [len(example["student"]["input_ids"]) - 1]
    inputs = only_last.data_collator([example])
    assert inputs["token_weights"][0, weighted[0]] == 1.0 and inputs["token_weights"].sum() == 1.0


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("missing", r"names the column 'missing'"),
        (lambda row, ids: [1.0], r"1 token weights, but \d+ tokens are supervised"),
        (lambda row, ids: [-1.0] * len(ids), r"token weight -1.0; expected finite numbers"),
        (lambda row, ids: [math.nan] * len(ids), r"token weight nan"),
        (lambda row, ids: None, r"gives None; expected a number, or a list of numbers"),
        (lambda row, ids: "1.5", r"gives '1.5'; expected a number, or a list of numbers"),
    ],
)
def test_wrong_token_weights_are_found_before_training(tmp_path, weights, words):
    """Prevents a fault in a column that shows itself in the second epoch."""
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, token_weights=weights)


# ---------------------------------------------------------------------------------- heads, norms, sparse rows


def test_an_auxiliary_head_learns_and_is_dropped(tmp_path):
    """Prevents an auxiliary head that ends up in the model, or one that never learns."""
    objective = [{"kind": "cross_entropy"}, {"kind": "logit_binary_kl", "rank": 2, "weight": 0.1}]
    trainer = student_run(tmp_path, objective, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    aux = trainer.objective.losses[1]
    assert aux.up.shape == (384, 2) and aux.up.abs().max() > 0
    assert set(load_file(tmp_path / "final" / "model.safetensors")) <= set(make_model(seed=0).state_dict())
    assert not (tmp_path / "final" / "objective.safetensors").exists()


def test_gradient_norms_are_those_of_each_term_and_change_nothing(tmp_path):
    """Prevents a figure that isn't the gradient that the term trains with, and a training that is changed by it."""
    two = [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.25}]
    parts = {"teacher": narrow_teacher(), "demonstrations": [], "learning_rate": 0.3}
    quiet, _ = run(tmp_path / "quiet", objective=two, **parts)
    trainer = student_run(tmp_path / "told", two, log_gradient_norms=True)
    before = trained_weights(trainer)
    trainer.train()
    told = {name: value - before[name] for name, value in trained_weights(trainer).items()}
    assert worst_difference(quiet, told) == 0.0
    for place, name in enumerate(("forward_kl", "cross_entropy")):
        alone, _ = run(tmp_path / name, objective=[two[place]], **parts, max_steps=1)
        norm = math.sqrt(sum(float(value.square().sum()) for value in alone.values())) / 0.3
        assert logged(trainer, f"gradient/{name}")[0] == pytest.approx(norm, rel=1e-4)


class Few(Teacher):
    """Sparse rows: the text's own token and one other."""

    def signal(self, batch, needs):
        targets = batch.teacher_view.targets
        ids = torch.stack([targets, (targets + 1) % 384], dim=-1)
        return TeacherSignal(TopKRows(ids, torch.tensor([0.6, 0.15]).log().expand(len(ids), 2), 384))


def test_the_captured_mass_of_a_sparse_teacher_is_logged(tmp_path):
    """Prevents a run on a handful of ids that looks like one on the whole vocabulary."""
    trainer = student_run(tmp_path, "forward_kl", teacher=Few(), eval_dataset=ROWS[:4])
    trainer.train()
    assert logged(trainer, "teacher/captured_mass")[0] == pytest.approx(0.75, rel=1e-5)
    assert trainer.evaluate()["eval_teacher/captured_mass"] == pytest.approx(0.75, rel=1e-5)


def test_renormalizing_is_asked_for_and_warned_of(tmp_path, caplog):
    """Prevents a student that puts its mass elsewhere at no cost without anyone having said so."""
    bucket = student_run(tmp_path / "a", "forward_kl", teacher=Few())
    assert bucket.objective.tail == "bucket" and "no cost" not in caplog.text
    cut = student_run(tmp_path / "b", "forward_kl", teacher=Few(), tail="renormalize")
    assert cut.objective.tail == "renormalize" and "at no cost" in caplog.text


def test_sinkhorn_logs_its_convergence(tmp_path):
    """Prevents a plan that never converges without anyone seeing it."""
    terms = [{"kind": "forward_kl"}, {"kind": "sinkhorn", "group_size": 8, "support": 16}]
    trainer = student_run(tmp_path, terms)
    trainer.train()
    assert 0 <= logged(trainer, "loss/sinkhorn/unbalanced")[0] < 0.5
    assert 0 <= logged(trainer, "loss/sinkhorn/cost_bound")[0] <= 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_losses_train_the_same(tmp_path):
    """Prevents an option that is faster because it computes something else."""
    terms = [{"kind": "jensen_shannon"}, {"kind": "cross_entropy", "weight": 0.1}]
    parts = {"teacher": narrow_teacher(), "demonstrations": [], "learning_rate": 0.3, "objective": terms}
    plain, fused = run(tmp_path / "a", **parts), run(tmp_path / "b", **parts, compile_losses=True)
    assert worst_difference(plain[0], fused[0]) < 1e-5


def test_a_schedule_that_leaves_a_step_without_a_term_is_refused_before_training(tmp_path):
    """Prevents a run that learns from nothing in silence, because its only weight is 0 for a while."""
    late = {"schedule": "linear", "start": 0.0, "end": 1.0, "start_step": 1, "end_step": 9}
    with pytest.raises(ValueError, match=r"At step 1 of 4: The weights are \[0.0\]"):
        student_run(tmp_path, [{"kind": "forward_kl", "weight": late}], max_steps=4)
    gone = {"schedule": "step", "start": 1.0, "end": 0.0, "end_step": 2}
    terms = [{"kind": "forward_kl", "weight": gone}, {"kind": "sinkhorn", "support": 8}]
    with pytest.raises(ValueError, match=r"At step 3 of 4: .*sinkhorn.* would stand alone"):
        student_run(tmp_path, terms, max_steps=4)


def test_a_schedule_ends_with_the_last_step(tmp_path):
    """Prevents an end that is never in force, because the last update is made one step earlier."""
    schedule = {"schedule": "linear", "start": 1.0, "end": 0.0}
    terms = [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": schedule}]
    trainer = student_run(tmp_path, terms, max_steps=3)
    trainer.train()
    loss, first, second = (logged(trainer, name) for name in ("loss", "loss/forward_kl", "loss/cross_entropy"))
    assert loss[0] == pytest.approx(first[0] + second[0], rel=1e-4)
    assert loss[2] == pytest.approx(first[2], rel=1e-4)


def test_states_alone_do_not_claim_an_agreement(tmp_path):
    """Prevents an agreement of 0 that was never counted."""

    class Alone(HiddenMSE):
        may_stand_alone = True

    trainer = student_run(tmp_path, [Alone()], eval_dataset=ROWS[:4])
    trainer.train()
    assert not logged(trainer, "teacher/agreement") and "eval_teacher/agreement" not in trainer.evaluate()


def test_a_term_that_reaches_nothing_has_no_gradient(tmp_path):
    """Prevents a crash of the figure that was to show it."""
    terms = [{"kind": "forward_kl"}, {"kind": "hidden_mse", "layers": [[0, 0]]}]
    trainer = make_trainer(tmp_path, objective=terms, log_gradient_norms=True)
    trainer.train()
    assert logged(trainer, "gradient/hidden_mse")[0] == 0.0 < logged(trainer, "gradient/forward_kl")[0]
