"""The recipe section of a rewarded run: what judges the student's answers, and how reward and teacher are weighed.

Says what a key may hold by itself; what must stand beside it is `hfkd.recipe.reward_faults`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from hfkd.recipe.fields import Number, Options, Positive, Text, weight_or_schedule

Weight = Annotated[Any, BeforeValidator(weight_or_schedule)]
AboveZero = Annotated[Number, Field(gt=0)]


class ReinforcementSection(BaseModel):
    """A reward beside the teacher, or in its place; the fields of `hfkd.reinforcement.KDRLConfig` of the same names.

    `verifier` judges each answer (see `hfkd.data.verify`), `num_generations` are drawn for each prompt, and `options`
    holds more fields of TRL's `GRPOConfig`. Lengths, temperature and top_p of the answers are those of
    `data.generation`.
    """

    model_config = ConfigDict(extra="forbid")

    verifier: Text
    num_generations: Annotated[int, Field(strict=True, ge=2)] = 8
    policy_loss: Literal["grpo", "nft"] = "grpo"
    reward_weight: Weight = 1.0
    distillation_weight: Weight = 0.002
    estimator: Literal["k2", "k3", "full", "top_k"] = "k2"
    candidates: Positive = 32
    log_ratio_limit: AboveZero | None = 10.0
    distil_where: Literal["everywhere", "wrong_responses", "wrong_groups"] = "everywhere"
    right_from: Annotated[Number, Field(gt=0, le=1)] = 1.0
    nft_floor: AboveZero = 1.0
    num_iterations: Positive = 1
    options: Options = {}

    def settings(self) -> dict[str, Any]:
        """The arguments of `KDRLConfig` that stand here."""
        return {**self.model_dump(exclude={"verifier", "options"}), **self.options}
