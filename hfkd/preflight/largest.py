"""The largest batches that a run can meet: its longest texts together. Takes real lengths where there are rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hfkd.batch import IGNORE, Batch, View
from hfkd.data.collate import DistillationCollator
from hfkd.data.prompts import PromptBuilder
from hfkd.data.tokenize import Encoded, answer_start
from hfkd.data.views import DistillationDataset, Example
from hfkd.objective import Objective
from hfkd.run.build import Run
from hfkd.run.texts import answered_rows, fitting, held_out_views, make_dataset, unanswered, visited_rows
from hfkd.student import pad_token
from hfkd.teachers import CachedTeacher, Teacher

LOOKED_AT = 4096
"""Of more examples than this only so many are tokenized, evenly spread; the others are taken to be as long as the
longest prompt of all together with the longest answer that was seen."""


@dataclass(frozen=True)
class Largest:
    """What a step has to hold.

    Args:
        batch: The micro-batch.
        prefix: What all prompts of the teacher begin with.
        measured: Whether the lengths are those of rows, and not the limits of the recipe.
    """

    batch: Batch
    prefix: list[int]
    measured: bool


def largest_batch(run: Run, teacher: Teacher | None, device: torch.device) -> Largest:
    """Put the longest examples of a run into one micro-batch.

    Args:
        run: With its rows and its prompt builder; without them the limits of the recipe are taken.
        teacher: The run's; decides whether there is a second view.
        device: Where the batch is to lie.

    Raises:
        ValueError: The rows can't be examples.
    """
    rows = run.config.train_batch_size
    if run.builder is None or not run.train:
        return Largest(_by_limits(run, teacher, rows, device), [], measured=False)
    run = replace(run, teacher=teacher)
    dataset = _examples(run)
    examples = [_with_answer(run, dataset[place]) for place in _places(len(dataset))]
    batch = _longest_together(run, dataset, examples, rows)
    return Largest(_moved(batch, device), dataset.shared_prefix, measured=True)


def held_out_batch(run: Run, teacher: Teacher | None, objective: Objective, device: torch.device) -> Batch | None:
    """Put the longest held-out texts into one batch, as fidelity and evaluations in training read them.

    Args:
        run: With its evaluation items and its prompt builder; without them the limits of the recipe are taken.
        teacher: Who reads them besides the student.
        objective: What it is asked for.
        device: Where the batch is to lie.

    Returns:
        None where no text can be read.
    """
    rows = run.config.eval_batch_size
    if run.builder is None or run.evaluation is None:
        return _by_limits(run, teacher, rows, device)
    try:
        dataset = held_out_views(run, run.evaluation.items, teacher, objective)
    except ValueError:  # the run goes without, too
        return None
    examples = [dataset[place] for place in _places(len(dataset))]
    return _moved(_longest_together(run, dataset, examples, rows), device) if examples else None


def _longest_together(run: Run, dataset: DistillationDataset, examples: Sequence[Example], rows: int) -> Batch:
    """A batch of the longest of some examples, as wide as others of the data set may be."""
    chosen = sorted(examples, key=_length, reverse=True)[:rows]
    for view in ("student", "teacher"):  # the longest of each view, whichever example it belongs to
        longest = max(examples, key=lambda one: len(one[view]["input_ids"]) if one[view] else 0)
        if longest not in chosen and chosen[-1] is not chosen[0]:
            chosen[-1] = longest
    features = [{**one, "index": place} for place, one in enumerate(chosen)]
    batch = Batch.from_inputs(DistillationCollator(pad_token(run.tokenizer))(features))
    if len(examples) < len(dataset) or len(set(dataset.student_shots)) > 1:
        batch = _widened(batch, dataset, examples)
    return batch


def _examples(run: Run) -> DistillationDataset:
    """The views of the rows that training visits."""
    rows, dataset = fitting(run)
    visited = visited_rows(run, rows)
    if _written_already(run):
        return make_dataset(
            run, answered_rows(run, visited, run.teacher.path, written=True), run.teacher, run.objective
        )
    if len(visited) >= len(rows):
        return dataset
    return make_dataset(run, unanswered(run, visited), run.teacher, run.objective)


def _written_already(run: Run) -> bool:
    """Whether the teacher's answers lie in its cache."""
    return run.recipe.data.answer == "teacher" and isinstance(run.teacher, CachedTeacher)


def _places(count: int) -> Sequence[int]:
    return range(count) if count <= LOOKED_AT else [place * count // LOOKED_AT for place in range(LOOKED_AT)]


def _length(example: Example) -> int:
    return sum(len(example[view]["input_ids"]) for view in ("student", "teacher") if example[view])


def _with_answer(run: Run, example: Example) -> Example:
    """An example whose answer is as long as it can be, where it is still to be written."""
    data = run.recipe.data
    if set(data.shares) == {"dataset"} and data.answer != "teacher" or _written_already(run):
        return example
    views = {view: example[view] and _lengthened(example[view], data.generation.max_new_tokens)
             for view in ("student", "teacher")}  # fmt: skip
    return {**example, **views}


def _lengthened(view: Encoded, count: int) -> Encoded:
    start = answer_start(view)
    answer = view["input_ids"][start:]
    answer += answer[-1:] * (count - len(answer))
    return {
        "input_ids": view["input_ids"][:start] + answer,
        "labels": view["labels"][:start] + answer,
    }


def _widened(batch: Batch, dataset: DistillationDataset, examples: Sequence[Example]) -> Batch:
    """The batch, padded to the longest prompt together with the longest answer."""
    answer = max(len(one["student"]["input_ids"]) - answer_start(one["student"]) for one in examples)
    wide = {"student": _padded(batch.student, dataset.longest_prompts["student"] + answer)}
    if batch.teacher is not None and batch.teacher_span is None:
        wide["teacher"] = _padded(batch.teacher, dataset.longest_prompts["teacher"] + answer)
    spans = None
    if batch.student_span is not None:
        spans = _filled(batch.student_span, wide["student"].labels.shape[1], -1)
    return replace(batch, **wide, student_span=spans)


def _padded(view: View, length: int) -> View:
    mask = _filled(view.attention_mask, length, 0)
    return View(_filled(view.input_ids, length, 0), mask, _filled(view.labels, length, IGNORE))


def _filled(values: Tensor, length: int, filler: int) -> Tensor:
    return nn.functional.pad(values, (0, max(0, length - values.shape[1])), value=filler)


def _by_limits(run: Run, teacher: Teacher | None, rows: int, device: torch.device) -> Batch:
    """A batch as long as the recipe allows; all but the first token is learned."""
    data = run.recipe.data

    def view(length: int) -> View:
        ids = torch.zeros(rows, length, dtype=torch.long, device=device)
        labels = ids.clone()
        labels[:, : 1 + length - data.max_length] = IGNORE
        return View(ids, torch.ones_like(ids), labels)

    student = view(data.max_length)
    longer = max(data.max_length, data.teacher_max_length or 0)
    second = teacher is not None and longer > data.max_length
    route = None if teacher is None or teacher.route is None else torch.zeros(rows, dtype=torch.long, device=device)
    return Batch(student, view(longer) if second else None, route=route)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return Batch.from_inputs({
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.to_inputs().items()
    })  # fmt: skip


def longest_prompt(builder: PromptBuilder, rows: Sequence[dict], shown: Sequence[dict]) -> int:
    """The most tokens of a prompt with these demonstrations before it; 0 where there are no rows.

    Args:
        builder: Writes and tokenizes.
        rows: To be asked.
        shown: The demonstrations.
    """
    return max((len(builder.encode_prompt(row, shown)) for row in rows), default=0)
