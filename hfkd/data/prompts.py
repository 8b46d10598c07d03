"""From a row and demonstrations to the tokens of a prompt, and from a row to the tokens of its answer.

The answer is tokenized apart from the prompt, so its tokens are the same whatever the prompt is. This module decides
what a model reads; it doesn't know which model reads it, which rows are drawn as demonstrations, or what a loss is.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hfkd.data.alignment import Placed
from hfkd.data.chat import ChatTemplate, Piece
from hfkd.data.messages import (
    Message,
    Row,
    clean,
    completion_messages,
    completion_text,
    has_messages,
    is_answered,
    is_conversational,
    prompt_messages,
    required,
    text_of,
)

Prompt = str | list[Message]


@dataclass(frozen=True)
class PromptStyle:
    """How prompts are written.

    Args:
        style: `text` writes one text by the templates below; `chat` writes chat messages, as does any row whose prompt
            is a list of messages.
        system: Opens the prompt: a first paragraph in text, the system message in chat (rows with one keep theirs).
        question: Template of a question, in text style; `{prompt}` is the row's prompt.
        answer: Template of an answer, in text style; `{completion}` is the row's completion. Its end should be a stop
            string, so that a model learns to stop.
        separator: Stands behind each demonstration, in text style.
        stop: Strings that end a generated answer, in text style.
        teacher_context: Template around the whole prompt of a teacher that reads a row's `privileged_context`; in text
            style `{prompt}` is the formatted question, in chat style the content of the last user message.
        builder: A function `(row, demonstrations, privileged) -> str | list of messages` in place of all the above but
            `answer` and `stop`.

    Raises:
        ValueError: A template has an unknown field or lacks one, or the style doesn't exist.
    """

    style: Literal["text", "chat"] = "text"
    system: str | None = None
    question: str = "Question: {prompt}\nAnswer:"
    answer: str = " {completion}\n"
    separator: str = "\n"
    stop: tuple[str, ...] = ("\n",)
    teacher_context: str = "{privileged_context}\n\n{prompt}"
    builder: Callable[[Row, Sequence[Row], bool], Prompt] | None = None

    def __post_init__(self) -> None:
        if self.style not in ("text", "chat"):
            raise ValueError(f"prompt.style is {self.style!r}; expected 'text' or 'chat'")
        _check_template("question", self.question, {"prompt"})
        _check_template("answer", self.answer, {"completion"})
        _check_template("teacher_context", self.teacher_context, {"privileged_context", "prompt"})


def _check_template(name: str, template: str, fields: set[str]) -> None:
    way_out = f"write {' and '.join(sorted('{' + field + '}' for field in fields))}, and double a literal brace"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"prompt.{name} is {template!r}, which is no template ({error}); {way_out}") from None
    found = {field for _, field, _, _ in parts if field is not None}
    if unknown := sorted(found - fields):
        raise ValueError(f"prompt.{name} is {template!r} with the unknown fields {unknown}; {way_out}")
    if missing := sorted(fields - found):
        raise ValueError(f"prompt.{name} is {template!r} without the fields {missing}; {way_out}")


class PromptBuilder:
    """Writes and tokenizes prompts and answers for one tokenizer.

    Args:
        tokenizer: The student's tokenizer.
        style: How prompts are written.

    Raises:
        ValueError: The style is `chat` and the tokenizer has no chat template.
    """

    # Stands before a text that is tokenized as the continuation of another one, see `_continuation`.
    _ANCHOR = ":"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: PromptStyle | None = None) -> None:
        self.tokenizer = tokenizer
        self.style = style or PromptStyle()
        self.chat = ChatTemplate(tokenizer)
        if self.style.style == "chat" and self.style.builder is None:
            self.chat.require()
        anchor = self._plain(self._ANCHOR)
        self._anchor = [] if self._plain(self._ANCHOR + " a") == anchor + self._plain(" a") else anchor
        self._trailing = self._count_trailing()

    def prompt(self, row: Row, demonstrations: Sequence[Row] = (), privileged: bool = False) -> Prompt:
        """Write the prompt of a row.

        Args:
            row: The row that is asked.
            demonstrations: Rows shown before it with their answers, in this order.
            privileged: Whether the row's `privileged_context` is shown too, where it has one.

        Returns:
            A text, or chat messages that end before the answer.

        Raises:
            ValueError: The row or a demonstration lacks what the style needs.
        """
        if self.style.builder is not None:
            return self.style.builder(row, demonstrations, privileged)
        if self._chats(row):
            return self._messages(prompt_messages(row), row, demonstrations, privileged)
        style = self.style
        parts = [f"{style.system}\n\n"] if style.system else []
        parts += [self._text(shown) + self._answer(shown) + style.separator for shown in demonstrations]
        question = self._text(row)
        if context := self._context(row, privileged):
            question = style.teacher_context.format(privileged_context=context, prompt=question)
        return "".join([*parts, question])

    def encode_prompt(self, row: Row, demonstrations: Sequence[Row] = (), privileged: bool = False) -> list[int]:
        """Tokenize the prompt of a row, as a model is to read it before it answers.

        A text begins with the tokens that the tokenizer puts before any text (BOS, if it does) and never ends with
        EOS; a chat begins as its template says.
        """
        prompt = self.prompt(row, demonstrations, privileged)
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, verbose=False)["input_ids"]
            return list(ids[: len(ids) - self._trailing])
        return self._plain(self.chat.render(clean(prompt), to_answer=True))

    def encode_completion(self, row: Row) -> list[int]:
        """Tokenize the answer of a row alone, so that it is the same behind every prompt.

        Raises:
            ValueError: The row has no completion, or the chat template isn't prefix-safe.
        """
        return self._continuation(self._completion(row))

    def encode_turns(
        self, row: Row, demonstrations: Sequence[Row] = (), *, privileged: bool = False
    ) -> list[tuple[list[int], bool]]:
        """Tokenize a whole example in pieces, each with whether it is supervised.

        Rows with a completion give the prompt and the completion. Rows with `messages` give all their assistant turns
        where the chat template marks them, else the last one; demonstrations are never supervised.
        """
        head, rest = self._turns(row, demonstrations, privileged)
        return [(head, False), *((self._continuation(text), supervised) for text, supervised in rest)]

    def answer_pieces(self, row: Row) -> list[Placed]:
        """Tokenize what `encode_turns` supervises of a row, and say where in its text each token lies.

        Raises:
            ValueError: As `encode_turns`; or the tokenizer can't say where its tokens lie.
        """
        return [self._placed(text) for text, supervised in self._turns(row)[1] if supervised]

    def _turns(
        self, row: Row, demonstrations: Sequence[Row] = (), privileged: bool = False
    ) -> tuple[list[int], list[Piece]]:
        """The ids of what comes before the first answer, and the texts that follow."""
        if has_messages(row) and self.style.builder is None:
            completion_messages(row)  # one without an answer is refused, whatever is marked of its earlier turns
            pieces = self._marked_pieces(row, demonstrations, privileged)
            if pieces is not None:
                (before, _), *rest = pieces  # the assistant never speaks first
                return self._plain(before), rest
        return self.encode_prompt(row, demonstrations, privileged), [(self._completion(row), True)]

    def _completion(self, row: Row) -> str:
        """What is written of a row behind its prompt."""
        prompt = self.prompt(row)
        if isinstance(prompt, str):
            return self._answer(row)
        return self.chat.split(clean(prompt), completion_messages(row))[1]

    def with_answer(self, row: Row, text: str) -> dict[str, Any]:
        """Copy a row with a generated text as its completion.

        What the answer template would add is taken off the text, so that the text isn't doubled when it is written
        again. It stands behind a conversation's last turn, in the place of the answer if there is one. The gold
        answer stays in `answer`.
        """
        copy = dict(row)
        if copy.get("answer") is None and (is_answered(row) if has_messages(row) else row.get("completion")):
            copy["answer"] = completion_text(row)
        if has_messages(row):
            copy["messages"] = [*prompt_messages(row), {"role": "assistant", "content": text.strip()}]
        elif isinstance(row.get("prompt"), str) and not isinstance(row.get("completion"), list | tuple):
            copy["completion"] = text.strip() if self._chats(row) else self._unformatted(text)
        else:
            copy["completion"] = [{"role": "assistant", "content": text.strip()}]
        return copy

    def _unformatted(self, text: str) -> str:
        before, _, after = self.style.answer.partition("{completion}")
        return text.strip().removeprefix(before.strip()).removesuffix(after.strip()).strip()

    def _chats(self, row: Row) -> bool:
        return self.style.style == "chat" or is_conversational(row)

    def _text(self, row: Row) -> str:
        prompt = required(row, "prompt") if not has_messages(row) else row["messages"]
        if not isinstance(prompt, str):
            raise ValueError(
                "a demonstration holds chat messages but the row holds text; set prompt.style to chat, or give "
                "both in one form"
            )
        return self.style.question.format(prompt=prompt)

    def _answer(self, row: Row) -> str:
        completion = required(row, "completion")
        if not isinstance(completion, str):
            raise ValueError(
                "a row has a text as prompt and messages as completion; give both as text or both as messages"
            )
        return self.style.answer.format(completion=completion)

    def _context(self, row: Row, privileged: bool) -> str | None:
        return (row.get("privileged_context") or None) if privileged else None

    def _messages(
        self, own: list[Message], row: Row, demonstrations: Sequence[Row], privileged: bool
    ) -> list[Message]:
        """System message, demonstrations as earlier turns, then the row's own turns."""
        opening = own[:1] if own and own[0]["role"] == "system" else []
        turns = own[len(opening) :]
        if not opening and self.style.system:
            opening = [{"role": "system", "content": self.style.system}]
        shown = [message for each in demonstrations for message in _demonstration_turns(each)]
        if context := self._context(row, privileged):
            turns = self._with_context(turns, context)
        return [*opening, *shown, *turns]

    def _with_context(self, turns: list[Message], context: str) -> list[Message]:
        last = max((index for index, message in enumerate(turns) if message["role"] == "user"), default=None)
        if last is None:
            raise ValueError("a row has a privileged_context but no user message to put it in")
        content = self.style.teacher_context.format(
            privileged_context=context, prompt=text_of(turns[last].get("content"))
        )
        return [*turns[:last], {**turns[last], "content": content}, *turns[last + 1 :]]

    def _marked_pieces(self, row: Row, demonstrations: Sequence[Row], privileged: bool) -> list[Piece] | None:
        own = clean(row["messages"])
        shown = self._messages(own, row, demonstrations, privileged)
        return self.chat.pieces(shown, self._messages(own, row, (), False))

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _continuation(self, text: str) -> list[int]:
        """Tokenize a text that follows another one.

        Tokenizers of the SentencePiece kind put a space before the first word of what they are given. Behind an anchor
        that is cut off again they don't, so the ids are those that a model would generate.
        """
        if self._anchor:
            ids = self._plain(self._ANCHOR + text)
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return self._plain(text)

    def _placed(self, text: str) -> Placed:
        """`_continuation`, with the place of each token in the text."""
        if self._anchor:
            placed = Placed.of(self.tokenizer, self._ANCHOR + text)
            if placed.ids[: len(self._anchor)] == self._anchor:
                return placed.behind(len(self._anchor), len(self._ANCHOR))
        return Placed.of(self.tokenizer, text)

    def _count_trailing(self) -> int:
        """How many tokens the tokenizer puts behind any text."""
        bare = self._plain("a")
        ids = list(self.tokenizer("a", verbose=False)["input_ids"])
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                return len(ids) - start - len(bare)
        return int(bool(ids) and ids[-1] == self.tokenizer.eos_token_id)


def _demonstration_turns(row: Row) -> list[Message]:
    """A demonstration as turns: without a system message, which only opens a conversation."""
    turns = [*prompt_messages(row), *completion_messages(row)]
    return [message for message in turns if message["role"] != "system"]
