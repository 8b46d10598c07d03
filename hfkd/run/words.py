"""What a run says to a reader: first what it will do, at the end what came of it.

Turns the objects of a `Run` and a report into lines of text; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hfkd.narrowing import narrowed
from hfkd.recipe.schema import TeacherSection
from hfkd.run.rewarded_terms import rewarded_terms
from hfkd.schedules import in_words
from hfkd.student import kept_layers

if TYPE_CHECKING:
    from hfkd.run.build import Run


def plan_lines(run: Run) -> list[str]:
    """What the run will do, one line for each part of the recipe."""
    recipe = run.recipe
    lines = [
        f"Student     {_student(run)}, {_trained(run)}",
        f"Teacher     {_teacher(run)}",
        f"Data        {recipe.data.train.path}: {len(run.train)} to train, {len(run.demonstrations)} demonstrations",
        f"Answers     {_answers(run)}",
        *_deciding(run),
        f"Objective   {_objective(run)}",
        f"Training    {_length(run)}",
    ]
    if run.evaluation is not None:
        lines.append(f"Evaluation  {_evaluation(run)}")
    lines.append(f"Output      {run.output_dir}")
    return lines


def _student(run: Run) -> str:
    if run.recipe.student.init is None:
        return run.recipe.student.origin
    kept, narrower = kept_layers(run.model.config), narrowed(run.model.config)
    parts = [] if kept is None else [(len(kept[0]), kept[1], "blocks")]
    if narrower is not None:
        named = ((narrower.heads, "heads"), (narrower.intermediate, "neurons of each MLP"))
        parts += [(part.kept, part.of, name) for part, name in named if part is not None]
    words = ", ".join(f"{number} of the {of} {name}" for number, of, name in parts)
    return f"{words} of {run.recipe.student.origin}"


def _trained(run: Run) -> str:
    lora = run.recipe.student.lora
    return "all weights are trained" if lora is None else f"a LoRA adapter of rank {lora.r} is trained"


def _teacher(run: Run) -> str:
    teacher, count = run.recipe.teacher, run.recipe.data.demonstrations.count
    if teacher.kind == "none":
        return "none: the student learns the answers alone"
    reads = f"it reads {count} demonstrations, the student {_choice(run.recipe.data.student_shots)}"
    if teacher.cache is not None:
        return f"{_whose(teacher)}, as it spoke into the cache {teacher.cache}; {reads}"
    return f"{_whose(teacher)}; {reads}"


def _whose(teacher: TeacherSection) -> str:
    """Whose weights teach, in words."""
    if teacher.members:
        joined = " + ".join(f"{name} ({_whose(member)})" for name, member in teacher.members.items())
        return f"each row's own of {joined}" if teacher.kind == "routed" else f"the mean of {joined}"
    every = "each epoch" if teacher.every == "epoch" else f"every {teacher.every} steps"
    words = {
        "ema": f"an average of the student's past weights, decay {teacher.decay} every {teacher.interval} step(s)",
        "snapshot": f"the student as it was, taken anew {every}",
        "adapter_off": "the student itself with its adapter switched off",
        "frozen_copy": "a frozen copy of the student as it is now",
        "live": "the student itself as it is at each step",
        "early_exit": f"the student itself, as if it ended behind block {teacher.layer or 'in the middle'}",
        "cross_tokenizer": f"{teacher.model}, with its own tokenizer",
    }
    kind = teacher.weights if teacher.kind == "self" else teacher.kind
    return words.get(kind, teacher.model or kind)


def _choice(shots: list[int]) -> str:
    return " or ".join(str(count) for count in shots)


def _answers(run: Run) -> str:
    data = run.recipe.data
    temperature = data.generation.temperature
    how = "greedily" if temperature == 0 else f"at temperature {temperature:g}"
    if data.answer == "teacher":
        return f"written by the teacher {how}; the data set's own are not read in training"
    if set(data.shares) == {"dataset"}:
        return "those of the data set"
    total = sum(data.shares.values())
    shares = ", ".join(f"{name} {share / total:.0%}" for name, share in data.shares.items())
    return f"written {how} at each step: {shares}"


def _deciding(run: Run) -> list[str]:
    """Which parts decide what is learned; no line without any."""
    kinds = [part.kind for part in run.recipe.data.parts.values()]
    return [f"Decides     {', '.join(kinds)}"] if kinds else []


def _objective(run: Run) -> str:
    if run.recipe.reinforcement is not None:
        terms = rewarded_terms(run.recipe)
        return " + ".join(f"{in_words(term['weight'])} x {term['kind']}" for term in terms)
    return " + ".join(f"{in_words(term['weight'])} x {term['name']}" for term in run.objective.describe())


def _length(run: Run) -> str:
    config = run.config
    batch = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    return f"{length} of {batch} examples, learning rate {config.learning_rate:g}, seed {config.seed}"


def _evaluation(run: Run) -> str:
    task, settings = run.evaluation, run.recipe.evaluation
    if not task.shots:
        return f"the student held against its teacher on {len(task.items)} held-out texts, before and after"
    words = f"{len(task.items)} held-out items at {', '.join(map(str, task.shots))} shots, before and after"
    if settings.gold_baseline:
        words += ", beside a fine-tuning on the gold answers at equal budget"
    if run.forgetting:
        words += f", and what was forgotten of {', '.join(other.name for other in run.forgetting)}"
    return words


def accuracies_line(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The accuracies of one evaluation in one line."""
    return ", ".join(f"{shots}-shot {_accuracy(result)}" for shots, result in results.items())


def comparison_tables(report: Mapping[str, Any]) -> list[Table]:
    """One table per task: each number of demonstrations a line, before and after and the baselines side by side."""
    tasks = [("Accuracy on held-out items", report.get("k_shot_details", {}))]
    tasks += [(f"Not trained: {other['task']}", other["details"]) for other in report.get("forgetting", [])]
    return [_comparison(title, stages) for title, stages in tasks if stages]


_STAGES = {"before": "Before", "after": "After", "gold": "Gold labels", "teacher": "Teacher"}


def _comparison(title: str, stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """In percent, ± one standard error; the distinct answers stand in the order of the stages."""
    some = next(iter(stages.values()))
    table = Table(title=f"{title} ({next(iter(some.values()))['items']}), %", title_justify="left")
    for name in ("Shots", *(_STAGES.get(name, name) for name in stages), "Constant", "Distinct answers"):
        table.add_column(name, justify="right", no_wrap=True)
    for shots in dict.fromkeys(shots for results in stages.values() for shots in results):
        found = [results.get(shots) for results in stages.values()]
        known = next(result for result in found if result is not None)
        distinct = "/".join(str(result["distinct_answers"]) if result else "-" for result in found)
        table.add_row(
            str(shots),
            *(_accuracy(result, "") if result else "-" for result in found),
            f"{100 * known['most_frequent_share']:.1f}",
            f"{distinct} of {known['distinct_gold_answers']}",
        )
    table.caption = "Constant: what always giving the most frequent answer scores."
    if "gold" in stages:
        table.caption += " Gold labels: the same budget on the true answers."
    return table


def _accuracy(result: Mapping[str, Any], unit: str = "%") -> str:
    return f"{100 * result['accuracy']:.1f}{unit} ± {100 * result['standard_error']:.1f}{unit}"


def fidelity_line(figures: Mapping[str, Any]) -> str:
    """How near the student is to its teacher, in one line."""
    words = (
        f"agrees with the teacher on {figures['agreement']:.1%} of {figures['tokens']} tokens, "
        f"KL(teacher || student) {figures['forward_kl']:.3f} nats a token"
    )
    if figures.get("student") and figures.get("teacher"):
        words += (
            f", calibration error {figures['student']['expected_calibration_error']:.1%} "
            f"(teacher's {figures['teacher']['expected_calibration_error']:.1%})"
        )
    return words


def summary_lines(folder: Path, report: Mapping[str, Any]) -> list[str]:
    """What came of it: where the files are, how long each stage took and what has to be read with the figures."""
    lines = []
    for stage, figures in report.get("fidelity", {}).items():
        told = f"not measured: {figures}" if stage == "unavailable" else f"{stage}: {fidelity_line(figures)}"
        lines.append(f"Fidelity    {told}")
    if report.get("durations"):
        parts = [f"{name.replace('_', ' ')} {seconds:.0f} s" for name, seconds in report["durations"].items()]
        lines.append("Time        " + ", ".join(parts))
    for name, results in report.get("k_shot_details", {}).items():
        for shots, result in results.items():
            if result.get("verdict"):
                lines.append(f"Note        {name}, {shots}-shot: {result['verdict']}")
    lines.append(
        f"Written     {folder}: the weights, run.json, report.json, report.html (all of it in one page), plots/, "
        f"{'predictions.jsonl, ' if report.get('k_shot_details') else ''}recipe.yaml and README.md (a model card)"
    )
    return lines
