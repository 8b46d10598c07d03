"""What decided which rows, examples and tokens were learned, and whether a reward had a say, read off the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hfkd.card.markdown import Markdown, code, joined
from hfkd.card.reading import count, entries, section, text, value

_TOLD = ("kind", "before", "after")
_PAPERS = {
    "domains": "2407.16154",
    "hard_prompts": "2305.14890",
    "prune": "2403.07854",
    "influence": "2002.08484",
    "confounders": "2506.07851",
    "rejection": "2308.01825",
    "rounds": "2311.08213",
    "select": "2411.08028",
    "teacher_quality": "2309.17134",
    "correct": "2407.10068",
    "private": "2212.08349",
}


def method_papers(run: Mapping[str, Any]) -> list[str]:
    """The arXiv numbers of the methods that were used."""
    parts = [*entries(run, "recipe.data.transforms"), section(run, "recipe.data.sampler")]
    kinds = [text(part, "kind") for part in [*parts, *entries(run, "recipe.data.revise")]]
    return [_PAPERS[kind] for kind in kinds if kind in _PAPERS]


def methods_lines(run: Mapping[str, Any]) -> list[Markdown]:
    """One line for each sampler, transform and reviser of the recipe, and for a reward; empty without any."""
    return list(_lines(run))


def hides(run: Mapping[str, Any]) -> bool:
    """Whether private tokens were to be learned less."""
    return any(text(part, "kind") == "private" for part in entries(run, "recipe.data.revise"))


def _lines(run: Mapping[str, Any]) -> Iterator[Markdown]:
    done = entries(run, "data.transforms")
    for place, part in enumerate(entries(run, "recipe.data.transforms")):
        told = done[place] if place < len(done) else {}
        known = isinstance(value(told, "before"), int) and isinstance(value(told, "after"), int)
        became = f"made {count(told, 'after')} rows of {count(told, 'before')}" if known else "made the training rows"
        counts = ", ".join(f"{name} {one}" for name, one in told.items() if name not in _TOLD and isinstance(one, int))
        yield joined([_named(part), became + _settings_after(part), f"({counts})" if counts else ""])
    if sampler := section(run, "recipe.data.sampler"):
        yield joined([_named(sampler), "chose the examples of each step" + _settings_after(sampler)])
    for part in entries(run, "recipe.data.revise"):
        yield joined([_named(part), "changed each step's batches before they were learned" + _settings_after(part)])
    if reward := section(run, "recipe.reinforcement"):
        judge = text(reward, "verifier")
        learned = "and its word was not learned" if value(reward, "reward_weight") == 0 else "and its word was learned"
        yield joined([code(judge) if judge else "A verifier", f"judged what the student drew, {learned}"])


def _named(part: Mapping[str, Any]) -> Markdown:
    return code(text(part, "kind", "unnamed"))


def _settings_after(part: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name}: {setting}" for name, setting in part.items() if name != "kind")
    return f" ({settings})" if settings else ""
