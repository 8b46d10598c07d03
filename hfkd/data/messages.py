"""The shapes that a row may have, read in one way: text or chat messages, `prompt`/`completion` or `messages`.

It knows no tokenizer, no template and no file. Rows come from Arrow tables, which fill what a row doesn't have with
None, so None means absent everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, Any]


def is_conversational(row: Row) -> bool:
    """Whether the row holds chat messages instead of texts."""
    return has_messages(row) or isinstance(row.get("prompt"), list | tuple)


def has_messages(row: Row) -> bool:
    """Whether the row is one conversation (`messages`) rather than a prompt and a completion."""
    return row.get("messages") is not None and row.get("prompt") is None


def clean(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Copy messages without the keys that hold None.

    Raises:
        ValueError: Something in the list isn't a message with a role.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not message.get("role"):
            raise ValueError(
                f"a conversation holds {message!r}; expected messages such as {{'role': 'user', 'content': '...'}}"
            )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def is_answered(row: Row) -> bool:
    """Whether a conversation (`messages`) ends with the assistant's turn."""
    return bool(row["messages"]) and clean(row["messages"])[-1]["role"] == "assistant"


def prompt_messages(row: Row) -> list[Message]:
    """What stands before the answer, as messages; a text becomes one user message."""
    if has_messages(row):
        return clean(row["messages"])[: -1 if is_answered(row) else None]
    prompt = required(row, "prompt")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else clean(prompt)


def completion_messages(row: Row) -> list[Message]:
    """The answer as messages; a text becomes one assistant message.

    Raises:
        ValueError: The row has no answer.
    """
    if has_messages(row):
        if not is_answered(row):
            raise ValueError(
                "the conversation doesn't end with the assistant's turn, so there is no answer to learn; add one, or "
                "let the student or the teacher write it (answer)"
            )
        return clean(row["messages"])[-1:]
    completion = required(row, "completion")
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return clean(completion)


def required(row: Row, name: str) -> Any:
    """The value of a column.

    Raises:
        ValueError: The row has no such value.
    """
    value = row.get(name)
    if value is None:
        found = [key for key in row if row[key] is not None]
        hint = "give one, or let the teacher write the answers" if name == "completion" else "map a column to it"
        raise ValueError(f"a row has no {name!r}, it has {found}; {hint}")
    return value


def text_of(content: Any) -> str:
    """The text of a message's content; of a list of parts, the texts of its parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text") or "" if isinstance(part, Mapping) else str(part) for part in content)


def prompt_key(row: Row) -> str:
    """The prompt as it is compared with others: case, leading, trailing and repeated white space don't count.

    The contents of messages are joined, so that a text and the same text as one user message have the same key.
    """
    prompt = None if has_messages(row) else required(row, "prompt")
    text = prompt if isinstance(prompt, str) else "\n".join(text_of(m.get("content")) for m in prompt_messages(row))
    return " ".join(text.casefold().split())


def completion_text(row: Row) -> str:
    """The answer as plain text, stripped; of several messages, the last one."""
    if not has_messages(row) and isinstance(row.get("completion"), str):
        return row["completion"].strip()
    return text_of(completion_messages(row)[-1].get("content")).strip()


def text_key(row: Row) -> str:
    """The whole text as it is compared with others, for rows whose prompt is only the beginning of a passage."""
    return f"{prompt_key(row)} {' '.join(completion_text(row).casefold().split())}"
