"""How much a model's answer depends on each token of a row's own prompt: gradients with respect to embeddings.

Knows prompts, models and places of tokens; it doesn't know what is made of the gradients.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfkd.batch import IGNORE, View
from hfkd.data.alignment import Placed
from hfkd.data.messages import clean, has_messages
from hfkd.data.prompts import PromptBuilder
from hfkd.packing import run_view
from hfkd.rows import Head, base_model_of, input_device, supervised
from hfkd.teachers import evaluating
from hfkd.transforms.base import Row
from hfkd.transforms.spans import Span

_MARK = "\ue000"


@dataclass(frozen=True)
class AskedRow:
    """A row as a model reads it, and where its own words lie in that.

    Args:
        prompt: Token ids of the whole prompt, template included.
        answer: Token ids of the answer.
        places: Of the prompt's tokens, those that cover a character of `text`.
        text: The row's own prompt, or of a conversation the last thing that the user says.
        spans: For each of `places`, the characters of `text` that it covers.
    """

    prompt: list[int]
    answer: list[int]
    places: list[int]
    text: str
    spans: list[Span]

    @classmethod
    def of(cls, row: Row, builder: PromptBuilder) -> AskedRow:
        """Write a row without demonstrations and find its own words.

        Raises:
            ValueError: The row has no answer, what is asked isn't a text, the prompt doesn't hold it once as it is, or
                the tokenizer can't say where its tokens lie.
        """
        ids, answer = builder.encode_prompt(row), builder.encode_completion(row)
        if not answer:
            raise ValueError("the answer of a row has no token, so nothing depends on its prompt")
        written, marked = _written(row, builder), _written(with_question(row, _MARK), builder)
        before, mark, after = marked.partition(_MARK)
        own = written[len(before) : len(written) - len(after)]
        if not mark or _MARK in after or before + own + after != written or own not in question_of(row):
            raise ValueError(
                "the prompt doesn't hold the row's own words once, as they are, so none of them can be taken out; "
                "write prompts by prompt.question or a chat template"
            )
        placed = Placed.of(builder.tokenizer, written)
        lead = len(ids) - len(placed.ids)
        if ids[max(0, lead) :] != placed.ids:
            raise ValueError("the tokenizer reads the prompt in another way where it says which characters it reads")
        found = [(lead + place, span) for place, span in _inside(placed, len(before), len(own))]
        return cls(ids, answer, [place for place, _ in found], own, [span for _, span in found])

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    def removable(self, spared: re.Pattern[str] | None = None) -> list[bool]:
        """For each of `places`, whether it is more than white space and holds nothing that is spared."""
        pieces = [self.text[start:end] for start, end in self.spans]
        return [bool(piece.strip()) and not (spared and spared.search(piece)) for piece in pieces]


def question_of(row: Row) -> str:
    """The words of a row that can be changed.

    Raises:
        ValueError: They aren't a text.
    """
    found = row["messages"] if has_messages(row) else row.get("prompt")
    if isinstance(found, list | tuple):
        turns = clean(found)
        found = turns[_last_user(turns)].get("content")
    if not isinstance(found, str):
        raise ValueError("what the user asks isn't a text, so no words can be taken out of it; give texts as contents")
    return found


def with_question(row: Row, text: str) -> dict[str, Any]:
    """A copy of a row that asks something else; all other columns, the answer too, stay as they are."""
    name = "messages" if has_messages(row) else "prompt"
    if not isinstance(row[name], list | tuple):
        return {**row, name: text}
    turns = clean(row[name])
    last = _last_user(turns)
    return {**row, name: [*turns[:last], {**turns[last], "content": text}, *turns[last + 1 :]]}


def sensitivity(model: nn.Module, asked: AskedRow) -> Tensor:
    """The norm of d(mean cross-entropy of the answer's tokens) / d(embedding), for the row's own words.

    Nothing but the embeddings gets a gradient; dropout is off.

    Args:
        model: A causal LM or a PEFT model around one; what of it learns plays no part.
        asked: The row.

    Returns:
        [n] float32, one for each of `asked.places`, taken in float32 whatever the model's dtype.
    """
    device = input_device(model)
    ids = torch.tensor([[*asked.prompt, *asked.answer]], device=device)
    labels = ids.clone()
    labels[:, : len(asked.prompt)] = IGNORE
    view = View(ids, torch.ones_like(ids), labels)
    with evaluating(model), torch.enable_grad(), _leaves(model) as leaves:
        hidden, labels = run_view(model, view)
        logits = Head.of(model).logits(supervised(hidden, labels.to(hidden.device))).float()
        loss = nn.functional.cross_entropy(logits, view.targets.to(logits.device))
        (gradient,) = torch.autograd.grad(loss, leaves[:1])
    return gradient[0, torch.tensor(asked.places, device=gradient.device)].float().norm(dim=-1)


@contextmanager
def _leaves(model: nn.Module) -> Iterator[list[Tensor]]:
    """The embeddings of each forward in here, cut off from what made them; [1, T, H]."""
    found: list[Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1].clone()  # some models change what they are given in place

    handle = base_model_of(model).get_input_embeddings().register_forward_hook(cut)
    try:
        yield found
    finally:
        handle.remove()


def _written(row: Row, builder: PromptBuilder) -> str:
    prompt = builder.prompt(row)
    return prompt if isinstance(prompt, str) else builder.chat.render(clean(prompt), to_answer=True)


def _inside(placed: Placed, start: int, length: int) -> Iterator[tuple[int, Span]]:
    """The tokens that cover some of these characters, and which; the template's own part is cut off."""
    for place, (first, last) in enumerate(placed.offsets):
        span = max(0, first - start), min(length, last - start)
        if span[0] < span[1]:
            yield place, span


def _last_user(turns: list[dict[str, Any]]) -> int:
    found = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    if not found:
        raise ValueError("a conversation has no user message, so there are no words of the user to take out")
    return found[-1]
