"""The trainer of a recipe with a reward: the student's answers are judged, and a teacher may speak of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfkd.objective import Objective, build_objective
from hfkd.recipe.checks import objective_options
from hfkd.recipe.reward_faults import names_own_terms
from hfkd.run.build import Run
from hfkd.run.reward_settings import make_reward_config
from hfkd.run.texts import make_dataset

if TYPE_CHECKING:
    from hfkd.reinforcement import KDRLTrainer


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
        **({"objective": full_objective(run)} if recipe.reinforcement.estimator == "full" else {}),
    )


def full_objective(run: Run) -> Objective:
    """What `estimator: full` measures: the terms that the recipe names, or else the reverse KL at the temperature that
    the answers are drawn at, like the other estimators.

    Args:
        run: Of a recipe with a reward.
    """
    recipe = run.recipe
    if names_own_terms(recipe):
        return run.objective
    temperature = {"temperature": recipe.data.generation.temperature, "scale_by_temperature_squared": False}
    return build_objective([{"kind": "reverse_kl", **temperature}], **objective_options(recipe))
