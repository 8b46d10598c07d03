"""The settings of a rewarded run, from a recipe; checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from hfkd.recipe.schema import Recipe
from hfkd.recipe.source import RecipeError

if TYPE_CHECKING:
    from hfkd.reinforcement import KDRLConfig


def make_reward_config(recipe: Recipe, config: TrainingArguments) -> KDRLConfig:
    """The trainer's settings.

    Args:
        recipe: With a `reinforcement` section.
        config: Of its `training` section; all that it says holds here too, defaults included.

    Raises:
        RecipeError: A value or a combination is refused.
    """
    from hfkd.reinforcement import KDRLConfig

    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    generation, data = recipe.data.generation, recipe.data
    settings = {name: getattr(config, name) for name in names}
    settings |= {
        "max_completion_length": generation.max_new_tokens,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "max_length": data.max_length,
        "teacher_max_length": data.teacher_max_length,
        "too_long": data.too_long,
    }
    _check_groups(recipe, config)
    try:
        return KDRLConfig(**{**settings, **recipe.reinforcement.settings()})
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError("reinforcement", [f"reinforcement: {error}"]) from error


def _check_groups(recipe: Recipe, config: TrainingArguments) -> None:
    """A step draws whole groups of answers; on how many processes is known where it is trained, not in the recipe."""
    reward = recipe.reinforcement
    if {"generation_batch_size", "steps_per_generation"} & set(reward.options):
        return  # what TRL says of these is clear
    answers = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    if answers % reward.num_generations:
        fault = (
            f"reinforcement.num_generations: got {reward.num_generations}, and a step has {answers} answers "
            "(training.per_device_train_batch_size times gradient_accumulation_steps times processes); expected a "
            "divisor of that"
        )
        raise RecipeError("reinforcement", [fault])
