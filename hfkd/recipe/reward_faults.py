"""What a recipe with a reward must not ask for: keys that can't stand beside `reinforcement`, found before a model is
loaded. One line per fault, as `hfkd.recipe.checks` gives for the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from hfkd.named import OWN_NAME
from hfkd.recipe.reinforcement import ReinforcementSection
from hfkd.recipe.schema import Recipe
from hfkd.recipe.source import near, shown

_GENERATION = {
    "max_completion_length": "data.generation.max_new_tokens",
    "temperature": "data.generation.temperature",
    "top_p": "data.generation.top_p",
}


def reward_faults(recipe: Recipe) -> Iterator[str]:
    """Faults of a rewarded run; none where the recipe has no `reinforcement`."""
    section = recipe.reinforcement
    if section is None:
        return
    yield from _verifier(section)
    yield from _weights(recipe, section)
    yield from _answers(recipe)
    yield from _options(section)
    yield from _training(recipe)
    if section.estimator != "full" and names_own_terms(recipe):
        yield (
            f"loss.terms: reinforcement.estimator is {section.estimator}, which estimates the reverse KL and no other "
            "terms; leave loss out, or set reinforcement.estimator: full"
        )


def names_own_terms(recipe: Recipe) -> bool:
    """Whether a rewarded recipe's loss is another one than what it has without that section."""
    return [term.model_dump(exclude_defaults=True) for term in recipe.loss.terms] != [{"kind": "reverse_kl"}]


def _training(recipe: Recipe) -> Iterator[str]:
    """Settings of a distillation run that a rewarded one doesn't know, and that have no place in another section."""
    for name in ("padding_free", "log_gradient_norms", "log_agreement"):
        if recipe.training.get(name):
            yield f"training.{name}: isn't read by a rewarded run; leave it out"
    if str(recipe.training.get("eval_strategy", "no")).lower() not in ("no", "false"):
        yield "training.eval_strategy: a rewarded run isn't evaluated while it trains; leave it out"


def _verifier(section: ReinforcementSection) -> Iterator[str]:
    from hfkd.data.verify import VERIFIERS

    name = section.verifier
    if name not in VERIFIERS and not OWN_NAME.match(name):
        yield (
            f"reinforcement.verifier: there is no verifier {shown(name)}{near(name, VERIFIERS)} (known: "
            f"{', '.join(VERIFIERS)}; your own is named as package.module:function)"
        )


def _weights(recipe: Recipe, section: ReinforcementSection) -> Iterator[str]:
    from hfkd.reinforcement.config import check_terms
    from hfkd.schedules import all_values

    try:
        distilled, _ = check_terms(section.distillation_weight, section.reward_weight)
    except ValueError as error:
        yield f"reinforcement.{error}"
        return
    asks = max(all_values(distilled)) > 0
    if asks and recipe.teacher.kind == "none":
        yield (
            "reinforcement.distillation_weight: is above 0, and teacher.kind is none; set it to 0 for the reward "
            "alone, or name a teacher"
        )


def _answers(recipe: Recipe) -> Iterator[str]:
    data, generation = recipe.data, recipe.data.generation
    if data.answer != "student":
        yield f"data.answer: got {shown(data.answer)}, and a rewarded student writes all answers; set answer: student"
    if generation.temperature == 0:
        yield (
            "data.generation.temperature: got 0, so that all answers to a prompt would be the same and none better "
            "than another; set it to 1.0"
        )
    if generation.backend != "transformers":
        yield (
            f"data.generation.backend: got {generation.backend}; TRL writes here: set reinforcement.options: "
            "{use_vllm: true}"
        )
    if generation.buffer_size:
        yield (
            "data.generation.buffer_size: rewarded answers are used again by reinforcement.num_iterations; leave it "
            "out"
        )
    for name in ("sampler", "revise", "token_weights"):
        if getattr(data, name, None):
            yield f"data.{name}: isn't read by a rewarded run; leave it out"
    if any(len(text) != 1 for text in data.prompt.stop):
        yield (
            f"data.prompt.stop: got {data.prompt.stop}; a rewarded answer ends at tokens, so expected single "
            'characters such as ["\\n"], or [] for the end that the student writes'
        )


def _options(section: ReinforcementSection) -> Iterator[str]:
    from transformers import TrainingArguments

    from hfkd.reinforcement.config import KDRLConfig

    known = {field.name for field in dataclasses.fields(KDRLConfig) if field.init}
    shared = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = set(ReinforcementSection.model_fields)
    for name in section.options:
        if name in _GENERATION:
            yield f"reinforcement.options.{name}: is set by {_GENERATION[name]} in a recipe; give it there"
        elif name in own:
            yield f"reinforcement.options.{name}: is a key of its own, reinforcement.{name}; give it there"
        elif name in shared:
            yield f"reinforcement.options.{name}: is a field of TrainingArguments; give it as training.{name}"
        elif name not in known:
            yield f"reinforcement.options.{name}: unknown key{near(name, known)}; expected a field of TRL's GRPOConfig"
