"""Several teachers in the place of one: all of them mixed at each token, or each row taught by the one that it names.

What the trainer tells a teacher is passed on to all of them. It doesn't know what kind they are: any teacher that
gives hidden states with a head can be a member, each with its own weights, dtype and devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkd.batch import Batch, View
from hfkd.data.views import DistillationDataset
from hfkd.rows import DenseRows, RowLayout, head_size
from hfkd.sharding import is_sharded
from hfkd.signal import DISTRIBUTION, TeacherSignal
from hfkd.teacher_rows import MixtureRows, RoutedRows
from hfkd.teachers.base import Teacher


class SeveralTeachers(Teacher):
    """The part that a mixture and a routed teacher share: whatever is told to them is told to each member once.

    Args:
        teachers: The members by name. A teacher that has two names is told everything once.

    Raises:
        ValueError: No member, a name that is empty or has a dot, a member that is several teachers itself, reads
            another vocabulary or provides no distributions.
        TypeError: The members aren't given by name, or one is no `Teacher`.
    """

    kind = "several"
    """Stands in the run record."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        if not isinstance(teachers, Mapping):
            raise TypeError(
                f"{type(self).__name__} got teachers as a {type(teachers).__name__}; expected a mapping of names to "
                "teachers, such as {'large': teacher, 'small': other}."
            )
        self.teachers = dict(teachers)
        if not self.teachers:
            raise ValueError(f"{type(self).__name__} got no teachers; expected a mapping of names to teachers.")
        for name, teacher in self.teachers.items():
            _check_member(name, teacher)

    @property
    def needs_second_view(self) -> bool:
        """Whether none of the members can teach anything without another prompt."""
        return all(teacher.needs_second_view for teacher in self.teachers.values())

    @property
    def begins_as_student(self) -> bool:
        """Whether all members begin with the student's weights."""
        return all(teacher.begins_as_student for teacher in self.teachers.values())

    @property
    def writes(self) -> bool:
        """Whether there is one member alone and it can write: several can't write one answer."""
        members = list(self._each())
        return len(members) == 1 and members[0].writes

    @property
    def needs_adapter(self) -> bool:
        """Whether a member can't do without the student's adapter."""
        return any(teacher.needs_adapter for teacher in self.teachers.values())

    @property
    def drawn(self) -> bool:
        """Whether a member is known through drawn ids only."""
        return any(teacher.drawn for teacher in self.teachers.values())

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        """Prepare each member."""
        for teacher in self._each():
            teacher.prepare(accelerator, student)

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Hold each member's ids against the student's."""
        for teacher in self._each():
            teacher.check_vocabulary(tokenizer)

    def check_heads(self, check: Callable[[PreTrainedModel], None]) -> None:
        """Let each member's head be looked at."""
        for teacher in self._each():
            teacher.check_heads(check)

    def meet(self, dataset: DistillationDataset, training: bool = True) -> None:
        """Tell each member of the texts."""
        for teacher in self._each():
            teacher.meet(dataset, training)

    def weights(self) -> AbstractContextManager[PreTrainedModel]:
        """The only member's model.

        Raises:
            TypeError: There are several, and no model writes as all of them would.
        """
        members = list(self._each())
        if len(members) == 1:
            return members[0].weights()
        raise TypeError(
            f"{type(self).__name__} has the members {list(self.teachers)}, and several teachers can't write one "
            "answer. Use `answer: dataset` or `answer: student`."
        )

    def share_prefix(self, ids: Sequence[int]) -> None:
        """Tell each member of the tokens that all prompts begin with."""
        for teacher in self._each():
            teacher.share_prefix(ids)

    def drop_padding(self) -> None:
        """Tell each member to run without padding."""
        for teacher in self._each():
            teacher.drop_padding()

    def after_step(self, step: int) -> None:
        """Tell each member of a step."""
        for teacher in self._each():
            teacher.after_step(step)

    def after_epoch(self, epoch: float) -> None:
        """Tell each member of the end of an epoch."""
        for teacher in self._each():
            teacher.after_epoch(epoch)

    def describe(self) -> dict[str, Any]:
        """The members by name."""
        return {"kind": self.kind, "members": {name: teacher.describe() for name, teacher in self.teachers.items()}}

    def state_dict(self) -> dict[str, Tensor]:
        """The members' states, each key behind its member's name and a dot."""
        return {
            f"{name}.{key}": value for name, teacher in self._named() for key, value in teacher.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hand each member its own part.

        Raises:
            ValueError: There is a part of no member here, or none of one that has a state.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, rest = key.partition(".")
            parts.setdefault(name, {})[rest] = value
        members = dict(self._named())
        wanted = {name for name, teacher in members.items() if teacher.state_dict()}
        if not wanted <= parts.keys() <= members.keys():
            raise ValueError(
                f"The checkpoint holds the states of the teachers {sorted(parts)}, but of those here "
                f"{sorted(wanted)} have one (members: {list(members)}). Resume with the teachers, under the names, "
                "that the checkpoint was made with, or start anew."
            )
        for name, part in parts.items():
            members[name].load_state_dict(part)

    def _named(self) -> Iterator[tuple[str, Teacher]]:
        """The members, one that has several names under its first."""
        seen: set[int] = set()
        for name, teacher in self.teachers.items():
            if id(teacher) not in seen:
                seen.add(id(teacher))
                yield name, teacher

    def _each(self) -> Iterator[Teacher]:
        return (teacher for _, teacher in self._named())

    def _ask(self, name: str, batch: Batch, needs: frozenset[str]) -> DenseRows:
        """What a member says, refused if it is in a form that can't stand beside the others'."""
        rows = self.teachers[name].signal(batch, needs).rows
        if not isinstance(rows, DenseRows):
            raise ValueError(
                f"The teacher {name!r} ({type(self.teachers[name]).__name__}) gives {type(rows).__name__}; beside "
                "other teachers it must give hidden states with a head (DenseRows). Take a teacher that is a model "
                "in this process, or a cache that was made with `--codec hidden`."
            )
        if len(rows) != batch.teacher_view.tokens:
            raise ValueError(
                f"The teacher {name!r} ({type(self.teachers[name]).__name__}) gives {len(rows)} rows for "
                f"{batch.teacher_view.tokens} supervised tokens; expected one row each, see `Teacher.signal`."
            )
        return rows


class MixtureTeacher(SeveralTeachers):
    """The weighted mean of several teachers' distributions: `p = sum_i w_i p_i`, taken at temperature 1.

    Every member reads every batch, one after the other; their vocabularies may be padded to different sizes.

    Args:
        teachers: The members by name.
        weights: How much each counts, by its name, above 0; they are scaled to sum to 1. None counts all alike.

    Raises:
        ValueError: See `SeveralTeachers`; or a weight is missing, of no member, not finite or not above 0.
    """

    kind = "mixture"

    def __init__(self, teachers: Mapping[str, Teacher], weights: Mapping[str, float] | None = None) -> None:
        super().__init__(teachers)
        given = dict.fromkeys(self.teachers, 1.0) if weights is None else dict(weights)
        if given.keys() != self.teachers.keys():
            raise ValueError(
                f"The weights are those of {sorted(given)}, but the teachers are {sorted(self.teachers)}. Give each "
                "teacher one weight, or none at all, which counts all alike."
            )
        for name, weight in given.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(
                    f"The weight of the teacher {name!r} is {weight!r}; expected a finite number above 0. Leave out a "
                    "teacher that shall not count: it would be run for nothing."
                )
        total = sum(given.values())
        self.shares = {name: float(given[name] / total) for name in self.teachers}

    def signal(self, batch: Batch, needs: frozenset[str]) -> TeacherSignal:
        """Ask every member.

        Raises:
            ValueError: A member gives rows that can't be mixed.
        """
        members = tuple(self._ask(name, batch, needs) for name in self.teachers)
        return TeacherSignal(MixtureRows(members, tuple(self.shares.values())))

    def describe(self) -> dict[str, Any]:
        """The members by name, each with its share."""
        told = super().describe()
        told["members"] = {name: {**member, "share": self.shares[name]} for name, member in told["members"].items()}
        return told


class RoutedTeacher(SeveralTeachers):
    """Each row is taught by the one teacher that it names.

    A member reads the rows that name it and is not run on a batch without any, unless its weights are spread over the
    processes: then it reads one row, for the sake of the others, whose batches name other teachers.

    Args:
        teachers: The members by the names that stand in the column.
        column: The column of the rows that names the teacher.

    Raises:
        ValueError: See `SeveralTeachers`.
    """

    kind = "routed"

    def __init__(self, teachers: Mapping[str, Teacher], column: str = "teacher") -> None:
        super().__init__(teachers)
        self.column = column
        self._vocab_size: int | None = None

    @property
    def route(self) -> tuple[str, tuple[str, ...]]:
        """The column, and the names that it may hold, in the order that `Batch.route` counts them in."""
        return self.column, tuple(self.teachers)

    def meet(self, dataset: DistillationDataset, training: bool = True) -> None:
        """Make sure that the rows name these teachers.

        Raises:
            ValueError: The data set was made without names, or with others.
        """
        if dataset.route != self.route:
            raise ValueError(
                f"The teacher of each row is looked for in {self.route}, but the data set was made with "
                f"route={dataset.route}. Pass `route=teacher.route` to DistillationDataset."
            )
        super().meet(dataset, training)

    def signal(self, batch: Batch, needs: frozenset[str]) -> TeacherSignal:
        """Ask each member that has rows in the batch, and put what they say into the batch's order.

        Raises:
            ValueError: The batch doesn't say who teaches its rows, or a member gives rows that can't stand beside
                the others'.
        """
        numbers = self._numbers(batch)
        owner = self._owners(batch)
        member, place, members = torch.zeros_like(owner), torch.zeros_like(owner), []
        for number, name in enumerate(self.teachers):
            if number not in numbers:
                if numbers and _runs_together(self.teachers[name]):
                    self.teachers[name].signal(_part(batch, [0]), needs)
                continue
            rows = self._ask(name, _part(batch, [row for row, one in enumerate(numbers) if one == number]), needs)
            own = owner == number
            member = torch.where(own, len(members), member)
            place = torch.where(own, own.cumsum(dim=0) - 1, place)
            members.append(rows.first(self._shared_size(rows)))
        return TeacherSignal(RoutedRows(tuple(members), member, place))

    def describe(self) -> dict[str, Any]:
        """The column, and the members by name."""
        return {**super().describe(), "column": self.column}

    def _numbers(self, batch: Batch) -> list[int]:
        """The member of each row, checked."""
        if batch.route is None:
            raise ValueError(
                "The batch doesn't say which teacher its rows have (input `route`). Pass "
                f"`route={self.route}` to DistillationDataset, or return `route` from your own collator."
            )
        numbers, rows = batch.route.tolist(), batch.teacher_view.labels.shape[0]
        if len(numbers) != rows or not all(0 <= number < len(self.teachers) for number in numbers):
            raise ValueError(
                f"The batch's `route` is {numbers} for {rows} rows; expected for each row a number from 0 to "
                f"{len(self.teachers) - 1}, its teacher's place among {list(self.teachers)}."
            )
        return numbers

    @staticmethod
    def _owners(batch: Batch) -> Tensor:
        """[N] the member of each supervised token."""
        labels = batch.teacher_view.labels
        return batch.route.to(labels.device)[RowLayout.of(labels).sequence]

    def _shared_size(self, rows: DenseRows) -> int:
        """The ids that all members score, whoever has rows in a batch: a row's loss must not depend on its
        neighbours. Of a member without a model, and without `vocab_size`, that is known of its own rows alone.
        """
        if self._vocab_size is None:
            known = [size for teacher in self._each() if (size := _vocab_size(teacher)) is not None]
            self._vocab_size = min(known, default=rows.vocab_size)
        self._vocab_size = min(self._vocab_size, rows.vocab_size)
        return self._vocab_size


def _check_member(name: str, teacher: Any) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"A teacher is named {name!r}; expected a text without a dot.")
    if not isinstance(teacher, Teacher):
        raise TypeError(
            f"The teacher {name!r} is a {type(teacher).__name__}; expected a Teacher. Wrap a model or its name in "
            "LocalTeacher."
        )
    if isinstance(teacher, SeveralTeachers):
        raise ValueError(
            f"The teacher {name!r} is a {type(teacher).__name__}; expected a single one. Put its members beside the "
            "others."
        )
    if teacher.other_vocabulary:
        raise ValueError(
            f"The teacher {name!r} ({type(teacher).__name__}) has another vocabulary than the student, so its "
            "distributions can't stand beside the others'. Use it alone, or take a teacher of the student's family."
        )
    if DISTRIBUTION not in teacher.provides:
        raise ValueError(
            f"The teacher {name!r} ({type(teacher).__name__}) provides {sorted(teacher.provides)}; several teachers "
            f"together need its {DISTRIBUTION}."
        )


def _vocab_size(teacher: Teacher) -> int | None:
    """The number of ids that a teacher scores, without running it; None where it has no model to read it off."""
    if (known := getattr(teacher, "vocab_size", None)) is not None:
        return int(known)
    if type(teacher).weights is Teacher.weights:
        return None
    with teacher.weights() as model:
        return head_size(model)


def _runs_together(teacher: Teacher) -> bool:
    """Whether all processes must run the teacher's model when one does."""
    if PartialState().num_processes == 1 or not teacher.writes:
        return False
    with teacher.weights() as model:
        return is_sharded(model)


def _part(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, as a teacher reads them, without the columns that none of them uses."""
    if len(rows) == batch.teacher_view.labels.shape[0]:
        return batch
    which = torch.tensor(rows, device=batch.teacher_view.labels.device)
    teacher = None if batch.teacher is None else _rows_of(batch.teacher, which)
    route = batch.route.to(which.device)[which]
    return replace(batch, student=_rows_of(batch.student, which), teacher=teacher, token_weights=None, route=route)


def _rows_of(view: View, which: Tensor) -> View:
    mask = view.attention_mask[which]
    used = mask.any(dim=0).nonzero()[:, 0].tolist()
    columns = slice(used[0], used[-1] + 1) if used else slice(None)
    return View(view.input_ids[which][:, columns], mask[:, columns], view.labels[which][:, columns])
