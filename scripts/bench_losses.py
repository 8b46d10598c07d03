"""What every loss costs, measured side by side in one run: `python scripts/bench_losses.py`.

Each token loss goes through `hfkd.Objective`, forward and backward, beside the bare matrix products that no dense
objective can do without, and beside those of TRL and Liger that are installed. Before anything is timed, values and
gradients are held against a definition in float64 where one is cheap, and against themselves with another chunk size.
The timed runs take turns (A B C A B C, the bare products several times a turn), and added memory is the peak of a
fresh process above what it held before. A second table has the losses on hidden states, a third memory over the rows.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_measuring import (
    add_common_arguments,
    in_fresh_process,
    load,
    package_version,
    print_lines,
    print_targets,
    setting,
    take_threads,
    time_in_turns,
    write_json,
)
from bench_reporting import plot, print_tables
from bench_rows import (
    BARE,
    BETAS,
    Case,
    Inputs,
    Prepare,
    Run,
    added_memory_of,
    bare,
    by_definition,
    largest_gap,
    liger,
    ours,
    trl_chunked,
    trl_gkd,
    trl_sdft,
    value_and_gradients,
    with_fresh_gradients,
)

from hfkd.losses import LOSSES, STATE_LOSSES, StateRows
from hfkd.rows import Head, RowLayout
from hfkd.terms import as_terms

NEEDED = ("hfkd.objective", "trl.kernels.chunked_divergence", "trl.experimental.gkd", "trl.experimental.sdft")
PLAIN = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl")
WANTED = {**dict.fromkeys(LOSSES, 1.5), **dict.fromkeys(PLAIN, 1.15), "sinkhorn": 1.6}
"""The most that a loss may take of the time of the bare products."""

GROWTH = 0.05
"""The most by which working memory may change from the fewest rows to the most."""

SETTINGS = {"sinkhorn": {"alone": True, "group_size": 256}}
"""Losses that aren't measured as they are by default."""

MEMORY_KINDS = ("forward_kl", "jensen_shannon", "adaptive_kl", "sinkhorn")
LAYERS = 10
"""Pairs of layers that a loss on states compares."""

CHECKED_ROWS, CHUNK_SIZES = 320, (64, 256)
BARE_EVERY = 8
"""Runs between two of the bare products, to which everything is compared."""


@dataclass(frozen=True)
class Peer:
    """An implementation by others.

    Args:
        package: Where it comes from.
        kind: What it measures.
        prepare: Makes its run.
    """

    package: str
    kind: str
    prepare: Prepare


def terms_of(kind: str) -> list[dict[str, Any]]:
    """The terms with which a loss is measured: itself, and cross-entropy where it may not stand alone."""
    term = {"kind": kind, **SETTINGS.get(kind, {})}
    return [term] if as_terms(term)[0].loss.may_stand_alone else [term, {"kind": "cross_entropy"}]


def name_of(kind: str) -> str:
    """How a loss of ours is called in the table."""
    settings = ", ".join(f"{key}={value}" for key, value in SETTINGS.get(kind, {}).items())
    beside = "".join(f" + {term['kind']}" for term in terms_of(kind)[1:])
    fewer = "" if LOSSES[kind].needs else " (no teacher: three products)"
    return f"hfkd {kind}{f' ({settings})' if settings else ''}{beside}{fewer}"


OURS: dict[str, str] = {name_of(kind): kind for kind in LOSSES}
PEERS: dict[str, Peer] = {
    f"{label}, {kind}": Peer(package, kind, prepare(kind))
    for label, package, prepare in (
        ("TRL ChunkedDivergenceFunction", "trl", trl_chunked),
        ("TRL GKD generalized_jsd_loss", "trl", trl_gkd),
        ("TRL SDFT full-logit loss", "trl", trl_sdft),
        ("Liger fused linear JSD", "liger-kernel", liger),
    )
    for kind in BETAS
}
IMPLEMENTATIONS: dict[str, Prepare] = {
    BARE: bare,
    **{name: ours(terms_of(kind)) for name, kind in OURS.items()},
    **{name: peer.prepare for name, peer in PEERS.items()},
}


def check_ours(kind: str, case: Case) -> float:
    """Compare a loss with itself in other chunks and, where there is one, with a definition, on a few rows.

    Returns:
        The largest relative gap.

    Raises:
        SystemExit: It is too large, or a number isn't finite.
    """
    inputs = Inputs.of(replace(case, rows=min(case.rows, CHECKED_ROWS)))
    first, second = (value_and_gradients(ours(terms_of(kind), size)(inputs), inputs) for size in CHUNK_SIZES)
    gaps = [largest_gap(first, second)]
    if kind in BETAS:
        gaps.append(largest_gap(first, value_and_gradients(by_definition(kind)(inputs), inputs)))
    gap, what = max(gaps)
    if not all(bool(one.isfinite().all()) for one in first.values()):
        raise SystemExit(f"{case.title()}: {kind!r} has a value or a gradient that isn't finite.")
    if not gap <= case.tolerance():
        raise SystemExit(f"{case.title()}: the {what} of {kind!r} is off by {gap:.2g} (allowed {case.tolerance()}).")
    return gap


def check_peer(peer: Peer, case: Case) -> tuple[float | None, str]:
    """Try another's implementation on a few rows.

    Returns:
        The largest relative gap to the definition, and why it can't be measured: an empty string where it can.
    """
    if not package_version(peer.package):
        return None, f"{peer.package} isn't installed"
    inputs = Inputs.of(replace(case, rows=min(case.rows, CHECKED_ROWS)))
    try:
        found = value_and_gradients(peer.prepare(inputs), inputs)
    except Exception as error:  # whatever it is, the row says so
        return None, _in_a_line(error)
    gap, what = largest_gap(found, value_and_gradients(by_definition(peer.kind)(inputs), inputs))
    limit = case.tolerance() if case.dtype == "float32" else 0.1  # some of them work in the rows' dtype throughout
    return gap, "" if gap <= limit else f"its {what} is off by {gap:.2g} (allowed {limit})"


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:80]}"


def check(case: Case, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compare the values of everyone; this warms up, too.

    Returns:
        By name the relative `gap`, the ratio of times that is `wanted` at most, and `why_not` where it can't be
        measured.
    """
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        gap, why_not = None, ""
        if name in OURS:
            gap = check_ours(OURS[name], case)
        elif name in PEERS:
            gap, why_not = check_peer(PEERS[name], case)
        results[name] = {"gap": gap, "wanted": WANTED[OURS[name]] if name in OURS else None, "why_not": why_not}
    return results


def state_run(kind: str, case: Case) -> Run:
    """A loss on the states of `LAYERS` layers, of the width of the last hidden states."""
    generator, rows = torch.Generator().manual_seed(0), case.rows

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, getattr(torch, case.dtype))

    student = {layer: draw(rows, case.hidden).requires_grad_() for layer in range(1, LAYERS + 1)}
    teacher = {layer: draw(rows, case.hidden) for layer in student}
    targets = torch.randint(0, case.vocab, (rows,), generator=generator).to(case.device)
    layout = RowLayout.single(rows, targets.device)
    states = StateRows(student, teacher, layout, targets, Head(draw(case.vocab, case.hidden)))
    loss = STATE_LOSSES[kind](layers="uniform")
    loss.prepare(LAYERS, LAYERS, case.hidden, case.hidden)
    loss.to(targets.device)

    def run() -> torch.Tensor:
        loss.zero_grad()
        for one in student.values():
            one.grad = None
        total = loss(states).sum()
        total.backward()
        return total.detach()

    if not run().isfinite():  # the first run, which isn't timed
        raise SystemExit(f"{case.title()}: {kind!r} isn't finite.")
    return run


def time_all(case: Case, results: dict[str, dict[str, Any]], kinds: Sequence[str], repeats: int) -> dict[str, dict]:
    """Time those that can be measured, and the losses on states, in the same turns.

    Args:
        case: The size.
        results: From `check`; gets `seconds` and `time`, or another `why_not`.
        kinds: The losses on states.
        repeats: Turns.

    Returns:
        `seconds` and `time` of the losses on states.
    """
    inputs, runs = Inputs.of(case), {}
    for name, found in results.items():
        if name == BARE or found["why_not"]:
            continue
        run = with_fresh_gradients(inputs, IMPLEMENTATIONS[name](inputs))
        found["why_not"] = _full_size(run, case)
        if not found["why_not"]:
            runs[name] = run
    runs.update({kind: state_run(kind, case) for kind in kinds})
    seconds = time_in_turns(_with_bare_between(runs, bare(inputs)), repeats, case.device)
    seconds[BARE] = [one for name, some in seconds.items() if name.startswith(BARE) for one in some]
    timed = {name: {"seconds": seconds[name], "time": statistics.median(seconds[name])} for name in (BARE, *runs)}
    for name, found in results.items():
        found.update(timed.get(name, {}))
    return {kind: timed[kind] for kind in kinds}


def _full_size(run: Run, case: Case) -> str:
    """Run once on a GPU, where kernels are compiled for each size and memory may not suffice; say why it can't be."""
    if case.device == "cpu":
        return ""
    try:
        run()
    except Exception as error:  # out of memory, most likely
        return _in_a_line(error)
    return ""


def _with_bare_between(runs: Mapping[str, Run], products: Run) -> dict[str, Run]:
    """Put the bare products before the first run and after every few."""
    mixed: dict[str, Run] = {}
    for place, (name, run) in enumerate(runs.items()):
        if place % BARE_EVERY == 0:
            mixed[f"{BARE} {place}"] = products
        mixed[name] = run
    return mixed


def added_memory(name: str, case: Case) -> int:
    """Bytes at the peak of one run above what was held before; to be called in a fresh process."""
    return added_memory_of(IMPLEMENTATIONS[name], case)


def weigh(name: str, case: Case, tries: int = 1) -> dict[str, int]:
    """Added memory in a fresh process (the least of several: an allocator's mood only adds), and what of it is left
    without the gradients that must be returned.
    """
    added = min(in_fresh_process(added_memory, name, case, preload=NEEDED) for _ in range(tries))
    return {"added": added, "working": added - 4 * case.hidden * (case.rows + case.vocab)}


def growth(working: Mapping[int, float]) -> float:
    """How much a straight line through working memory rises from the fewest rows to the most, in parts of its mean."""
    rows, figures = list(working), list(working.values())
    slope = statistics.linear_regression(rows, figures).slope
    return slope * (max(rows) - min(rows)) / (abs(statistics.mean(figures)) or 1.0)


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one size."""
    names = [BARE, *(name for name, kind in OURS.items() if kind in options.kinds)]
    names += [name for name, peer in PEERS.items() if peer.kind in options.kinds]
    _say(f"{case.title()}: checking {len(names)} rows of the table")
    results = check(case, names)
    _say("timing")
    states = time_all(case, results, [kind for kind in options.kinds if kind in STATE_LOSSES], options.repeats)
    _let_go(case.device)
    _say("weighing")
    weighed = [name for name in results if name in OURS and OURS[name] in options.memory_kinds]
    memory = {
        name: {rows: weigh(name, replace(case, rows=rows), options.tries) for rows in options.memory_rows}
        for name in weighed
    }
    for name in (BARE, *weighed, *PEERS) if options.memory_rows else ():
        if name in results and not results[name]["why_not"]:
            results[name].update(memory.get(name, {}).get(case.rows) or weigh(name, case))
    return {"case": asdict(case), "layers": LAYERS, "results": results, "states": states, "memory": memory}


def _say(words: str) -> None:
    """Tell who waits how far we are, beside the tables."""
    print(time.strftime("%H:%M:%S"), words, file=sys.stderr, flush=True)


def _let_go(device: str) -> None:
    """Give memory back, so that fresh processes have room."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def judge(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold time and memory of ours against the targets."""
    products = report["results"][BARE]["time"]
    verdicts = []
    for name, found in report["results"].items():
        if found["wanted"] and "time" in found:
            limit, ratio = found["wanted"], found["time"] / products
            words = f"time of {name}: {ratio:.2f} x bare, wanted at most {limit}"
            verdicts.append({"ratio": ratio, "limit": limit, "met": ratio <= limit, "words": words})
    for name, figures in report["memory"].items():
        if len(figures) > 1:
            found = growth({rows: one["working"] for rows, one in figures.items()})
            words = f"working memory of {name}, {min(figures)} to {max(figures)} rows: {found:+.1%}"
            words += f", wanted within {GROWTH:.0%}"
            verdicts.append({"ratio": found, "limit": GROWTH, "met": abs(found) <= GROWTH, "words": words})
    return verdicts


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    known = [*LOSSES, *STATE_LOSSES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1024x576x49152"], help="NxHxV, one or more")
    parser.add_argument("--kinds", nargs="+", default=known, choices=known, metavar="KIND", help="default: every loss")
    parser.add_argument("--spread", type=float, default=2.0, help="standard deviation of the logits, in nats")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--memory-kinds", nargs="*", default=MEMORY_KINDS, choices=list(LOSSES), metavar="KIND")
    parser.add_argument(
        "--memory-rows", nargs="*", type=int, default=[1024, 2048, 4096, 8192, 16384], help="none: weigh nothing"
    )
    parser.add_argument("--tries", type=int, default=1, help="fresh processes for each figure of memory over rows")
    add_common_arguments(parser)
    parser.add_argument("--plot", type=Path, help="draw them into this file; several sizes add theirs to its name")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure all sizes and print the tables."""
    options = _arguments(words)
    take_threads(options.threads)
    print_lines(f"{setting(options.device)}; {options.dtype}; {options.repeats} turns", load())
    reports = []
    for size in options.sizes:
        shape = (int(number) for number in size.split("x"))
        case = Case(*shape, True, options.device, options.dtype, options.spread)
        report = measure(case, options)
        report["targets"] = judge(report)
        print_tables(case.title(), report)
        print_targets(report["targets"])
        if options.plot:
            alone = len(options.sizes) == 1
            plot(report, options.plot if alone else options.plot.with_stem(f"{options.plot.stem}-{size}"))
        reports.append(report)
    write_json({"setting": setting(options.device), "cases": reports}, options.json)


if __name__ == "__main__":
    main()
