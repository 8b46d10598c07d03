"""The trainer of a recipe with a reward: the student's answers are judged, and a teacher may speak of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from hfkd.recipe.schema import Recipe
from hfkd.recipe.source import RecipeError
from hfkd.run.build import Run
from hfkd.run.texts import make_dataset

if TYPE_CHECKING:
    from hfkd.reinforcement import KDRLConfig, KDRLTrainer


def make_reinforced_trainer(run: Run, rows: Sequence[dict[str, Any]]) -> KDRLTrainer:
    """A trainer over these rows, as `reinforcement` says.

    Args:
        run: With its tokenizer, its student and its teacher.
        rows: To be asked; a stand-in is where their answers would be.

    Raises:
        ValueError: The settings don't fit together, or no text fits its limits.
    """
    from hfkd.reinforcement import KDRLTrainer

    recipe = run.recipe
    return KDRLTrainer(
        run.model,
        run.teacher,
        recipe.reinforcement.verifier,
        make_reward_config(recipe, run.config),
        train_dataset=make_dataset(run, rows, run.teacher, run.objective),
        processing_class=run.tokenizer,
        **({"objective": run.objective} if recipe.reinforcement.estimator == "full" else {}),
    )


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
    try:
        return KDRLConfig(**{**settings, **recipe.reinforcement.settings()})
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError("reinforcement", [f"reinforcement: {error}"]) from error
