"""What an objective costs, measured side by side in one run: `python scripts/bench_objective.py`.

Compared are the bare matrix products that no dense objective can do without, ours, and two of TRL's: the chunked
divergence kernel and the dense loss of GKD. All are given the same rows, their values and gradients are compared on a
few rows before anything is timed, the timed runs take turns (A B C A B C), and added memory is the peak of a fresh
process above what it held before. It knows nothing of models: rows are random numbers.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace

from bench_measuring import (
    add_common_arguments,
    in_fresh_process,
    load,
    package_version,
    print_lines,
    print_table,
    print_targets,
    setting,
    span,
    take_threads,
    write_json,
)
from bench_rows import (
    BARE,
    KEPT,
    Case,
    Inputs,
    Prepare,
    added_memory_of,
    bare,
    bare_kept,
    by_definition,
    largest_gap,
    ours,
    seconds_by_turns,
    trl_chunked,
    trl_gkd,
    value_and_gradients,
)

FORWARD, REVERSE = "hfkd forward_kl", "hfkd reverse_kl"
CHUNKED, DENSE = "TRL ChunkedDivergenceFunction, forward KL", "TRL GKD generalized_jsd_loss, forward KL"
NEEDED = ("hfkd.objective", "trl.kernels.chunked_divergence", "trl.experimental.gkd")
TARGETS = (
    ("time", FORWARD, BARE, 1.15),
    ("time", FORWARD, CHUNKED, 0.5),
    ("memory", FORWARD, DENSE, 0.25),
)
"""What is measured, of whom, against whom, and the highest ratio wanted."""


IMPLEMENTATIONS: dict[str, Prepare] = {
    BARE: bare,
    KEPT: bare_kept,
    FORWARD: ours("forward_kl"),
    REVERSE: ours("reverse_kl"),
    CHUNKED: trl_chunked("forward_kl"),
    DENSE: trl_gkd("forward_kl"),
}


def check_values(case: Case, names: Sequence[str], rows: int = 64) -> None:
    """Compare values and gradients with the definition, on a few rows of the case's width; this warms up, too.

    Raises:
        SystemExit: One of them differs.
    """
    inputs = Inputs.of(replace(case, rows=min(case.rows, rows)))
    for name in names:
        found = value_and_gradients(IMPLEMENTATIONS[name](inputs), inputs)
        if name in (BARE, KEPT):
            continue
        definition = by_definition("reverse_kl" if name == REVERSE else "forward_kl")
        gap, what = largest_gap(found, value_and_gradients(definition(inputs), inputs))
        if not gap <= case.tolerance():
            raise SystemExit(
                f"{case.title()}: the {what} of {name!r} is off by {gap:.2g} (allowed {case.tolerance()})."
            )


def added_memory(name: str, case: Case) -> int:
    """Bytes at the peak of one run above what was held before; to be called in a fresh process."""
    return added_memory_of(IMPLEMENTATIONS[name], case)


def measure(case: Case, names: Sequence[str], repeats: int) -> dict[str, dict[str, object]]:
    """Check, time and weigh the implementations of one case."""
    check_values(case, names)
    seconds = seconds_by_turns({name: IMPLEMENTATIONS[name] for name in names}, case, repeats)
    gc.collect()
    return {
        name: {
            "seconds": seconds[name],
            "time": statistics.median(seconds[name]),
            "memory": in_fresh_process(added_memory, name, case, preload=NEEDED),
        }
        for name in names
    }


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
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add_common_arguments(parser)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure all sizes and print the tables."""
    options = _arguments(words)
    take_threads(options.threads)
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
    write_json({"setting": setting(options.device), "cases": report}, options.json)


if __name__ == "__main__":
    main()
