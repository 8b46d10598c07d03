"""What a rewarded run learns, in the form in which a record has the terms of an objective. For people: nothing is
computed by it.
"""

from __future__ import annotations

from typing import Any

from hfkd.recipe.schema import Recipe

_POLICIES = {
    "grpo": (
        "-min(w A, clip(w) A), w the ratio of new to old probability, A the answer's advantage in its group",
        "Shao et al. (GRPO), 2024, https://arxiv.org/abs/2402.03300, as TRL has it.",
    ),
    "nft": (
        "-r log w - (1 - r) log((1 - s w) / (1 - s)), w the ratio of new to old probability, r the reward, s its "
        "mean in the group",
        "Chen et al. (NFT), 2025, https://arxiv.org/abs/2505.18116.",
    ),
}
_KDRL = "Xu et al. (KDRL), 2025, https://arxiv.org/abs/2506.02208."
_ESTIMATORS = {
    "k2": "R^2 / 2 at the drawn tokens, R = log p - log q: the gradient of KL(q || p)",
    "k3": "exp(R) - R - 1 at the drawn tokens, R = log p - log q: the gradient of KL(p || q)",
    "top_k": "KL(q || p) over the likeliest ids and one entry for the rest",
    "full": "KL(q || p) over the vocabulary",
}


def rewarded_terms(recipe: Recipe) -> list[dict[str, Any]]:
    """The reward and the teacher's term, each where it counts: kind, weight, settings, formula and paper.

    Args:
        recipe: With a `reinforcement` section.
    """
    reward, terms = recipe.reinforcement, []
    if reward.reward_weight:
        formula, paper = _POLICIES[reward.policy_loss]
        settings = {"verifier": reward.verifier, "num_generations": reward.num_generations}
        terms.append(_term("reward", reward.policy_loss, reward.reward_weight, settings, formula, paper))
    if reward.distillation_weight and recipe.teacher.kind != "none":
        settings = {"distil_where": reward.distil_where}
        formula = _ESTIMATORS[reward.estimator]
        terms.append(_term("distillation", reward.estimator, reward.distillation_weight, settings, formula, _KDRL))
    return terms


def _term(name: str, kind: str, weight: Any, settings: dict[str, Any], formula: str, paper: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "weight": weight, **settings, "formula": formula, "paper": paper}
