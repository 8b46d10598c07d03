"""Chat messages to text by the tokenizer's chat template, with the places that an assistant speaks.

Knows chat templates; it doesn't know rows, demonstrations or what is learned.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hfkd.data.messages import Message

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Piece = tuple[str, bool]
"""A run of text, and whether an assistant turn of the row is what it holds."""


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: Any tokenizer of transformers; it needs a chat template only when something is rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def require(self) -> str:
        """The template.

        Raises:
            ValueError: The tokenizer has none.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path or type(self.tokenizer).__name__!r} has no chat "
                "template, but the prompts are chat messages; set prompt.style to text with rows of text, use a "
                "tokenizer of an instruction-tuned model, or set tokenizer.chat_template"
            )
        return self.tokenizer.get_chat_template()

    def render(self, messages: Sequence[Message], *, to_answer: bool) -> str:
        """The text of a conversation.

        Args:
            messages: At least one message.
            to_answer: Whether the header of an assistant turn follows, so that a model answers next.

        Raises:
            ValueError: There is no template, or the template refuses the conversation.
        """
        self.require()
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=to_answer)
        except Exception as error:  # templates raise jinja2 errors of their own words
            roles = [message.get("role") for message in messages]
            raise ValueError(f"the chat template refuses a conversation with the roles {roles}: {error}") from error
        _check_written(messages[-1], text)
        return text

    def split(self, prompt: Sequence[Message], completion: Sequence[Message]) -> tuple[str, str]:
        """Render a prompt, and what the template adds to it for a completion.

        Raises:
            ValueError: The text of the whole conversation doesn't begin with the text of the prompt.
        """
        before = self.render(prompt, to_answer=True)
        whole = self.render([*prompt, *completion], to_answer=False)
        if not whole.startswith(before):
            same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
            raise ValueError(
                "the chat template isn't prefix-safe: with the answer the conversation no longer begins with the "
                f"prompt. After {before[:same][-30:]!r} the prompt goes on {before[same:][:30]!r} and the "
                f"conversation {whole[same:][:30]!r}; use a template that renders earlier turns in one way, or "
                "prompt.style: text"
            )
        return before, whole[len(before) :]

    def pieces(self, messages: Sequence[Message], own: Sequence[Message]) -> list[Piece] | None:
        """Cut a conversation at the marks of its assistant turns, and supervise the row's own turns only.

        Args:
            messages: What is rendered: demonstrations as earlier turns, then the row's own conversation.
            own: The row's own conversation, which says how many marks at the end are the row's.

        Returns:
            The pieces in order, or None where the template marks no assistant turn.

        Raises:
            ValueError: Behind the demonstrations the template writes the row's own turns in another way.
        """
        if self.marked is None:
            return None
        alone, spans_alone = self._spans(own)
        text, spans = self._spans(messages)
        expected = [alone[start:end] for start, end in spans_alone]
        if not expected:
            return None
        kept = spans[-len(expected) :]
        found = [text[start:end] for start, end in kept]
        if found != expected:
            raise ValueError(
                f"the chat template renders the assistant turns {expected} alone but {found} behind demonstrations or "
                "other context, so the two views can't be supervised on the same tokens; use another chat template"
            )
        pieces, position = [], 0
        for start, end in kept:
            pieces += [(text[position:start], False), (text[start:end], True)]
            position = end
        return [*pieces, (text[position:], False)]

    def _spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.marked,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        _check_written(messages[-1], texts[0])
        return texts[0], [(start, end) for start, end in spans[0] if end > start]

    @cached_property
    def marked(self) -> str | None:
        """The template with assistant turns marked: its own, or TRL's version of it; else None, with one warning."""
        template = self.require()
        return template if _MARK.search(template) else _from_trl(self.tokenizer)


def _check_written(message: Message, text: str) -> None:
    """Templates of some vision models write nothing of a content that is a plain text, and say nothing about it."""
    content = message.get("content")
    # the beginning may be reasoning, which templates rewrite
    end = content.strip()[-20:] if isinstance(content, str) else ""
    if end not in text:
        raise ValueError(
            f"the chat template doesn't write the content {end!r} of a message of the role {message['role']!r}; it "
            "may want contents as lists of parts such as {'type': 'text', 'text': '...'}, or another tokenizer"
        )


def _from_trl(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tokenizer)
    except (ImportError, ValueError) as error:
        reason: Any = "TRL isn't installed" if isinstance(error, ImportError) else "TRL knows no marked version of it"
    warnings.warn(
        f"The chat template marks no assistant turns ({{% generation %}}) and {reason}: of rows with `messages`, "
        "only the last assistant turn is learned.",
        stacklevel=3,
    )
    return None
