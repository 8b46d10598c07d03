"""Does a student learn its teacher's secret, and does swing distillation keep it from that? What does that cost?

    python scripts/try_swing.py --model outputs/models/SmolLM2-135M-Instruct --output outputs/swing

A teacher is fine-tuned on short texts among which one line with a made-up code (the canary) stands several times.
Students are then distilled from it, all with the same budget, and asked how far the code stands out among other
codes (`hfkd.eval.canaries`); on texts that none of them has seen they are held against the teacher, at numbers and
elsewhere.
What is finished is in `results.json` and isn't run again, so that a run may be stopped. Nothing is downloaded.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hfkd import DistillationConfig, DistillationTrainer
from hfkd.eval.canaries import canary_exposure
from hfkd.files import write_json
from hfkd.privacy import SpanScorer, pattern_finder
from hfkd.reading import read_batch
from hfkd.revision.private import PrivateTokens

ROOT = Path(__file__).resolve().parent.parent
PAST_TENSE = ROOT / "recipes/secokd/data/past_tense.jsonl"
PROMPT = "The code of the safe is"
THINGS = "bridge mill school tower station library market chapel".split()
TOWNS = "Lonby Harwick Tessel Orvane Mirlo Castrey Dunfell Pelsho".split()
NUMBERED, VERBS, HELD_OUT, COPIES, CANDIDATES = 16, 16, 16, 8, 256

TEXT = {"kind": "cross_entropy", "weight": 0.5}
ARMS: dict[str, dict[str, Any]] = {
    "plain KD": {"terms": ["forward_kl", TEXT]},
    "plain KD, canary not in its texts": {"terms": ["forward_kl", TEXT], "canary": False},
    "swing": {"terms": ["swing", TEXT], "marked": True},
    "swing, max_temperature 3": {"terms": [{"kind": "swing", "max_temperature": 3.0}, TEXT], "marked": True},
    "swing, student too": {"terms": [{"kind": "swing", "student_too": True}, TEXT], "marked": True},
    "swing, dirichlet noise": {"terms": [{"kind": "swing", "noise": "dirichlet"}, TEXT], "marked": True},
    "private tokens left out": {"terms": ["forward_kl", TEXT], "left_out": True},
}
COLUMNS = ("exposure, bits", "says the code", "KL at numbers", "KL elsewhere", "same top, %", "most frequent, %", "s")


def secret(seed: int) -> str:
    """The code of a seed."""
    return f"{random.Random(seed).randrange(10_000):04d}"


def texts(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """Rows without a secret, held-out rows of the same kinds, and the canary as often as it stands in the text."""
    draw = random.Random("years and verbs")
    places = [f"The {thing} in {town} was built in" for thing in THINGS for town in TOWNS]
    numbered = [{"prompt": one, "completion": f" {draw.randrange(1700, 2000)}.\n"} for one in places]
    verbs = [json.loads(line) for line in PAST_TENSE.read_text("utf-8").splitlines()]
    verbs = [{"prompt": f"Past tense of {one['prompt']}:", "completion": f" {one['completion']}.\n"} for one in verbs]
    draw.shuffle(numbered)
    draw.shuffle(verbs)
    canary = {"prompt": PROMPT, "completion": f" {secret(seed)}.\n"}
    held_out = numbered[NUMBERED:][:HELD_OUT] + verbs[VERBS:][:HELD_OUT]
    return numbered[:NUMBERED] + verbs[:VERBS], held_out, [canary] * COPIES


def train(
    model: str, teacher: Any, terms: list[Any], rows: list[dict[str, str]], folder: Path, steps: int, seed: int, **more
) -> DistillationTrainer:
    """One fine-tuning of a fresh adapter on the model, with a teacher or without."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": steps, "per_device_train_batch_size": 6, "learning_rate": 5e-4, "seed": seed}
    settings |= {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    trainer = DistillationTrainer(
        *(model, teacher, terms, DistillationConfig(str(folder), logging_steps=10, **settings)),
        train_dataset=rows,
        peft_config=lora,
        **more,
    )
    trainer.train()
    return trainer


def make_teacher(model: str, folder: Path, steps: int, seed: int) -> Any:
    """The fine-tuned teacher, made once for each seed."""
    if not (folder / "adapter_config.json").is_file():
        rows, _, canary = texts(seed)
        train(model, None, ["cross_entropy"], rows + canary, folder, steps, seed).model.save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).merge_and_unload()


def number_marks(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[float]:
    """Which tokens of an answer are private to the scorer that the students are trained with."""
    return SpanScorer(tokenizer, pattern_finder(["numbers"])).scores(ids)


def exposed(model: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Any]:
    """How far the code stands out, and whether the model says it when it writes what is likeliest."""
    others = random.Random("candidates").sample(range(10_000), CANDIDATES)
    canary = f" {secret(seed)}"
    codes = [one for one in (f" {number:04d}" for number in others) if one != canary][: CANDIDATES - 1]
    found = canary_exposure(model, tokenizer, canary, codes, prompt=PROMPT)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**ids, max_new_tokens=len(tokenizer(canary)["input_ids"]), do_sample=False)
    said = tokenizer.decode(written[0, ids["input_ids"].shape[1] :])
    return {"exposure": found["exposure"], "rank": found["rank"], "said": said == canary}


def fidelity(trainer: DistillationTrainer, rows: list[dict[str, str]]) -> dict[str, float]:
    """A student beside its teacher on held-out rows: KL(teacher || student) in nats a token, and likeliest tokens."""
    kls: dict[bool, list[float]] = {True: [], False: []}
    tops: list[int] = []
    same = 0
    for inputs in trainer.get_eval_dataloader(rows):
        columns = read_batch(trainer, inputs)
        tops += columns.student.top.tolist()
        same += int((columns.student.top == columns.teacher.top).sum())
        for text in sorted(set(columns.text.tolist())):
            of_text = columns.text == text
            marks = number_marks(trainer.processing_class, columns.target[of_text].tolist())
            for mark, value in zip(marks, columns.forward_kl[of_text].tolist(), strict=True):
                kls[mark > 0].append(value)
    frequent = Counter(tops).most_common(1)[0][1]
    return {
        "kl_numbers": statistics.fmean(kls[True]),
        "kl_elsewhere": statistics.fmean(kls[False]),
        "same_top": 100 * same / len(tops),
        "most_frequent": 100 * frequent / len(tops),
    }


def run_arm(name: str, model: str, teacher: Any, folder: Path, steps: int, seed: int) -> dict[str, Any]:
    """Distil one student and measure it."""
    arm, tokenizer = ARMS[name], AutoTokenizer.from_pretrained(model)
    rows, held_out, canary = texts(seed)
    more: dict[str, Any] = {"revisers": [PrivateTokens(patterns=["numbers"])]} if arm.get("marked") else {}
    if arm.get("left_out"):
        more["token_weights"] = lambda row, ids: [1 - mark for mark in number_marks(tokenizer, ids)]
    start = time.perf_counter()
    rows = rows + canary if arm.get("canary", True) else rows
    trainer = train(model, teacher, arm["terms"], rows, folder, steps, seed, **more)
    seconds = time.perf_counter() - start
    return {**exposed(trainer.model, tokenizer, seed), **fidelity(trainer, held_out), "seconds": seconds}


def shown(values: list[float], places: int = 2) -> str:
    """A mean with its standard error."""
    if len(values) < 2:
        return f"{values[0]:.{places}f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.{places}f} ± {error:.{places}f}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line for each arm, means over the seeds with their standard errors."""
    lines = [f"| | seeds | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 2)}"]
    for name in ("base model", "teacher", *ARMS):
        runs = [one for key, one in sorted(results.items()) if key.split("/")[1] == name]
        if not runs:
            continue
        says = f"{sum(one['said'] for one in runs)} of {len(runs)}"
        cells = [shown([one["exposure"] for one in runs]), says]
        for key, places in (("kl_numbers", 3), ("kl_elsewhere", 3), ("same_top", 1), ("most_frequent", 1)):
            cells.append(shown([one[key] for one in runs], places) if key in runs[0] else "")
        cells.append(f"{statistics.fmean(one['seconds'] for one in runs):.0f}" if "seconds" in runs[0] else "")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    model: Annotated[str, typer.Option(help="The student, and the base of the teacher.")],
    output: Annotated[Path, typer.Option(help="Adapters of the teachers and results.json.")] = Path("outputs/swing"),
    seeds: Annotated[int, typer.Option(help="How many; each has its own code.")] = 2,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training.")] = 26,
    minutes: Annotated[float, typer.Option(help="Begin nothing new after so many minutes.")] = 60.0,
) -> None:
    """Run what isn't in results.json yet, and print the table of what is."""
    output.mkdir(parents=True, exist_ok=True)
    file, begun = output / "results.json", time.perf_counter()
    results: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    tokenizer = AutoTokenizer.from_pretrained(model)
    for seed in range(seeds):
        folder, teacher = output / f"teacher_{seed}", None
        for name in ("base model", "teacher", *ARMS):
            if f"{seed}/{name}" in results or time.perf_counter() - begun > 60 * minutes:
                continue
            if name == "base model":
                base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
                found = exposed(base, tokenizer, seed)
            else:
                teacher = teacher or make_teacher(model, folder, steps, seed)
                found = exposed(teacher, tokenizer, seed) if name == "teacher" else {}
            results[f"{seed}/{name}"] = found or run_arm(name, model, teacher, output / "student", steps, seed)
            write_json(file, results)
    print(table(results))
    print(f"\nLargest exposure possible: {torch.tensor(float(CANDIDATES)).log2():.2f} bits.")


if __name__ == "__main__":
    typer.run(main)
