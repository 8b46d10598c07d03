"""Runs a recipe of several adapters: one run after the other, each in a folder of its own below the recipe's.

Everything of all of them that needs no weights is looked at before the first one is trained. What one run is, is
`hfkd.run.conduct`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate.utils import gather_object
from rich.console import Console

from hfkd.compatibility import check_second_view
from hfkd.data.prompts import PromptBuilder
from hfkd.errors import NonFiniteGradient, NonFiniteLoss
from hfkd.files import write_whole
from hfkd.masking import shareable
from hfkd.recipe.adapters import expand
from hfkd.record import RunRecord, check_output_folder, read_record
from hfkd.rollout.on_policy import Mixture
from hfkd.run.build import Run, check_engine, check_imports, make_parts, settings_of
from hfkd.run.conduct import RunResult
from hfkd.run.deciding import check_rows
from hfkd.run.expected import expected_contract
from hfkd.run.models import load_tokenizer
from hfkd.run.rows import load_data
from hfkd.run.texts import fitting
from hfkd.teachers import CachedTeacher, check_same_tokens

if TYPE_CHECKING:
    from hfkd.recipe.schema import Recipe

ROLES = ("intuitive", "knowledge", "deep")
"""What the adapters of a recipe are called if they are to be asked together by `hfkd reason`, unless it is told other
names.
"""


@dataclass
class AdapterRuns:
    """What the runs of several adapters left behind.

    Attributes:
        output_dir: The folder with one folder for each adapter, and `recipe.yaml`.
        runs: By the adapter's name.
    """

    output_dir: Path
    runs: dict[str, RunResult]


def run_adapters(
    recipe: Recipe,
    run_one: Callable[..., RunResult],
    *,
    console: Console | None = None,
    command: Sequence[str] = (),
) -> AdapterRuns:
    """Train the adapters of a recipe, in their order. A run that is resumed leaves those alone that are finished.

    Args:
        recipe: With adapters.
        run_one: Runs the recipe of one; takes `console` and `command`.
        console: Where the first process prints; None prints to the terminal.
        command: The command line, for the records.

    Raises:
        ValueError: Something in the recipe, in the rows or in the cache of any adapter can't work, or a folder holds
            another run.
        OSError: A file is missing or damaged. Of both the message begins with the adapter's key.
    """
    folder = Path(recipe.training["output_dir"])
    plans = {name: _looked_at(name, one) for name, one in expand(recipe).items()}
    first = next(iter(plans.values())).config.process_index == 0
    console = (console or Console()) if first else Console(quiet=True)
    runs = {}
    for number, (name, plan) in enumerate(plans.items(), 1):
        done = _is_finished(plan)
        words = ", finished before" if done else ""
        console.print(f"Adapter {name} ({number} of {len(plans)}){words}", markup=False, highlight=False)
        with _named(name):
            runs[name] = _left_by(plan) if done else run_one(plan.recipe, console=console, command=command)
    if first:
        told = shareable(recipe.resolved())
        write_whole(folder / "recipe.yaml", yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
    for line in _last_lines(folder, list(plans)):
        console.print(line, markup=False, highlight=False)
    return AdapterRuns(folder, runs)


def _looked_at(name: str, recipe: Recipe) -> Run:
    """An adapter's settings, found to be right, and a folder that may be used. If it is still to be trained, its rows,
    texts, tokenizers and cache are there too; nothing is kept of them.

    Raises:
        ValueError: As in a run, with the adapter's name. So does an OSError.
    """
    with _named(name):
        run = settings_of(recipe)
        check_imports(recipe)
        check_engine(recipe)
        policy = recipe.training.get("run_policy", "refuse")
        if policy != "resume" or run.config.process_index == 0:
            check_output_folder(run.output_dir, policy, run.fingerprint, recipe.resolved())
        if not _is_finished(run):
            _look_at_texts(replace(run))
    return run


def _look_at_texts(run: Run) -> None:
    """What a run does before it asks a model anything.

    Args:
        run: With its settings; it is filled.

    Raises:
        ValueError: Rows, texts, tokens or a cache don't go together. So does an OSError.
    """
    recipe = run.recipe
    run.take(load_data(recipe, run.sources))
    run.tokenizer = load_tokenizer(recipe.student)
    run.builder = PromptBuilder(run.tokenizer, run.style)
    make_parts(run)
    _look_at_tokens(run)
    dataset = fitting(run)[1]
    if recipe.reinforcement is None:
        check_second_view(run.objective, run.teacher, dataset, Mixture.of(recipe.data.shares))
    check_rows(run, dataset)
    if isinstance(run.teacher, CachedTeacher):
        run.teacher.expect(expected_contract(run, dataset))


def _look_at_tokens(run: Run) -> None:
    """Whether other models that are to teach are where the recipe says, and read the student's tokens."""
    teacher = run.recipe.teacher
    for section in (teacher, *teacher.members.values()):
        if section.kind == "local" and section.cache is None:
            check_same_tokens(run.tokenizer, load_tokenizer(section))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the adapter's key before the message of an error, which stays of its kind where it holds a message alone."""
    try:
        yield
    except (ValueError, OSError, NonFiniteLoss, NonFiniteGradient) as error:
        told = f"adapters.{name}: {error}"
        if error.args == (str(error),):
            error.args = (told,)
            raise
        raise (OSError if isinstance(error, OSError) else ValueError)(told) from error


def _is_finished(run: Run) -> bool:
    """Whether the run is resumed and was over before, as the first process sees it."""
    resumed = run.recipe.training.get("run_policy") == "resume"
    return resumed and gather_object([read_record(run.output_dir).get("status") == "finished"])[0]


def _left_by(run: Run) -> RunResult:
    record: dict[str, Any] = read_record(run.output_dir)
    known = {field.name for field in fields(RunRecord)}
    kept = {key: value for key, value in record.items() if key in known}
    report = json.loads((run.output_dir / "report.json").read_text(encoding="utf-8"))
    return RunResult(run.output_dir, report, RunRecord(**kept))


def _last_lines(folder: Path, names: Sequence[str]) -> list[str]:
    lines = [f"Adapters    {', '.join(names)}, each in its folder below {folder}"]
    if set(ROLES) <= set(names):
        lines.append(f'Ask them    hfkd reason {folder} "your question"')
    return lines
