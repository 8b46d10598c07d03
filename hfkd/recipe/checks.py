"""What a recipe must not ask for: combinations of keys that can't work, each found before a model is loaded.

Reads a validated `Recipe` and gives one line per fault. Classes of the user's own are not imported here
(`hfkd.run.build` does that), so what depends on them is checked when the run is built; what depends on the rows is
checked when they are seen.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hfkd.named import OWN_NAME
from hfkd.recipe.reward_faults import reward_faults
from hfkd.recipe.schema import Recipe
from hfkd.recipe.source import near, shown
from hfkd.recipe.teachers import answer_faults, second_view_faults, teacher_faults
from hfkd.recipe.values import plain_value
from hfkd.record import BY_EVALUATION

# Fields of DistillationConfig that have their place in another section.
_ELSEWHERE = {
    "chunk_size": "loss.chunk_size",
    "tail": "loss.tail",
    "compile_losses": "loss.compile_losses",
    "max_length": "data.max_length",
    "teacher_max_length": "data.teacher_max_length",
    "too_long": "data.too_long",
    "model_init_kwargs": "student.load_kwargs",
    "push_to_hub": "hub.push",
    "hub_model_id": "hub.repo_id",
    "hub_private_repo": "hub.private",
    "resume_from_checkpoint": "training.run_policy",
}
_POLICIES = ("refuse", "resume", "overwrite")


def find_faults(recipe: Recipe) -> list[str]:
    """Every impossible combination, one line each; also converts numbers that YAML reads as texts in `training`."""
    checks = (
        *(_loading, teacher_faults, second_view_faults, _loss, answer_faults),
        *(_columns, _parts, _shots, _evaluation, _names, _training, _hub, reward_faults),
    )
    return [fault for check in checks for fault in check(recipe)]


def is_own_class(kind: str) -> bool:
    """Whether a name has the form `package.module:Class`."""
    return bool(OWN_NAME.match(kind))


def _loading(recipe: Recipe) -> Iterator[str]:
    """What must stand beside `load_kwargs`, where it is seen, holds for the tokenizer too, and is told to the user."""
    from hfkd.loading import KERNEL_OPTIONS

    sections: dict[str, Any] = {"student": recipe.student, "teacher": recipe.teacher}
    sections |= {f"teacher.members.{name}": member for name, member in recipe.teacher.members.items()}
    for key, section in sections.items():
        if "trust_remote_code" in section.load_kwargs:
            yield f"{key}.load_kwargs: holds trust_remote_code; give it as {key}.trust_remote_code"
        if section.load_kwargs.get("use_safetensors") is False:
            yield f"{key}.load_kwargs: use_safetensors is false, and pickled weights are never read; leave it out"
        for name in KERNEL_OPTIONS:
            if section.load_kwargs.get(name) and not section.trust_remote_code:
                yield (
                    f"{key}.load_kwargs: {name} lets code of the hub run; set {key}.trust_remote_code beside it if "
                    "you trust that code and the model's, or leave it out"
                )
    if recipe.data.generation.vllm.get("trust_remote_code") and not recipe.student.trust_remote_code:
        yield "data.generation.vllm: trust_remote_code is the student's; set student.trust_remote_code beside it"


def _loss(recipe: Recipe) -> Iterator[str]:
    from hfkd.losses import LOSSES, STATE_LOSSES

    known = {**LOSSES, **STATE_LOSSES}
    faults, builtin = [], []
    for index, term in enumerate(recipe.loss.terms):
        key = f"loss.terms.{index}"
        if term.kind in known:
            faults += _loss_arguments(f"{key}.", known[term.kind], term.model_extra or {})
            builtin.append(term)
        elif not is_own_class(term.kind):
            faults.append(
                f"{key}.kind: there is no loss {shown(term.kind)}{near(term.kind, known)} (known: "
                f"{', '.join(known)}; "
                "your own is named as package.module:Class)"
            )
    yield from faults
    if not faults and len(builtin) == len(recipe.loss.terms):
        yield from _objective(recipe)


def _loss_arguments(prefix: str, loss: type, given: dict[str, Any]) -> list[str]:
    # A class without an __init__ of its own has torch.nn.Module's, which seems to take everything.
    bare = loss.__init__.__module__.startswith("torch.")
    parameters = {} if bare else inspect.signature(loss).parameters
    hints = typing.get_type_hints(loss.__init__)
    known = ["kind", "weight", "name", *parameters]
    faults = []
    for name, value in given.items():
        if name not in parameters:
            faults.append(f"{prefix}{name}: unknown key{near(name, known)} (known here: {', '.join(known)})")
            continue
        try:
            given[name] = plain_value(hints.get(name), value)
        except ValueError as error:
            faults.append(f"{prefix}{name}: got {shown(value)} ({type(value).__name__}); expected {error}")
    return faults


def _objective(recipe: Recipe) -> Iterator[str]:
    from hfkd.objective import build_objective

    try:
        objective = build_objective(term_specs(recipe), **objective_options(recipe))
    except (ValueError, TypeError) as error:
        yield f"loss.terms: {error}"
        return
    yield from needs_faults(recipe, objective.needs)


def term_specs(recipe: Recipe) -> list[dict[str, Any]]:
    """The terms in the form that `build_objective` takes."""
    return [{**term.model_dump(exclude_none=True)} for term in recipe.loss.terms]


def objective_options(recipe: Recipe) -> dict[str, Any]:
    """What else `build_objective` takes from a recipe."""
    return recipe.loss.model_dump(exclude={"terms"})


def needs_faults(recipe: Recipe, needs: Collection[str]) -> Iterator[str]:
    """What an objective asks of a teacher and this recipe doesn't give; called again when own losses are built."""
    if not needs or (recipe.reinforcement is not None and recipe.teacher.kind == "none"):
        return
    kinds = ", ".join(term.kind for term in recipe.loss.terms)
    if recipe.teacher.kind == "none":
        yield (
            f"loss.terms: {kinds} asks for a teacher's {' and '.join(sorted(needs))}, and teacher.kind is none; "
            "use cross_entropy alone, or name a teacher"
        )
    differ = recipe.teacher.kind in ("self", "cross_tokenizer") or recipe.data.demonstrations.count > 0
    if recipe.data.whole_text and differ:
        yield (
            f"data.whole_text: true trains on each view's whole text, so student and teacher have different "
            f"tokens and {kinds} "
            "can't compare them; use cross_entropy alone, a teacher of kind local without demonstrations "
            "(both then read the same), or whole_text: false"
        )


def _columns(recipe: Recipe) -> Iterator[str]:
    if "token_weights" in recipe.data.train.columns and recipe.data.token_weights is None:
        column = recipe.data.train.columns["token_weights"]
        yield f"data.train.columns: maps token_weights, but nothing reads it; set data.token_weights to {column!r}"


def _parts(recipe: Recipe) -> Iterator[str]:
    from hfkd.recipe.parts import part_faults

    yield from part_faults(recipe)


def _shots(recipe: Recipe) -> Iterator[str]:
    data, count = recipe.data, recipe.data.demonstrations.count
    if max(data.student_shots) > count:
        yield (
            f"data.student_shots: got {data.student_shots}, and there are {count} demonstrations to draw from; "
            "lower it or raise data.demonstrations.count"
        )
    if data.teacher_max_length is not None and recipe.teacher.kind == "none":
        yield "data.teacher_max_length: is given, and teacher.kind is none; leave it out"


def _evaluation(recipe: Recipe) -> Iterator[str]:
    evaluation, count = recipe.evaluation, recipe.data.demonstrations.count
    if evaluation is None:
        return
    if not evaluation.shots and not (evaluation.fidelity and recipe.teacher.kind != "none"):
        yield (
            "evaluation.shots: is empty and no fidelity is measured (that needs evaluation.fidelity: true and a "
            "teacher), so nothing would be evaluated; give shots, or leave the section out"
        )
    for key in ("gold_baseline", "forgetting"):
        if not evaluation.shots and getattr(evaluation, key):
            yield f"evaluation.{key}: compares answers, and evaluation.shots is empty; give shots, or leave it out"
    if recipe.data.demonstrations.column is None and max(evaluation.shots, default=0) > count:
        yield (
            f"evaluation.shots: got {evaluation.shots}, and data.demonstrations.count is {count}; "
            "lower the shots or raise the count"
        )


def _names(recipe: Recipe) -> Iterator[str]:
    """Names of formats, extractors and own functions, so that a typing slip doesn't wait for the data."""
    from hfkd.data.formats import FORMATS
    from hfkd.eval.answers import EXTRACTORS

    sources: list[tuple[str, Any]] = [
        ("data.train", recipe.data.train),
        ("data.demonstrations", recipe.data.demonstrations),
    ]
    extracts: list[tuple[str, str | None]] = []
    if recipe.evaluation is not None:
        others = [(f"evaluation.forgetting.{i}", other) for i, other in enumerate(recipe.evaluation.forgetting)]
        sources += [("evaluation", recipe.evaluation), *others]
        extracts = [("evaluation", recipe.evaluation.extract), *((key, other.extract) for key, other in others)]
    for key, source in sources:
        if source.format is not None and source.format not in FORMATS and ":" not in source.format:
            yield f"{key}.format: there is no format {_unknown(source.format, FORMATS)}"
    for key, name in extracts:
        if name is not None and name not in EXTRACTORS:
            yield f"{key}.extract: there is no extractor {_unknown(name, EXTRACTORS)}"
    yield from _prompt(recipe)


def _prompt(recipe: Recipe) -> Iterator[str]:
    from hfkd.data.prompts import PromptStyle

    prompt = recipe.data.prompt
    try:
        PromptStyle(**prompt.model_dump(exclude={"builder", "stop"}))
    except ValueError as error:
        yield f"data.{error}"
    builder = prompt.builder
    if builder is not None and not is_own_class(builder):
        yield f"data.prompt.builder: got {shown(builder)}; expected package.module:function"


def _unknown(name: str, known: Collection[str]) -> str:
    return f"{shown(name)}{near(name, known)} (known: {', '.join(known)})"


def _training(recipe: Recipe) -> Iterator[str]:
    from hfkd.config import DistillationConfig

    known = {field.name: field for field in dataclasses.fields(DistillationConfig) if field.init}
    hints = typing.get_type_hints(DistillationConfig)
    for name, value in list(recipe.training.items()):
        if name in _ELSEWHERE:
            yield f"training.{name}: is set by {_ELSEWHERE[name]} in a recipe; give it there"
        elif name not in known:
            yield f"training.{name}: unknown key{near(name, known)}; training takes the fields of DistillationConfig"
            continue
        if value is False and name.endswith("_strategy"):
            value = "no"  # which YAML reads as false
        try:
            recipe.training[name] = plain_value(hints.get(name), value)
        except ValueError as error:
            yield f"training.{name}: got {shown(value)} ({type(value).__name__}); expected {error}"
    if not isinstance(recipe.training.get("output_dir"), str) or not recipe.training["output_dir"]:
        yield f"training.output_dir: got {shown(recipe.training.get('output_dir'))}; expected the path of a folder"
    yield from _training_values(recipe.training)
    yield from _evaluation_in_training(recipe)
    if recipe.training.get("run_policy", "refuse") not in _POLICIES:
        policy = str(recipe.training["run_policy"])
        yield f"training.run_policy: got {policy!r}; expected {' or '.join(_POLICIES)}{near(policy, _POLICIES)}"


def _training_values(training: dict[str, Any]) -> Iterator[str]:
    """Numbers that the trainer would take in another sense or stumble over late."""
    least = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0.0}
    for name, lowest in least.items():
        value = training.get(name)
        if isinstance(value, int | float) and value < lowest:
            yield f"training.{name}: got {value}; expected at least {lowest}"
    if training.get("max_steps") == 0:
        yield "training.max_steps: got 0; expected at least 1, or no such key (then num_train_epochs counts)"


def _evaluation_in_training(recipe: Recipe) -> Iterator[str]:
    """What the evaluations of the trainer need, and whom they leave out."""
    strategy = recipe.training.get("eval_strategy", "no")
    if str(strategy).rpartition(".")[2].lower() in ("no", "none"):
        return
    if recipe.evaluation is None:
        yield (
            f"training.eval_strategy: got {strategy!r}, and there is nothing to evaluate on; add an evaluation "
            "section, or leave this key out"
        )
    cached = [recipe.teacher.cache, *(member.cache for member in recipe.teacher.members.values())]
    if any(cache is not None for cache in cached):
        yield (
            f"training.eval_strategy: got {strategy!r}, and a cached teacher knows no held-out texts; leave this key "
            "out (the questions are asked before and after training), or train without teacher.cache"
        )
    if recipe.evaluation is not None and recipe.evaluation.gold_baseline:
        scheduler = recipe.training.get("lr_scheduler_type")
        if scheduler in BY_EVALUATION:
            yield (
                f"evaluation.gold_baseline: isn't evaluated while it trains, and lr_scheduler_type {scheduler!r} "
                "follows from that; choose another one, or leave the baseline out"
            )


def _hub(recipe: Recipe) -> Iterator[str]:
    hub, student = recipe.hub, recipe.student
    if hub.push and hub.repo_id is None:
        yield "hub.repo_id: is required when hub.push is true; expected owner/name"
    for key, name in (("repo_id", hub.repo_id), ("base", hub.base)):
        if name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            yield f"hub.{key}: got {shown(name)}; expected owner/name"
    for key in ("base", "merged"):
        if getattr(hub, key) and student.lora is None:
            yield f"hub.{key}: is for adapters, and student.lora isn't given; leave it out"
    if hub.push and hub.merged and student.load_kwargs.get("quantization_config"):
        yield "hub.merged: the base is quantised, and merging would round the adapter away; leave it out"
    known = hub.base is not None or hub.merged or student.init is not None
    if hub.push and student.lora is not None and not known and Path(student.origin).exists():
        yield (
            f"hub.push: the adapter belongs on {shown(student.origin)}, a folder that nobody else has; give the id "
            "that this model has on the hub as hub.base, or set hub.merged: true"
        )
