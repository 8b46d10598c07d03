"""What a check found, and what runs the checks: each by itself, so that one that fails doesn't hide the others.

It doesn't know what is checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfkd.files import write_json
from hfkd.masking import mask_secrets, shareable

Level = Literal["pass", "warning", "error"]

_SIGNS: dict[str, tuple[str, str]] = {"pass": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "bold red")}

Made = TypeVar("Made")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        level: `pass`; `warning`, if the run can be started but may not be what was meant; `error`, if it would fail or
            learn nothing.
        name: Of the check.
        message: What was found, and of a warning or an error what to change.
        figures: The numbers behind it, as JSON values.
    """

    level: Level
    name: str
    message: str
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def exit_code(findings: Iterable[Finding], strict: bool = False) -> int:
    """What a shell is told: 0 where nothing stands in the way, 1 where there is an error.

    Args:
        findings: Of all checks.
        strict: Whether a warning counts as an error.
    """
    levels = {finding.level for finding in findings}
    return int("error" in levels or (strict and "warning" in levels))


def verdict(findings: Iterable[Finding]) -> str:
    """`passed`, or how many warnings and errors there are."""
    levels = [finding.level for finding in findings]
    counts = [(levels.count(name), name) for name in ("error", "warning")]
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count) or "passed"


def findings_table(findings: Sequence[Finding]) -> Table:
    """All findings, a line for each."""
    table = Table(title="Findings", title_justify="left", show_lines=True, expand=True)
    table.add_column("", width=1)
    table.add_column("Check", no_wrap=True)
    table.add_column("What was found", ratio=1, overflow="fold")
    for finding in findings:
        sign, style = _SIGNS[finding.level]
        message = Text(printable(finding.message), style="" if finding.level == "pass" else style)
        table.add_row(Text(sign, style=style), finding.name, message)
    return table


def printable(text: str) -> str:
    """A text without secrets, its control characters but line ends written out: a terminal would obey them."""
    shown = (one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)
    return mask_secrets("".join(shown))


class Examination:
    """Checks under way: each is run by itself, and what it raises or logs is a finding too.

    Args:
        console: Where warnings and errors are shown at once.

    Attributes:
        found: The findings so far, in order.
        not_run: What checks that weren't run were lacking.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.found: list[Finding] = []
        self.not_run: dict[str, list[str]] = {}

    def close(self) -> list[Finding]:
        """All findings; at the end, which checks couldn't be run."""
        failed = {finding.name for finding in self.found if finding.level == "error"}
        left = {name: missing for name, missing in self.not_run.items() if name not in failed}
        if left:
            words = ", ".join(f"{name} (for lack of: {', '.join(missing)})" for name, missing in left.items())
            self.add(Finding("warning", "not run", f"{words}. Mend the errors and check again.", left))
        return self.found

    def add(self, finding: Finding) -> None:
        """Take a finding; one that asks for a change is shown at once."""
        self.found.append(finding)
        if finding.level != "pass":
            sign, style = _SIGNS[finding.level]
            self.console.print(Text(f"{sign} {finding.name}: {printable(finding.message)}", style=style))

    def check(self, name: str, check: Callable[[], Iterable[Finding]], **needs: Any) -> bool:
        """Run a check.

        Args:
            name: Of the check, for what it raises.
            check: Gives findings.
            needs: What it can't do without, by name; where one is None it isn't run.

        Returns:
            Whether it was run and found no error.
        """
        if missing := [need.replace("_", " ") for need, value in needs.items() if value is None]:
            self.not_run[name] = missing
            return False
        before = len(self.found)
        with self._guarded(name):
            for finding in check():
                self.add(finding)
        return all(finding.level != "error" for finding in self.found[before:])

    def make(self, name: str, maker: Callable[[], Made], **needs: Any) -> Made | None:
        """Make what later checks need.

        Args:
            name: Of the check, for what it raises.
            maker: Makes it.
            needs: As in `check`; nothing is said where one is missing, since its own error was.

        Returns:
            What was made; None where something was missing or raised.
        """
        if any(value is None for value in needs.values()):
            return None
        made = None
        with self._guarded(name):
            made = maker()
        return made

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Make findings of what is raised, and of warnings that hfkd logs."""
        heard = _Heard()
        logger = logging.getLogger("hfkd")
        passed_on, logger.propagate = logger.propagate, False
        logger.addHandler(heard)
        try:
            with self.console.status(f"{name} ..."):
                yield
        except Exception as error:
            self.add(_of_error(name, error))
        finally:
            logger.removeHandler(heard)
            logger.propagate = passed_on
        for message in dict.fromkeys(heard.messages):
            self.add(Finding("warning", name, message))


def _of_error(name: str, error: Exception) -> Finding:
    """An error that a user can mend speaks for itself; of others the kind is told too."""
    text = str(error).strip() or "no reason was given"
    plain = isinstance(error, ValueError | OSError)
    return Finding("error", name, text if plain else f"{type(error).__name__}: {text}")


class _Heard(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.messages.append(record.getMessage())


def write_findings(path: Path, findings: Sequence[Finding], recipe: Path) -> Path:
    """Write the findings as JSON, without secrets and without this machine's paths.

    Args:
        path: The file.
        findings: Of all checks.
        recipe: The file that they are of.
    """
    content = {"recipe": str(recipe), "verdict": verdict(findings), "findings": [one.to_dict() for one in findings]}
    return write_json(path, shareable(content))
