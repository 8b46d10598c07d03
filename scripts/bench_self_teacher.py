"""What a prompted self-teacher costs, measured side by side in one run: `python scripts/bench_self_teacher.py`.

First the teacher's forward, with and without the reuse of the tokens that all its prompts begin with; then whole
optimizer steps of `DistillationTrainer` and of TRL's `SDFTTrainer` on the same tokens, with the same adapter, batch
and optimizer. Prompts are random words, one token each, so that lengths are exact. Both trainers' losses of the first
step are compared before anything is said of their speed. Nothing here measures how well a student learns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_measuring import (
    add_common_arguments,
    load,
    print_lines,
    print_table,
    print_targets,
    setting,
    span,
    synchronize,
    take_threads,
    time_in_turns,
    write_json,
)
from bench_steps import OFF_POLICY, SDFT, SDFT_ALONE, WITH_ANSWERS, Lengths, Words, compare_steps
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging

from hfkd.batch import IGNORE, Batch, View
from hfkd.teachers import LocalTeacher

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

DEFAULT_MODEL = Path("outputs/models/SmolLM2-135M-Instruct")
WHOLE, REUSED = "every prompt run whole", "shared prefix reused"


def load_model(folder: Path | None, device: str) -> tuple[PreTrainedModel, str]:
    """The model in float32 and what it is, in words: the folder given, the quickstart's, or random weights of that
    shape.
    """
    folder = folder or (DEFAULT_MODEL if DEFAULT_MODEL.exists() else None)
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device), folder.name
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    set_seed(0)
    return LlamaForCausalLM(config).to(device), "random weights in the shape of SmolLM2-135M"


def compare_forward(model: PreTrainedModel, lengths: Lengths, repeats: int, device: str) -> dict[str, Any]:
    """Time the teacher's forward with and without reuse, and hold the two against each other.

    Raises:
        SystemExit: They say different things.
    """
    words = Words(model.config.vocab_size)
    prefix = words.ids(lengths.shared)
    ids = torch.tensor([[*prefix, *words.ids(lengths.own)] for _ in range(lengths.batch)], device=device)
    labels = ids.clone()
    labels[:, : -lengths.answer] = IGNORE
    batch = Batch(View(ids, torch.ones_like(ids), labels))
    whole, reusing = LocalTeacher(model, reuse_prefix=False), LocalTeacher(model)
    reusing.share_prefix(prefix)
    runs = {name: _signal(teacher, batch) for name, teacher in ((WHOLE, whole), (REUSED, reusing))}
    synchronize(device)
    start = time.perf_counter()
    reusing.prefix.cache_for(model, 1)
    synchronize(device)
    once = time.perf_counter() - start
    gap = _largest_gap(runs[WHOLE]().rows, runs[REUSED]().rows)
    if reusing.prefix is None:
        raise SystemExit(f"The cache of {type(model).__name__} can't be shared, so there is nothing to compare.")
    if not gap <= 1e-3:
        raise SystemExit(f"Log-probabilities with and without reuse differ by {gap:.2g} nats (allowed 1e-3).")
    return {"seconds": time_in_turns(runs, repeats, device), "prefix_once": once, "gap": gap}


def _signal(teacher: LocalTeacher, batch: Batch) -> Callable[[], Any]:
    return lambda: teacher.signal(batch, frozenset({"distribution"}))


def _largest_gap(one: Any, other: Any) -> float:
    first, second = (rows.head.logits(rows.hidden).log_softmax(-1) for rows in (one, other))
    return float((first - second).abs().max())


def report_forward(lengths: Lengths, found: dict[str, Any]) -> list[dict]:
    """Print the first table."""
    medians = {name: statistics.median(seconds) for name, seconds in found["seconds"].items()}
    ratio = medians[WHOLE] / medians[REUSED]
    print_table(
        f"The teacher's forward: {lengths.shared} shared + {lengths.own} own tokens, batch {lengths.batch}",
        ("what", "seconds (median)", "least to most", "times faster"),
        [
            (name, f"{medians[name]:.3g}", span(found["seconds"][name]), f"{medians[WHOLE] / medians[name]:.1f}")
            for name in (WHOLE, REUSED)
        ],
    )
    print_lines(
        f"- running the prefix itself, once as long as the weights stay: {found['prefix_once']:.3g} s",
        f"- largest difference of a log-probability: {found['gap']:.2g} nats",
    )
    return [{"ratio": ratio, "met": ratio >= 10, "words": f"reuse is {ratio:.1f} times faster, wanted at least 10"}]


def report_steps(lengths: Lengths, found: dict[str, Any]) -> list[dict]:
    """Print the second table."""
    medians = {name: statistics.median(seconds) for name, seconds in found["seconds"].items()}
    rows = []
    for name in (SDFT, SDFT_ALONE, OFF_POLICY, WITH_ANSWERS):
        if name not in medians:
            rows.append((name, "trl isn't installed", "", ""))
            continue
        ratio = f"{medians[SDFT] / medians[name]:.1f}" if SDFT in medians else ""
        rows.append((name, f"{medians[name]:.3g}", span(found["seconds"][name]), ratio))
    print_table(
        f"A whole optimizer step: {lengths.demonstrations} demonstrations of {lengths.demonstration_tokens} tokens in "
        f"all, questions of {lengths.question}, answers of {lengths.answer}, batch {lengths.batch}, LoRA r=16",
        ("what", "seconds a step (median)", "least to most", "times faster than SDFT"),
        rows,
    )
    if SDFT not in medians:
        return []
    ours, theirs = found["losses"]
    print_lines(f"- loss of the first step: hfkd {ours:.6f}, TRL {theirs:.6f} nats per token")
    pairs = ((OFF_POLICY, SDFT), (WITH_ANSWERS, SDFT))
    return [_target(medians, name, other) for name, other in pairs]


def _target(medians: dict[str, float], name: str, other: str) -> dict[str, Any]:
    ratio = medians[other] / medians[name]
    return {"ratio": ratio, "met": ratio >= 2.5, "words": f"{name}: {ratio:.1f} times faster, wanted at least 2.5"}


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help=f"a folder; {DEFAULT_MODEL} if it is there, else random weights")
    parser.add_argument("--parts", nargs="+", default=["forward", "step"], choices=["forward", "step"])
    parser.add_argument("--repeats", type=int, default=3, help="of the forward; the trainers take one turn less")
    parser.add_argument("--steps", type=int, default=4, help="of a training run, the first not counted")
    for name, value in (("shared", 1024), ("own", 96), ("demonstration-tokens", 310), ("question", 8), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=value, help="tokens" if name != "batch" else "rows")
    add_common_arguments(parser)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print both tables."""
    options = _arguments(words)
    take_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    lengths = Lengths(options.shared, options.own, 8, options.demonstration_tokens, options.question, 4, options.batch)
    model, name = load_model(options.model, options.device)
    print_lines(f"{setting(options.device)}; float32; model: {name}", load())
    report: dict[str, Any] = {"setting": setting(options.device), "model": name}
    if "forward" in options.parts:
        found = compare_forward(model.eval(), lengths, options.repeats, options.device)
        report["forward"] = {**found, "targets": report_forward(lengths, found)}
        print_targets(report["forward"]["targets"])
    del model
    if "step" in options.parts:
        found = compare_steps(
            lambda: load_model(options.model, options.device)[0],
            lengths,
            options.steps,
            max(1, options.repeats - 1),
            options.device,
        )
        report["step"] = {**found, "targets": report_steps(lengths, found)}
        print_targets(report["step"]["targets"])
    write_json(report, options.json)


if __name__ == "__main__":
    main()
