"""What an objective costs, measured side by side in one run: `python scripts/bench_objective.py`.

Compared are the bare matrix products that no dense objective can do without, ours, and two of TRL's: the chunked
divergence kernel and the dense loss of GKD. All are given the same rows, their values and gradients are compared on a
few rows before anything is timed, the timed runs take turns (A B C A B C), and added memory is the peak of a fresh
process above what it held before. It knows nothing of models: rows are random numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from bench_measuring import (
    in_fresh_process,
    load,
    package_version,
    peak_above_now,
    print_lines,
    print_table,
    print_targets,
    setting,
    span,
    time_in_turns,
)
from torch import Tensor
from torch.nn.functional import linear

from hfkd.objective import Objective
from hfkd.rows import DenseRows, Head
from hfkd.signal import TeacherSignal

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

BARE, KEPT = "bare matrix products", "bare matrix products, into buffers kept between runs"
FORWARD, REVERSE = "hfkd forward_kl", "hfkd reverse_kl"
CHUNKED, DENSE = "TRL ChunkedDivergenceFunction, forward KL", "TRL GKD generalized_jsd_loss, forward KL"
NEEDED = ("hfkd.objective", "trl.kernels.chunked_divergence", "trl.experimental.gkd")
TARGETS = (
    ("time", FORWARD, BARE, 1.15),
    ("time", FORWARD, CHUNKED, 0.5),
    ("memory", FORWARD, DENSE, 0.25),
)
"""What is measured, of whom, against whom, and the highest ratio wanted."""


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
    """

    rows: int
    hidden: int
    vocab: int
    trained_head: bool
    device: str
    dtype: str

    def title(self) -> str:
        """Size and head in words."""
        size = f"N={self.rows}, H={self.hidden}, V={self.vocab}"
        return f"{size}, {'trained' if self.trained_head else 'frozen'} head"


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
        """Draw them; logits have a standard deviation of about 2 nats."""
        generator = torch.Generator().manual_seed(0)
        dtype, place = getattr(torch, case.dtype), case.device

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(place, dtype)

        scale = 2.0 * case.hidden**-0.5
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


def ours(kind: str) -> Callable[[Inputs], Run]:
    """`hfkd.Objective` of one term."""

    def prepare(inputs: Inputs) -> Run:
        objective = Objective(kind)
        teacher = TeacherSignal(DenseRows(inputs.teacher_hidden, Head(inputs.teacher_weight)))

        def run() -> Tensor:
            total = objective(DenseRows(inputs.hidden, Head(inputs.weight)), teacher, inputs.targets).total
            total.backward()
            return total.detach()

        return run

    return prepare


def trl_chunked(inputs: Inputs) -> Run:
    """TRL's chunked kernel: recomputes both projections in backward."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run() -> Tensor:
        student, teacher = (inputs.hidden, inputs.weight, None), (inputs.teacher_hidden, inputs.teacher_weight, None)
        total = ChunkedDivergenceFunction.apply(*student, *teacher, 0.0)[0].sum()
        total.backward()
        return total.detach()

    return run


def trl_dense(inputs: Inputs) -> Run:
    """TRL GKD's loss on dense logits, the projections included; without labels, so no masked copy is made."""
    from trl.experimental.gkd import GKDTrainer

    def run() -> Tensor:
        with torch.no_grad():
            teacher = linear(inputs.teacher_hidden, inputs.teacher_weight)
        student = linear(inputs.hidden, inputs.weight)
        total = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=0, num_items_in_batch=1)
        total.backward()
        return total.detach()

    return run


def by_definition(direction: str) -> Callable[[Inputs], Run]:
    """The divergence written out on dense logits in float32; what the others are held against."""

    def prepare(inputs: Inputs) -> Run:
        def run() -> Tensor:
            student = linear(inputs.hidden, inputs.weight).float().log_softmax(-1)
            teacher = linear(inputs.teacher_hidden, inputs.teacher_weight).float().log_softmax(-1)
            first, second = (teacher, student) if direction == "forward" else (student, teacher)
            total = (first.exp() * (first - second)).sum()
            total.backward()
            return total.detach()

        return run

    return prepare


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Run]] = {
    BARE: bare,
    KEPT: bare_kept,
    FORWARD: ours("forward_kl"),
    REVERSE: ours("reverse_kl"),
    CHUNKED: trl_chunked,
    DENSE: trl_dense,
}


def check_values(case: Case, names: Sequence[str], rows: int = 64) -> None:
    """Compare values and gradients with the definition, on a few rows of the case's width; this warms up, too.

    Raises:
        SystemExit: One of them differs.
    """
    inputs = Inputs.of(replace(case, rows=min(case.rows, rows)))
    tolerance = 1e-4 if case.dtype == "float32" else 3e-2
    for name in names:
        found = _value_and_gradients(IMPLEMENTATIONS[name](inputs), inputs)
        if name in (BARE, KEPT):
            continue
        direction = "reverse" if name == REVERSE else "forward"
        wanted = _value_and_gradients(by_definition(direction)(inputs), inputs)
        for what, one, other in zip(("value", "hidden gradient", "head gradient"), found, wanted, strict=False):
            gap = float((one.float() - other.float()).norm() / other.float().norm())
            if not gap <= tolerance:
                raise SystemExit(f"{case.title()}: the {what} of {name!r} is off by {gap:.2g} (allowed {tolerance}).")


def _value_and_gradients(run: Run, inputs: Inputs) -> list[Tensor]:
    inputs.forget()
    value = run()
    found = [one for one in (value, inputs.hidden.grad, inputs.weight.grad) if one is not None]
    inputs.forget()
    return found


def added_memory(name: str, case: Case) -> int:
    """Bytes at the peak of one run above what was held before; to be called in a fresh process."""
    tiny = Inputs.of(replace(case, rows=4, hidden=16, vocab=64))
    IMPLEMENTATIONS[name](tiny)()  # libraries and threads are loaded before anything is counted
    inputs = Inputs.of(case)
    return peak_above_now(lambda: IMPLEMENTATIONS[name](inputs)(), case.device)


def measure(case: Case, names: Sequence[str], repeats: int) -> dict[str, dict[str, object]]:
    """Check, time and weigh the implementations of one case."""
    check_values(case, names)
    seconds = _seconds(case, names, repeats)
    gc.collect()
    return {
        name: {
            "seconds": seconds[name],
            "time": statistics.median(seconds[name]),
            "memory": in_fresh_process(added_memory, name, case, preload=NEEDED),
        }
        for name in names
    }


def _seconds(case: Case, names: Sequence[str], repeats: int) -> dict[str, list[float]]:
    inputs = Inputs.of(case)

    def with_fresh_gradients(run: Run) -> Run:
        def fresh() -> Tensor | None:
            inputs.forget()
            return run()

        return fresh

    runs = {name: with_fresh_gradients(IMPLEMENTATIONS[name](inputs)) for name in names}
    return time_in_turns(runs, repeats, case.device)


def tabulate(case: Case, results: dict[str, dict]) -> None:
    """Print one case."""
    rows, dense = [], results.get(DENSE, {}).get("memory")
    for name in IMPLEMENTATIONS:
        if name not in results:
            rows.append((name, "trl isn't installed", "", "", "", ""))
            continue
        found = results[name]
        to_bare, to_dense = found["time"] / results[BARE]["time"], found["memory"] / dense if dense else float("nan")
        figures = (f"{found['time']:.3g}", span(found["seconds"]), f"{to_bare:.2f}")
        rows.append((name, *figures, f"{found['memory'] / 1e6:,.0f} MB", f"{to_dense:.2f}"))
    print_table(case.title(), ("what", "seconds (median)", "least to most", "x bare", "added memory", "x GKD"), rows)


def judge(results: dict[str, dict]) -> list[dict[str, object]]:
    """Hold the results against the targets."""
    verdicts = []
    for what, name, other, limit in TARGETS:
        if name in results and other in results and results[other][what]:
            ratio = results[name][what] / results[other][what]
            words = f"{what} of {name}: {ratio:.2f} x {other}, wanted at most {limit}"
            verdicts.append({"ratio": ratio, "limit": limit, "met": ratio <= limit, "words": words})
    return verdicts


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1024x576x49152", "1024x896x65536"], help="NxHxV, one or more")
    parser.add_argument("--heads", nargs="+", default=["trained", "frozen"], choices=["trained", "frozen"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, help="of torch; one is the steadier measure on a busy machine")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure all sizes and print the tables."""
    options = _arguments(words)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the fresh processes
        torch.set_num_threads(options.threads)
    names = [name for name in IMPLEMENTATIONS if "TRL" not in name or package_version("trl")]
    print_lines(f"{setting(options.device)}; {options.dtype}; {options.repeats} runs each, by turns", load())
    report = []
    for size in options.sizes:
        rows, hidden, vocab = (int(number) for number in size.split("x"))
        for head in options.heads:
            case = Case(rows, hidden, vocab, head == "trained", options.device, options.dtype)
            results = measure(case, names, options.repeats)
            verdicts = judge(results)
            tabulate(case, results)
            print_targets(verdicts)
            report.append({"case": asdict(case), "results": results, "targets": verdicts})
    if options.json:
        options.json.write_text(json.dumps({"setting": setting(options.device), "cases": report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
