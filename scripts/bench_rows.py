"""What the benchmarks of the objective share: random rows, and those who turn them into one number and its gradients.

Each of them is a function of `Inputs` that prepares what it may prepare once, and returns what is measured: forward
and backward. Nothing here measures, and nothing knows of models: rows are random numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from bench_measuring import peak_above_now, time_in_turns
from torch import Tensor
from torch.nn.functional import linear

from hfkd.objective import Objective
from hfkd.rows import DenseRows, Head
from hfkd.signal import TeacherSignal

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

BARE, KEPT = "bare matrix products", "bare matrix products, into buffers kept between runs"
BETAS = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}
"""The number by which TRL and Liger know a measure."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        rows: Supervised tokens N.
        hidden: Width H of both models.
        vocab: Ids V.
        trained_head: Whether the student's head gets a gradient.
        device: `cpu` or `cuda`.
        dtype: Name of the dtype of states and heads.
        spread: Standard deviation of the logits (nats).
    """

    rows: int
    hidden: int
    vocab: int
    trained_head: bool
    device: str
    dtype: str
    spread: float = 2.0

    def title(self) -> str:
        """Size and head in words."""
        size = f"N={self.rows}, H={self.hidden}, V={self.vocab}"
        return f"{size}, {'trained' if self.trained_head else 'frozen'} head"

    def tolerance(self) -> float:
        """The largest relative gap between two values of the same thing."""
        return 1e-4 if self.dtype == "float32" else 3e-2


@dataclass(frozen=True)
class Inputs:
    """Random rows and heads: `hidden` and `teacher_hidden` [N, H], `weight` and `teacher_weight` [V, H], `targets`
    [N].
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        """Draw them; the logits of both models are independent of each other."""
        generator = torch.Generator().manual_seed(0)
        dtype, place = getattr(torch, case.dtype), case.device

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(place, dtype)

        scale = case.spread * case.hidden**-0.5
        return cls(
            draw(case.rows, case.hidden).requires_grad_(),
            draw(case.vocab, case.hidden, scale=scale).requires_grad_(case.trained_head),
            draw(case.rows, case.hidden),
            draw(case.vocab, case.hidden, scale=scale),
            torch.randint(0, case.vocab, (case.rows,), generator=generator).to(place),
        )

    def forget(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None


Run = Callable[[], Tensor | None]
"""Forward and backward; returns the sum over the rows, detached."""

Prepare = Callable[[Inputs], Run]
"""Makes a run for some rows."""


def bare(inputs: Inputs) -> Run:
    """The four matrix products (three for a frozen head), written as anyone would; like all others here, they have to
    find memory for their results.
    """
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

    def run() -> None:
        student = hidden @ weight.T
        teacher = inputs.teacher_hidden @ inputs.teacher_weight.T
        results = [student, teacher, student @ weight]
        if inputs.weight.requires_grad:
            results.append(student.T @ hidden)

    return run


def bare_kept(inputs: Inputs) -> Run:
    """The same products into memory that is there already: the least that any of this can take."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    student = torch.full((len(hidden), len(weight)), 0.5, dtype=hidden.dtype, device=hidden.device)
    teacher, grad_hidden = student.clone(), hidden.clone()
    grad_weight = weight.clone() if inputs.weight.requires_grad else None

    def run() -> None:
        torch.mm(hidden, weight.T, out=student)
        torch.mm(inputs.teacher_hidden, inputs.teacher_weight.T, out=teacher)
        torch.mm(student, weight, out=grad_hidden)
        if grad_weight is not None:
            torch.mm(student.T, hidden, out=grad_weight)

    return run


def ours(terms: str | Sequence[Mapping[str, Any]], chunk_size: int | None = None) -> Prepare:
    """`hfkd.Objective`; the teacher's rows are given to it if a term asks for them, as the trainer does it."""

    def prepare(inputs: Inputs) -> Run:
        torch.manual_seed(0)  # losses with parameters draw the same ones each time
        objective = Objective(terms, chunk_size)
        for loss in objective.losses:
            loss.prepare(inputs.hidden.shape[1], len(inputs.weight))
        objective.to(inputs.hidden.device)
        teacher = TeacherSignal(DenseRows(inputs.teacher_hidden, Head(inputs.teacher_weight)))
        signal = teacher if objective.needs else None

        def run() -> Tensor:
            objective.zero_grad()
            total = objective(DenseRows(inputs.hidden, Head(inputs.weight)), signal, inputs.targets).total
            total.backward()
            return total.detach()

        return run

    return prepare


def trl_chunked(kind: str) -> Prepare:
    """TRL's chunked kernel (Triton on a GPU, torch on a CPU): recomputes both projections in backward."""

    def prepare(inputs: Inputs) -> Run:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        teacher = (inputs.teacher_hidden, inputs.teacher_weight, None)

        def run() -> Tensor:
            student = (inputs.hidden, inputs.weight, None)
            total = ChunkedDivergenceFunction.apply(*student, *teacher, BETAS[kind])[0].sum()
            total.backward()
            return total.detach()

        return run

    return prepare


def _on_logits(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], Run]:
    """What reads dense logits, the projections included."""

    def prepare(inputs: Inputs) -> Run:
        def run() -> Tensor:
            with torch.no_grad():
                teacher = linear(inputs.teacher_hidden, inputs.teacher_weight)
            total = measure(linear(inputs.hidden, inputs.weight), teacher)
            total.backward()
            return total.detach()

        return run

    return prepare


def trl_gkd(kind: str) -> Prepare:
    """TRL GKD's loss on dense logits; without labels, so no masked copy is made."""

    def measure(student: Tensor, teacher: Tensor) -> Tensor:
        from trl.experimental.gkd import GKDTrainer

        pair = student[None], teacher[None]
        return GKDTrainer.generalized_jsd_loss(*pair, beta=BETAS[kind], num_items_in_batch=1)

    return _on_logits(measure)


def trl_sdft(kind: str) -> Prepare:
    """TRL SDFT's loss over the whole vocabulary, apart from its trainer."""

    def measure(student: Tensor, teacher: Tensor) -> Tensor:
        from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

        return compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=BETAS[kind]).sum()

    return _on_logits(measure)


def liger(kind: str) -> Prepare:
    """Liger's fused linear divergence without its cross-entropy; compiled, as it is by default, on a GPU only."""

    def prepare(inputs: Inputs) -> Run:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # It divides by the number of rows. The weight undoes that without another pass over the gradients.
        weights = {"weight_hard_loss": 0.0, "weight_soft_loss": float(len(inputs.hidden))}
        loss = LigerFusedLinearJSDLoss(beta=BETAS[kind], compiled=inputs.hidden.is_cuda, **weights)
        teacher = (inputs.teacher_hidden, inputs.teacher_weight)

        def run() -> Tensor:
            total = loss(inputs.hidden, inputs.weight, *teacher, inputs.targets)
            total.backward()
            return total.detach()

        return run

    return prepare


def by_definition(kind: str) -> Prepare:
    """A divergence written out in float64 on dense logits; what the others are held against."""

    def divergence(first: Tensor, second: Tensor) -> Tensor:
        return (first.exp() * (first - second)).sum()

    def measure(student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (logits.double().log_softmax(-1) for logits in (student, teacher))
        if kind == "forward_kl":
            return divergence(theirs, ours)
        if kind == "reverse_kl":
            return divergence(ours, theirs)
        middle = ((ours.exp() + theirs.exp()) / 2).log()
        return (divergence(theirs, middle) + divergence(ours, middle)) / 2

    return _on_logits(measure)


def value_and_gradients(run: Run, inputs: Inputs) -> dict[str, Tensor]:
    """What a run says, by name."""
    inputs.forget()
    found = {"value": run(), "hidden gradient": inputs.hidden.grad, "head gradient": inputs.weight.grad}
    inputs.forget()
    return {what: one for what, one in found.items() if one is not None}


def largest_gap(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative gap, and what it is the gap of; one that is no number counts as the largest."""
    gaps = []
    for what, other in wanted.items():
        gap = float((found[what].double() - other.double()).norm() / other.double().norm())
        gaps.append((gap if gap == gap else float("inf"), what))
    return max(gaps)


def added_memory_of(prepare: Prepare, case: Case) -> int:
    """Bytes at the peak of one run above what was held before; to be called in a fresh process."""
    tiny = Inputs.of(replace(case, rows=4, hidden=16, vocab=64))
    prepare(tiny)()  # libraries and threads are loaded before anything is counted
    inputs = Inputs.of(case)
    return peak_above_now(lambda: prepare(inputs)(), case.device)


def with_fresh_gradients(inputs: Inputs, run: Run) -> Run:
    """A run that has no gradients of earlier runs to add to."""

    def fresh() -> Tensor | None:
        inputs.forget()
        return run()

    return fresh


def seconds_by_turns(prepares: Mapping[str, Prepare], case: Case, repeats: int) -> dict[str, list[float]]:
    """Seconds of each run on the same rows, by turns."""
    inputs = Inputs.of(case)
    runs = {name: with_fresh_gradients(inputs, prepare(inputs)) for name, prepare in prepares.items()}
    return time_in_turns(runs, repeats, case.device)
