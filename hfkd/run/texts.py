"""Which texts a run teaches: rows that can be examples, those that training visits, and the answers that a teacher
writes to them. A run and the building of a cache must find the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkd.data.prompts import PromptBuilder
from hfkd.data.select import visited
from hfkd.data.views import DistillationDataset, teacher_prompts
from hfkd.data.weights import TokenWeights
from hfkd.errors import NothingToLearn
from hfkd.examples import PLACEHOLDER
from hfkd.masking import mask
from hfkd.objective import Objective
from hfkd.recipe.parts import make_transforms
from hfkd.recipe.schema import Recipe
from hfkd.rollout.answers import teacher_answers
from hfkd.rollout.hf import HFRollout
from hfkd.run.build import Run
from hfkd.run.expected import deciding, name_of
from hfkd.run.models import token_weights
from hfkd.sharding import Launch

if TYPE_CHECKING:
    from hfkd.teachers import Teacher

WEIGHTS = "token_weights"
ANSWERS_NAME = "teacher_answers.jsonl"

Rows = list[dict[str, Any]]


def make_dataset(
    run: Run, rows: Sequence[dict[str, Any]], teacher: Teacher | None, objective: Objective
) -> DistillationDataset:
    """Both views of each row, as the recipe says."""
    data = run.recipe.data
    decides = data.sampler is not None or bool(data.revise)
    reads = teacher is not None and (bool(objective.needs) or "teacher" in data.shares or decides)
    other = PromptBuilder(teacher.tokenizer, run.style) if reads and teacher.other_vocabulary else None
    return DistillationDataset(
        rows,
        run.builder,
        demonstrations=fixed_demonstrations(run),
        student_shots=data.student_shots,
        teacher_view=reads,
        max_length=data.max_length,
        teacher_max_length=data.teacher_max_length,
        too_long=data.too_long,
        whole_text=data.whole_text,
        seed=data.seed,
        token_weights=_weights(run, rows),
        route=teacher.route if reads else None,
        teacher_builder=other,
    )


def _weights(run: Run, rows: Sequence[dict[str, Any]]) -> TokenWeights | None:
    """How much tokens count: as the recipe says, or else as a transform wrote into these rows."""
    named = token_weights(run.recipe.data.token_weights)
    if named is not None or not run.recipe.data.transforms or not any(WEIGHTS in row for row in rows):
        return named
    return _written if any(WEIGHTS in one.writes for one in make_transforms(run.recipe)) else None


def _written(row: Mapping[str, Any], ids: Sequence[int]) -> float | Sequence[float]:
    """The weights that a transform gave a row; 1 for one that came later."""
    weights = row.get(WEIGHTS)
    return 1.0 if weights is None else weights


def fidelity_texts(run: Run) -> DistillationDataset | None:
    """Both views of the held-out items, on which the student is held against its teacher; None where the recipe wants
    none or there is no teacher.
    """
    evaluation = run.recipe.evaluation
    if evaluation is None or not evaluation.fidelity or run.teacher is None:
        return None
    return held_out_views(run, run.evaluation.items, run.teacher, run.objective)


def held_out_views(
    run: Run, rows: Sequence[dict[str, Any]], teacher: Teacher | None, objective: Objective
) -> DistillationDataset:
    """Both views of held-out rows; those that don't fit are left out."""
    data = run.recipe.data.model_copy(update={"too_long": "drop"})
    lenient = replace(run, recipe=run.recipe.model_copy(update={"data": data}))
    return make_dataset(lenient, rows, teacher, objective)


def unanswered(run: Run, rows: Sequence[dict[str, Any]]) -> Rows:
    """The rows with a stand-in for answers that are still to be written, or as they are where their own count."""
    data = run.recipe.data
    if data.answer != "teacher" and "dataset" in data.shares:
        return list(rows)
    return [run.builder.with_answer(row, PLACEHOLDER) for row in rows]


def fixed_demonstrations(run: Run) -> Rows:
    """The demonstrations that all training prompts share; none where each row brings its own."""
    return run.demonstrations if run.recipe.data.demonstrations.column is None else []


def fitting(run: Run) -> tuple[Rows, DistillationDataset]:
    """The training rows that can be examples, found before anything is run, and the views that were made to find them.

    A row whose answer is still to be written is measured with a short one.
    """
    dataset = make_dataset(run, unanswered(run, run.train), run.teacher, run.objective)
    return [run.train[number] for number in dataset.kept], dataset


def visited_rows(run: Run, rows: Sequence[dict[str, Any]]) -> Rows:
    """The rows that training visits; all of them where the recipe chooses among them."""
    config, data = run.config, run.recipe.data
    if data.sampler is not None or data.transforms:
        return list(rows)
    if config.max_steps > 0:
        step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        examples = config.max_steps * step
    else:
        examples = math.ceil(config.num_train_epochs * len(rows))
    return list(visited(rows, examples, config.seed))


def answered_rows(run: Run, rows: Rows, folder: Path, written: bool = False) -> Rows:
    """The rows with what the prompted teacher wrote, or had written into the folder before; rows that it left empty
    are taken out.

    Args:
        run: Its teacher is asked only if an answer is missing, and must be prepared then.
        rows: To be answered.
        folder: Where the answers are kept.
        written: Whether all answers lie there, as those of a cache do; nothing is written then.

    Raises:
        NothingToLearn: All answers are empty.
        ValueError: The folder's answers are of another teacher, or lack some that must be there.
    """
    prompts = teacher_prompts(rows, run.builder, fixed_demonstrations(run))
    rollout = HFRollout(run.tokenizer, run.generation)
    path, fingerprint = Path(folder) / ANSWERS_NAME, answers_fingerprint(run.recipe)
    speaks = None if written else run.teacher.weights
    answers = teacher_answers(rows, prompts, rollout, speaks, path, fingerprint)
    kept = [run.builder.with_answer(row, answer) for row, answer in zip(rows, answers, strict=True) if answer.strip()]
    if not kept:
        raise NothingToLearn(
            f"the teacher's answers to all {len(rows)} training prompts are empty; look at data.prompt (the stop "
            "strings end an answer where it begins?) and at data.generation.max_new_tokens"
        )
    return kept


def prepare_to_write(run: Run) -> None:
    """Make the run's teacher ready to answer; a trainer prepares it again, for its own device and plugins."""
    run.teacher.prepare(Launch.of(run.config), run.model)


def answers_fingerprint(recipe: Recipe) -> dict[str, Any]:
    """What decides the teacher's answers besides the prompts: whose weights they are, and how they are loaded."""
    section = recipe.student if recipe.teacher.kind in ("self", "ema", "snapshot") else recipe.teacher
    names = {"kind", "model", "init", "revision", "dtype", "load_kwargs", "options"}
    found = mask(section.model_dump(mode="json", include=names))
    subfolder = section.load_kwargs.get("subfolder")
    found["load_kwargs"] = deciding(found["load_kwargs"])
    if section.model is not None:
        found["model"] = name_of(section.model, subfolder)
    if getattr(section, "init", None) is not None:
        found["init"]["source"] = name_of(section.init.source, subfolder)
    return found
