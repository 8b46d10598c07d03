"""What decides what a run learns: its sampler held against the rows, and rows changed by transforms, with the models
at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hfkd.data.views import DistillationDataset
from hfkd.errors import NothingToLearn
from hfkd.recipe.parts import make_revisers, make_sampler, make_transforms
from hfkd.run.build import Run
from hfkd.run.evaluation import movable
from hfkd.run.texts import Rows, fixed_demonstrations, prepare_to_write
from hfkd.run.training import make_rollout
from hfkd.transforms.base import Workshop


def check_rows(run: Run, dataset: DistillationDataset) -> bool:
    """Let the recipe's sampler, its first transform and its revisers look at the examples, before anything is asked.

    Args:
        run: With its settings.
        dataset: Of the training examples; of what transforms will make of them nothing is known yet.

    Returns:
        Whether there is a sampler that looked; none does where a transform comes first.

    Raises:
        ValueError: One of them can't work with these rows.
    """
    if transforms := make_transforms(run.recipe):
        transforms[0].check([dataset.row(index) for index in range(len(dataset))])
        return False
    for reviser in make_revisers(run.recipe):
        reviser.check(dataset)
    sampler, config = make_sampler(run.recipe), run.config
    if sampler is None:
        return False
    size = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    seed = config.seed if config.data_seed is None else config.data_seed
    sampler.attach(dataset, seed=seed, examples_per_step=size)
    return True


def transformed(
    run: Run, rows: Sequence[dict[str, Any]], say: Callable[[str], None]
) -> tuple[Rows, list[dict[str, Any]]]:
    """The rows that are trained on, made of these by the recipe's transforms, in their order.

    Args:
        run: With its models.
        rows: That training would visit, answered.
        say: Prints a line.

    Returns:
        The rows, and what each transform did.

    Raises:
        NothingToLearn: A transform left nothing.
        ValueError: A transform can't work with these rows.
    """
    transforms = make_transforms(run.recipe)
    made, told = list(rows), []
    if not transforms:
        return made, told
    if run.teacher is not None:
        prepare_to_write(run)
    if movable(run.model):
        run.model.to(run.config.device)
    workshop = Workshop(
        student=run.model,
        teacher=run.teacher,
        builder=run.builder,
        demonstrations=fixed_demonstrations(run),
        held_out=run.evaluation.items if run.evaluation is not None else [],
        rollout=make_rollout(run),
        seed=run.recipe.data.seed,
        folder=run.output_dir,
        say=say,
    )
    for section, transform in zip(run.recipe.data.transforms, transforms, strict=True):
        before = len(made)
        made = transform.apply(made, replace(workshop))
        if not made:
            raise NothingToLearn(f"data.transforms: {section.kind} left none of {before} rows; loosen its settings")
        say(f"{section.kind}: {before} rows became {len(made)}.")
        told.append({"kind": section.kind, "before": before, "after": len(made), **transform.describe()})
    return made, told
