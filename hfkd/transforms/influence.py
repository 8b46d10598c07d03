"""How much each training row helps on clean ones: its gradient held against theirs, before training.

A row whose gradient points where the clean rows' gradient points is counted more, one that points elsewhere less.
Knows the student and its loss; it doesn't know how the rows are trained on afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfkd.batch import Batch
from hfkd.data.collate import DistillationCollator
from hfkd.data.load import Source, load_rows
from hfkd.data.select import visited
from hfkd.data.sources import SUFFIXES
from hfkd.data.views import DistillationDataset
from hfkd.objective import Objective, build_objective
from hfkd.packing import run_view
from hfkd.rows import DenseRows, Head, RowLayout, input_device, supervised
from hfkd.sharding import is_sharded
from hfkd.signal import DISTRIBUTION
from hfkd.teachers import Teacher, evaluating
from hfkd.transforms.base import Row, RowTransform, Workshop
from hfkd.transforms.figures import row_figures, weights_digest

_TEXT = "cross_entropy"


class InfluenceWeights(RowTransform):
    """Weighs rows by the cosine between their gradient and that of a clean set.

    Formula:
        w_i = clip(1 + strength * <g_clean, g_i> / (|g_clean| |g_i|), 0, highest), g the gradient of the mean loss of
        a token with respect to the parameters that learn (the adapter, where there is one), dropout off. `centered`
        takes the rows' mean cosine from each.
    Args:
        strength: How far the cosine moves a weight from 1, >= 0; 0 writes no weights.
        drop: The share of the rows with the lowest cosines that is left out, from 0 to below 1.
        highest: The largest weight, >= 1.
        loss: Whose gradient a training row has: `cross_entropy` of its text, or another term's key, `forward_kl` say,
            which asks the teacher. A clean row's is always that of its text.
        path: A file of clean rows. Without one they are those that the evaluation holds out: what is measured on them
            afterwards is then no longer measured on rows that played no part.
        clean: How many clean rows are read, >= 1, chosen by the seed; all where there are fewer.
        projection: Numbers that a gradient is summed up in, by chance; a cosine then errs by about
            1 / sqrt(projection). None is exact: it keeps one whole gradient in memory, little for an adapter.
        centered: Whether a row is held against the other rows instead of against nothing. An untrained student's rows
            all point the same way at first (how to answer at all), so that without it the weights are mostly one
            factor above 1 on all rows alike; with it their mean is about 1.
        max_length: In tokens; longer rows keep the weight 1, and longer clean rows aren't read.

    Raises:
        ValueError: A setting is out of its range, nothing would be done, or there is no such loss.

    Paper:
        After KD-AIF ("Knowledge Distillation with Adapted Weight", 2025, https://arxiv.org/abs/2501.02705), where
        influence functions weigh samples again and again in training. The inverse Hessian is left out here: this is
        the dot product of gradients of TracIn (Pruthi et al., 2020, https://arxiv.org/abs/2002.08484) at one point,
        the student before its first step, and as a cosine, so that short and hard rows aren't favoured.
    """

    writes = ("token_weights",)

    def __init__(
        self,
        strength: float = 1.0,
        drop: float = 0.0,
        highest: float = 2.0,
        loss: str = _TEXT,
        path: str | None = None,
        clean: int = 32,
        projection: int | None = None,
        centered: bool = False,
        max_length: int = 2048,
    ) -> None:
        _check("strength", strength, 0, "a number of 0 or more")
        _check("highest", highest, 1, "the largest weight, 1 or more")
        if not _is_number(drop) or not 0 <= drop < 1:
            raise ValueError(f"drop is {drop!r}; expected the share of the rows that is left out, from 0 to below 1.")
        if strength == 0 and drop == 0:
            raise ValueError("strength and drop are both 0, so nothing would change; raise one, or leave this out.")
        for name, value in (("clean", clean), ("projection", 1 if projection is None else projection)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1.")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
            raise ValueError(f"max_length is {max_length!r}; expected a number of tokens, at least 2.")
        if path is not None and _is_missing(path):
            raise ValueError(f"path is {path!r}, and there is no such file; expected a file of clean rows.")
        self.strength, self.drop, self.highest, self.loss = float(strength), float(drop), float(highest), loss
        self.path, self.clean, self.projection, self.centered = path, clean, projection, bool(centered)
        self.max_length = max_length
        needs = build_objective(loss).needs
        if needs - {DISTRIBUTION}:
            raise ValueError(f"loss is {loss!r}, which reads hidden states; expected one that reads distributions.")
        self.needs_teacher = bool(needs)
        self.writes = ("token_weights",) if strength else ()
        self._told: dict[str, Any] = {}

    def apply(self, rows: Sequence[Row], workshop: Workshop) -> list[Row]:
        """Take a gradient of each row and of each clean one.

        Raises:
            ValueError: There is no clean row, no parameter learns, or the models can't be asked here.
        """
        reader = _Reader(workshop, self.loss, self.max_length)
        clean = self._clean_rows(workshop)
        views = reader.views(rows, reader.objective.needs)
        cosines = np.zeros(len(rows))
        decided = {"rows": list(rows), "clean": clean, "settings": [self.loss, self.projection, workshop.seed]}
        decided |= {"prompts": [views.student_prompts, views.teacher_prompts], "weights": reader.digests()}
        workshop.say(f"influence: the gradients of {len(views)} rows, held against those of {len(clean)} clean ones.")
        sketch = _Sketch(self.projection, workshop.seed)
        found = row_figures(len(views), 1, reader.cosine_of(views, clean, sketch), workshop, "influence", decided)
        cosines[views.kept] = found[:, 0]
        moved = np.zeros(len(rows))
        moved[views.kept] = found[:, 0] - (found.mean() if self.centered else 0)
        weights = np.clip(1 + self.strength * moved, 0, self.highest)
        kept = self._kept(cosines, views.kept)
        self._tell(cosines[views.kept], weights[kept], len(rows), len(clean))
        if not self.strength:
            return [rows[place] for place in kept]
        return [_weighted(rows[place], float(weights[place])) for place in kept]

    def describe(self) -> dict[str, Any]:
        """How many rows were measured and dropped, and what the cosines and the weights were."""
        return dict(self._told)

    def _clean_rows(self, workshop: Workshop) -> list[Row]:
        found = workshop.held_out if self.path is None else load_rows(Source(path=self.path))
        if not len(found):
            raise ValueError(
                "influence: there is no clean row to hold gradients against; give path a file of rows that are known "
                "to be right, or the recipe an evaluation section, whose held-out rows are read"
            )
        return visited(found, self.clean, workshop.seed)

    def _kept(self, cosines: np.ndarray, measured: Sequence[int]) -> list[int]:
        lowest = sorted(measured, key=cosines.__getitem__)[: int(self.drop * len(measured))]
        return sorted(set(range(len(cosines))) - set(lowest))

    def _tell(self, cosines: np.ndarray, weights: np.ndarray, rows: int, clean: int) -> None:
        spread = {"cosine": cosines} | ({"weight": weights} if self.strength else {})
        self._told = {"rows": rows, "measured": len(cosines), "clean": clean}
        for name, values in spread.items():
            self._told[name] = {each: float(getattr(values, each)()) for each in ("min", "mean", "max")}
        if self.strength and not weights.any():
            raise ValueError(
                f"influence: all {len(weights)} weights are 0, so nothing would be learned; lower strength, or look "
                "at the clean rows: every training row points away from them"
            )


class _Reader:
    """Student, teacher and loss, asked for gradients of single rows."""

    def __init__(self, workshop: Workshop, loss: str, max_length: int) -> None:
        self.student, self.teacher, self.builder = workshop.student, workshop.teacher, workshop.builder
        self.demonstrations, self.max_length = workshop.demonstrations, max_length
        self.objective, self.of_text = build_objective(loss), build_objective(_TEXT)
        self._check(loss)
        self.learned = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        if not self.learned:
            raise ValueError("influence: no parameter of the student learns, so there is no gradient to look at")
        self.collator = DistillationCollator(self.builder.tokenizer.pad_token_id)
        for objective in (self.objective, self.of_text):
            objective.prepare(self.student)

    def _check(self, loss: str) -> None:
        if self.student is None:
            raise ValueError("influence: takes gradients of the student, and there is none here")
        if is_sharded(self.student):
            raise ValueError("influence: the student's weights are in shards; take the rows' weights on one process")
        if self.objective.needs and (self.teacher is None or self.teacher.other_vocabulary):
            raise ValueError(
                f"influence: loss is {loss!r}, which asks a teacher with the student's tokenizer, and there is none; "
                f"set loss to {_TEXT}"
            )

    def views(self, rows: Sequence[Row], needs: frozenset[str], name: str = "training") -> DistillationDataset:
        """The rows that aren't too long, as the student reads them without demonstrations."""
        return DistillationDataset(
            rows,
            self.builder,
            demonstrations=self.demonstrations if needs else (),
            teacher_view=bool(needs),
            max_length=self.max_length,
            too_long="drop",
            route=self.teacher.route if needs else None,
            name=name,
        )

    def digests(self) -> list[str]:
        """What tells these models from others."""
        found = [weights_digest(self.student)]
        if self.objective.needs:
            found.append(str(self.teacher.describe()))
            if self.teacher.writes:
                with self.teacher.weights() as model:
                    found.append(weights_digest(model))
        return found

    def cosine_of(
        self, views: DistillationDataset, clean: Sequence[Row], sketch: _Sketch
    ) -> Callable[[int], list[float]]:
        """A function of the number of a view; the clean gradient is taken when it is first called."""
        texts: list[Tensor] = []

        def cosine(number: int) -> list[float]:
            if not texts:
                texts.append(self._clean_gradient(clean, sketch))
            ours = sketch(self.gradient(views, number, self.objective, self.teacher)[0])
            size = float(ours.norm() * texts[0].norm())
            # A row that is already known to the last bit has no gradient, and says nothing for or against itself.
            return [float(ours @ texts[0]) / size if size else 0.0]

        return cosine

    def _clean_gradient(self, clean: Sequence[Row], sketch: _Sketch) -> Tensor:
        views, total = self.views(clean, frozenset(), "clean"), None
        for number in range(len(views)):
            gradient, tokens = self.gradient(views, number, self.of_text, None)
            share = sketch(gradient) * tokens  # as one mean over all tokens
            total = share if total is None else total + share
        if not bool(torch.isfinite(total).all()) or not bool(total.any()):
            raise ValueError(
                "influence: the gradient of the clean rows is 0 or not finite, so nothing can be held against it; "
                "give other clean rows, or load the student in float32"
            )
        return total

    def gradient(
        self, views: DistillationDataset, number: int, objective: Objective, teacher: Teacher | None
    ) -> tuple[Sequence[Tensor], int]:
        """Of the mean loss of a row's tokens, for each parameter that learns; and the number of tokens."""
        student = self.student
        inputs = self.collator([views[number]])
        batch = Batch.from_inputs({name: value.to(input_device(student)) for name, value in inputs.items()})
        signal = teacher.signal(batch, objective.needs) if objective.needs else None
        with evaluating(student), torch.enable_grad():
            hidden, labels = run_view(student, batch.student)
            said = DenseRows(supervised(hidden, labels), Head.of(student))
            total = objective(said, signal, batch.student.targets, None, RowLayout.of(batch.student.labels)).total
            asked = {"allow_unused": True, "materialize_grads": True}
            found = torch.autograd.grad(total / batch.student.tokens, self.learned, **asked)
        return found, batch.student.tokens


class _Sketch:
    """A gradient as one vector: laid end to end, or summed up in fewer numbers.

    Each coordinate is added to one number or taken from it, both by chance and the same for every gradient, so that a
    product of two sketches is on average the product of the gradients.
    """

    def __init__(self, size: int | None, seed: int) -> None:
        self.size, self.seed = size, seed
        self._places: dict[int, Tensor] = {}

    def __call__(self, gradient: Sequence[Tensor]) -> Tensor:
        """Return [size], or [P] where nothing is summed up; float32."""
        parts = [part.flatten().float() for part in gradient]
        if self.size is None:
            return torch.cat(parts)
        signed = parts[0].new_zeros(2 * self.size)  # added ones at even places, those to be taken away at odd ones
        for number, part in enumerate(parts):
            signed.index_add_(0, self._drawn(number, part), part)
        return signed[0::2] - signed[1::2]

    def _drawn(self, number: int, part: Tensor) -> Tensor:
        if number not in self._places:
            draws = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            drawn = torch.randint(2 * self.size, (part.numel(),), generator=draws, dtype=torch.int32)
            self._places[number] = drawn.to(part.device)
        return self._places[number]


def _weighted(row: Row, weight: float) -> Row:
    """A copy with the weight, which multiplies weights that the row brings."""
    before = row.get("token_weights")
    if before is None:
        return {**row, "token_weights": weight}
    if isinstance(before, Real):
        return {**row, "token_weights": float(before) * weight}
    return {**row, "token_weights": [float(one) * weight for one in before]}


def _is_missing(path: str) -> bool:
    """Whether it is surely a file, by its ending, and isn't there; a hub's id may have a dot, too."""
    elsewhere = "://" in path or path.startswith("reasoning_gym:")
    return not elsewhere and Path(path).suffix.lower() in SUFFIXES and not Path(path).expanduser().exists()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: Any, least: float, expected: str) -> None:
    if not _is_number(value) or value < least:
        raise ValueError(f"{name} is {value!r}; expected {expected}.")
