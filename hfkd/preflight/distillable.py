"""Is there anything to distil? The teacher behind its prompt, the student behind its own and the most frequent answer
are compared on the same items.

A student can't become better than a teacher that guesses; the loss would fall all the same. Runs both models as they
are before training.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfkd.data.prompts import PromptBuilder
from hfkd.data.views import shown_demonstrations, teacher_prompts
from hfkd.eval.answers import EXTRACTORS, match
from hfkd.eval.k_shot import ShotResult, gold_answer, score
from hfkd.preflight.findings import Finding
from hfkd.rollout.base import Completion, GenerationSettings
from hfkd.rollout.hf import HFRollout
from hfkd.run.build import Run
from hfkd.run.texts import fixed_demonstrations
from hfkd.teachers import CachedTeacher, SeveralTeachers, Teacher

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

NAME = "anything to distil"
_BATCH = 32
_BY_CHANCE = 2  # items with the same answer


@dataclass(frozen=True)
class Items:
    """What is asked.

    Args:
        rows: Questions with a gold answer.
        source: Where they are from, in words.
        extract: Name of what reads the answer out of the text.
        tolerance: For numbers.
        max_new_tokens: The longest reply.
        judged: Whether the recipe says how an answer is read; if not, a low figure may be the measure's fault.
    """

    rows: list[dict[str, Any]]
    source: str
    extract: str
    tolerance: float
    max_new_tokens: int
    judged: bool

    @property
    def golds(self) -> list[str]:
        """The right answers."""
        return [gold_answer(row) for row in self.rows]


@dataclass(frozen=True)
class Asked:
    """What a model answered.

    Args:
        result: As an evaluation scores it.
        seconds: That all answers took.
    """

    result: ShotResult
    seconds: float

    @property
    def right(self) -> list[bool]:
        """Whether each answer was right."""
        return self.result.right


@dataclass(frozen=True)
class Difference:
    """A difference of two shares on the same items, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Difference:
        """First minus second, item by item: what both get right or wrong says nothing of the difference."""
        gaps = [int(ours) - int(theirs) for ours, theirs in zip(first, second, strict=True)]
        mean = sum(gaps) / len(gaps)
        spread = sum((gap - mean) ** 2 for gap in gaps) / max(1, len(gaps) - 1)
        return cls(mean, math.sqrt(spread / len(gaps)))

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors from nothing."""
        return self.mean != 0 and abs(self.mean) > 2 * self.error


def choose_items(run: Run, wanted: int) -> Items | None:
    """The items to ask: held-out ones, or training rows where those lack what the teacher reads.

    Args:
        run: With its rows.
        wanted: How many.

    Returns:
        None where no row has a gold answer.
    """
    section, task = run.recipe.evaluation, run.evaluation
    train = [row for row in run.train if row.get("answer") is not None]
    held_out = list(task.items) if task is not None and task.shots else []
    told = any(row.get("privileged_context") for row in train)
    by_context = told and not any(row.get("privileged_context") for row in held_out)
    routed = run.recipe.teacher.kind == "routed" and not any(row.get("teacher") for row in held_out)
    if held_out and not by_context and not routed:
        rows, source = held_out, "held-out items"
    else:
        rows, source = random.Random(run.recipe.data.seed).sample(train, min(len(train), wanted)), "training rows"
    rows = [row for row in rows if row.get("answer") is not None or row.get("completion") is not None]
    if not rows:
        return None
    if section is None or not section.shots:
        limit = run.recipe.data.generation.max_new_tokens
        return Items(rows[:wanted], source, "text", 0.0, limit, judged=False)
    return Items(rows[:wanted], source, section.extract, section.tolerance, section.max_new_tokens, judged=True)


def why_not(run: Run, items: Items | None) -> str:
    """Why the question can't be asked; empty where it can."""
    section = run.recipe.evaluation
    if run.teacher is None or not (run.objective.needs or run.recipe.data.answer == "teacher"):
        return "no teacher is asked: the student learns the answers themselves"
    if isinstance(run.teacher, CachedTeacher):
        return "the teacher is read from a cache and can't answer"
    if section is not None and not section.shots:
        return "evaluation.shots is empty, so no item has an answer to give"
    if run.recipe.data.whole_text:
        return "data.whole_text learns whole texts, which are no answers"
    if items is None:
        return "no row has a gold answer"
    speakers = _speakers(run.teacher)
    return (
        "" if all(one.writes for one in speakers.values()) else "the teacher has no model that could write an answer"
    )


def ask_student(run: Run, items: Items) -> Asked:
    """The student's answers behind its own prompt, the demonstrations drawn as in training."""
    draws = random.Random(run.recipe.data.seed)
    fixed, shots = fixed_demonstrations(run), run.recipe.data.student_shots
    prompts = []
    for row in items.rows:
        available = shown_demonstrations(row, fixed)
        shown = draws.sample(available, min(len(available), draws.choice(shots)))
        prompts.append(run.builder.encode_prompt(row, shown))
    return _answer(run, run.model, run.tokenizer, run.builder, prompts, items)


def ask_teachers(run: Run, items: Items) -> dict[str, Asked]:
    """The teacher's answers behind its prompt; of several teachers each one's own.

    Args:
        run: Its teacher is prepared.
        items: What is asked.

    Returns:
        By name; a single teacher has the name `teacher`.
    """
    found = {}
    for name, teacher in _speakers(run.teacher).items():
        own = teacher.tokenizer if teacher.other_vocabulary else None
        tokenizer, builder = own or run.tokenizer, PromptBuilder(own, run.style) if own else run.builder
        prompts = teacher_prompts(items.rows, builder, fixed_demonstrations(run))
        with teacher.weights() as model:
            found[name] = _answer(run, model, tokenizer, builder, prompts, items)
    return found


def _speakers(teacher: Teacher) -> dict[str, Teacher]:
    return dict(teacher.teachers) if isinstance(teacher, SeveralTeachers) else {"teacher": teacher}


def _answer(
    run: Run,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    builder: PromptBuilder,
    prompts: list[list[int]],
    items: Items,
) -> Asked:
    stop = builder.style.stop if isinstance(builder.prompt(items.rows[0]), str) else ()
    section = run.recipe.evaluation
    size = section.batch_size if section is not None else _BATCH
    settings = GenerationSettings(items.max_new_tokens, tuple(stop), batch_size=size)
    began = time.perf_counter()
    completions: list[Completion] = HFRollout(tokenizer, settings).generate(model, prompts)
    took = time.perf_counter() - began
    given = [EXTRACTORS[items.extract](completion.text) for completion in completions]
    return Asked(score(0, given, items.golds, items.tolerance), took)


def judge(items: Items, student: Asked, teachers: Mapping[str, Asked]) -> Iterator[Finding]:
    """Compare the answers; of several teachers each one by itself.

    Args:
        items: What was asked.
        student: Its answers.
        teachers: Theirs, by name.
    """
    for name, teacher in teachers.items():
        level, words = _judge_one(items, student, teacher)
        lead = "" if name == "teacher" else f"{name}: "
        yield Finding(level, NAME, f"{lead}{words}", _figures(items, student, teacher))


def _judge_one(items: Items, student: Asked, teacher: Asked) -> tuple[Any, str]:
    constant = constantly_right(items)
    over_constant = Difference.of(teacher.right, constant)
    over_student = Difference.of(teacher.right, student.right)
    words = _scores(items, student, teacher)
    if not items.judged and not any(teacher.right):
        return "warning", (
            f"{words} Without an evaluation section an answer must equal the data set's word for word, which says "
            "little of long ones. Add evaluation (extract, max_new_tokens) to have it asked properly."
        )
    if not any(teacher.right) and not any(student.right):
        return "warning", (
            f"{words} Neither gives one right answer, so this can't tell. Look at the examples above, at "
            "evaluation.extract and at evaluation.max_new_tokens; if those are right, the teacher can't do the task."
        )
    if over_student.mean < 0 and over_student.clear:
        return "error", (
            f"{words} The teacher is worse than its student: learning from it takes something away. Give it more or "
            "better demonstrations, or take another teacher."
        )
    if over_constant.mean <= 0 and (over_constant.clear or _falls_back(constant)):
        return "error", (
            f"{words} The teacher is no better than always answering {teacher.result.most_frequent_answer!r}: there "
            "is nothing to distil but that answer, and accuracy can rise by learning just that. Give the teacher "
            "more or better demonstrations, take a stronger one, or an easier task."
        )
    doubts = []
    if not over_constant.clear:
        doubts.append("the most frequent answer")
    if not over_student.clear:
        doubts.append("the student")
    if doubts:
        return "warning", (
            f"{words} Whether the teacher is better than {' and '.join(doubts)} can't be told, the difference is "
            "within two standard errors: there may be little to distil. Ask more items (--items) to know."
        )
    return "pass", f"{words} There is something to distil."


def _falls_back(constant: Sequence[bool]) -> bool:
    """Whether a constant answer is one to fall back to. Among answers that occur once or twice the most frequent one
    is a chance of these items, and says nothing of a teacher that is right as rarely.
    """
    return sum(constant) > _BY_CHANCE


def constantly_right(items: Items) -> list[bool]:
    """For each item, whether the most frequent gold answer is right."""
    golds = items.golds
    always = score(0, golds, golds, items.tolerance).most_frequent_answer
    return [match(always, gold, items.tolerance) for gold in golds]


def _scores(items: Items, student: Asked, teacher: Asked) -> str:
    constant, result = sum(constantly_right(items)) / len(items.rows), teacher.result
    gain = Difference.of(teacher.right, student.right)
    return (
        f"On {len(items.rows)} {items.source} the teacher with its prompt is right in {_share(result)}, the student "
        f"with its own in {_share(student.result)} (difference {100 * gain.mean:+.1f} ± {100 * gain.error:.1f} "
        f"points), always answering {result.most_frequent_answer!r} in {constant:.1%}."
    )


def _share(result: ShotResult) -> str:
    return f"{result.accuracy:.1%} ± {result.standard_error:.1%}"


def _figures(items: Items, student: Asked, teacher: Asked) -> dict[str, Any]:
    constant = constantly_right(items)
    pairs = {"over_student": (teacher, student.right), "over_constant": (teacher, constant)}
    differences = {name: Difference.of(first.right, second) for name, (first, second) in pairs.items()}
    figures = {"items": len(items.rows), "source": items.source, "constant": sum(constant) / len(constant)}
    figures |= {"most_frequent_answer": teacher.result.most_frequent_answer}
    for name, asked in (("teacher", teacher), ("student", student)):
        figures[name] = {
            "accuracy": asked.result.accuracy,
            "standard_error": asked.result.standard_error,
            "top_answer": asked.result.top_answer,
            "top_answer_share": asked.result.top_answer_share,
        }
    return figures | {name: {"mean": one.mean, "standard_error": one.error} for name, one in differences.items()}
