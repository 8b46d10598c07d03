"""From a recipe to the objects of a run: settings, rows, tokenizer, student, teacher and objective.

What needs no model comes first, so that what can be refused is refused before anything is downloaded. It trains
nothing and writes nothing: `hfkd.run` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkd.compatibility import check_parts
from hfkd.config import DistillationConfig
from hfkd.data.load import Source
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.data.route import route_of
from hfkd.named import import_function
from hfkd.objective import Objective, build_objective
from hfkd.recipe.adapters import refuse_adapters
from hfkd.recipe.checks import is_own_class, needs_faults, objective_options, term_specs
from hfkd.recipe.schema import Recipe
from hfkd.recipe.source import RecipeError
from hfkd.record import check_output_folder, recipe_fingerprint
from hfkd.rollout.base import GenerationSettings
from hfkd.rollout.on_policy import Mixture
from hfkd.rollout.vllm import engine_class
from hfkd.run.models import (
    load_student,
    load_tokenizer,
    make_teacher,
    own_teacher,
    prepare_teacher,
)
from hfkd.run.reward_settings import make_reward_config
from hfkd.run.rows import Rows, Task, load_data
from hfkd.sharding import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfkd.teachers import Teacher


ASIDE: Mapping[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "report_to": "none",
    "run_policy": "overwrite",
}
"""Settings of a training beside a recipe's own, for a comparison or a trial: nothing is kept of it, it isn't evaluated
while it runs, and no tracker draws it into the run's curves.
"""


@dataclass
class Run:
    """Everything that a run needs. After a dry build the fields from `tokenizer` on are empty.

    Attributes:
        fingerprint: What decides the weights, see `hfkd.record.recipe_fingerprint`.
        sources: The row sources by their section: `train`, `demonstrations`, `evaluation`, `forgetting.<i>`.
        train: Training rows, without the demonstrations and the evaluation items.
        evaluation: The task of the recipe; None without an `evaluation` section.
    """

    recipe: Recipe
    fingerprint: str
    config: DistillationConfig
    style: PromptStyle
    generation: GenerationSettings
    objective: Objective
    sources: dict[str, Source]
    tokenizer: PreTrainedTokenizerBase | None = None
    builder: PromptBuilder | None = None
    train: list[dict[str, Any]] = field(default_factory=list)
    demonstrations: list[dict[str, Any]] = field(default_factory=list)
    evaluation: Task | None = None
    forgetting: list[Task] = field(default_factory=list)
    model: PreTrainedModel | None = None
    teacher: Teacher | None = None

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.recipe.training["output_dir"])

    def take(self, rows: Rows) -> None:
        """Put the loaded rows in their places."""
        self.train, self.demonstrations = rows.train, rows.demonstrations
        self.evaluation, self.forgetting = rows.evaluation, rows.forgetting


def build(recipe: Recipe, *, dry: bool = False) -> Run:
    """Make the objects of a run.

    Args:
        recipe: From `load_recipe`.
        dry: Stop before anything is loaded: no tokenizer, no rows, no model. What is left is what a test can check of
            any recipe without a network.

    Raises:
        ValueError: Something in the recipe or in the data can't work; the message says what to change.
        OSError: A file is missing.
    """
    run = settings_of(recipe, dry)
    check_imports(recipe)
    if dry:
        return run
    check_engine(recipe)
    policy = recipe.training.get("run_policy", "refuse")
    if policy != "resume" or run.config.process_index == 0:  # it alone writes the record that is compared
        check_output_folder(run.output_dir, policy, run.fingerprint, recipe.resolved())
    run.take(load_data(recipe, run.sources))
    run.tokenizer = load_tokenizer(recipe.student)
    run.builder = PromptBuilder(run.tokenizer, run.style)
    make_parts(run)
    launch = _launch(recipe, run)
    run.model = load_student(recipe, seed=run.config.seed)
    prepare_teacher(recipe, run.teacher, run.model, run.tokenizer, launch)
    return run


def check_imports(recipe: Recipe) -> None:
    """Import the teachers' classes that are the user's own.

    Raises:
        ValueError: One can't be imported, or is no teacher.
    """
    for section in (recipe.teacher, *recipe.teacher.members.values()):
        if is_own_class(section.kind):
            own_teacher(section.kind)


def make_parts(run: Run) -> None:
    """Make the run's teacher, not loaded yet, and see that it goes with its rows, its terms and its student.

    Raises:
        ValueError: It doesn't.
    """
    recipe = run.recipe
    run.teacher = make_teacher(recipe)
    _check_routes(recipe, run)
    if recipe.reinforcement is None or run.teacher is not None:
        check_parts(run.objective, run.teacher, Mixture.of(recipe.data.shares), recipe.student.lora is not None)


def _launch(recipe: Recipe, run: Run) -> Launch:
    """How the teacher is placed before there is a trainer. Under ZeRO-3 it waits, since its engine needs the trainer's
    accelerator, unless it is asked before: whole on each process then.

    Raises:
        ValueError: It is asked before, and is to stay in CPU memory.
    """
    launch, section = Launch.of(run.config), recipe.teacher
    graded = recipe.evaluation is not None and section.kind == "local"
    if not launch.is_zero3 or section.cache is not None or not (graded or recipe.data.answer == "teacher"):
        return launch
    if section.offload:
        raise ValueError(
            "teacher.offload: the teacher is asked before training (evaluation, or data.answer: teacher), and under "
            "ZeRO-3 it can speak out of CPU memory only once training has begun. Leave the evaluation section and "
            "data.answer out, launch with FSDP2 (recipes/accelerate/fsdp2.yaml), or build a cache (`hfkd cache`) and "
            "train with that"
        )
    return replace(launch, is_zero3=False)


def check_engine(recipe: Recipe) -> None:
    """Make sure that vLLM is there if the recipe writes with it, before anything is loaded.

    Raises:
        ValueError: It isn't.
    """
    if recipe.data.generation.backend != "vllm":
        return
    try:
        engine_class()
    except ImportError as error:
        raise ValueError(f"data.generation.backend: {error}") from error


def _check_routes(recipe: Recipe, run: Run) -> None:
    """Look up the teacher of every row, before any model is loaded.

    Raises:
        ValueError: A row names none, or one that there isn't.
    """
    if run.teacher is None or run.teacher.route is None:
        return
    for number, row in enumerate(run.train):
        try:
            route_of(run.teacher.route, row, recipe.teacher.column)
        except ValueError as error:
            raise ValueError(f"training row {number}: {error}") from error


def settings_of(recipe: Recipe, dry: bool = False, trains: bool = True) -> Run:
    """What a recipe says without any file of rows or weights.

    Args:
        recipe: From `load_recipe`.
        dry: As in `build`.
        trains: Whether it is to be trained; without, what a reward's trainer would be told isn't looked at.

    Raises:
        ValueError: Something in it can't work.
    """
    refuse_adapters(recipe)
    config = make_config(recipe, **({"use_cpu": True} if dry else {}))  # a GPU's recipe can be checked without one
    if trains and recipe.reinforcement is not None:
        make_reward_config(recipe, config)  # made again for its trainer; refused here before anything is loaded
    return Run(
        recipe=recipe,
        fingerprint=recipe_fingerprint(recipe.resolved()),
        config=config,
        style=make_style(recipe),
        generation=make_settings(recipe),
        objective=_make_objective(recipe),
        sources=make_sources(recipe),
    )


def make_settings(recipe: Recipe) -> GenerationSettings:
    """How text is written."""
    names = {"max_new_tokens", "temperature", "top_p", "batch_size"}
    kept = recipe.data.generation.model_dump(include=names)
    return GenerationSettings(**kept, stop=tuple(recipe.data.prompt.stop), seed=recipe.data.seed)


def make_style(recipe: Recipe) -> PromptStyle:
    """The prompt style, with the user's own builder imported and checked to be callable."""
    settings = recipe.data.prompt.model_dump()
    builder = settings.pop("builder")
    if builder is not None:
        settings["builder"] = import_function(builder, "data.prompt.builder")
    return PromptStyle(**{**settings, "stop": tuple(settings["stop"])})


def make_sources(recipe: Recipe) -> dict[str, Source]:
    """The row sources that the recipe names, by section; nothing is opened."""
    data = recipe.data
    train = data.train.model_dump()
    if data.demonstrations.column is not None:
        train["columns"] = {**train["columns"], "demonstrations": data.demonstrations.column}
    if recipe.teacher.column is not None:
        train["columns"] = {**train["columns"], "teacher": recipe.teacher.column}
    if data.token_weights is not None and ":" not in data.token_weights:
        train["columns"] = {**train["columns"], "token_weights": data.token_weights}
    sources = {"train": Source(**train)}
    if data.demonstrations.path is not None:
        kept = data.demonstrations.model_dump(include={"path", "name", "split", "format", "columns", "seed"})
        sources["demonstrations"] = Source(**kept)
    if recipe.evaluation is None:
        return sources
    names = {"path", "name", "split", "format", "columns", "size", "seed", "revision", "options"}
    if recipe.evaluation.path is not None:
        sources["evaluation"] = Source(**recipe.evaluation.model_dump(include=names))
    for index, other in enumerate(recipe.evaluation.forgetting):
        wanted = {**other.model_dump(include=names), "size": other.size + other.demonstrations}
        sources[f"forgetting.{index}"] = Source(**wanted)
    return sources


def make_config(recipe: Recipe, **changes: Any) -> DistillationConfig:
    """The trainer's settings, from `training` and what other sections say of it; `changes` come last.

    Raises:
        RecipeError: `DistillationConfig` refuses a value or a combination.
    """
    settings = dict(recipe.training)
    settings |= objective_options(recipe)
    try:
        return DistillationConfig(**{**settings, **changes})
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError("training", [f"training: {error}"]) from error


def _make_objective(recipe: Recipe) -> Objective:
    try:
        objective = build_objective(term_specs(recipe), **objective_options(recipe))
    except (ValueError, TypeError) as error:
        raise ValueError(f"loss.terms: {error}") from error
    faults = list(needs_faults(recipe, objective.needs))
    if faults:
        raise RecipeError("loss", faults)
    return objective
