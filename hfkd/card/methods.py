"""What decided which rows, examples and tokens were learned, and whether a reward had a say, read off the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hfkd.card.markdown import Markdown, code, joined
from hfkd.card.reading import count, entries, section, text, value


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
        yield joined([_named(part), became + _settings_after(part)])
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
