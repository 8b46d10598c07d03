"""Does it help to learn only what the teacher is sure of and the student still needs?

A small model teaches itself three tasks: as the teacher it reads demonstrations, as the student none, and the teacher
writes all labels. Plain distillation against selection after LLKD by sequences and by tokens, and against as many
sequences dropped at random, at an equal number of steps and rows. What is finished isn't run again. It trains and
measures through the package and knows nothing of how selection works.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "recipes" / "secokd" / "data"
TASKS = {"past_tense": "past tense", "plural": "plural", "ordinal": "ordinal number"}
SHOWN, HELD_OUT = 4, 40

ARMS: dict[str, dict[str, Any] | None] = {
    "plain KD": None,
    "LLKD, sequences": {"by": "sequence", "per": "domain"},
    "LLKD, tokens": {"by": "token", "per": "domain"},
    "same share of sequences, at random": {"random": "LLKD, sequences"},
}


def read_tasks() -> tuple[list[dict], list[dict], list[dict]]:
    """Demonstrations, held-out items and training rows of all tasks; each row's domain is its task."""
    from hfkd.data.select import split_rows

    parts: tuple[list[dict], list[dict], list[dict]] = ([], [], [])
    for domain, words in TASKS.items():
        lines = (DATA / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [{**row, "prompt": f"{words} of {row['prompt']}", "domain": domain} for row in map(json.loads, lines)]
        splits = split_rows(rows, demonstrations=SHOWN, evaluation=HELD_OUT, seed=0)
        for part, some in zip(parts, (splits.demonstrations, splits.evaluation, splits.train), strict=True):
            part.extend(some)
    shown, held_out, train = parts
    return shown[::SHOWN] + shown[1::SHOWN] + shown[2::SHOWN] + shown[3::SHOWN], held_out, train


def labelled(rows: Sequence[Mapping[str, Any]], model: Any, tokenizer: Any, shown: Sequence[dict]) -> list[dict]:
    """The rows with the model's own answers behind the demonstrations; `gold` keeps the true one."""
    from hfkd import GenerationSettings, HFRollout, PromptStyle
    from hfkd.data.prompts import PromptBuilder

    builder = PromptBuilder(tokenizer, PromptStyle(separator=""))
    rollout = HFRollout(tokenizer, GenerationSettings(max_new_tokens=12, stop=("\n",), batch_size=48))
    prompts = [builder.encode_prompt(row, shown) for row in rows]
    texts = [each.text.strip() for each in rollout.generate(model, prompts)]
    return [
        {**row, "completion": text, "gold": row["completion"]} for row, text in zip(rows, texts, strict=True) if text
    ]


def prepare(folder: Path, model_folder: str) -> dict[str, list[dict]]:
    """The rows with the teacher's labels, written by it once."""
    from hfkd.files import write_json
    from hfkd.loading import load_causal_lm, load_tokenizer_of

    path = folder / "rows.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    shown, held_out, train = read_tasks()
    model, tokenizer = load_causal_lm(model_folder), load_tokenizer_of(model_folder)
    rows = {"shown": shown, "held_out": held_out}
    rows["train"] = labelled(train, model, tokenizer, shown)
    rows["asked"] = labelled(held_out, model, tokenizer, shown)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)
    return rows


def revisers(settings: Mapping[str, Any] | None, shares: Mapping[str, float], seed: int) -> list[Any]:
    """What an arm does to its batches."""
    import torch

    from hfkd.revision import Reviser
    from hfkd.revision.select import Selection
    from hfkd.revision.tokens import with_only

    class AtRandom(Reviser):
        """Drops whole rows by the toss of a coin, as many as another arm did on average."""

        def revise(self, batches: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
            draw = torch.Generator().manual_seed(1000 * seed + step)
            new, counts = [], [0, 0]
            for batch in batches:
                supervised = batch["labels"][:, 1:] != -100
                kept = torch.rand(len(supervised), generator=draw) < shares[settings["random"]]
                kept[0] |= not kept.any()
                new.append(with_only(batch, kept[:, None].expand_as(supervised)[supervised]))
                counts = [counts[0] + int(supervised[kept].sum()), counts[1] + int(supervised.sum())]
            self.kept = counts
            return new

        def figures(self) -> dict[str, tuple[float, float]]:
            return {"selection/kept": (self.kept[0], self.kept[1])}

    if settings is None:
        return []
    return [AtRandom() if "random" in settings else Selection(**settings)]


def train(
    rows: Mapping[str, list[dict]], model: str, arm: str, seed: int, steps: int, folder: Path, share: float
) -> dict[str, Any]:
    """Train one student and ask it the held-out items without demonstrations."""
    from peft import LoraConfig

    from hfkd import DistillationConfig, DistillationTrainer, PromptStyle, SelfTeacher

    chosen = revisers(ARMS[arm], {"LLKD, sequences": share}, seed)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 2e-4, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": seed}
    trainer = DistillationTrainer(
        model,
        SelfTeacher("adapter_off"),
        "forward_kl",
        DistillationConfig(str(folder / "run"), dataloader_pin_memory=False, **settings),
        train_dataset=rows["train"],
        eval_dataset=rows["asked"],
        peft_config=lora,
        prompts=PromptStyle(separator=""),
        demonstrations=rows["shown"],
        revisers=chosen,
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    log = trainer.state.log_history
    kept = [entry["selection/kept"] for entry in log if "selection/kept" in entry]
    answers = ask(trainer.model, trainer.processing_class, rows["held_out"])
    divergence = trainer.evaluate()["eval_loss"]
    names = sorted({name for entry in log for name in entry if name.startswith("selection/")})
    by_step = {name: [entry.get(name) for entry in log if "loss" in entry] for name in names}
    share_kept = sum(kept) / len(kept) if kept else 1.0
    return {**answers, "forward_kl": divergence, "kept": share_kept, "seconds": seconds, "log": by_step}


def ask(model: Any, tokenizer: Any, rows: Sequence[dict], shown: Sequence[dict] = ()) -> dict[str, Any]:
    """Accuracy in all, and by task, with the share of the answer that is given most often."""
    from hfkd import PromptStyle
    from hfkd.data.prompts import PromptBuilder
    from hfkd.eval.k_shot import evaluate_k_shot

    builder = PromptBuilder(tokenizer, PromptStyle(separator=""))
    report = evaluate_k_shot(model, tokenizer, rows, shown, builder, shots=[len(shown)], max_new_tokens=12)
    result = report.results[len(shown)]
    domains = [row["domain"] for row in rows]
    tasks = {
        name: sum(right for right, domain in zip(result.right, domains, strict=True) if domain == name)
        / domains.count(name)
        for name in TASKS
    }
    common = {"most_given": result.top_answer_share, "most_frequent": result.most_frequent_share}
    return {"accuracy": result.accuracy, "tasks": tasks, "items": result.items, **common}


def finished(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier run with these settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found["result"] if found.get("settings") == settings else None


def do_arm(rows: Mapping[str, list[dict]], arm: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of one arm and seed, trained if it isn't there yet."""
    from hfkd.files import write_json

    path = folder / f"{hashlib.sha256(arm.encode()).hexdigest()[:8]}_{settings['seed']}.json"
    share = 1.0
    if arm in ARMS and (ARMS[arm] or {}).get("random"):
        share = do_arm(rows, ARMS[arm]["random"], settings, folder)["kept"]
    wanted = {**settings, "arm": arm, "reviser": ARMS.get(arm), "share": round(share, 6)}
    if (known := finished(path, wanted)) is not None:
        return known
    if arm in ARMS:
        result = train(rows, settings["model"], arm, settings["seed"], settings["steps"], folder, share)
    else:
        from hfkd.loading import load_causal_lm, load_tokenizer_of

        model, tokenizer = load_causal_lm(settings["model"]), load_tokenizer_of(settings["model"])
        result = ask(model, tokenizer, rows["held_out"], rows["shown"] if arm.startswith("teacher") else ())
    write_json(path, {"settings": wanted, "result": result})
    return result


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: a row an arm, means over its seeds."""
    names = " | ".join(f"{words}, %" for words in TASKS.values())
    lines = [
        f"| arm | tokens kept, % | right of held-out, % ± s.e. (seeds) | {names} | most given answer, % | "
        "KL(teacher, student), nats | training, s |",
        "|---" * (6 + len(TASKS)) + "|",
    ]
    for arm, runs in results.items():

        def mean(name: str, runs: Sequence[Mapping[str, Any]] = runs) -> float | None:
            values = [run[name] for run in runs if name in run]
            return sum(values) / len(values) if values else None

        accuracy, items = mean("accuracy"), runs[0]["items"]
        error = math.sqrt(accuracy * (1 - accuracy) / items)
        seeds = ", ".join(f"{100 * run['accuracy']:.1f}" for run in runs)
        tasks = " | ".join(f"{100 * sum(run['tasks'][name] for run in runs) / len(runs):.1f}" for name in TASKS)
        cells = [
            arm,
            _cell(mean("kept"), "{:.1f}", 100),
            f"{100 * accuracy:.1f} ± {100 * error:.1f} ({seeds})",
            tasks,
            f"{100 * mean('most_given'):.1f}",
            _cell(mean("forward_kl"), "{:.3f}"),
            _cell(mean("seconds"), "{:.0f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else form.format(scale * value)


def main(
    model: Annotated[str, typer.Option(help="A folder or hub id.")] = "outputs/models/SmolLM2-135M-Instruct",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 30,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, with the seeds 0, 1, ...")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="An arm; may be given several times.")] = None,
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("outputs/try_selection"),
) -> None:
    """Train all arms, write results.json, and print the table."""
    from hfkd.cli.quiet import quiet_libraries
    from hfkd.files import write_json

    quiet_libraries()
    if unknown := sorted(set(only or ()) - set(ARMS)):
        raise typer.BadParameter(f"there is no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    rows = prepare(output, model)
    right = sum(row["completion"] == row["gold"] for row in rows["train"]) / len(rows["train"])
    print(f"{len(rows['train'])} training rows; the teacher's label is the true one in {100 * right:.1f} % of them\n")
    arms = {"untrained": 1, f"teacher, {len(rows['shown'])} demonstrations": 1, **dict.fromkeys(only or ARMS, seeds)}
    results = {
        arm: [do_arm(rows, arm, {"model": model, "steps": steps, "seed": seed}, output) for seed in range(count)]
        for arm, count in arms.items()
    }
    write_json(output / "results.json", {"steps": steps, "right_labels": right, "arms": results})
    print(table(results))
    print(f"\nMeans over the seeds; s.e. of one run of {results['untrained'][0]['items']} items.")


if __name__ == "__main__":
    typer.run(main)
