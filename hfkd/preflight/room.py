"""Will it fit? The memory of the run by part, against what this machine's device has.

How much each part takes is `hfkd.preflight.memory`; here it is compared, printed, and said what to lower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfkd.cache.folder import size_in_words
from hfkd.preflight.findings import Finding
from hfkd.run.build import Run

if TYPE_CHECKING:
    from hfkd.config import DistillationConfig
    from hfkd.preflight.memory import Estimate

_NAME = "memory"
_SLACK = {"cpu": 0.1}  # of what there is: what allocators and libraries take isn't in the estimate
_SLACK_ELSEWHERE = 0.2


@dataclass(frozen=True)
class Room:
    """What a run takes and what there is.

    Args:
        alone: What one process takes that is alone.
        each: What each process of the run takes; the same where it has one.
        available: Bytes on this machine's device.
        fitting_chunk: The largest `loss.chunk_size` with which each process fits; None where none does, or where it
            fits as it is.
    """

    alone: Estimate
    each: Estimate
    available: int
    fitting_chunk: int | None = None

    @property
    def can_be_tried(self) -> bool:
        """Whether this process can load the models and make a few steps."""
        return self.alone.total <= self.available

    @property
    def fits(self) -> bool:
        """Whether each process of the run has room on such a device."""
        return self.each.total <= self.available


def measure_room(run: Run, processes: int) -> Room | str:
    """Reckon what a run takes, and look how much is free. Loads no weights.

    Args:
        run: With its rows and its builder the lengths are real ones.
        processes: Of the run.

    Returns:
        What was reckoned, or why it can't be.
    """
    from hfkd.preflight import memory

    try:
        alone = memory.estimate(run, processes=1)
    except memory.CannotEstimate as error:
        return str(error)
    each = alone if processes == 1 else memory.estimate(run, processes=processes)
    available = memory.available_bytes(run.config.device)
    chunk = None
    if each.total > available:
        chunk = memory.chunk_size_that_fits(run, available, processes=processes)
    return Room(alone, each, available, chunk)


def check_room(run: Run, room: Room, console: Console) -> Iterator[Finding]:
    """Print the parts, and say whether they fit.

    Args:
        run: Its recipe names what can be lowered.
        room: From `measure_room`.
        console: Where to.
    """
    console.print()
    console.print(Text(f"Memory at the peak of the run, on {room.each.device}", style="bold"))
    console.print(room_table(room))
    console.print("What each part holds at the moment when all of them together are most.")
    each, several = room.each, room.each.processes > 1
    moment = {"evaluation": "while held-out texts are read", "generation": "while answers are written"}
    when = next((words for name, words in moment.items() if _at_peak(each, name)), "in a step of training")
    who = f"each of {each.processes} processes takes" if several else "the run takes"
    largest = max(each, key=lambda part: part.bytes)
    words = (
        f"At its peak, {when}, {who} {size_in_words(each.total)} on {each.device}, most of it {largest.name} "
        f"({size_in_words(largest.bytes)}); {size_in_words(room.available)} are free here"
    )
    figures = {"available": room.available, **each.to_dict()}
    if not room.fits:
        figures["chunk_size_that_fits"] = room.fitting_chunk
        yield Finding("error", _NAME, f"{words}. {_remedy(run, room)}{_notes(each)}", figures)
    elif each.total > room.available * (1 - _SLACK.get(each.device.split(":")[0], _SLACK_ELSEWHERE)):
        yield Finding(
            "warning",
            _NAME,
            f"{words}: little is left for what can't be foreseen. {_lower(run, each)}{_notes(each)}",
            figures,
        )
    else:
        yield Finding("pass", _NAME, f"{words}.{_notes(each)}", figures)
    if several and each.device.startswith("cpu") and each.total * each.processes > room.available:
        text = f"{each.processes} processes take {size_in_words(each.total * each.processes)} together"
        yield Finding("warning", _NAME, f"{text}, more than this machine has free: spread them over several.", figures)
    if room.fits and not room.can_be_tried:
        alone = size_in_words(room.alone.total)
        yield Finding("warning", _NAME, f"One process alone would take {alone}, so no step can be tried here.")


def room_table(room: Room) -> Table:
    """The parts, one a line; of several processes beside one that is alone."""
    columns = {"one process": room.alone}
    if room.each.processes > 1:
        columns[f"each of {room.each.processes}"] = room.each
    table = Table()
    table.add_column("Part")
    for name in columns:
        table.add_column(name, justify="right")
    sizes = {name: {part.name: part.bytes for part in one} for name, one in columns.items()}
    for part in dict.fromkeys(name for one in sizes.values() for name in one):
        table.add_row(part, *(size_in_words(one.get(part, 0)) for one in sizes.values()))
    table.add_section()
    table.add_row("together", *(size_in_words(one.total) for one in columns.values()), style="bold")
    table.add_row("free here", *(size_in_words(room.available) for _ in columns))
    return table


def _remedy(run: Run, room: Room) -> str:
    """What to change, the chunk size first where that alone helps."""
    given, chunk = run.recipe.loss.chunk_size, room.fitting_chunk
    if chunk is not None:
        was = "is chosen by itself" if given is None else f"is {given}"
        return f"It would run out of memory. loss.chunk_size {was}; with loss.chunk_size={chunk} it fits."
    return f"It would run out of memory, whatever loss.chunk_size is. {_lower(run, room.each)}"


def _at_peak(estimate: Estimate, name: str) -> bool:
    """Whether a part that isn't there all the time is, when all together are most; a mask or two may outlast it."""
    return any(part.name == name and part.bytes > part.most / 2 for part in estimate)


def _lower(run: Run, estimate: Estimate) -> str:
    """What makes a run smaller, of what isn't done already; what the peak is made of comes first."""
    config, recipe = run.config, run.recipe
    ways = []
    if _at_peak(estimate, "evaluation") and config.per_device_eval_batch_size > 1:
        ways.append(
            f"lower training.per_device_eval_batch_size (it is {config.per_device_eval_batch_size}; the figures stay "
            "the same)"
        )
    elif _at_peak(estimate, "generation"):
        ways.append("lower evaluation.batch_size and data.generation.batch_size (the answers stay the same)")
    else:
        ways.extend(_in_a_step(config))
    if recipe.student.lora is None:
        ways.append("train an adapter (student.lora)")
    if recipe.teacher.kind == "local" and recipe.teacher.cache is None:
        ways.append("read the teacher from a cache (hfkd cache)")
    text = "; ".join(ways) or "take a smaller model, or more processes that share it (recipes/accelerate/fsdp2.yaml)"
    return f"{text[:1].upper()}{text[1:]}."


def _in_a_step(config: DistillationConfig) -> Iterator[str]:
    if config.per_device_train_batch_size > 1:
        yield (
            f"lower training.per_device_train_batch_size (it is {config.per_device_train_batch_size}; raise "
            "gradient_accumulation_steps as much, and the steps are the same)"
        )
    if not config.gradient_checkpointing:
        yield "set training.gradient_checkpointing: true"


def _notes(estimate: Estimate) -> str:
    return "".join(f" {note}" for note in estimate.notes)
