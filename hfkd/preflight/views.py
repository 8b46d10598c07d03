"""The examples as the models will read them: how many there are, how long, what was left out, and the first of them on
paper.

What is learned, what both views read, and what of the teacher's prompt is run once for all is said of each token. It
reads the data set of the run itself, so what is shown is what is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfkd.batch import IGNORE
from hfkd.data.tokenize import Encoded, prompt_length
from hfkd.data.views import DistillationDataset
from hfkd.prefix import SharedPrefix
from hfkd.preflight.findings import Finding, printable
from hfkd.run.build import Run
from hfkd.teachers import CachedTeacher, SeveralTeachers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfkd.teachers import Teacher

_NAME = "examples"
_MEASURED = 512
_LONGEST = 480
_COLOURS = {"run once": "blue", "this view": "", "both read": "cyan", "learned": "bold green", "not learned": "dim"}


@dataclass(frozen=True)
class Piece:
    """A run of tokens of a view.

    Args:
        kind: `run once` (with the prompts of all other examples), `this view` (what the other one doesn't have there),
            `both read`, `learned` or `not learned` (behind an answer).
        ids: Its tokens.
    """

    kind: str
    ids: list[int]


def tokens_run_once(dataset: DistillationDataset, teacher: Teacher | None) -> int:
    """How many tokens of each of the teacher's prompts are run once for all of them.

    Args:
        dataset: Its views.
        teacher: Needn't be prepared.
    """
    members = teacher.teachers.values() if isinstance(teacher, SeveralTeachers) else [teacher]
    reuses = any(getattr(member, "reuse_prefix", False) for member in members)
    length = len(dataset.shared_prefix)
    return length if reuses and length >= SharedPrefix.MINIMUM else 0


def pieces_of(view: Encoded, other: Encoded | None, once: int = 0) -> list[Piece]:
    """Cut a view by what becomes of its tokens.

    Args:
        view: The tokens and which of them are learned.
        other: The other model's view; None where both read this one, or there is one model.
        once: Tokens at its beginning that are run once for all examples.
    """
    ids, labels, length = view["input_ids"], view["labels"], prompt_length(view)
    shared = 0 if other is None else _common_end(ids[once:length], other["input_ids"][: prompt_length(other)])
    own = "both read" if other is None else "this view"
    found = [Piece("run once", ids[:once]), Piece(own, ids[once : length - shared])]
    found.append(Piece("both read", ids[length - shared : length]))
    for learned, run in groupby(range(length, len(ids)), key=lambda place: labels[place] != IGNORE):
        found.append(Piece("learned" if learned else "not learned", [ids[place] for place in run]))
    return [piece for piece in found if piece.ids]


def _common_end(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both sequences end in."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((count for count, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(first), len(second)))


def show_examples(console: Console, run: Run, dataset: DistillationDataset, count: int = 2) -> None:
    """Print the first examples of both views.

    Args:
        console: Where to.
        run: Its teacher says what is run once; its recipe says who writes the answers.
        dataset: The examples.
        count: How many.
    """
    once = tokens_run_once(dataset, run.teacher)
    console.print()
    console.print(Text("The first examples", style="bold"))
    for index in range(min(count, len(dataset))):
        example = dataset[index]
        student, teacher = example["student"], example["teacher"]
        console.print(_view_table(f"Example {index}: the student reads", student, teacher, 0, run, run.tokenizer))
        if teacher is not None:
            read_by = (dataset.teacher_builder or run.builder).tokenizer
            title = f"Example {index}: the teacher reads"
            console.print(_view_table(title, teacher, student, once, run, read_by, told=index > 0))
        elif run.teacher is not None and run.objective.needs:
            console.print("The teacher reads the same.")
    console.print(_legend(once, dataset))


def _view_table(
    title: str,
    view: Encoded,
    other: Encoded | None,
    once: int,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    told: bool = False,
) -> Table:
    """One view, a line for each piece; what is run once needn't be told twice."""
    pieces = pieces_of(view, other, once)
    learned = sum(len(piece.ids) for piece in pieces if piece.kind == "learned")
    does = "learns" if "student" in title else "speaks of"
    table = Table(
        title=f"{title} {len(view['input_ids'])} tokens and {does} {learned}",
        title_justify="left",
        show_header=False,
        box=None,
        pad_edge=False,
    )
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for piece in pieces:
        style = _COLOURS[piece.kind]
        text = _shown(tokenizer, piece.ids)
        if piece.kind == "run once" and told:
            text = "(the same as above)"
        if piece.kind == "learned" and _unwritten(run):
            text = f"(in the place of {text!r}: what the {_unwritten(run)} will write)"
        table.add_row(Text(piece.kind, style=style), str(len(piece.ids)), Text(text, style=style))
    return table


def _unwritten(run: Run) -> str:
    """Who is still to write the answers; empty where they are there."""
    data = run.recipe.data
    if data.answer == "teacher":
        return "teacher"
    return "" if "dataset" in data.shares else " or the ".join(data.shares)


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = printable(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).replace("\n", "↵\n").removesuffix("\n")
    if len(text) <= _LONGEST:
        return text
    head, tail = text[: _LONGEST // 2], text[-_LONGEST // 2 :]
    return f"{head}\n[... {len(text) - len(head) - len(tail)} characters are not shown here, but read ...]\n{tail}"


def _legend(once: int, dataset: DistillationDataset) -> Text:
    words = {
        "both read": "in both prompts",
        "this view": "the rest of this prompt",
        "run once": "keys and values kept for all examples",
        "learned": "the same tokens in both views",
    }
    if not once:
        del words["run once"]
    if not dataset.second_view:
        words = {"both read": "the prompt", "learned": "the answer"}
    line = Text("")
    for kind, meaning in words.items():
        line.append(kind, style=_COLOURS[kind]).append(f": {meaning}.  ")
    return line


def check_examples(run: Run, dataset: DistillationDataset, positions: Mapping[str, int]) -> Iterator[Finding]:
    """Say how many rows are examples and how long they are.

    Args:
        run: With its training rows.
        dataset: Made of them.
        positions: How many positions the models of `student` and `teacher` have, where that is known.
    """
    student, teacher = _lengths(dataset)
    once = tokens_run_once(dataset, run.teacher)
    figures: dict[str, Any] = {
        "rows": len(run.train),
        "examples": len(dataset),
        "too_long": dataset.dropped,
        "demonstrations_left_out": dataset.dropped_demonstrations,
        "student_tokens": {"median": median(student), "max": max(student), "limit": dataset.max_length},
    }
    words = (
        f"{len(dataset)} of {len(run.train)} training rows are examples: {_view_words('student', student, dataset)}"
    )
    if dataset.second_view:
        figures["teacher_tokens"] = {"median": median(teacher), "max": max(teacher)}
        figures["teacher_tokens"] |= {"limit": dataset.teacher_max_length, "run_once": once}
        words += f"; {_view_words('teacher', teacher, dataset)}" + _prefix_words(once, dataset, run.teacher)
    elif run.teacher is not None and run.objective.needs:
        words += "; the teacher reads the same"
    yield Finding("pass", _NAME, f"{words}. Nothing is cut.", figures)
    if dataset.dropped:
        yield Finding("warning", _NAME, _dropped(dataset, len(run.train)), {"too_long": dataset.dropped})
    if dataset.dropped_demonstrations:
        count = dataset.dropped_demonstrations
        text = f"{count} training rows have the prompt of a demonstration and are left out of training."
        yield Finding("pass", _NAME, text, {"demonstrations_left_out": count})
    yield from _room(run, dataset)
    for who, longest in (("student", max(student)), ("teacher", max(teacher or student))):
        if longest > positions.get(who, longest):
            text = f"A view of the {who} has {longest} tokens, and its model was made for {positions[who]} positions."
            limit = "data.max_length" if who == "student" else "data.teacher_max_length"
            yield Finding("error", _NAME, f"{text} Lower {limit} to that, or show fewer demonstrations.")


def _lengths(dataset: DistillationDataset) -> tuple[list[int], list[int]]:
    """Tokens of the first examples as student and teacher read them."""
    numbers = range(min(_MEASURED, len(dataset)))
    student = [len(dataset[number]["student"]["input_ids"]) for number in numbers]
    teacher = [len(dataset.read_by_teacher(number)["input_ids"]) for number in numbers] if dataset.second_view else []
    return student, teacher


def _view_words(who: str, lengths: Sequence[int], dataset: DistillationDataset) -> str:
    limit = dataset.max_length if who == "student" else dataset.teacher_max_length
    some = f" in the first {len(lengths)}" if len(lengths) < len(dataset) else ""
    size = f"{median(lengths):g} tokens (median), {max(lengths)} at most"
    if min(lengths) == max(lengths):
        size = f"{max(lengths)} tokens"
    return f"the {who} reads {size}{some} (limit {limit})"


def _prefix_words(once: int, dataset: DistillationDataset, teacher: Teacher | None) -> str:
    if once:
        return f", of which the first {once} are the same for all and run once"
    if isinstance(teacher, CachedTeacher) or not dataset.shared_prefix:
        return ""
    shared = len(dataset.shared_prefix)
    why = f"fewer than {SharedPrefix.MINIMUM}" if shared < SharedPrefix.MINIMUM else "reuse_prefix is off"
    return f", of which the first {shared} are the same for all but run each time ({why})"


def _dropped(dataset: DistillationDataset, rows: int) -> str:
    unlike = " or hold nothing that both tokenizers can write" if dataset.teacher_builder is not None else ""
    return (
        f"{dataset.dropped} of {rows} training rows ({dataset.dropped / rows:.1%}) are left out: they are longer than "
        f"data.max_length={dataset.max_length} (student) or data.teacher_max_length={dataset.teacher_max_length} "
        f"(teacher){unlike}. Raise the limits, or show fewer demonstrations."
    )


def _room(run: Run, dataset: DistillationDataset) -> Iterator[Finding]:
    """Answers that are still to be written need room behind the longest prompt."""
    if not _unwritten(run):
        return
    most = run.generation.max_new_tokens
    limits = {"student": dataset.max_length, "teacher": dataset.teacher_max_length}
    for who, limit in limits.items():
        longest = dataset.longest_prompts[who]
        if longest + most > limit:
            setting = "data.max_length" if who == "student" else "data.teacher_max_length"
            yield Finding(
                "warning",
                _NAME,
                f"The longest prompt of the {who} has {longest} tokens and may be answered with {most} more, above "
                f"{setting}={limit}: rows with such an answer are left out or refused. Raise {setting}.",
                {"longest_prompt": longest, "max_new_tokens": most, "limit": limit},
            )
