"""KDRLTrainer on a tiny student: TRL's GRPO where the teacher is silent, and the terms as their formulas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from rewarding import (
    SETTINGS,
    assert_step,
    distributions,
    learned,
    listen,
    logged,
    make_rewarded,
    odd,
    prompts_of,
    same,
    student,
    trained,
)
from training import DEMONSTRATIONS, ROWS
from trl import GRPOConfig, GRPOTrainer

from hfkd import PromptStyle
from hfkd.errors import HeadError, VerifierError
from hfkd.reinforcement import KDRLConfig
from hfkd.reinforcement.asking import stop_ids
from hfkd.teachers import EmaTeacher, LocalTeacher, MixtureTeacher, RoutedTeacher, SelfTeacher

TOLD = {"demonstrations": DEMONSTRATIONS, "prompts": PromptStyle()}
STEP = {"schedule": "step", "start": 0.0, "end": 1.0, "end_step": 1}
TWICE = {"per_device_train_batch_size": 4}


def plain_grpo(folder: Any, **overrides: Any) -> dict[str, torch.Tensor]:
    """What TRL alone makes of the same student, prompts and rewards."""
    trainer = GRPOTrainer(
        student(),
        [lambda completions, **_: [odd(None, text) for text in completions]],
        GRPOConfig(output_dir=str(folder), **{**SETTINGS, **overrides}),
        train_dataset=Dataset.from_dict({"prompt": [row["prompt"] for row in ROWS[:16]]}),
        processing_class=make_tokenizer(),
    )
    return trained(trainer)


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "optim": "adamw_torch", "learning_rate": 1e-3}])
def test_without_a_teacher_it_is_trls_trainer_bit_for_bit(tmp_path, options):
    """A comparison with GRPO alone would otherwise be one with another GRPO."""
    ours = trained(make_rewarded(tmp_path / "ours", distillation_weight=0, **options))
    assert same(ours, plain_grpo(tmp_path / "trl", **options))


def test_a_teacher_whose_weight_is_0_isnt_asked(tmp_path):
    """A teacher that costs time, or moves a random number, though it is switched off."""

    class Silent(LocalTeacher):
        def signal(self, batch, needs):
            raise AssertionError("asked")

    ours = trained(make_rewarded(tmp_path / "ours", teacher=Silent(make_model(seed=1)), distillation_weight=0))
    assert same(ours, plain_grpo(tmp_path / "trl"))


def by_hand(estimator: str, student_rows: torch.Tensor, teacher_rows: torch.Tensor, inputs: dict) -> torch.Tensor:
    """The teacher's term as the formula says, a mean over the taught tokens."""
    ids, taught = inputs["completion_ids"][..., None], inputs["taught"]
    if estimator == "full":
        values = (student_rows.exp() * (student_rows - teacher_rows)).sum(dim=-1)
    else:
        ratio = (teacher_rows.gather(-1, ids) - student_rows.gather(-1, ids))[..., 0]
        values = 0.5 * ratio**2 if estimator == "k2" else ratio.exp() - ratio - 1
    return values[taught].sum() / taught.sum()


@pytest.mark.parametrize(("estimator", "batches"), [("k2", (8, 1)), ("k3", (4, 2)), ("full", (4, 2))])
def test_a_step_of_distillation_is_the_formulas_step(tmp_path, monkeypatch, estimator, batches):
    """Tokens shifted by one, a prompt of the wrong side, or a mean over the wrong tokens still train something."""
    size, times = batches
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 1}
    trainer = make_rewarded(
        *(tmp_path,),
        teacher=SelfTeacher("adapter_off"),
        estimator=estimator,
        reward_weight=0.0,
        distillation_weight=0.5,
        log_ratio_limit=None,
        max_grad_norm=0.0,
        **TOLD,
        **settings,
    )
    kept = listen(trainer, monkeypatch)
    before = learned(trainer)
    after = trained(trainer)
    inputs = {name: torch.cat([one[name] for one in kept]) for name in ("completion_ids", "taught", "asked")}
    assert inputs["taught"].sum() == logged(trainer, "num_tokens")[0] - sum(
        len(prompt) for prompt in prompts_of(trainer, inputs, "student")
    )
    reference = student()
    ours = distributions(reference, prompts_of(trainer, inputs, "student"), inputs)
    with torch.no_grad(), reference.disable_adapter():
        theirs = distributions(reference, prompts_of(trainer, inputs, "teacher"), inputs)
    loss = by_hand(estimator, ours, theirs, inputs)
    assert logged(trainer, "distillation/loss")[0] == pytest.approx(loss.item(), rel=2e-4)
    (0.5 * loss).backward()
    assert_step(reference, before, after, SETTINGS["learning_rate"])


@pytest.mark.parametrize("estimator", ["k2", "full", "top_k"])
def test_a_teacher_that_is_the_student_adds_nothing(tmp_path, estimator):
    """Temperatures or vocabularies that differ between the two would give a loss, and a pull, at equality."""
    model = student()
    trainer = make_rewarded(
        tmp_path,
        model=model,
        teacher=SelfTeacher("frozen_copy"),
        estimator=estimator,
        distillation_weight=1.0,
        max_steps=1,
        temperature=0.7,
        verifier=lambda row, text: 1.0,
    )
    before = learned(trainer)
    trainer.train()
    after = learned(trainer)
    assert abs(logged(trainer, "distillation/loss")[0]) < 1e-6
    assert max(float((after[name] - before[name]).abs().max()) for name in after) < 1e-5


@pytest.mark.parametrize("where", ["wrong_responses", "wrong_groups"])
def test_where_all_is_right_nothing_is_distilled(tmp_path, where):
    """A mean over no tokens is NaN, and a step of it would end the run."""
    options = {"verifier": lambda row, text: 1.0, "learning_rate": 0.5}
    teacher = {"teacher": make_model(seed=1), "distillation_weight": 1.0, "distil_where": where}
    trainer = make_rewarded(tmp_path, **options, **teacher)
    before = learned(trainer)
    trainer.train()
    assert logged(trainer, "distillation/share") == [0.0, 0.0] and logged(trainer, "loss") == [0.0, 0.0]
    assert same(before, learned(trainer))


def test_only_wrong_answers_are_distilled(tmp_path):
    """The wrong half in place of the other one would go unnoticed: both train."""
    trainer = make_rewarded(tmp_path, teacher=make_model(seed=1), distil_where="wrong_responses")
    trainer.train()
    for share, reward in zip(logged(trainer, "distillation/share"), logged(trainer, "reward"), strict=True):
        assert share == pytest.approx(1 - reward) and 0 < share < 1


def kinds() -> dict[str, Any]:
    """Teachers that put their rows together in ways of their own."""
    several = {"a": LocalTeacher(make_model(seed=1)), "b": LocalTeacher(make_model(seed=2))}
    return {
        "ema": EmaTeacher(decay=0.5),
        "mixture": MixtureTeacher(several),
        "routed": RoutedTeacher(several),
        "live": SelfTeacher("live"),
        "larger vocabulary": LocalTeacher(make_model(seed=1, vocab_size=400)),
    }


@pytest.mark.parametrize("kind", list(kinds()))
def test_any_kind_of_teacher_speaks_of_drawn_answers(tmp_path, kind):
    """A kind that gives its rows in another form would fail in the first step, hours after the run was asked for."""
    rows = [{**row, "teacher": "ab"[place % 2]} for place, row in enumerate(ROWS[:16])]
    options = {"teacher": kinds()[kind], "reward_weight": 0.0, "distillation_weight": 1.0}
    trainer = make_rewarded(tmp_path, train_dataset=rows, **options, **TOLD)
    trained(trainer)
    assert all(0.01 < value < 100 for value in logged(trainer, "distillation/loss"))


def test_weights_follow_their_schedules(tmp_path):
    """A switch that comes a step late, or never, is another method under the same name."""
    switch = {"schedule": "step", "start": 1.0, "end": 0.0, "end_step": 1}
    trainer = make_rewarded(tmp_path, teacher=make_model(seed=1), distillation_weight=switch, max_steps=3)
    trainer.train()
    assert logged(trainer, "distillation/weight") == [1.0]


def test_nft_begins_as_dr_grpo(tmp_path):
    """Its gradient on answers of the present weights is reward less mean reward, token by token."""
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "distillation_weight": 0}
    ours = trained(make_rewarded(tmp_path / "nft", policy_loss="nft", **settings))
    advantage = trained(make_rewarded(tmp_path / "grpo", scale_rewards="none", loss_type="dapo", **settings))
    assert all(torch.allclose(ours[name], advantage[name], atol=1e-6) for name in ours)


def test_old_answers_count_by_their_ratio(tmp_path, monkeypatch):
    """The second pass over the same answers would otherwise be an estimate for weights that are gone."""
    from hfkd.reinforcement import kdrl

    seen = []
    real = kdrl.bounded_ratio
    monkeypatch.setattr(kdrl, "bounded_ratio", lambda *args: seen.append(real(*args)) or seen[-1])
    options = {"teacher": make_model(seed=1), "num_iterations": 2, "epsilon": 0.01, "distillation_weight": 1.0}
    trained(make_rewarded(tmp_path, **options))
    first, second = seen
    assert torch.allclose(first, torch.ones_like(first), atol=1e-5)
    assert second.min() == pytest.approx(0.99) and second.max() == pytest.approx(1.01)


def test_answers_end_at_the_prompts_stop_string(tmp_path, monkeypatch):
    """Behind the line end a small model goes on with questions of its own, and the teacher would be asked of them."""
    trainer = make_rewarded(tmp_path, distillation_weight=0, max_steps=1, prompts=PromptStyle(stop=("e",)))
    ends = set(stop_ids(make_tokenizer(), ["e"]))
    kept = listen(trainer, monkeypatch)
    trainer.train()
    inputs = kept[0]
    answers = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
    ]
    assert any(answer[-1] in ends for answer in answers)
    assert not any(token in ends for answer in answers for token in answer[:-1])
    with pytest.raises(ValueError, match="stop string is 'ab'"):
        stop_ids(make_tokenizer(), ["ab"])


def test_ends_that_the_teacher_doesnt_know_arent_distilled(tmp_path):
    """A teacher with another end token calls the student's end absurd: the student would learn never to stop."""
    teacher = make_model(seed=1)
    teacher.generation_config.eos_token_id = 7
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    known = LocalTeacher(teacher, tokenizer=tokenizer)
    model = student()
    options = {"distillation_weight": 1.0, "max_completion_length": 64, "max_steps": 1, "temperature": 3.0}
    trainer = make_rewarded(tmp_path, model=model, teacher=known, **options)
    trainer.train()
    assert trainer._foreign.tolist() == [2]
    ended = 1 - logged(trainer, "completions/clipped_ratio")[0]
    assert ended > 0 and logged(trainer, "distillation/share")[0] < 1


def test_a_teacher_whose_head_is_read_wrongly_is_refused(tmp_path):
    """Log-probabilities that aren't the teacher's look like any others in the log."""
    teacher = make_model(seed=1)
    plain = teacher.lm_head.forward
    teacher.lm_head.forward = lambda states: 2 * plain(states)
    with pytest.raises(HeadError, match="differ from the model's own"):
        make_rewarded(tmp_path, teacher=teacher).train()


def test_a_run_goes_on_exactly(tmp_path):
    """A moving teacher or a random number that isn't in the checkpoint shows only in the weights."""
    options = {"teacher": "self", "distillation_weight": 0.5, "max_steps": 4, **TOLD}
    straight = trained(make_rewarded(tmp_path / "straight", save_strategy="steps", save_steps=2, **options))
    trainer = make_rewarded(tmp_path / "resumed", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert same(straight, learned(trainer))
    assert not (tmp_path / "straight" / "checkpoint-2" / "training_args.bin").exists()


def raising(row: Any, text: str) -> float:
    raise KeyError("grade")


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        (raising, "raised KeyError.*The row: '[a-z]+'"),
        (lambda *_: float("nan"), "nan"),
    ],
)
def test_a_broken_verifier_stops_the_run_and_names_the_row(tmp_path, verifier, message):
    """TRL takes a NaN for 'no reward' and trains on."""
    with pytest.raises(VerifierError, match=message):
        make_rewarded(tmp_path, distillation_weight=0, verifier=verifier).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no teacher"),
        ({"teacher": "self", "estimator": "k1"}, "estimator is 'k1'"),
        ({"teacher": "self", "distil_where": "some"}, "distil_where is 'some'"),
        ({"policy_loss": "ppo"}, "policy_loss is 'ppo'"),
        ({"teacher": "self", "eval_strategy": "steps"}, "eval_strategy"),
        ({"teacher": "self", "objective": "forward_kl"}, "objective is given, and estimator is 'k2'"),
        ({"teacher": "self", "objective": "cross_entropy", "estimator": "full"}, "learn the text"),
        ({"teacher": "self", "right_from": 0.0}, "right_from is 0.0"),
        ({"teacher": "self", "max_completion_length": 3000}, "may be answered with 3000 more"),
        ({"distillation_weight": 0, "verifier": "exactly"}, "verifier is 'exactly'"),
        ({"distillation_weight": 0, "policy_loss": "nft", "beta": 0.5}, "beta is 0.5, and policy_loss: nft"),
        ({"distillation_weight": 0, "policy_loss": "nft", "epsilon": 0.1}, "epsilon is 0.1, and policy_loss: nft"),
        ({"distillation_weight": 0, "policy_loss": "nft", "loss_type": "dr_grpo"}, "loss_type is 'dr_grpo'"),
        ({"teacher": "self", "reward_weight": 0.0, "beta": 5.0}, "beta is 5.0, and reward_weight"),
        ({"teacher": "self", "reward_weight": STEP, "entropy_coef": 0.1}, "is 0 at some step"),
        ({"teacher": "self", "steps_per_generation": 2, **TWICE, "gradient_accumulation_steps": 4}, "a multiple of"),
        ({"distillation_weight": 0, "temperature": "1e-3"}, "write 0.001"),
    ],
)
def test_what_cant_work_is_said_before_training(tmp_path, options, message):
    """Each of these would end a run in its first step, or train something else than was asked for."""
    with pytest.raises(ValueError, match=message):
        make_rewarded(tmp_path, **options)


def test_bounds_of_the_ratio_are_a_teachers_too_beside_nft():
    """k2 reads them; refusing them would leave its ratio at the default."""
    nft = {"policy_loss": "nft", "distillation_weight": 1.0, "epsilon": 0.1}
    assert KDRLConfig(output_dir="unused", use_cpu=True, **nft).epsilon == 0.1
    with pytest.raises(ValueError, match="epsilon is 0.1"):
        KDRLConfig(output_dir="unused", use_cpu=True, estimator="full", **nft)


def test_defaults_are_those_of_the_paper():
    """The fields are read by people who compare with it."""
    config = KDRLConfig(output_dir="unused", use_cpu=True)
    assert (config.estimator, config.distillation_weight, config.policy_loss) == ("k2", 0.002, "grpo")
