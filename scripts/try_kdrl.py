"""Does a teacher help a student that learns from a reward, and the other way round?

Sums of two digits from reasoning-gym. The teacher is the student's own model behind 8 examples, the student reads none
or one. The reward alone, the teacher alone and both, on equally many answers of the student's own. What is finished
isn't run again. It trains and measures through the package and knows nothing of how reward and teacher are joined.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

TASK = "chain_sum"
OPTIONS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
ROWS, DEMONSTRATIONS, HELD_OUT = 160, 8, 48
ANSWERS, TO_EACH, TOKENS = 16, 4, 5
SHOTS = (0, 1)

ARMS: dict[str, dict[str, Any]] = {
    "GRPO alone": {"distillation_weight": 0.0},
    "KD alone": {"reward_weight": 0.0, "distillation_weight": 1.0},
    "KDRL": {"distillation_weight": 0.1},
}


def read_rows() -> tuple[list[dict], list[dict], list[dict]]:
    """Demonstrations, held-out items and training rows; no question is in two of them. The prompt is the sum alone."""
    from hfkd.data.load import Source, load_rows

    made = load_rows(Source(f"reasoning_gym:{TASK}", size=ROWS, options=OPTIONS))
    rows = [{**row, "prompt": json.loads(row["verification"])["expression"]} for row in made]
    items = DEMONSTRATIONS + HELD_OUT
    return rows[:DEMONSTRATIONS], rows[DEMONSTRATIONS:items], rows[items:]


def ask(model: Any, tokenizer: Any, items: Sequence[dict], shown: Sequence[dict], shots: Sequence[int]) -> dict:
    """By number of examples: accuracy, and how often the answer comes that comes most often."""
    from hfkd.data.prompts import PromptBuilder
    from hfkd.eval.k_shot import evaluate_k_shot

    builder = PromptBuilder(tokenizer, style())
    report = evaluate_k_shot(model, tokenizer, items, shown, builder, shots=shots, max_new_tokens=TOKENS)
    return {
        str(count): {
            "accuracy": result.accuracy,
            "error": result.standard_error,
            "most_given": result.top_answer_share,
            "most_frequent": result.most_frequent_share,
        }
        for count, result in report.results.items()
    }


def style() -> Any:
    """How questions are asked, in training and afterwards."""
    from hfkd import PromptStyle

    return PromptStyle(question="{prompt} =", separator="")


def train(
    arm: Mapping[str, Any], seed: int, steps: int, rate: float, model: str, rows: tuple, folder: Path
) -> dict[str, Any]:
    """Train once, and ask the student afterwards."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from hfkd.loading import load_causal_lm, load_tokenizer_of
    from hfkd.reinforcement import KDRLConfig, KDRLTrainer

    shown, items, train_rows = rows
    tokenizer = load_tokenizer_of(model, {})
    set_seed(seed)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": steps, "per_device_train_batch_size": ANSWERS, "num_generations": TO_EACH}
    settings |= {"max_completion_length": TOKENS, "learning_rate": rate, "logging_steps": 1, "seed": seed}
    settings |= {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "dataloader_pin_memory": False}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    trainer = KDRLTrainer(
        get_peft_model(load_causal_lm(model), lora),
        "self" if arm["distillation_weight"] else None,
        "reasoning_gym",
        KDRLConfig(str(folder / "runs"), **settings, **arm),
        train_dataset=train_rows,
        processing_class=tokenizer,
        prompts=style(),
        demonstrations=shown,
        student_shots=SHOTS,
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    terms = [entry["distillation/loss"] for entry in trainer.state.log_history if "distillation/loss" in entry]
    return {
        "seconds": seconds,
        "rewards": rewards,
        "terms": terms,
        "shots": ask(trainer.model, *(tokenizer, items, shown, SHOTS)),
    }


def before(model: str, rows: tuple) -> dict[str, Any]:
    """What the model answers untrained; behind all examples it is the teacher."""
    from hfkd.loading import load_causal_lm, load_tokenizer_of

    shown, items, _ = rows
    loaded, tokenizer = load_causal_lm(model), load_tokenizer_of(model, {})
    return {"shots": ask(loaded, tokenizer, items, shown, (*SHOTS, DEMONSTRATIONS))}


def row(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """A line of the table: every run's accuracies, then means over the runs."""
    cells = []
    for count in map(str, SHOTS):
        asked = [run["shots"][count] for run in runs]
        each = ", ".join(f"{100 * one['accuracy']:.1f} ± {100 * one['error']:.1f}" for one in asked)
        given = 100 * statistics.fmean(one["most_given"] for one in asked)
        cells += [each, f"{100 * statistics.fmean(one['accuracy'] for one in asked):.1f}", f"{given:.1f}"]
    rewards = [statistics.fmean(run["rewards"][-5:]) for run in runs if "rewards" in run]
    cells += (
        [f"{statistics.fmean(rewards):.3f}", f"{statistics.fmean(run['seconds'] for run in runs):.0f} s"]
        if rewards
        else ["", ""]
    )
    return f"| {' | '.join([name, *cells])} |"


def table(found: Mapping[str, Any], seeds: int, steps: int, rate: float) -> str:
    """All arms whose runs are there."""
    known = found["before"]["shots"]
    teacher = known[str(DEMONSTRATIONS)]
    columns = [f"{count} examples: each seed, % ± standard error | mean | most given answer" for count in SHOTS]
    lines = [
        f"{HELD_OUT} held-out questions, greedy; {steps} steps of {ANSWERS} answers, {TO_EACH} to each question, at a "
        f"learning rate of {rate:g}. The teacher scores {100 * teacher['accuracy']:.1f} ± "
        f"{100 * teacher['error']:.1f} %; always giving the most frequent answer, "
        f"{100 * teacher['most_frequent']:.1f} %.",
        "",
        f"| | {' | '.join(columns)} | reward, last 5 steps | time |",
        "|" + "---|" * (3 + 3 * len(SHOTS)),
        row("untrained", [found["before"]]),
    ]
    for name in ARMS:
        runs = [found[key] for seed in range(seeds) if (key := f"{name}/{steps}/{rate}/{seed}") in found]
        lines += [row(name, runs)] if runs else []
    return "\n".join(lines)


def main(
    model: Annotated[
        str, typer.Option(help="The student: a hub id or folder.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    output: Annotated[Path, typer.Option(help="Where results.json is kept.")] = Path("outputs/try_kdrl"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 20,
    rate: Annotated[float, typer.Option(help="Learning rate, constant.")] = 2e-4,
    seeds: Annotated[int, typer.Option(help="Runs of each arm.")] = 2,
    minutes: Annotated[float, typer.Option(help="Begin no run after so many minutes.")] = math.inf,
) -> None:
    """Run what isn't there yet, and print the table."""
    from hfkd.files import write_json

    rows, path = read_rows(), output / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    began = time.monotonic()
    jobs = [("before", None, 0), *((name, arm, seed) for seed in range(seeds) for name, arm in ARMS.items())]
    for name, arm, seed in jobs:
        key = name if arm is None else f"{name}/{steps}/{rate}/{seed}"
        if key in found or time.monotonic() - began > 60 * minutes:
            continue
        found[key] = before(model, rows) if arm is None else train(arm, seed, steps, rate, model, rows, output)
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    print(table(found, seeds, steps, rate))


if __name__ == "__main__":
    typer.run(main)
