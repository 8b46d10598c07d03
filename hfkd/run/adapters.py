"""Runs a recipe of several adapters: one run after the other, each in a folder of its own below the recipe's.

All of them are looked at before the first one is trained. What one run is, is `hfkd.run.conduct`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate.utils import gather_object
from rich.console import Console

from hfkd.files import write_whole
from hfkd.masking import shareable
from hfkd.recipe.adapters import expand
from hfkd.record import RunRecord, check_output_folder, read_record
from hfkd.run.build import Run, check_imports, settings_of
from hfkd.run.conduct import RunResult
from hfkd.run.rows import load_data

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
        ValueError: Something in the recipe or in the rows of any adapter can't work, or a folder holds another run.
        OSError: A file is missing or damaged.
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
        runs[name] = _left_by(plan) if done else run_one(plan.recipe, console=console, command=command)
    if first:
        told = shareable(recipe.resolved())
        write_whole(folder / "recipe.yaml", yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
    for line in _last_lines(folder, list(plans)):
        console.print(line, markup=False, highlight=False)
    return AdapterRuns(folder, runs)


def _looked_at(name: str, recipe: Recipe) -> Run:
    """An adapter's settings and rows, found to be there, and a folder that may be used; nothing is kept of the rows.

    Raises:
        ValueError: As in a run, with the adapter's name. So does an OSError.
    """
    with _named(name):
        run = settings_of(recipe)
        check_imports(recipe)
        policy = recipe.training.get("run_policy", "refuse")
        if policy != "resume" or run.config.process_index == 0:
            check_output_folder(run.output_dir, policy, run.fingerprint, recipe.resolved())
        load_data(recipe, run.sources)
    return run


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"adapters.{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"adapters.{name}: {error}") from error


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
