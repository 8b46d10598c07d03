"""What a prompt style or a chat template leaves to learn: is there an answer token at all, and does an answer end?

Runs on a few rows, without a model; all rows are read when the views are made.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hfkd.data.messages import Row, completion_text
from hfkd.data.prompts import PromptBuilder
from hfkd.preflight.findings import Finding
from hfkd.run.build import Run
from hfkd.run.texts import unanswered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = "template"
_ROWS, _END = 8, 3


def is_chat(builder: PromptBuilder, row: Row) -> bool:
    """Whether the prompt of a row is written by a chat template."""
    return not isinstance(builder.prompt(row), str)


def check_template(run: Run) -> Iterator[Finding]:
    """Write the answers of the first rows, and look at what is learned of them.

    Args:
        run: With its rows and its builder.
    """
    builder, rows = run.builder, unanswered(run, run.train[:_ROWS])
    chats = is_chat(builder, rows[0])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            learned = [_learned(builder, row) for row in rows]
        except ValueError as error:
            what = "The chat template leaves no assistant token to learn" if chats else "An answer can't be written"
            yield Finding("error", _NAME, f"{what}: {error}", {"chat": chats})
            return
    figures = {"chat": chats, "rows": len(rows), "learned_tokens": [len(ids) for ids in learned]}
    if not all(learned):
        yield Finding("error", _NAME, _nothing(run, chats, learned), figures)
        return
    for words in dict.fromkeys(str(one.message) for one in said if "chat template" in str(one.message)):
        yield Finding("warning", _NAME, words)
    ends = [_ends(builder, ids, chats) for ids in learned]
    if not all(ends):
        yield Finding("warning", _NAME, _endless(run, chats), figures)
    yield from _stopped_early(run, chats)
    if all(ends):
        text = "The chat template" if chats else "The prompt style"
        last = run.tokenizer.decode(learned[0][-_END:])
        yield Finding("pass", _NAME, f"{text} leaves the answer to learn, its end included: ...{last!r}.", figures)


def _learned(builder: PromptBuilder, row: Row) -> list[int]:
    return [token for ids, supervised in builder.encode_turns(row) if supervised for token in ids]


def _nothing(run: Run, chats: bool, learned: Sequence[list[int]]) -> str:
    number = [bool(ids) for ids in learned].index(False)
    if chats:
        return (
            f"The chat template leaves no assistant token of training row {number}, so nothing would be learned. Look "
            "at {% generation %} in the template of the student's tokenizer, or use data.prompt.style: text"
        )
    return (
        f"No token of the answer of training row {number} is left to learn; look at its completion and at "
        f"data.prompt.answer ({run.style.answer!r})"
    )


def _ends(builder: PromptBuilder, ids: Sequence[int], chats: bool) -> bool:
    """Whether what is learned of an answer ends in something that ends a generated answer, too."""
    if builder.tokenizer.eos_token_id in ids[-_END:]:
        return True
    behind = builder.style.answer.rpartition("{completion}")[2]
    return not chats and any(stop in behind for stop in builder.style.stop)


def _endless(run: Run, chats: bool) -> str:
    end = _end_token(run.tokenizer)
    if chats:
        return (
            f"What is learned of an answer doesn't end in {end}, so the student isn't taught to stop. Put the end of "
            "the turn inside the assistant's part of the chat template, or set the tokenizer's eos_token to it."
        )
    return (
        f"data.prompt.answer is {run.style.answer!r}: what is learned of an answer ends neither in a stop string "
        f"({list(run.style.stop)}) nor in {end}, so the student isn't taught to stop. End it with a stop string."
    )


def _end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the end token {tokenizer.eos_token!r}" if tokenizer.eos_token else "an end token (the tokenizer has none)"


def _stopped_early(run: Run, chats: bool) -> Iterator[Finding]:
    """Stop strings within the data set's own answers: a generated one would end there."""
    if chats or not run.style.stop:
        return
    answers = [completion_text(row) for row in run.train[:1000] if row.get("completion") is not None]
    cut = sum(any(stop in answer for stop in run.style.stop) for answer in answers)
    if cut:
        yield Finding(
            "warning",
            _NAME,
            f"{cut} of the first {len(answers)} answers hold a stop string ({list(run.style.stop)}) before their end: "
            "whatever writes such an answer is cut off there. Choose other stop strings in data.prompt.stop.",
            {"answers": len(answers), "holding_a_stop_string": cut},
        )
