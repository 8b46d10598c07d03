"""The parts of a recipe that are a class with its arguments: samplers, revisers and transforms, by key or by
`package.module:Class`.

Finds the class, holds the arguments against its constructor, and makes the object. What the objects do is known where
they are defined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hfkd.named import OWN_NAME, import_class
from hfkd.recipe.schema import Recipe
from hfkd.recipe.source import near, shown
from hfkd.recipe.values import argument_faults
from hfkd.revision import REVISERS, Reviser
from hfkd.sampling import SAMPLERS, ExampleSampler
from hfkd.transforms import TRANSFORMS, RowTransform

Part = ExampleSampler | Reviser | RowTransform


class _Place(NamedTuple):
    """What may stand under a key of `data`: what it is called, its built-in classes, their base."""

    word: str
    known: Mapping[str, str]
    base: type[Part]


_PLACES = {
    "transforms": _Place("transform", TRANSFORMS, RowTransform),
    "sampler": _Place("sampler", SAMPLERS, ExampleSampler),
    "revise": _Place("reviser", REVISERS, Reviser),
}


def part_faults(recipe: Recipe) -> Iterator[str]:
    """Faults of the parts, each under its key; classes of the user's own aren't imported."""
    for key, section in recipe.data.parts.items():
        word, known, base = _PLACES[key.split(".")[1]]
        if OWN_NAME.match(section.kind):
            continue
        if section.kind not in known:
            yield (
                f"{key}.kind: there is no {word} {shown(section.kind)}{near(section.kind, known)} (known: "
                f"{', '.join(known)}; your own is named as package.module:Class)"
            )
            continue
        cls = import_class(known[section.kind], key, base)
        faults = list(argument_faults(key, cls, section.model_extra or {}))
        yield from faults
        if not faults:
            try:
                made = cls(**(section.model_extra or {}))
            except (ValueError, TypeError, OSError) as error:
                yield f"{key}: {error}"
                continue
            yield from _beside(recipe, key, made)
    yield from _together(recipe)


def make_sampler(recipe: Recipe) -> ExampleSampler | None:
    """The sampler of a recipe; None where it has none.

    Raises:
        ValueError: A class of the user's own can't be imported, or refuses its arguments. So do the next two.
    """
    return next(iter(_made(recipe, "sampler")), None)


def make_revisers(recipe: Recipe) -> list[Reviser]:
    """The revisers of a recipe, in their order."""
    return _made(recipe, "revise")


def make_transforms(recipe: Recipe) -> list[RowTransform]:
    """The transforms of a recipe, in their order."""
    return _made(recipe, "transforms")


def _made(recipe: Recipe, place: str) -> list[Any]:
    """The objects of one place, in their order."""
    _, known, base = _PLACES[place]
    made = []
    for key, section in recipe.data.parts.items():
        if key.split(".")[1] != place:
            continue
        cls = import_class(known.get(section.kind, section.kind), f"{key}.kind", base)
        given = section.model_extra or {}
        if faults := list(argument_faults(key, cls, given)):
            raise ValueError("; ".join(faults))
        try:
            made.append(cls(**given))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}: {error}") from error
    return made


def _beside(recipe: Recipe, key: str, part: Part) -> Iterator[str]:
    if part.needs_teacher and recipe.teacher.kind == "none":
        yield f"{key}: asks the teacher, and teacher.kind is none; name a teacher, or leave this part out"


def _together(recipe: Recipe) -> Iterator[str]:
    """What the parts need of each other, and of the rest."""
    data = recipe.data
    if recipe.teacher.cache is not None and data.transforms:
        yield (
            "data.transforms: changes the rows, and teacher.cache holds what the teacher says of those before; train "
            "without teacher.cache"
        )
    known = data.sampler is not None and data.sampler.kind in SAMPLERS
    if known and recipe.reinforcement is None and "dataset" not in data.shares:
        yield (
            f"data.sampler: {data.sampler.kind} measures on the rows' own answers, and all answers are written during "
            "training; give data.answer a share of dataset, let the teacher write before training, or leave it out"
        )
    yield from _private(recipe)
    yield from _transforms(recipe)
    weighs = any(section.kind == "influence" for section in data.transforms)
    if weighs and data.token_weights is not None and ":" in data.token_weights:
        yield (
            "data.token_weights: is a function, which sees nothing of the weights that influence writes; leave one of "
            "the two out"
        )
    if recipe.reinforcement is not None and (data.sampler is not None or data.revise):
        key = "data.sampler" if data.sampler is not None else "data.revise"
        yield f"{key}: a rewarded run draws its prompts and writes its texts by itself; leave this out"
    yield from _kept_alike(recipe)


def _private(recipe: Recipe) -> Iterator[str]:
    """Marks of private tokens, and terms that heed them: either alone hides nothing. The user's own are trusted."""
    from hfkd.losses import LOSSES, STATE_LOSSES

    revisers = [section.kind for section in recipe.data.revise]
    losses = {**LOSSES, **STATE_LOSSES}
    terms = {term.kind: losses.get(term.kind) for term in recipe.loss.terms}
    if "swing" in terms and not any(kind == "private" or OWN_NAME.match(kind) for kind in revisers):
        yield (
            "loss.terms: swing hides tokens that are marked as private, and data.revise "
            f"{'marks none' if revisers else 'is empty'}; add {{kind: private}}, or name the measure itself"
        )
    heeds = "swing" in terms or any(loss is None or loss.fits_text or not loss.needs for loss in terms.values())
    if "private" in revisers and not heeds:
        yield (
            f"data.revise.{revisers.index('private')}: private marks tokens, and no term heeds the marks "
            f"({', '.join(terms)}), so nothing would be hidden; put {{kind: swing, measure: ...}} in the place of "
            "those that ask the teacher, or leave this part out"
        )


def _transforms(recipe: Recipe) -> Iterator[str]:
    """What single transforms need of the teacher and of the evaluation, as they would say only when they work."""
    kind = recipe.teacher.kind
    for place, section in enumerate(recipe.data.transforms):
        key = f"data.transforms.{place}"
        if section.kind == "confounders" and kind not in ("local", "none") and not OWN_NAME.match(kind):
            yield (
                f"{key}: confounders holds the student against one other model that reads the same tokens, and "
                f"teacher.kind is {kind}; set it to local"
            )
        clean = (section.model_extra or {}).get("path")
        if section.kind == "influence" and clean is None and recipe.evaluation is None:
            yield (
                f"{key}: influence holds rows against clean ones, and there are none; give it a path, or the recipe "
                "an evaluation section, whose held-out rows are read"
            )


def _kept_alike(recipe: Recipe) -> Iterator[str]:
    """A weight that goes by the share of rows kept, and the share itself, stand in two places."""
    shares = [section.model_extra.get("keep") for section in recipe.data.transforms if section.kind == "prune"]
    for place, term in enumerate(recipe.loss.terms):
        kept = term.weight.get("kept") if isinstance(term.weight, dict) else None
        if kept is not None and len(shares) == 1 and kept != shares[0]:
            yield (
                f"loss.terms.{place}.weight.kept: got {kept}, and prune keeps {shares[0]}; give both the same share"
            )
