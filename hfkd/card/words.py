"""What was done, in words: the student, its teacher, whose answers it learned, the machine and the time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hfkd.card.course import steps_words
from hfkd.card.markdown import Markdown, code, code_cell, joined, table
from hfkd.card.reading import count, entries, number, section, text, value

_ROLES = {
    "student": "student (base model)",
    "teacher": "teacher",
    "train": "training rows",
    "demonstrations": "demonstrations",
    "evaluation": "evaluation items",
}
_ROWS = {
    "train": "recipe.data.train",
    "demonstrations": "recipe.data.demonstrations",
    "evaluation": "recipe.evaluation",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def origin(run: Mapping[str, Any]) -> str:
    """Where the student's weights are from, be it a whole model or a part of one; empty where nobody says."""
    student = section(run, "recipe.student")
    known = text(student, "model") or text(student, "init.from") or text(run, "origins.student.id")
    return known or text(run, "adapter.base_model_name_or_path")


def base_id(run: Mapping[str, Any]) -> str:
    """The id on the hub of the model that the student was made of; empty where it isn't known to be there."""
    known = section(run, "origins.student")
    name = text(known, "id") or origin(run)
    source = text(known, "source") or text(run, "student.source")
    return name if source == "hub" and _HUB_ID.fullmatch(name) else ""


def has_adapter(run: Mapping[str, Any]) -> bool:
    """Whether an adapter was trained, and not the whole model."""
    return bool(section(run, "recipe.student.lora") or section(run, "adapter"))


def is_adapter(run: Mapping[str, Any]) -> bool:
    """Whether the weights beside the card are an adapter: it may have been merged into its base since."""
    return has_adapter(run) and not run.get("merged")


def kept(run: Mapping[str, Any]) -> str:
    """What the student has of its origin; empty where it has all."""
    student, parts = section(run, "student"), []
    if isinstance(blocks := value(student, "kept_layers"), list) and blocks:
        numbers = ", ".join(map(str, blocks))
        parts.append(f"{len(blocks)} of the {count(student, 'layers_before')} blocks ({numbers}; counted from 0)")
    for name, words in (("heads", "attention heads"), ("intermediate", "MLP neurons")):
        if part := section(student, f"narrowed.{name}"):
            parts.append(f"{count(part, 'kept')} of the {count(part, 'of')} {words} of each block")
    return ", ".join(parts)


def is_part(run: Mapping[str, Any]) -> bool:
    """Whether the student was cut out of a larger model."""
    return bool(kept(run) or section(run, "recipe.student.init"))


def title(run: Mapping[str, Any]) -> str:
    """A name for the model: what it was, and what it was taught on."""
    model = origin(run).rstrip("/").split("/")[-1] or "A model"
    blocks, of = value(run, "student.kept_layers"), count(run, "student.layers_before")
    if isinstance(blocks, list) and of:
        model = f"{model} ({len(blocks)} of {of} blocks)"
    data = train_name(run)
    return f"{model}, distilled on {data}" if data else f"{model}, distilled"


def train_name(run: Mapping[str, Any]) -> str:
    """A short name of the training rows."""
    return short_name(text(run, "recipe.data.train.path"))


def short_name(path: str) -> str:
    """The last part of a path or an id, without what follows its dot if that is the kind of a file."""
    last = path.rstrip("/").split("/")[-1]
    return re.sub(r"\.(jsonl?|csv|parquet|ya?ml|txt)$", "", last)


def done(run: Mapping[str, Any], report: Mapping[str, Any]) -> Markdown:
    """What was trained, of what, how, and for how long."""
    lora, name = section(run, "recipe.student.lora") or section(run, "adapter"), origin(run)
    of = joined([f"{kept(run)} of" if kept(run) else "", code(name) if name else "a model that isn't recorded"])
    if has_adapter(run):
        alpha = number(lora, "alpha") or number(lora, "lora_alpha")
        size = f" (rank {count(lora, 'r')}, alpha {alpha:g})" if count(lora, "r") and alpha else ""
        what = Markdown(f"A LoRA adapter{size} was trained on {of}")
    elif section(run, "recipe.student"):
        what = Markdown(f"All weights of {of} were trained")
    else:
        what = Markdown(f"What was trained isn't recorded; it began with {of}")
    if revision := text(run, "origins.student.revision") or text(run, "recipe.student.revision"):
        what = Markdown(f"{what} at revision {code(revision)}")
    teacher = text(run, "recipe.teacher.kind")
    how = ", on answers alone." if teacher == "none" else ", by distillation: the student learned what a teacher says."
    if section(run, "recipe.reinforcement"):
        how = f", by a reward{'' if teacher == 'none' else ' and a teacher'} on answers that the student drew itself."
    return Markdown(f"{what}{how if teacher else '.'}\n{_parameters(run)}{_length(run, report)}")


def _then(data: Mapping[str, Any]) -> str:
    """What became of the answers before they were learned, where something may have."""
    writers = [
        text(part, "kind") for part in entries(data, "transforms") if text(part, "kind") in ("rejection", "rounds")
    ]
    return f" Then {' and '.join(writers)} put other texts in the place of some, as told below." if writers else ""


def _parameters(run: Mapping[str, Any]) -> str:
    total, trained = count(run, "parameters.total"), count(run, "parameters.trained")
    return f"{trained:,} of {total:,} parameters were trained. " if total and trained else ""


def _length(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    history, training = entries(report, "loss_history"), section(run, "recipe.training")
    losses = [one for one in (number(entry, "loss") for entry in history) if one is not None]
    steps = steps_words(run, report)
    words = [f"{steps[0].upper()}{steps[1:]}" if steps else "How many steps were made isn't recorded"]
    batch, rate = count(training, "per_device_train_batch_size"), number(training, "learning_rate")
    batch *= max(1, count(training, "gradient_accumulation_steps", 1)) * count(run, "hardware.processes", 1)
    each = [f"{batch} examples a step"] if batch else []
    each += [f"a learning rate of {rate:g}"] if rate else []
    words += [" at ".join(each)] if each else []
    if losses:
        unit = "" if section(run, "recipe.reinforcement") else " nats per token"
        words.append(f"the logged loss went from {losses[0]:.4g} to {losses[-1]:.4g}{unit}")
    return "; ".join(words) + "."


def answers_words(run: Mapping[str, Any]) -> str:
    """Whose answers were learned, and how they were written."""
    data = section(run, "recipe.data")
    answer = value(data, "answer")
    if not data:
        return ""
    temperature = number(data, "generation.temperature") or 0
    how = f"sampled at temperature {temperature:g}" if temperature else "written greedily"
    if answer in ("dataset", "teacher", None):
        return (
            f"The answers are the teacher's own, {how}."
            if answer == "teacher"
            else ("The answers are those of the data set.")
        ) + _then(data)
    shares = answer if isinstance(answer, Mapping) else {str(answer): 1.0}
    shares = {name: number(shares, name) or 0.0 for name in shares}
    total = sum(shares.values()) or 1.0
    whose = {
        "student": "written by the student itself",
        "teacher": "written by the teacher",
        "dataset": "the data set's",
    }
    named = [f"{whose.get(name, name)} in {share / total:.0%} of the steps" for name, share in shares.items() if share]
    return f"The answers are {', '.join(named)}; what was written, was written anew for its step ({how})."


def lengths_words(run: Mapping[str, Any]) -> str:
    """How long the views might be, in tokens."""
    data = section(run, "recipe.data")
    longest, teachers = count(data, "max_length"), count(data, "teacher_max_length")
    if not longest:
        return ""
    parts = [f"{longest} tokens for the student"] + ([f"{teachers} for the teacher"] if teachers else [])
    then = "are left out and counted" if text(data, "too_long") == "drop" else "end the run with an error"
    return f"An example has at most {' and '.join(parts)}; longer ones {then}."


def origins_table(run: Mapping[str, Any]) -> Markdown:
    """Where models and rows are from, with revision and licence as far as they are recorded."""
    rows = []
    for role, one in origins_of(run):
        source = {"hub": "Hugging Face hub", "folder": "local folder", "file": "local file"}.get(
            text(one, "source"), text(one, "source", "not recorded")
        )
        revision = code_cell(text(one, "revision")) if text(one, "revision") else "not recorded"
        rows.append((role, code_cell(text(one, "id")), source, revision, text(one, "licence", "not recorded")))
    return table(("what", "id", "source", "revision", "licence"), rows)


def origins_of(run: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The origins by their role; those that an older record doesn't have are what its recipe asked for."""
    return [(role, one) for key, role in _ROLES.items() for role, one in _origins_as(run, key, role)]


def ingredients_of(run: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The origins of what the model was made of: all but those of the items that it was only asked."""
    return [
        (role, one) for key, role in _ROLES.items() if key != "evaluation" for role, one in _origins_as(run, key, role)
    ]


def _origins_as(run: Mapping[str, Any], key: str, role: str) -> list[tuple[str, Mapping[str, Any]]]:
    known = section(run, "origins")
    several = {name: section(known.get(name)) for name in known if str(name).startswith(f"{key}.")}
    named = several or {key: section(known.get(key)) or _asked_for(run, key)}
    if key == "teacher" and not known.get(key) and not several:
        named = {f"teacher.{name}": one for name, one in _members(run).items()} or named
    found = [(f"{role}{name[len(key) :].replace('.', ' ', 1)}", one) for name, one in named.items()]
    return [(role, one) for role, one in found if text(one, "id")]


def _members(run: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What a recipe asks for of each of several teachers."""
    members = section(run, "recipe.teacher.members")
    return {str(name): _named(section(one)) for name, one in members.items()}


def _named(teacher: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": text(teacher, "model"), "revision": value(teacher, "revision")}


def _asked_for(run: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if key == "student":
        source = text(run, "student.source") or None
        return {"id": origin(run), "source": source, "revision": value(run, "recipe.student.revision")}
    if key in _ROWS:
        rows = section(run, _ROWS[key])
        return {"id": text(rows, "path"), "revision": value(rows, "revision")}
    return _named(section(run, "recipe.teacher"))


def hardware_words(run: Mapping[str, Any]) -> str:
    """The devices and processes of the run."""
    hardware = section(run, "hardware")
    if not hardware:
        return "not recorded"
    name, processes = text(hardware, "name"), count(hardware, "processes", 1)
    device = f"{count(hardware, 'count', 1)} x {name}" if name else text(hardware, "device", "unknown")
    threads = count(hardware, "cpu_threads")
    parts = [device, f"{processes} process{'es' if processes != 1 else ''}"]
    if threads and not name:
        parts.append(f"{threads} threads")
    return ", ".join(parts)


def time_words(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The seconds of each stage."""
    durations = section(run, "durations") or section(report, "durations")
    parts = [
        f"{name.replace('_', ' ')} {seconds:.0f} s"
        for name in durations
        if (seconds := number(durations, name)) is not None
    ]
    total = sum(number(durations, name) or 0.0 for name in durations)
    return f"{total:.0f} s: {', '.join(parts)}" if parts else "not recorded"


def energy_words(run: Mapping[str, Any]) -> str:
    """The energy, and what of the machine it is that of."""
    joules = number(run, "energy.joules")
    if joules is None:
        return "not measured"
    devices = value(run, "energy.devices")
    named = ", ".join(map(str, devices)) if isinstance(devices, list) and devices else "devices that aren't named"
    seconds = number(run, "energy.seconds")
    during = f" in {seconds:.0f} s" if seconds else ""
    source = text(run, "energy.source", "the machine")
    return (
        f"{joules:.0f} J ({joules / 3.6e6:.3g} kWh){during}, counted by {source} for {named}: all that these devices "
        "used, whoever used it, and nothing of the rest of the machine"
    )
