"""A workshop whose models say what a script says, for transforms that let models write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from conftest import make_tokenizer
from torch import nn

from hfkd import PromptBuilder, PromptStyle
from hfkd.rollout.base import Completion, GenerationSettings, Rollout
from hfkd.teachers import Teacher
from hfkd.transforms import Workshop

Script = Callable[[str, str, int], str]
"""Of who writes, the prompt's text and the seed in force: what is written."""


def named(name: str) -> nn.Module:
    """A model that is known by its name, with a weight to tell it from others."""
    model = nn.Linear(1, 1, bias=False)
    model.said_by = name
    with torch.no_grad():
        model.weight.fill_(float(len(name)))
    return model


class ScriptedTeacher(Teacher):
    """A teacher that only writes."""

    def signal(self, batch: Any, needs: frozenset[str]) -> Any:
        """It says nothing of texts that are there."""
        raise NotImplementedError

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The model that the script knows as `teacher`."""
        yield named("teacher")


class ScriptedRollout(Rollout):
    """Writes what the script says, and keeps a list of who was asked what."""

    def __init__(self, script: Script, tokenizer: Any) -> None:
        self.script, self.tokenizer = script, tokenizer
        self.settings = GenerationSettings(stop=("\n",))
        self.asked: list[tuple[str, str, GenerationSettings]] = []

    def generate(
        self, model: nn.Module, prompts: Sequence[list[int]], description: str | None = None
    ) -> list[Completion]:
        """One text for each prompt."""
        found = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            self.asked.append((model.said_by, text, self.settings))
            found.append(Completion([], self.script(model.said_by, text, self.settings.seed), True))
        return found


def scripted(script: Script, *, chat: bool = False, **fields: Any) -> Workshop:
    """A workshop with such a rollout; `said` is the list of what it told the user."""
    tokenizer = make_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    builder = PromptBuilder(tokenizer, PromptStyle())
    said: list[str] = []
    parts = {"teacher": ScriptedTeacher(), "rollout": ScriptedRollout(script, tokenizer), **fields}
    workshop = Workshop(named("student"), parts.pop("teacher"), builder, say=said.append, **parts)
    workshop.said = said
    return workshop
