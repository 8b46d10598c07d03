"""The tables of docs/scaling.md: `python scripts/memory_table.py` renews them, `--check` only compares.

All figures are `hfkd.memory`'s arithmetic on the sizes below; nothing is run.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

from written_page import write_or_compare

from hfkd.memory import ModelSize, Setup, memory

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
COMMAND = "python scripts/memory_table.py"
BEGIN = f"<!-- memory: written by `{COMMAND}`, not by hand -->"
END = "<!-- memory: end -->"

MODELS = {
    "0.5B": ModelSize(0.47e9, layers=24, hidden=896, vocabulary=128256, tied=True),
    "1B": ModelSize(1.24e9, layers=16, hidden=2048, vocabulary=128256, tied=True),
    "3B": ModelSize(3.21e9, layers=28, hidden=3072, vocabulary=128256, tied=True),
    "8B": ModelSize(8.03e9, layers=32, hidden=4096, vocabulary=128256),
    "70B": ModelSize(70.6e9, layers=80, hidden=8192, vocabulary=128256),
}
"""Sizes as Llama 3 has them, and a half-billion one of the same make."""

FULL = Setup(student_dtype="float32", teacher_dtype="bfloat16")
LORA = replace(FULL, student_dtype="bfloat16", learning=0.01)
STUDENTS = (*((name, "all, AdamW", FULL) for name in ("0.5B", "1B", "3B", "8B")), ("8B", "LoRA, 1 %", LORA))
LAYOUTS = {
    "1 GPU": {},
    "DDP, 8": {"processes": 8},
    "ZeRO-2, 8": {"processes": 8, "sharding": "zero2"},
    "FSDP2 or ZeRO-3, 8": {"processes": 8, "sharding": "full"},
    "the same, teacher in CPU memory": {"processes": 8, "sharding": "full", "teacher": "offloaded"},
    "the same, cached teacher": {"processes": 8, "sharding": "full", "teacher": "cached"},
    "FSDP2 or ZeRO-3, 64": {"processes": 64, "sharding": "full"},
}
BILLION = 1e9


def main(arguments: list[str]) -> int:
    """Write the tables, or with `--check` say whether they are up to date."""
    return write_or_compare(PAGE, renewed, COMMAND, arguments)


def renewed(page: str) -> str:
    """The page with the tables as they should be now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{totals()}\n\n{parts()}\n{END}{rest.split(END)[1]}"


def totals() -> str:
    """Gigabytes on one GPU, for each student under each teacher and layout."""
    rows: list[tuple[str, ...]] = [("student", "learns", "teacher", *LAYOUTS)]
    for student, learns, base in STUDENTS:
        for teacher in ("1B", "8B", "70B"):
            found = (memory(MODELS[student], MODELS[teacher], replace(base, **layout)) for layout in LAYOUTS.values())
            rows.append((student, learns, teacher, *(_gigabytes(one.total) for one in found)))
    return _table(rows)


def parts() -> str:
    """What the sum is made of, for the largest pair."""
    rows: list[tuple[str, ...]] = [("8B student, 70B teacher", *LAYOUTS)]
    found = [asdict(memory(MODELS["8B"], MODELS["70B"], replace(FULL, **layout))) for layout in LAYOUTS.values()]
    rows += [(name, *(_gigabytes(one[name]) for one in found)) for name in found[0]]
    return _table(rows)


def _gigabytes(value: float) -> str:
    number = value / BILLION
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def _table(rows: list[tuple[str, ...]]) -> str:
    ruled = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
