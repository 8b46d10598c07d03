"""What was done in a run, as lines for a page: student, teacher, objective, origins, hardware, time and energy.

Reads `run.json`, and the report for the steps that were logged; any part may be missing or of an unexpected kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfkd.card.course import steps_words
from hfkd.card.objective import terms_of
from hfkd.card.reading import count, number, section, text, value
from hfkd.card.teaching import WEIGHTS, shots_words, teacher_read
from hfkd.card.words import answers_words, hardware_words, kept, origin, origins_of
from hfkd.schedules import in_words

_OTHER_KINDS = {
    "none": "none: the student learned from the answers alone",
    "ema": "a moving average of the student's weights",
    "snapshot": "the student as it was some steps before",
    "early_exit": "the student itself, as if it ended at a lower layer",
}
_SOURCES = {"hub": "Hugging Face hub", "folder": "a folder", "file": "a file", "generator": "a generator"}
_NOT_SETTINGS = ("name", "kind", "weight", "formula", "paper")


def facts_of(run: Mapping[str, Any], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what was done, the steps as far as the report logged them; an empty value isn't known."""
    energy = number(run, "energy.joules")
    return [
        ("Student", _student(run)),
        ("Teacher", _teacher(section(run, "recipe.teacher"))),
        ("What they read", _read(run)),
        ("Answers", answers_words(run)),
        ("Trained", _trained(run)),
        ("Steps", _steps(run, report)),
        ("Hardware", hardware_words(run) if section(run, "hardware") else ""),
        ("Energy", "" if energy is None else _energy(energy, section(run, "energy"))),
    ]


def objective_of(run: Mapping[str, Any]) -> list[dict[str, str]]:
    """The terms of the objective: weight, kind, settings, formula and where it is from."""
    found = []
    for term in terms_of(run):
        settings = {key: one for key, one in term.items() if key not in _NOT_SETTINGS and one is not None}
        found.append(
            {
                "kind": text(term, "kind", "unknown"),
                "weight": _worded(term.get("weight", 1.0)),
                "settings": ", ".join(f"{key.replace('_', ' ')} {_worded(one)}" for key, one in settings.items()),
                "formula": term["formula"],
                "paper": term["paper"],
            }
        )
    return found


def origin_rows(run: Mapping[str, Any]) -> list[dict[str, str]]:
    """Where student, teacher and rows are from, with revision and licence; what isn't known is empty."""
    return [
        {
            "role": role,
            "id": text(one, "id"),
            "source": _SOURCES.get(text(one, "source"), text(one, "source")),
            "revision": text(one, "revision"),
            "licence": text(one, "licence"),
        }
        for role, one in origins_of(run)
    ]


def data_rows(run: Mapping[str, Any]) -> list[dict[str, str]]:
    """The parts of the data that have a digest: the very rows that were read."""
    parts = section(run, "data")
    return [
        {"name": name.replace("_", " "), "rows": f"{count(part, 'rows'):,}", "digest": text(part, "sha256")[:16]}
        for name in parts
        if text(part := section(parts, name), "sha256")
    ]


def duration_rows(run: Mapping[str, Any], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How long each stage took, and all of them together."""
    found = section(run, "durations") or section(report, "durations")
    seconds = {name: one for name in found if (one := number(found, name)) is not None}
    rows = [(name.replace("_", " "), duration(one)) for name, one in seconds.items()]
    return [*rows, ("together", duration(sum(seconds.values())))] if len(rows) > 1 else rows


def duration(seconds: float) -> str:
    """Seconds in words, as exactly as one wants to know them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _student(run: Mapping[str, Any]) -> str:
    name, part = origin(run), kept(run)
    return f"{part} of {name}" if part and name else name


def _teacher(teacher: Mapping[str, Any]) -> str:
    kind = text(teacher, "kind")
    if members := section(teacher, "members"):
        each = ", ".join(f"{name} ({_teacher(section(members, name)) or 'unknown'})" for name in members)
        return f"{'one for each kind of row' if kind == 'routed' else 'a mixture'}: {each}"
    if kind == "self":
        return WEIGHTS.get(text(teacher, "weights"), "the student itself")
    name = text(teacher, "model") or _OTHER_KINDS.get(kind, kind)
    return f"{name}, read from a cache of what it says" if name and value(teacher, "cache") else name


def _read(run: Mapping[str, Any]) -> str:
    if not section(run, "recipe.data"):
        return ""
    taught = text(run, "recipe.teacher.kind") != "none"
    teachers = f"The teacher read {teacher_read(run)}. " if taught else ""
    return f"{teachers}{shots_words(run)}".strip()


def _trained(run: Mapping[str, Any]) -> str:
    rank = count(run, "recipe.student.lora.r")
    total, trained = count(run, "parameters.total"), count(run, "parameters.trained")
    words = [f"a LoRA adapter of rank {rank}"] if rank else ["all weights"] if section(run, "recipe.student") else []
    if total:
        words.append(f"{trained:,} of {total:,} parameters ({trained / total:.1%})")
    return ", ".join(words)


def _steps(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    training, steps = section(run, "recipe.training"), steps_words(run, report)
    rows = count(training, "per_device_train_batch_size")
    rate, seed = number(training, "learning_rate"), number(training, "seed")
    words = [steps] if steps else ["how many is not recorded"] if training else []
    words += (
        [f"{rows * max(count(training, 'gradient_accumulation_steps', 1), 1)} rows each per process"] if rows else []
    )
    words += [f"learning rate {rate:g}"] if rate else []
    return ", ".join(words + ([f"seed {seed:g}"] if seed is not None else []))


def _energy(joules: float, energy: Mapping[str, Any]) -> str:
    devices = value(energy, "devices")
    named = ", ".join(map(str, devices)) if isinstance(devices, list) and devices else "devices that aren't named"
    return (
        f"{joules / 3600:,.3g} Wh ({joules:,.0f} J) by the counters of: {named}; nothing else of the machine is in it"
    )


def _worded(one: Any) -> str:
    try:
        return in_words(one) if isinstance(one, Mapping | float) else str(one)
    except (KeyError, TypeError, ValueError):
        return str(one)
