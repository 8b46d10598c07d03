"""Teachers that follow the student: what they keep of it, that it is left as it was, and resuming."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from safetensors.torch import load_file
from test_teachers import LONG, NEEDS, batch_of, change, close, plain, spoken, student
from torch import Tensor, nn
from training import lora, make_trainer, trained_weights, worst_difference

from hfkd.losses import CrossEntropy, ForwardKL
from hfkd.support import TokenChunk
from hfkd.teachers.moving import EmaTeacher, ShadowTeacher, SnapshotTeacher

KINDS = {"ema": lambda: EmaTeacher(decay=0.5), "snapshot": lambda: SnapshotTeacher(every=1)}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_student = pytest.mark.parametrize("full", [True, False], ids=["full", "adapter"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def learner_of(full: bool, dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    """A student in training mode, all of it or an adapter learning."""
    return (make_model(seed=0, **settings).train() if full else student(dropout=0.5)).to(dtype)


def prepared(teacher: ShadowTeacher, learner: nn.Module) -> ShadowTeacher:
    """The teacher, knowing its student."""
    teacher.prepare(Accelerator(cpu=True), learner)
    return teacher


def learning(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what learns, in float64."""
    return {name: one.detach().double().clone() for name, one in model.named_parameters() if one.requires_grad}


def shadow(teacher: ShadowTeacher) -> dict[str, Tensor]:
    """What the teacher keeps, by the names of the parameters."""
    return {name[7:]: one for name, one in teacher.state_dict().items() if name.startswith("shadow.")}


def moved(model: nn.Module, seed: int, size: float = 1e-3) -> None:
    """Stands for an optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_((size * torch.randn(one.shape, generator=generator)).to(one.dtype))


def loaded_with(learner: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Another model with these weights, made without the teacher's way of putting them in force."""
    other = copy.deepcopy(learner)
    assert not set(values) - set(other.state_dict())
    other.load_state_dict(values, strict=False)
    return other


# -------------------------------------------------------------------------------------------------- what is kept


@every_student
@every_dtype
def test_the_average_is_the_one_in_the_docstring(full, dtype):
    """Prevents a decay that is taken for its complement, and changes of a half-precision student that round to
    nothing.
    """
    learner = learner_of(full, dtype)
    teacher = prepared(EmaTeacher(decay=0.99), learner)
    expected, first = learning(learner), learning(learner)
    for step in range(1, 21):
        moved(learner, step, 0.05)
        teacher.after_step(step)
        now = learning(learner)
        expected = {name: 0.99 * expected[name] + 0.01 * now[name] for name in expected}
    ours = shadow(teacher)
    assert ours.keys() == expected.keys() == first.keys() and int(teacher.state_dict()["changes.EmaTeacher"]) == 20
    for name, one in expected.items():
        assert ours[name].dtype == torch.float32
        step_taken = (one - first[name]).abs().max()
        assert step_taken > 1e-3
        assert (ours[name].double() - one).abs().max() < 1e-4 * step_taken + 1e-6


def test_one_step_leaves_the_teacher_near_where_it_was():
    """Prevents the inverted rate, by which the teacher is the student after one step."""
    learner = learner_of(True)
    teacher, before = prepared(EmaTeacher(decay=0.9), learner), learning(learner)
    moved(learner, 1, 0.1)
    teacher.after_step(1)
    for name, now in learning(learner).items():
        torch.testing.assert_close(shadow(teacher)[name].double() - before[name], 0.1 * (now - before[name]))


def test_it_moves_once_an_interval():
    """Prevents an interval that is counted from somewhere else after a resume, or not at all."""
    learner = learner_of(False)
    teacher, expected = prepared(EmaTeacher(decay=0.5, interval=3), learner), learning(learner)
    for step in range(1, 8):
        moved(learner, step)
        teacher.after_step(step)
        teacher.after_epoch(step)
        if step % 3 == 0:
            expected = {name: 0.5 * expected[name] + 0.5 * now for name, now in learning(learner).items()}
    assert teacher.changes == 2
    for name, one in expected.items():
        torch.testing.assert_close(shadow(teacher)[name].double(), one, rtol=1e-5, atol=1e-7)


@every_student
def test_only_what_learns_is_kept(full):
    """Prevents a second copy of the base under an adapter, and a tied matrix that is kept and swapped twice."""
    learner = learner_of(full)
    kept = shadow(prepared(EmaTeacher(), learner))
    names = {name for name, one in learner.named_parameters() if one.requires_grad}
    assert set(kept) == names and (full or all("lora_" in name for name in names))
    assert "lm_head.weight" not in kept  # the head is the embeddings
    own = {one.data_ptr() for one in learner.parameters()}
    assert own.isdisjoint(one.data_ptr() for one in kept.values())


@every_dtype
def test_snapshots_are_taken_when_they_are_due(dtype):
    """Prevents a teacher that follows every step, one that never moves, and snapshots that were rounded."""
    for every in (2, "epoch"):
        learner = learner_of(True, dtype)
        teacher, expected = prepared(SnapshotTeacher(every), learner), learning(learner)
        for step in range(1, 6):
            moved(learner, step, 0.05)
            teacher.after_step(step)
            due = step % 2 == 0
            if due:
                teacher.after_epoch(step / 2)
                expected = learning(learner)
            assert all(torch.equal(one.double(), expected[name]) for name, one in shadow(teacher).items())
            assert any(not torch.equal(one.double(), expected[name]) for name, one in learning(learner).items()) != due


@every_kind
def test_before_anything_moved_it_is_the_student_before_the_first_step(kind):
    """Prevents random or empty targets in the first epoch."""
    learner = learner_of(False)
    teacher, expected = prepared(KINDS[kind](), learner), plain(learner)
    change(learner)
    close(spoken(teacher), expected)
    assert (plain(learner) - expected).abs().max() > 0.1


# --------------------------------------------------------------------------------------------- what is put in force


@every_kind
@every_dtype
@pytest.mark.parametrize("student_kind", ["tied", "untied", "adapter"])
def test_the_teacher_says_what_another_model_with_its_weights_says(kind, dtype, student_kind):
    """Prevents a teacher whose body is the average and whose head is the student's, which trains beside it."""
    learner = learner_of(student_kind != "adapter", dtype, tie_word_embeddings=student_kind != "untied")
    teacher = prepared(KINDS[kind](), learner)
    moved(learner, 1, 0.1)
    teacher.after_step(1)
    moved(learner, 2, 0.1)
    expected = plain(loaded_with(learner, shadow(teacher))).float()
    rows = teacher.signal(batch_of(), NEEDS).rows
    change(learner)  # what the student does afterwards doesn't reach a signal that was given
    with torch.no_grad():
        ours = rows.head.logits(rows.hidden).float()
    assert (ours - plain(learner).float()).abs().max() > 0.1
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@every_kind
@every_dtype
@every_student
@pytest.mark.parametrize("fails", [False, True], ids=["as usual", "error"])
def test_the_student_is_back_bit_for_bit(kind, dtype, full, fails):
    """Prevents an out-of-memory error that is caught, or just a rounding, from leaving the teacher's weights in the
    student.
    """
    learner = learner_of(full, dtype)
    teacher = prepared(KINDS[kind](), learner)
    moved(learner, 1, 0.1)
    before = {name: (one.data_ptr(), one.dtype, one.detach().clone()) for name, one in learner.named_parameters()}
    asked = {name: one.requires_grad for name, one in learner.named_parameters()}
    modes = {name: module.training for name, module in learner.named_modules()}
    first = next(one for one in learner.parameters() if one.requires_grad)
    first.grad = torch.ones_like(first)
    try:
        with teacher.weights() as model:
            assert model is learner and not any(module.training for module in model.modules())
            assert not torch.equal(first, before[next(name for name in asked if asked[name])][2])
            if fails:
                raise RuntimeError("stop")
    except RuntimeError as error:
        assert str(error) == "stop"
    for name, one in learner.named_parameters():
        assert (one.data_ptr(), one.dtype) == before[name][:2] and torch.equal(one, before[name][2])
    assert {name: one.requires_grad for name, one in learner.named_parameters()} == asked
    assert {name: module.training for name, module in learner.named_modules()} == modes
    assert torch.equal(first.grad, torch.ones_like(first))


@every_kind
@every_student
def test_teaching_between_forward_and_backward_loses_no_gradient(kind, full):
    """Prevents a backward through the teacher's weights, because a graph holds parameters and no copies of them."""
    learner = learner_of(full).eval()
    teacher = prepared(KINDS[kind](), learner)
    moved(learner, 1, 0.1)
    view = batch_of().student

    def gradients(teach: bool) -> dict[str, Tensor]:
        learner.zero_grad()
        cost = learner(input_ids=view.input_ids, attention_mask=view.attention_mask, labels=view.labels).loss
        if teach:
            spoken(teacher)
        cost.backward()
        return {name: one.grad.clone() for name, one in learner.named_parameters() if one.grad is not None}

    without, beside = gradients(False), gradients(True)
    assert without and all(gradient.abs().max() > 0 for gradient in without.values())
    assert without.keys() == beside.keys()
    assert all(torch.equal(without[name], beside[name]) for name in without)


@every_kind
@every_student
def test_autocast_does_not_mix_teacher_and_student(kind, full):
    """Prevents one side from reading the other's weights in half precision, which autocast keeps by the parameter."""
    learner = learner_of(full).eval()
    teacher = prepared(KINDS[kind](), learner)
    moved(learner, 1, 0.1)
    view = batch_of().teacher

    def both() -> tuple[Tensor, Tensor]:
        """The teacher between two forwards of the student, all in one context."""
        first = learner(input_ids=view.input_ids).logits
        hidden = teacher.signal(batch_of(), NEEDS).rows.hidden
        second = learner(input_ids=view.input_ids).logits
        assert torch.equal(first, second) and second.requires_grad
        return hidden.float(), second.float()

    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = both()
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@every_kind
@every_student
def test_nothing_learns_in_the_shadow(kind, full):
    """Prevents targets with a graph, or with the noise of dropout, the adapter's included."""
    teacher = prepared(KINDS[kind](), learner_of(full))
    rows = teacher.signal(batch_of(), NEEDS).rows
    assert rows.hidden.grad_fn is None and not rows.hidden.requires_grad and not rows.head.weight.requires_grad
    assert not any(one.requires_grad for one in teacher.state_dict().values())
    assert torch.equal(spoken(teacher), spoken(teacher)) and torch.is_grad_enabled()


@every_kind
def test_the_prefix_is_run_anew_when_the_weights_have_moved(kind):
    """Prevents demonstrations read with the weights of an older teacher, and a prefix that is run for nothing."""
    learner = learner_of(False)
    teacher = prepared(KINDS[kind](), learner)
    teacher.share_prefix(LONG)
    before = spoken(teacher)
    kept = teacher.prefix._cache
    change(learner)
    assert torch.equal(spoken(teacher), before) and kept is not None and teacher.prefix._cache is kept
    teacher.after_step(1)
    expected = plain(loaded_with(learner, shadow(teacher)))
    assert (expected - before).abs().max() > 0.1
    close(spoken(teacher), expected)
    assert teacher.prefix._cache is not kept
    teacher.load_state_dict(teacher.state_dict())
    assert teacher.prefix._cache is None


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EmaTeacher(decay=1.0), r"decay is 1.0; expected .* below 1.*frozen_copy"),
        (lambda: EmaTeacher(decay=-0.1), "decay is -0.1"),
        (lambda: EmaTeacher(decay=float("nan")), "decay is nan"),
        (lambda: EmaTeacher("0.9"), "decay is '0.9'; expected a number"),
        (lambda: EmaTeacher(None), "decay is None; expected a number"),
        (lambda: EmaTeacher(interval=0), "interval is 0; expected optimizer steps"),
        (lambda: EmaTeacher(interval=1.5), "interval is 1.5"),
        (lambda: SnapshotTeacher(every=0), "every is 0; expected `epoch` or a number"),
        (lambda: SnapshotTeacher(every="step"), "every is 'step'"),
        (lambda: SnapshotTeacher(0.5), "The teacher's every is 0.5; expected `epoch` or a number"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, words):
    """Prevents a teacher that never moves, or is the student at each step, because of one number."""
    with pytest.raises(ValueError, match=words):
        make()


def test_without_its_student_it_says_so():
    """Prevents an attribute error in whoever forgot `prepare`."""
    teacher = EmaTeacher()
    assert teacher.state_dict() == {}
    with pytest.raises(RuntimeError, match="call `prepare` first"), teacher.weights():
        pass


def test_a_frozen_student_has_no_shadow():
    """Prevents an empty average that is taken for a teacher."""
    with pytest.raises(ValueError, match="EmaTeacher keeps a copy .*none of its parameters requires"):
        prepared(EmaTeacher(), make_model(seed=0).requires_grad_(False))


def test_the_state_of_another_student_is_refused():
    """Prevents an average that goes on with the half of the tensors that happen to have the same name."""
    teacher = prepared(EmaTeacher(), learner_of(False))
    kept = {name: one.clone() for name, one in shadow(teacher).items()}
    state = teacher.state_dict()
    name = next(name for name in state if "lora_A" in name)
    for wrong, words in (
        ({key: one for key, one in state.items() if key != name}, r"missing.*expected \(4, 32\)"),
        ({**state, name: torch.zeros(8, 32)}, r"shape \(8, 32\) in the checkpoint; expected \(4, 32\)"),
        ({**state, "shadow.more": torch.zeros(1)}, "'shadow.more'.*expected no such entry"),
    ):
        with pytest.raises(ValueError, match=rf"EmaTeacher belongs to another student .*: 1 entries differ.*{words}"):
            teacher.load_state_dict(wrong)
    assert all(torch.equal(one, kept[name]) for name, one in shadow(teacher).items())


def test_the_state_of_another_kind_is_refused():
    """Prevents an average that goes on as a snapshot, and a snapshot that is averaged, because the names agree."""
    kinds = [EmaTeacher(), SnapshotTeacher()]
    ema, snapshot = (prepared(kind, learner_of(False)).state_dict() for kind in kinds)
    with pytest.raises(ValueError, match=r"another kind of teacher: 2 entries differ, first 'changes.EmaTeacher'"):
        kinds[1].load_state_dict(ema)
    with pytest.raises(ValueError, match="2 entries differ"):
        kinds[0].load_state_dict(snapshot)
    kinds[1].load_state_dict(snapshot)


def test_a_student_that_was_changed_under_it_is_refused():
    """Prevents a swap that reaches nothing, because the model was cut or sharded in the meantime."""
    learner = learner_of(True)
    teacher = prepared(EmaTeacher(), learner)
    learner.model.norm.weight = nn.Parameter(torch.ones(16))
    with pytest.raises(RuntimeError, match=r"norm.weight with shape \(32,\), but that has shape \(16,\)"):
        teacher.after_step(1)


# ------------------------------------------------------------------------------------------------ in a training run


def self_run(folder, teacher: ShadowTeacher, **overrides):
    """A trainer whose teacher follows the student, behind demonstrations."""
    settings = {"peft_config": lora(), "optim": "adamw_torch", "learning_rate": 1e-2, "teacher": teacher}
    return make_trainer(folder, **{**settings, **overrides})


MOVING = {
    "ema": (lambda: EmaTeacher(decay=0.5), {"max_steps": 4}),
    "slow ema": (lambda: EmaTeacher(decay=0.9, interval=2), {"max_steps": 5, "save_steps": 3}),
    "steps": (lambda: SnapshotTeacher(every=3), {"max_steps": 5}),
    "epoch": (lambda: SnapshotTeacher(), {"max_steps": 5, "save_steps": 3}),
    "an epoch's last step": (lambda: SnapshotTeacher(), {"max_steps": 4}),
    "epochs": (lambda: SnapshotTeacher(), {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch"}),
}


@pytest.mark.parametrize("kind", MOVING)
def test_resumed_equals_straight(tmp_path, kind):
    """Prevents a teacher that begins anew with the resumed student, and so another run after each interruption."""
    make, settings = MOVING[kind]
    settings = {"save_strategy": "steps", "save_steps": 2, **settings}
    whole = self_run(tmp_path / "whole", make(), **settings)
    whole.train()
    checkpoint = f"checkpoint-{settings['save_steps']}"
    assert settings["save_steps"] < whole.state.global_step
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "parts" / checkpoint)
    resumed = self_run(tmp_path / "parts", make(), **{**settings, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / checkpoint))
    ours, theirs = trained_weights(whole), trained_weights(resumed)
    assert ours and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole.teacher.changes > 0
    kept = shadow(resumed.teacher)
    assert all(torch.equal(one, kept[name]) for name, one in shadow(whole.teacher).items())


def test_the_average_follows_a_run(tmp_path):
    """Prevents a teacher that nobody tells of the steps, so that it stays where the student began."""
    trainer = self_run(tmp_path, EmaTeacher(decay=0.8), max_steps=3)
    seen, expected = [], learning(trainer.model)
    after_step = trainer.teacher.after_step
    trainer.teacher.after_step = lambda step: (seen.append(learning(trainer.model)), after_step(step))
    trainer.train()
    assert len(seen) == 3
    for now in seen:
        expected = {name: 0.8 * expected[name] + 0.2 * now[name] for name in expected}
    for name, one in shadow(trainer.teacher).items():
        torch.testing.assert_close(one.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_accumulation_does_not_change_the_average(tmp_path):
    """Prevents an average over micro-batches, which would move with a setting for memory."""
    runs = {}
    for size in (8, 2):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainer = self_run(tmp_path / str(size), EmaTeacher(decay=0.5), optim="sgd", learning_rate=0.5, **shape)
        first = learning(trainer.model)
        trainer.train()
        assert trainer.teacher.changes == 2
        runs[size] = {name: one - first[name] for name, one in shadow(trainer.teacher).items()}
    assert worst_difference(runs[8], runs[2]) < 1e-5


def test_the_shadow_is_neither_trained_nor_saved_with_the_student(tmp_path):
    """Prevents an average that the optimizer moves too, and a student that is published with its teacher inside."""
    trainer = self_run(tmp_path, EmaTeacher(decay=0.5), save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    mine = {one.data_ptr() for one in shadow(trainer.teacher).values()}
    learned = {one.data_ptr() for group in trainer.optimizer.param_groups for one in group["params"]}
    assert mine and learned and mine.isdisjoint(learned)
    assert not [name for name in load_file(tmp_path / "final" / "adapter_model.safetensors") if "shadow" in name]
    assert not (tmp_path / "final" / "teacher.safetensors").exists()
    saved = load_file(tmp_path / "checkpoint-2" / "teacher.safetensors")
    assert all(torch.equal(saved["shadow." + name], one) for name, one in shadow(trainer.teacher).items())


# ------------------------------------------------------------------------------------------------------------ PS-KD

EPOCHS, SHARE = 4, 0.8
PS_KD = [
    {"kind": "cross_entropy", "weight": {"schedule": "stairs", "stairs": EPOCHS, "start": 1.0, "end": 1 - SHARE}},
    {"kind": "forward_kl", "weight": {"schedule": "stairs", "stairs": EPOCHS, "start": 0.0, "end": SHARE}},
]


def ps_kd_run(folder, objective=PS_KD, epochs: int = EPOCHS, **overrides):
    """A student that learns labels, and from the second epoch on what it said of them in the one before."""
    settings = {"demonstrations": [], "max_steps": -1, "num_train_epochs": epochs, "learning_rate": 0.1}
    parts = {"teacher": SnapshotTeacher(), "objective": objective, "save_strategy": "epoch"}
    return make_trainer(folder, **{**settings, **parts, **overrides})


def test_the_first_epoch_of_ps_kd_is_fine_tuning(tmp_path):
    """Prevents an untrained model from being taken for the previous epoch's."""
    whole = ps_kd_run(tmp_path / "whole")
    whole.train()
    plainly = ps_kd_run(tmp_path / "plain", "cross_entropy", teacher=None)
    plainly.train()
    first, same, last, other = (
        load_file(tmp_path / run / f"checkpoint-{step}" / "model.safetensors")
        for step in (2, 8)
        for run in ("whole", "plain")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any((last[name] - other[name]).abs().max() > 1e-5 for name in last)


def test_the_weights_of_ps_kd_grow_with_the_epochs(tmp_path):
    """Prevents a weight that changes in the middle of an epoch, or that ends below the one that was asked for."""
    trainer = ps_kd_run(tmp_path)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    shares = [0.0, 0.0, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8]  # a_e = .8 (e + 1) / 4, and none in the first
    for line, share in zip(lines, shares, strict=True):
        expected = (1 - share) * line["loss/cross_entropy"] + share * line["loss/forward_kl"]
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
    assert [term.at(7, 8).weight for term in trainer.objective.terms] == pytest.approx([1 - SHARE, SHARE])
    assert all(lines[step]["loss/forward_kl"] < 1e-6 for step in (0, 2, 4, 6))  # the student is its own snapshot
    assert all(lines[step]["loss/forward_kl"] > 1e-5 for step in (1, 3, 5, 7))


def test_the_gradient_of_ps_kd_is_that_of_its_mixed_target():
    """Prevents two terms that are not the published loss."""
    generator = torch.Generator().manual_seed(0)
    logits, previous = (torch.randn(5, 9, generator=generator) for _ in range(2))
    logits.requires_grad_(True)
    targets, share = torch.arange(5), 0.6
    chunk = TokenChunk.from_logits(targets, logits, previous)
    ours = (1 - share) * CrossEntropy()(chunk) + share * ForwardKL()(chunk)
    mixed = (1 - share) * nn.functional.one_hot(targets, 9) + share * previous.softmax(-1)
    theirs = -(mixed * logits.log_softmax(-1)).sum(-1)
    gradients = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (ours, theirs)]
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
