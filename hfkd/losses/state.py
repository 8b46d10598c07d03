"""What a loss on hidden states is: a measure between a student's and a teacher's vectors of the same tokens, over some
pairs of layers. Which layer stands beside which, the projection where widths differ, and the precision are dealt with
here; a new measure is one class with one method.

States are numbered as in `hfkd.states`. A loss knows no model, prompt or tokenizer.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hfkd.losses.base import recipe_key, recipe_kind
from hfkd.rows import Head, RowLayout
from hfkd.signal import STATES

Layers = Literal["uniform", "last"] | Sequence[Sequence[int]]
"""A rule, or [student layer, teacher layer] pairs."""

_SMALLEST = 1e-12
"""A vector that is shorter has no direction."""


@dataclass(frozen=True)
class StateRows:
    """The hidden states of N supervised tokens.

    Args:
        student: [N, H] by layer, with a gradient.
        teacher: [N, H] by layer, without one; the widths of the two sides may differ.
        layout: Where the rows come from.
        targets: [N] the ids that the tokens really have.
        teacher_head: The teacher's output head, where there is a whole one.
    """

    student: Mapping[int, Tensor]
    teacher: Mapping[int, Tensor]
    layout: RowLayout
    targets: Tensor
    teacher_head: Head | None = None

    def __len__(self) -> int:
        return self.targets.shape[0]


class StateLoss(nn.Module, ABC):
    """A cost of each supervised token's hidden states, neither divided nor masked. Its unit is not the nat.

    Args:
        layers: Which student layer is compared with which teacher layer. `uniform`: each block's output with the one
            at the same relative depth. `last`: the two states below the output heads. Or a list of [student layer,
            teacher layer] pairs, numbered from 0 (embeddings) to the number of blocks.
        project: Whether the student's states pass a learned matrix first, one a pair, which is trained with the
            student and is no part of it. None: only where the widths differ and the measure needs equal ones.
    """

    key: ClassVar[str]
    """The name in recipes and logs: the class name in snake case."""

    needs: ClassVar[frozenset[str]] = frozenset({STATES})
    """What it asks a teacher for (see `hfkd.signal`)."""

    may_stand_alone: bool = False
    """Whether it makes sense as the only term of an objective."""

    why_not_alone: ClassVar[str] = (
        "what lies above the last layer that it reads, the head above all, learns nothing from it."
    )
    """The reason, for the error message, where it doesn't."""

    fits_text: ClassVar[bool] = False
    """As for losses on tokens (`TokenLoss`): it doesn't learn the text itself."""

    compares_vectors: ClassVar[bool] = True
    """Whether student and teacher vectors must have the same width."""

    @property
    def learns_text(self) -> bool:
        """As for losses on tokens."""
        return self.fits_text or not self.needs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.key = recipe_key(cls.__name__)

    def __init__(self, layers: Layers = "uniform", project: bool | None = None) -> None:
        super().__init__()
        cls = type(self)
        if cls.between is StateLoss.between and cls.compare is StateLoss.compare:
            raise TypeError(
                f"{cls.__name__} measures nothing yet: write its method `between(student, teacher) -> [n]`."
            )
        self.layers = _as_layers(layers, self.key)
        self.project = project
        self.pairs: list[tuple[int, int]] = []
        self.projectors = nn.ModuleList()
        self._sizes: tuple[int, int, int, int] | None = None

    def prepare(self, student_layers: int, teacher_layers: int, student_width: int, teacher_width: int) -> None:
        """Settle the pairs of layers and make the projections; called before training. A second call with the same
        sizes changes nothing.

        Args:
            student_layers: Number of the student's blocks.
            teacher_layers: Number of the teacher's.
            student_width: Size of the student's hidden states.
            teacher_width: Size of the teacher's.

        Raises:
            ValueError: A layer is out of range, or the widths differ and a projection was ruled out.
        """
        sizes = (student_layers, teacher_layers, student_width, teacher_width)
        if sizes == self._sizes:
            return
        differ = student_width != teacher_width and self.compares_vectors
        if differ and self.project is False:
            raise ValueError(
                f"{self.key}: the student's states have {student_width} dimensions and the teacher's {teacher_width}, "
                "and `project: false` rules a projection out. Leave `project` out, or take `relation`, which "
                "compares tokens with each other and needs none."
            )
        pairs = self._resolve(student_layers, teacher_layers)
        made = nn.ModuleList()
        if differ or self.project:
            generator = torch.Generator().manual_seed(torch.initial_seed())  # the same on all processes of a run
            made.extend(_projector(student_width, teacher_width, generator) for _ in pairs)
        self.pairs, self.projectors, self._sizes = pairs, made, sizes

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Measure each row. The one method to write.

        Args:
            student: [n, D] float32, projected if need be, with a gradient.
            teacher: [n, D] float32, without one; its own width where the measure doesn't compare vectors.

        Returns:
            [n].
        """
        raise NotImplementedError(f"{type(self).__name__} has no measure of two vectors alone.")

    def compare(self, student: Tensor, teacher: Tensor, states: StateRows) -> Tensor:
        """Return [N], the cost at one pair of layers; override it where the two vectors don't say enough."""
        return self.between(student, teacher)

    def forward(self, states: StateRows) -> Tensor:
        """Return [N], each token's cost: the mean over the pairs of layers.

        Raises:
            RuntimeError: It wasn't prepared.
            ValueError: The states of a layer are missing or don't fit.
        """
        if not self.pairs:
            raise RuntimeError(f"{self.key} doesn't know its layers yet: call `prepare` first (the trainer does).")
        with torch.autocast(states.targets.device.type, enabled=False):
            total: Tensor | None = None
            for place, pair in enumerate(self.pairs):
                student, teacher = self._vectors(states, *pair)
                if self.projectors:
                    student = nn.functional.linear(student, self.projectors[place].weight.to(student.dtype))
                values = self.compare(student, teacher, states)
                total = values if total is None else total + values
            return total / len(self.pairs)

    def settings(self) -> dict[str, Any]:
        """The layers and the projection."""
        return {"layers": self.layers, "project": self.project}

    def describe(self) -> dict[str, Any]:
        """The recipe form: `kind` (package.module:Class for a loss from elsewhere) and the settings."""
        return {"kind": recipe_kind(type(self)), **self.settings()}

    def _resolve(self, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
        if self.layers == "last":
            return [(student_layers, teacher_layers)]
        if self.layers == "uniform":
            depths = range(1, student_layers + 1)
            # Halves go up, and never to the embeddings.
            nearest = ((2 * depth * teacher_layers + student_layers) // (2 * student_layers) for depth in depths)
            return [(depth, max(1, layer)) for depth, layer in zip(depths, nearest, strict=True)]
        pairs = [(student, teacher) for student, teacher in self.layers]
        for student, teacher in pairs:
            if student > student_layers or teacher > teacher_layers:
                raise ValueError(
                    f"{self.key}: the pair {[student, teacher]} names a layer that isn't there; the student has the "
                    f"layers 0 to {student_layers}, the teacher 0 to {teacher_layers}. Change `layers`, or take "
                    "`uniform` or `last`."
                )
        return pairs

    def _vectors(self, states: StateRows, student_layer: int, teacher_layer: int) -> tuple[Tensor, Tensor]:
        _, _, student_width, teacher_width = self._sizes
        sides = (
            ("student", states.student, student_layer, student_width),
            ("teacher", states.teacher, teacher_layer, teacher_width),
        )
        found = []
        for side, given, layer, width in sides:
            vectors = given.get(layer)
            if vectors is None or vectors.shape != (len(states), width):
                got = "none" if vectors is None else f"the shape {tuple(vectors.shape)}"
                raise ValueError(
                    f"{self.key}: expected the {side}'s states of layer {layer} with the shape "
                    f"{(len(states), width)}, got {got}. It was prepared for other sizes, or this layer of the model "
                    "is wider or narrower than its configuration says: choose other `layers`."
                )
            found.append(vectors if vectors.dtype == torch.float64 else vectors.float())
        student, teacher = found
        return student, teacher.detach().to(student)


def unit(vectors: Tensor) -> Tensor:
    """Divide each vector by its length; one without a direction becomes 0 and gets no gradient.

    Args:
        vectors: [n, D].

    Returns:
        [n, D] of length 1 or 0.
    """
    length = vectors.norm(dim=-1, keepdim=True)
    known = length > _SMALLEST
    return vectors / length.where(known, 1.0) * known


def _projector(student_width: int, teacher_width: int, generator: torch.Generator) -> nn.Linear:
    """A matrix that keeps the lengths of vectors about as they are."""
    with torch.device("cpu"):
        made = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False, dtype=torch.float32)
    with torch.no_grad():
        made.weight.normal_(0.0, teacher_width**-0.5, generator=generator)
    return made


def _as_layers(layers: Layers, key: str) -> str | list[list[int]]:
    if layers in ("uniform", "last"):
        return layers
    pairs = [] if isinstance(layers, str) or not isinstance(layers, Sequence) else list(layers)
    if not pairs or not all(_is_pair(pair) for pair in pairs):
        raise ValueError(
            f"{key}: layers is {layers!r}; expected `uniform`, `last`, or a list of [student layer, teacher layer] "
            "pairs such as [[6, 12], [12, 24]], numbered from 0 (embeddings)."
        )
    made = [[int(student), int(teacher)] for student, teacher in pairs]
    if twice := [pair for place, pair in enumerate(made) if pair in made[:place]]:
        raise ValueError(
            f"{key}: layers names the pair {twice[0]} twice. Name each pair once; raise `weight` instead."
        )
    return made


def _is_pair(pair: Any) -> bool:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in pair)
