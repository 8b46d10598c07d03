"""The settings of a rewarded training: TRL's `GRPOConfig`, and what a teacher beside the reward needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from hfkd.objective import Objective, build_objective
from hfkd.reinforcement.estimators import ESTIMATORS, LikeliestReverseKL
from hfkd.reinforcement.masks import PLACES
from hfkd.reinforcement.policy import check_factor, check_policy, check_unread
from hfkd.schedules import Schedule, all_values, constant_or_schedule
from hfkd.signal import STATES

FULL, TOP_K = "full", "top_k"
KINDS = (*ESTIMATORS, FULL, TOP_K)
POLICY_LOSSES = ("grpo", "nft")


@dataclass
class KDRLConfig(GRPOConfig):
    """Settings of a `KDRLTrainer`; everything else is as in TRL's `GRPOConfig`.

    Args:
        distillation_weight: Factor of the teacher's term: a number, or a schedule such as `{"schedule": "linear",
            "start": 0.005, "end": 0.001, "end_step": 80}`. 0 is TRL's GRPO, and the teacher isn't asked.
        reward_weight: Factor of the reward's term, a number or a schedule too; of all that TRL's loss has, so also of
            what `beta` and `entropy_coef` add, which a factor of 0 would take away: refused. 0 is distillation alone.
        estimator: What the teacher's term is: `k2` or `k3` of the drawn tokens, `full` over the whole vocabulary (any
            objective, the reverse KL by default), `top_k` over the student's likeliest ids.
        candidates: How many ids `top_k` reads.
        log_ratio_limit: The largest log-ratio (nats) of `k2` and `k3`, see `hfkd.reinforcement.estimators`; None for
            none.
        distil_where: Which answers the teacher teaches: `everywhere`, `wrong_responses` or `wrong_groups`.
        right_from: The least reward of a right answer, for `distil_where`.
        policy_loss: `grpo`, with all that `loss_type` offers, or `nft`, which reads none of the settings of TRL's loss
            (`hfkd.reinforcement.policy.UNREAD_BY_NFT`): they are refused beside it.
        nft_floor: See `hfkd.reinforcement.nft`.
        max_length: The most tokens of the student's prompt and answer together.
        teacher_max_length: The same for the teacher's view; None takes `max_length`.
        too_long: What happens to a row above its limit: `raise`, or `drop` (counted).
    """

    distillation_weight: Any = field(default=0.002, metadata={"help": "Factor of the teacher's term."})
    reward_weight: Any = field(default=1.0, metadata={"help": "Factor of the reward's term."})
    estimator: str = field(default="k2", metadata={"help": "k2, k3, full or top_k."})
    candidates: int = field(default=32, metadata={"help": "How many ids top_k reads."})
    log_ratio_limit: float | None = field(default=10.0, metadata={"help": "The largest log-ratio of k2 and k3."})
    distil_where: str = field(default="everywhere", metadata={"help": "Which answers the teacher teaches."})
    right_from: float = field(default=1.0, metadata={"help": "The least reward of a right answer."})
    policy_loss: str = field(default="grpo", metadata={"help": "grpo or nft."})
    nft_floor: float = field(default=1.0, metadata={"help": "The least likelihood ratio of the wrong policy."})
    max_length: int = field(default=2048, metadata={"help": "The most tokens of the student's view."})
    teacher_max_length: int | None = field(default=None, metadata={"help": "The most tokens of the teacher's view."})
    too_long: str = field(default="raise", metadata={"help": "raise or drop."})

    def __post_init__(self) -> None:
        """Check what can't work."""
        super().__post_init__()
        distilled, rewarded = (all_values(one) for one in check_terms(self.distillation_weight, self.reward_weight))
        check_policy(self)
        _one_of("estimator", self.estimator, KINDS)
        _one_of("distil_where", self.distil_where, PLACES)
        _one_of("policy_loss", self.policy_loss, POLICY_LOSSES)
        _above_zero("candidates", self.candidates)
        _above_zero("nft_floor", self.nft_floor)
        if self.log_ratio_limit is not None:
            _above_zero("log_ratio_limit", self.log_ratio_limit)
        self._check_terms_together(teaches=max(distilled) > 0, least_reward=min(rewarded))
        if not 0 < self.right_from <= 1:
            raise ValueError(f"right_from is {self.right_from!r}; expected a reward above 0 and up to 1.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns is on; the rows of the prompts would be lost. Leave it off.")
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no":
            raise ValueError(
                f"eval_strategy is {self.eval_strategy!r}; expected no: a rewarded training isn't evaluated while it "
                "runs. Its log has the mean reward of every step; ask questions before and after."
            )

    def _check_terms_together(self, teaches: bool, least_reward: float) -> None:
        """Refuse what one term would read and the other takes away, and steps whose tokens can't be counted."""
        check_factor(self, least_reward)
        if self.policy_loss == "nft":
            check_unread(self, bounds_are_read=teaches and self.estimator in ESTIMATORS)
        per_step = self.gradient_accumulation_steps
        if (teaches or self.policy_loss == "nft") and self.steps_per_generation % per_step:
            raise ValueError(
                f"steps_per_generation is {self.steps_per_generation}, and gradient_accumulation_steps {per_step}; "
                "expected a multiple of that: a mean over the tokens of a step needs all its answers before the first "
                "of them is learned."
            )


def check_terms(distillation_weight: Any, reward_weight: Any) -> tuple[float | Schedule, float | Schedule]:
    """Read both weights.

    Args:
        distillation_weight: A number, a schedule, or its recipe form.
        reward_weight: The same.

    Raises:
        ValueError: One is neither, is negative or not finite, or nothing is ever learned.
    """
    found = []
    for name, value in (("distillation_weight", distillation_weight), ("reward_weight", reward_weight)):
        weight = constant_or_schedule(value, name)
        if not all(math.isfinite(end) and end >= 0 for end in all_values(weight)):
            raise ValueError(f"{name} is {value!r}; expected numbers of at least 0.")
        found.append(weight)
    if all(max(all_values(weight)) == 0 for weight in found):
        raise ValueError("distillation_weight and reward_weight are both 0; nothing would be learned.")
    return found[0], found[1]


def objective_of(spec: Any, args: KDRLConfig) -> Objective:
    """What the terms on whole distributions measure, at the temperature that the answers are drawn at.

    Args:
        spec: As `KDRLTrainer` takes it.
        args: Its settings.

    Raises:
        ValueError: It isn't read, or reads hidden states.
    """
    if args.estimator != FULL and spec != "reverse_kl":
        raise ValueError(
            f"objective is given, and estimator is {args.estimator!r}; expected 'full', the one that measures an "
            "objective of your own."
        )
    options = {"temperature": args.temperature, "scale_by_temperature_squared": False}
    if args.estimator == TOP_K:
        objective = build_objective([LikeliestReverseKL(args.candidates, **options)])
    else:
        objective = build_objective([{"kind": "reverse_kl", **options}] if spec == "reverse_kl" else spec)
    if STATES in objective.needs:
        raise ValueError("The objective reads hidden states, which aren't kept here; take losses on distributions.")
    return objective


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.")


def _above_zero(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name} is {value!r}; expected a number above 0.")
