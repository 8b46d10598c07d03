"""Does it help to draw more of what the student lacks?

Three tasks of reasoning-gym. The teacher is a small model that was fine-tuned on all of them, the student the same
model fine-tuned on the first alone, so that it has nothing more to learn there. Plain distillation of all rows against
DDK's shares of domains, at an equal number of steps and rows. What is finished isn't run again. It trains and measures
through the package and knows nothing of how domains are drawn.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

TASKS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "spell_backward": {"min_word_len": 3, "max_word_len": 4},
    "sentence_reordering": {"min_words_in_sentence": 3, "max_words_in_sentence": 4},
}
MASTERED = "chain_sum"
ROWS, HELD_OUT = 150, 32
TEACHER_STEPS, STUDENT_STEPS = 48, 24

ARMS: dict[str, dict[str, Any] | None] = {
    "plain KD": None,
    "DDK": {"interval": 4, "smoothing": 0.5, "examples": 8},
}


def read_tasks() -> tuple[list[dict], dict[str, list[dict]]]:
    """Training rows of all tasks, and of each the held-out items; a row's domain is its task."""
    from hfkd.data.load import Source, load_rows

    train, held_out = [], {}
    for task, options in TASKS.items():
        rows = [
            {**row, "domain": task} for row in load_rows(Source(f"reasoning_gym:{task}", size=ROWS, options=options))
        ]
        held_out[task] = rows[:HELD_OUT]
        train += rows[HELD_OUT:]
    return train, held_out


def make_trainer(model: Any, teacher: Any, rows: Sequence[dict], folder: Path, tokenizer: Any, **options: Any) -> Any:
    """A trainer of an adapter; `steps`, `rate`, `seed` and `sampler` may be given."""
    from peft import LoraConfig

    from hfkd import DistillationConfig, DistillationTrainer, PromptStyle

    steps, rate, seed = options.get("steps", 1), options.get("rate", 2e-4), options.get("seed", 0)
    settings = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": rate, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": seed}
    return DistillationTrainer(
        model,
        teacher,
        "cross_entropy" if teacher is None else "forward_kl",
        DistillationConfig(str(folder), dataloader_pin_memory=False, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        prompts=PromptStyle(separator=""),
        sampler=options.get("sampler"),
    )


def fine_tuned(name: str, rows: Sequence[dict], steps: int, model: str, folder: Path, tokenizer: Any) -> Any:
    """The model after some steps on the rows' answers; the adapter is kept in the folder."""
    from peft import PeftModel

    from hfkd.loading import load_causal_lm

    kept = folder / f"{name}_{steps}"
    base = load_causal_lm(model)
    if not (kept / "adapter_config.json").is_file():
        trainer = make_trainer(base, None, rows, folder / "runs", tokenizer, steps=steps, rate=1e-3)
        trainer.train()
        trainer.save_model(str(kept))
        return trainer.model.merge_and_unload()
    return PeftModel.from_pretrained(base, str(kept)).merge_and_unload()


def ask(model: Any, tokenizer: Any, held_out: Mapping[str, Sequence[dict]]) -> dict[str, Any]:
    """By task, the accuracy and the share of the answer that is given most often."""
    from hfkd import PromptStyle
    from hfkd.data.prompts import PromptBuilder
    from hfkd.eval.k_shot import evaluate_k_shot

    builder, found = PromptBuilder(tokenizer, PromptStyle(separator="")), {}
    for task, items in held_out.items():
        result = evaluate_k_shot(model, tokenizer, items, (), builder, shots=[0], max_new_tokens=16).results[0]
        found[task] = {
            "accuracy": result.accuracy,
            "most_given": result.top_answer_share,
            "most_frequent": result.most_frequent_share,
        }
    return found


def measured(model: Any, teacher: Any, tokenizer: Any, held_out: Mapping[str, list[dict]], folder: Path) -> dict:
    """By task, how far a model is from the teacher on held-out answers, and what it answers itself."""
    import torch

    from hfkd import LocalTeacher

    trainer = make_trainer(model, LocalTeacher(teacher), held_out[MASTERED], folder / "runs", tokenizer)
    found = ask(trainer.model, tokenizer, held_out)  # the fresh adapter changes nothing
    with torch.no_grad():
        for task, items in held_out.items():
            found[task]["forward_kl"] = trainer.evaluate(items)["eval_loss"]
    return found


def train(
    arm: Mapping[str, Any] | None, seed: int, steps: int, models: Mapping[str, Any], rows: tuple, folder: Path
) -> dict[str, Any]:
    """Distil once; and measure the student."""
    from hfkd import LocalTeacher
    from hfkd.sampling.domains import DomainSampler

    train_rows, held_out = rows
    sampler = None if arm is None else DomainSampler(**arm)
    more = {"steps": steps, "seed": seed, "sampler": sampler}
    teacher = LocalTeacher(models["fixed"])
    trainer = make_trainer(
        models["student before"](), teacher, train_rows, folder / "runs", models["tokenizer"], **more
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    log = [entry for entry in trainer.state.log_history if f"domains/{MASTERED}/share" in entry]
    model = trainer.model.merge_and_unload()
    tasks = measured(model, models["fixed"], models["tokenizer"], held_out, folder)
    drawn = {} if sampler is None else {"drawn": drawn_by(sampler, 8 * steps)}
    return {"tasks": tasks, "seconds": seconds, "log": log, **drawn}


def drawn_by(sampler: Any, draws: int) -> dict[str, float]:
    """The share of each task in what was learned: a sampler that was trained with draws its last epoch again."""
    if draws > len(sampler):
        raise ValueError(f"{draws} draws are more than the {len(sampler)} of an epoch; take fewer steps")
    counts = Counter(sampler.dataset.row(index)["domain"] for index in list(sampler.order(0))[:draws])
    return {task: counts[task] / draws for task in TASKS}


def finished(path: Path, settings: Mapping[str, Any]) -> Any:
    """The result of an earlier run with these settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found["result"] if found.get("settings") == settings else None


def do_arm(arm: str, settings: dict[str, Any], models: Mapping[str, Any], rows: tuple, folder: Path) -> dict[str, Any]:
    """The result of one arm and seed, trained if it isn't there yet."""
    from hfkd.files import write_json

    wanted = {
        **settings,
        "arm": arm,
        "sampler": ARMS.get(arm),
        "tasks": TASKS,
        "before": [TEACHER_STEPS, STUDENT_STEPS],
    }
    name = hashlib.sha256(arm.encode()).hexdigest()[:8]
    path = folder / f"{name}_{settings['seed']}.json"
    if (known := finished(path, wanted)) is not None:
        return known
    if arm in ARMS:
        result = train(ARMS[arm], settings["seed"], settings["steps"], models, rows, folder)
    else:
        tasks = measured(models[arm](), models["fixed"], models["tokenizer"], rows[1], folder)
        result = {"tasks": tasks}
    write_json(path, {"settings": wanted, "result": result})
    return result


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: a row for each arm and task, and one for the mean over the tasks; means over the seeds."""
    lines = [
        "| arm | task | KL(teacher, student), nats a token (seeds) | right of held-out, % ± s.e. (seeds) | most given "
        "answer (most frequent right one), % | drawn, % | training, s |",
        "|---" * 7 + "|",
    ]
    for arm, runs in results.items():
        for task in TASKS:
            divergences = [run["tasks"][task]["forward_kl"] for run in runs]
            rights = [run["tasks"][task]["accuracy"] for run in runs]
            share = sum(rights) / len(rights)
            given = sum(run["tasks"][task]["most_given"] for run in runs) / len(runs)
            drawn = [run["drawn"][task] for run in runs if "drawn" in run]
            cells = [
                *(arm, task, _several(divergences, "{:.3f}")),
                f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / HELD_OUT):.1f} "
                f"({', '.join(f'{100 * right:.1f}' for right in rights)})",
                f"{100 * given:.1f} ({100 * runs[0]['tasks'][task]['most_frequent']:.1f})",
                _several([100 * value for value in drawn], "{:.1f}") if drawn else "-",
                "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        means = [sum(run["tasks"][task]["forward_kl"] for task in TASKS) / len(TASKS) for run in runs]
        rights = [100 * sum(run["tasks"][task]["accuracy"] for task in TASKS) / len(TASKS) for run in runs]
        seconds = [run["seconds"] for run in runs if "seconds" in run]
        took = f"{sum(seconds) / len(seconds):.0f}" if seconds else "-"
        cells = [arm, "**mean**", _several(means, "{:.3f}"), _several(rights, "{:.1f}"), "", "", took]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _several(values: Sequence[float], form: str) -> str:
    """The mean, its standard error over the seeds where there are several, and each."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return form.format(mean)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return f"{form.format(mean)} ± {form.format(error)} ({', '.join(map(form.format, values))})"


def main(
    model: Annotated[str, typer.Option(help="A folder or hub id.")] = "outputs/models/SmolLM2-135M-Instruct",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 24,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, with the seeds 0, 1, ...")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="An arm; may be given several times.")] = None,
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("outputs/try_domains"),
) -> None:
    """Make teacher and student, train all arms, write results.json, and print the table."""
    from hfkd.cli.quiet import quiet_libraries
    from hfkd.files import write_json
    from hfkd.loading import load_tokenizer_of

    quiet_libraries()
    if unknown := sorted(set(only or ()) - set(ARMS)):
        raise typer.BadParameter(f"there is no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    rows, tokenizer = read_tasks(), load_tokenizer_of(model)
    mastered = [row for row in rows[0] if row["domain"] == MASTERED]
    common = (model, output, tokenizer)
    makers = {  # each run begins with a model of its own
        "teacher": lambda: fine_tuned("teacher", rows[0], TEACHER_STEPS, *common),
        "student before": lambda: fine_tuned("student", mastered, STUDENT_STEPS, *common),
    }
    models = {**makers, "tokenizer": tokenizer, "fixed": makers["teacher"]()}
    arms = {"teacher": 1, "student before": 1, **dict.fromkeys(only or ARMS, seeds)}
    results = {
        arm: [
            do_arm(arm, {"model": model, "steps": steps, "seed": seed}, models, rows, output) for seed in range(count)
        ]
        for arm, count in arms.items()
    }
    write_json(output / "results.json", {"steps": steps, "arms": results})
    print(table(results))
    print(f"\n{steps} steps of 8 rows each; {HELD_OUT} held-out items a task.")
    print("Mean ± standard error over the seeds (each seed); that of an accuracy by task is of one run's items.")


if __name__ == "__main__":
    typer.run(main)
