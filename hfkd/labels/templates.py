"""What a teacher is asked of a row, and how its text is read: what a template is, and the two for labels.

Knows rows and texts. How a text is had, and how often one is asked for, is known elsewhere.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hfkd.data.load import CANONICAL
from hfkd.data.messages import Message, has_messages, is_conversational, prompt_messages, text_of

_PLACE = re.compile(r"\{([a-z_]+)\}")
_KEPT = tuple(name for name in CANONICAL if name not in ("prompt", "completion", "messages", "token_weights"))


class FormatError(ValueError):
    """A text of the teacher isn't in the form that the template asks for."""


@dataclass(frozen=True)
class Answer:
    """One text of the teacher, read.

    Attributes:
        text: As it came.
        answer: The short answer in it.
        completion: What a student is to write.
        value: What two samples have in common when they agree.
    """

    text: str
    answer: str
    completion: str
    value: Hashable


def fill(template: str, **values: str) -> str:
    """A text with its `{name}` places filled, once: braces in what is filled in stay as they are."""
    return _PLACE.sub(lambda found: values.get(found[1], found[0]), template)


def check_places(key: str, template: str, needed: Sequence[str], known: Sequence[str] = ()) -> None:
    """Refuse a template text that leaves out what it is for, or has a place that nothing fills.

    Raises:
        ValueError: Names the place.
    """
    if not isinstance(template, str):
        raise ValueError(f"{key} is {template!r}; expected a text")
    places = _PLACE.findall(template)
    for name in needed:
        if name not in places:
            raise ValueError(f"{key} has no {{{name}}}; expected the place where it goes")
    for name in places:
        if name not in (*needed, *known):
            names = ", ".join(f"{{{one}}}" for one in (*needed, *known))
            raise ValueError(f"{key} has a place {{{name}}} that nothing fills; there are {names}")


class Template(ABC):
    """Asks a teacher about rows. `read` is the method to write; a template must not change once it is made.

    Args:
        instruction: The teacher's last user message; `{prompt}` is the row's.
        system: A system message before it.
        examples: Worked examples, `{prompt, completion}` each: turns before the question. The completion is what the
            teacher should have written.

    Attributes:
        together: Whether a student can learn several answers to one row (`keep: all`).
    """

    together: ClassVar[bool] = True

    def __init__(
        self, instruction: str = "{prompt}", system: str | None = None, examples: list[dict[str, str]] | None = None
    ) -> None:
        check_places("instruction", instruction, ("prompt",))
        for example in examples or []:
            texts = isinstance(example, Mapping) and set(example) == {"prompt", "completion"}
            if not texts or not all(isinstance(part, str) and part.strip() for part in example.values()):
                raise ValueError(f"examples holds {example!r}; expected {{prompt: ..., completion: ...}}, both texts")
        self.instruction = instruction
        self.system = system
        self.examples = [dict(example) for example in examples or []]

    def messages(self, row: Mapping[str, Any]) -> list[Message]:
        """What the teacher reads of a row."""
        *before, last = prompt_messages(row)
        asked = [{"role": "system", "content": self.system}] if self.system else []
        for example in self.examples:
            asked.append({"role": "user", "content": fill(self.instruction, prompt=example["prompt"])})
            asked.append({"role": "assistant", "content": example["completion"]})
        content = fill(self.instruction, prompt=text_of(last.get("content")))
        return [*asked, *before, {**last, "content": content}]

    @abstractmethod
    def read(self, row: Mapping[str, Any], text: str) -> Answer:
        """Read the teacher's text; called in several threads at once.

        Args:
            row: What was asked about.
            text: Never empty.

        Raises:
            FormatError: It isn't in the form that was asked for. It is asked for again then.
        """

    def rows(self, labelled: Sequence[tuple[int, Mapping[str, Any], Answer]]) -> list[dict[str, Any]]:
        """What is written for training.

        Args:
            labelled: Number, row and answer; a row may be there several times.

        Returns:
            Rows in the columns that recipes read, in that order. `answer` is the source's own where it has one.
        """
        return [learned_row(number, row, answer) for number, row, answer in labelled]


def learned_row(number: int, row: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """A row to learn, in the form that the source has: texts, or messages."""
    prompt: Any = prompt_messages(row) if has_messages(row) else row["prompt"]
    completion: Any = answer.completion
    if is_conversational(row):
        completion = [{"role": "assistant", "content": completion}]
    kept = {name: row[name] for name in _KEPT if row.get(name) is not None}
    made = {"prompt": prompt, "completion": completion, "answer": answer.answer, **kept}
    return made | {"teacher_answer": answer.answer, "source_row": number}


class LabelTemplate(Template):
    """A short answer: a class, a word, a number.

    Args:
        instruction, system, examples: See `Template`.
        labels: The only answers that count, in the spelling that is learned; any text where none are given.
        pattern: A regular expression whose first group, or whole match, is the answer: for a teacher that answers in
            sentences. The last match counts.
    """

    def __init__(
        self,
        instruction: str = "{prompt}",
        system: str | None = None,
        examples: list[dict[str, str]] | None = None,
        labels: list[str] | None = None,
        pattern: str | None = None,
    ) -> None:
        super().__init__(instruction, system, examples)
        self.labels = checked_labels(labels)
        self.pattern = compiled("pattern", pattern)

    def read(self, row: Mapping[str, Any], text: str) -> Answer:
        """The label, or what the pattern finds."""
        found = text.strip()
        if self.pattern is not None:
            matches = list(self.pattern.finditer(text))
            if not matches:
                raise FormatError(f"nothing in it matches {self.pattern.pattern!r}")
            found = (matches[-1][1 if self.pattern.groups else 0] or "").strip()
        found = one_of(self.labels, found)
        return Answer(text, found, found, _same(found))


class RationaleTemplate(Template):
    """An answer with the reasons before it.

    Args:
        instruction, system, examples: See `Template`. The instruction has to ask for the marker.
        marker: What the last line with the answer begins with, whatever the case.
        completion: What the student writes, of `{rationale}`, `{marker}` and `{answer}`.
        labels: As for a label.
    """

    def __init__(
        self,
        instruction: str = '{prompt}\n\nGive your reasons. Then write a last line: "Answer:" and the answer alone.',
        system: str | None = None,
        examples: list[dict[str, str]] | None = None,
        marker: str = "Answer:",
        completion: str = "{rationale}\n{marker} {answer}",
        labels: list[str] | None = None,
    ) -> None:
        super().__init__(instruction, system, examples)
        if not isinstance(marker, str) or not marker.strip():
            raise ValueError(f"marker is {marker!r}; expected a text, such as Answer:")
        check_places("completion", completion, ("answer",), ("rationale", "marker"))
        if marker.casefold() not in instruction.casefold():
            raise ValueError(f"instruction doesn't ask for {marker!r}, by which the answer is found; name it there")
        self.marker = marker.strip()
        self.completion = completion
        self.labels = checked_labels(labels)

    def read(self, row: Mapping[str, Any], text: str) -> Answer:
        """What stands after the last marker that begins a line; the rationale is what stands before it."""
        marker = re.compile(rf"^[*_#\s]*{re.escape(self.marker)}[*_]*[ \t]*", re.IGNORECASE | re.MULTILINE)
        places = list(marker.finditer(text))
        if not places:
            raise FormatError(f"no line begins with {self.marker!r}")
        rationale, rest = text[: places[-1].start()].strip(), text[places[-1].end() :].strip()
        if not rationale:
            raise FormatError("there are no reasons before the answer")
        if not rest or "\n" in rest:
            raise FormatError(f"after {self.marker!r} there is {rest[:40]!r}; expected one line, the last one")
        answer = one_of(self.labels, rest.strip("*_ "))
        learned = fill(self.completion, rationale=rationale, marker=self.marker, answer=answer)
        return Answer(text, answer, learned, _same(answer))


def one_of(labels: Mapping[str, str], found: str) -> str:
    """The label in its own spelling; the text itself where there are no labels.

    Raises:
        FormatError: It is none of them, or empty.
    """
    if not found:
        raise FormatError("the answer is empty")
    if not labels:
        return found
    if _same(found) not in labels:
        raise FormatError(f"the answer {found[:40]!r} is none of {', '.join(labels.values())}")
    return labels[_same(found)]


def checked_labels(labels: Sequence[str] | None) -> dict[str, str]:
    """Labels by what is compared of them.

    Raises:
        ValueError: Fewer than two, no texts, or two that are the same but for case.
    """
    if labels is None:
        return {}
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(one, str) and one for one in labels):
        raise ValueError(f"labels is {labels!r}; expected a list of two or more texts (quote yes, no, on and off)")
    found = {_same(label): label for label in labels}
    if len(found) < len(labels):
        raise ValueError(f"labels is {labels}; two of them are the same but for case and punctuation")
    return found


def compiled(key: str, pattern: str | None) -> re.Pattern[str] | None:
    """A regular expression.

    Raises:
        ValueError: It is none.
    """
    try:
        return None if pattern is None else re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{key} is {pattern!r}, which is no regular expression: {error}") from None


def _same(text: str) -> str:
    """Case, white space and a closing dot or quote don't make two answers different."""
    return " ".join(text.casefold().split()).strip(" .\"'`*")
