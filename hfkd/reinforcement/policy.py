"""What TRL's settings of the reward's loss may be: a fault is told before a model is loaded, and not in the first step
or never. Checks values; computes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from trl import GRPOConfig

NAMES: Mapping[str, tuple[str, ...]] = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
}
"""Fields of `GRPOConfig` that name something, which TRL itself looks at in its first step or never."""
_RANGES: Mapping[str, tuple[float, float]] = {
    "beta": (0, math.inf),
    "epsilon": (0, math.inf),
    "epsilon_high": (0, math.inf),
    "top_entropy_quantile": (0, 1),
    "ref_model_mixup_alpha": (0, 1),
    "top_p": (0, 1),
    "top_k": (0, math.inf),
    "min_p": (0, 1),
}
_ABOVE_ZERO = (
    *("delta", "off_policy_mask_threshold", "sapo_temperature_neg", "sapo_temperature_pos"),
    *("temperature", "top_p", "repetition_penalty", "max_completion_length", "num_iterations", "steps_per_generation"),
)
_NUMBERS = ("entropy_coef", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
BOUNDS = ("epsilon", "epsilon_high")
"""Bounds of the importance ratio, of the reward's loss and of a teacher's k2 and k3."""
UNREAD_BY_NFT = (
    *("loss_type", "delta", "importance_sampling_level", "scale_rewards", "multi_objective_aggregation"),
    *("beta", "use_bias_correction_kl", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
    *("vespo_lambda_neg", "top_entropy_quantile", "off_policy_mask_threshold"),
    *("entropy_coef", "use_adaptive_entropy", *_NUMBERS[1:]),
)
"""Fields of TRL's loss, in whose place NFT stands."""


def check_policy(config: GRPOConfig) -> None:
    """See that names and numbers can be.

    Args:
        config: After its own checks.

    Raises:
        ValueError: One can't; names the field.
    """
    for name, known in NAMES.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected one of {', '.join(known)}.")
    for name in (*_RANGES, *_ABOVE_ZERO, *_NUMBERS):
        value = getattr(config, name)
        if value is None:
            continue
        low, high = _RANGES.get(name, (-math.inf, math.inf))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}; expected a number {_in_words(low, high)}.")
        if name in _ABOVE_ZERO and value <= 0:
            raise ValueError(f"{name} is {value!r}; expected a number above 0.")
    if config.reward_weights is not None and len(config.reward_weights) != 1:
        raise ValueError(
            f"reward_weights is {config.reward_weights!r}, and there is one verifier; expected one number, or none "
            "(reward_weight is the factor of the reward's term)."
        )
    if config.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is set, and neither reward nor teacher uses it; leave it out.")


def check_unread(config: GRPOConfig, bounds_are_read: bool) -> None:
    """Refuse settings of TRL's loss where NFT stands in its place.

    Args:
        config: Of an NFT run.
        bounds_are_read: Whether a teacher's term reads `BOUNDS`.

    Raises:
        ValueError: One differs from its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    for name in (*UNREAD_BY_NFT, *(() if bounds_are_read else BOUNDS)):
        if getattr(config, name) != defaults[name]:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, and policy_loss: nft doesn't read it; leave it out, or take "
                "policy_loss: grpo."
            )


def check_factor(config: GRPOConfig, least: float) -> None:
    """Refuse parts of TRL's loss that a factor of 0 takes away with the reward.

    Args:
        config: Its settings.
        least: The smallest factor of TRL's loss in the run.

    Raises:
        ValueError: There are such parts, and the factor gets to 0.
    """
    for name in ("beta", "entropy_coef", "use_adaptive_entropy"):
        if least == 0 and getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, and reward_weight, which multiplies that part of the loss too, "
                "is 0 at some step, where it would do nothing. Keep reward_weight above 0, or leave it out."
            )


def _in_words(low: float, high: float) -> str:
    if low == -math.inf:
        return "(not a text, such as YAML makes of 1e-3; write 0.001)"
    return f"from {low} to {high}" if high < math.inf else f"of at least {low}"
