"""The arithmetic of reward and teacher: estimators by enumeration, NFT, masks, schedules."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from trl import GRPOConfig

from hfkd.losses.kl import ReverseKL
from hfkd.reinforcement.config import check_terms
from hfkd.reinforcement.drawn import Tally, count_steps
from hfkd.reinforcement.estimators import LikeliestReverseKL, bounded_ratio, k2, k3
from hfkd.reinforcement.masks import taught_responses
from hfkd.reinforcement.nft import nft_loss
from hfkd.reinforcement.policy import NAMES, UNREAD_BY_NFT
from hfkd.support import TokenChunk

STUDENT = torch.tensor([0.9, -0.4, 0.3, 1.2, -1.0, 0.1], dtype=torch.float64)
TEACHER = torch.tensor([0.2, 0.5, -0.3, 0.8, 0.4, -0.9], dtype=torch.float64).log_softmax(dim=0)


def averaged(estimate):
    """Value and gradient by the student's logits, averaged over all tokens that it may draw."""
    logits = STUDENT.clone().requires_grad_()
    said = logits.log_softmax(dim=0)
    value = (said.detach().exp() * estimate(TEACHER - said)).sum()
    return value.item(), torch.autograd.grad(value, logits)[0]


def exact(forward: bool):
    """KL(teacher, student) or KL(student, teacher), and its gradient."""
    logits = STUDENT.clone().requires_grad_()
    said = logits.log_softmax(dim=0)
    value = (TEACHER.exp() * (TEACHER - said)).sum() if forward else (said.exp() * (said - TEACHER)).sum()
    return value.item(), torch.autograd.grad(value, logits)[0]


def test_k1_teaches_nothing():
    """-R looks like the divergence and has no gradient: whoever adds it as a loss trains on noise."""
    value, gradient = averaged(lambda ratio: -ratio)
    assert value == pytest.approx(exact(forward=False)[0], abs=1e-15)
    assert gradient.abs().max() < 1e-15


def test_k2_has_the_gradient_of_the_reverse_kl_and_another_value():
    """A wrong sign or a detached student would leave the name and take the meaning."""
    value, gradient = averaged(k2)
    wanted, slope = exact(forward=False)
    assert slope.abs().max() > 0.05
    assert torch.allclose(gradient, slope, atol=1e-15, rtol=0)
    assert abs(value - wanted) > 0.01


def test_k3_has_the_value_of_the_reverse_kl_and_the_gradient_of_the_forward_kl():
    """k3 is the loss that people take for the reverse KL; a test that mixed the two up would hide it."""
    value, gradient = averaged(k3)
    assert value == pytest.approx(exact(forward=False)[0], abs=1e-15)
    assert torch.allclose(gradient, exact(forward=True)[1], atol=1e-15, rtol=0)
    assert (gradient - exact(forward=False)[1]).abs().max() > 0.01


def test_limits_hold_the_gradient_and_leave_small_ratios_alone():
    """One absurd token would otherwise decide the step; a limit that bites everywhere would change the estimator."""
    ratio = torch.tensor([-20.0, -1.0, 0.5, 20.0], requires_grad=True)
    near, far = k2(ratio, 3.0), torch.autograd.grad(k2(ratio, 3.0).sum(), ratio)[0]
    assert near[1:3].tolist() == k2(ratio)[1:3].tolist()
    assert far.tolist() == [-3.0, -1.0, 0.5, 3.0]
    assert near[0].item() == pytest.approx(3 * 20 - 4.5)
    held = torch.autograd.grad(k3(ratio, 3.0).sum(), ratio)[0]
    assert held[[0, 3]].tolist() == [0.0, 0.0] and held[2].item() == pytest.approx(math.exp(0.5) - 1)
    assert k3(ratio, 3.0)[3].item() == pytest.approx(math.exp(3) - 4)


def test_equal_models_cost_nothing():
    """A term that isn't 0 with its gradient at equality would pull a student away from the teacher that it has met."""
    ratio = torch.zeros(5, requires_grad=True)
    for estimate in (k2, k3):
        values = estimate(ratio, 10.0)
        assert values.abs().max() == 0
        assert torch.autograd.grad(values.sum(), ratio)[0].abs().max() == 0


def test_ratio_is_bounded_and_has_no_gradient():
    """A gradient through the ratio would add half R squared times that of the policy, which no formula asks for."""
    new = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    ratio = bounded_ratio(new, torch.zeros(3), 0.2, 0.3)
    assert not ratio.requires_grad and ratio.tolist() == pytest.approx([1.0, 1.3, 0.8])


def likeliest(candidates: int, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    chunk = TokenChunk(torch.zeros(len(student), dtype=torch.long), student, teacher)
    return LikeliestReverseKL(candidates)(chunk)


def test_likeliest_tokens_and_the_rest():
    """Ids of the teacher instead of the student's, or a rest that is left out, would be another measure."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 9, generator=generator) for _ in range(2))
    whole = ReverseKL()(TokenChunk(torch.zeros(4, dtype=torch.long), student, teacher))
    assert torch.allclose(likeliest(9, student, teacher), whole, atol=1e-6)
    ours, theirs = student.log_softmax(-1).exp(), teacher.log_softmax(-1).exp()
    for row, value in enumerate(likeliest(3, student, teacher).tolist()):
        top = ours[row].argsort(descending=True)[:3]
        pairs = [(ours[row, place], theirs[row, place]) for place in top]
        pairs.append((1 - ours[row, top].sum(), 1 - theirs[row, top].sum()))
        assert value == pytest.approx(float(sum(q * (q / p).log() for q, p in pairs)), abs=1e-6)
        assert 0 < value < whole[row] - 1e-4
    with pytest.raises(ValueError, match="candidates is 0"):
        LikeliestReverseKL(0)


def nft_gradient(rewards: list[float], ratio: float = 0.0) -> torch.Tensor:
    log_ratio = torch.full((len(rewards), 1), ratio, dtype=torch.float64, requires_grad=True)
    reward = torch.tensor(rewards, dtype=torch.float64)
    loss = nft_loss(log_ratio, reward, reward.mean().expand(len(rewards)))
    assert bool(torch.isfinite(loss).all())
    return torch.autograd.grad(loss.sum(), log_ratio)[0][:, 0]


def test_nft_on_its_own_answers_is_the_advantage():
    """Without the factor 1 - r right and wrong answers would count alike, however hard the prompt is."""
    gradient = nft_gradient([1, 1, 1, 0, 0, 0, 0, 0])
    assert gradient.tolist() == pytest.approx([-0.625] * 3 + [0.375] * 5)


@pytest.mark.parametrize("rewards", [[1.0] * 4, [0.0] * 4])
def test_nft_learns_nothing_from_prompts_that_tell_nothing(rewards):
    """With all answers right the wrong policy is 0/0: one such prompt would turn the whole step into NaN."""
    assert nft_gradient(rewards).abs().max() == 0


def test_nft_stays_finite_where_the_wrong_policy_would_be_negative():
    """A wrong answer that became likelier than the mixture allows has a negative ratio, whose logarithm is NaN."""
    gradient = nft_gradient([1, 1, 1, 0], ratio=math.log(3.0))
    assert bool(torch.isfinite(gradient).all()) and gradient[3] > gradient[0]
    assert gradient[3].item() == pytest.approx(0.25 * 3 * 0.75 / 0.25)  # the floor's value, the line's slope


def test_masks_by_reward():
    """A mask that looks at the wrong group would distil what the student can, and spare what it can't."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 0.01])
    assert taught_responses(rewards, "everywhere", 2).all()
    assert taught_responses(rewards, "wrong_responses", 2).tolist() == [False, True, True, True, True, True]
    assert taught_responses(rewards, "wrong_groups", 2).tolist() == [False, False, True, True, True, True]
    assert taught_responses(rewards, "wrong_groups", 2, right_from=0.5).tolist() == [False] * 4 + [True] * 2
    with pytest.raises(ValueError, match="distil_where is 'some'"):
        taught_responses(rewards, "some", 2)


def test_annealing_reaches_its_floor_after_80_steps():
    """A schedule that ended with the run would still imitate strongly when it should have let go."""
    annealed, switched = check_terms(
        {"schedule": "linear", "start": 5e-3, "end": 1e-3, "end_step": 80},
        {"schedule": "step", "start": 0.0, "end": 1.0, "end_step": 60},
    )
    assert [annealed.at(step) for step in (0, 40, 80, 200)] == pytest.approx([5e-3, 3e-3, 1e-3, 1e-3])
    assert annealed.at(1) == pytest.approx(5e-3 - 5e-5)
    assert [switched.at(step) for step in (59, 60)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0, 0), "both 0"),
        ((-1, 1), "distillation_weight is -1"),
        ((1, "much"), "reward_weight is 'much'"),
        ((float("nan"), 1), "distillation_weight is nan"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    """A negative weight would train away from the teacher; two zeros would train nothing for hours."""
    with pytest.raises(ValueError, match=message):
        check_terms(*weights)


def test_tokens_are_counted_by_step():
    """Where a generation makes several steps, its own mean would weigh a step by what the others are taught."""
    masks = [[[1, 0], [1, 1]], [[0, 0], [1, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    batches = [{"completion_mask": torch.ones(2, 2), "taught": torch.tensor(mask).bool()} for mask in masks]
    count_steps(batches, 2, torch.device("cpu"))
    assert [float(one["taught_in_step"]) for one in batches] == [4, 4, 4, 4]
    count_steps(batches, 1, torch.device("cpu"))
    assert [float(one["taught_in_step"]) for one in batches] == [3, 1, 0, 4]
    assert [float(one["tokens_in_step"]) for one in batches] == [4, 4, 4, 4]


def test_a_step_that_teaches_nothing_has_no_loss_to_log():
    """A 0 would read as a student that has met its teacher."""
    tally, taught = Tally(), torch.tensor([[True, False]])
    tally.add(torch.tensor(3.0), taught, torch.ones(1, 2))
    tally.add(torch.tensor(1.0), taught, torch.ones(1, 2))
    assert tally.figures(torch.device("cpu")) == {"share": 0.5, "loss": 2.0}
    tally.add(torch.tensor(0.0), ~taught & taught, torch.ones(1, 2))
    assert tally.figures(torch.device("cpu")) == {"share": 0.0}


def test_names_of_losses_are_those_of_trl():
    """A loss that TRL learned or lost would be refused, or taken, by a list that nobody looks at."""
    fields = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    said = fields["loss_type"].metadata["help"]
    assert set(re.findall(r"'(\w+)'", said.split(". ")[1])) == set(NAMES["loss_type"])
    assert all(name in fields and fields[name].default in known for name, known in NAMES.items())
    assert set(UNREAD_BY_NFT) <= set(fields)
