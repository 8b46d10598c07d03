"""Targeted extraction: a teacher names what is in a passage and of which type, and a student learns to find one type.

Each passage costs one request and gives a row for each type that was found in it, and rows of types that weren't,
whose answer is the empty list: without those a student always finds something.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hfkd.data.messages import prompt_messages, text_of
from hfkd.labels.spans import read_list
from hfkd.labels.templates import Answer, FormatError, Template, check_places, fill

_ASK = (
    "List every entity that the passage names, with its type. Reply with a JSON list of pairs and nothing else: "
    '[["entity, as it is written in the passage", "type"], ...]'
)


class ExtractionTemplate(Template):
    """Entities and their types in, one question for each type out.

    Args:
        instruction, system, examples: See `Template`; `{prompt}` is the passage. Without an instruction it asks for
            JSON pairs, of `types` if they are given.
        types: The only types that count. Each passage then has a row for each of them, found or not. Without them the
            teacher chooses the types.
        negatives: Without `types`: for each passage so many types that others have and it hasn't, drawn by how many
            passages have them.
        question: What the student is asked after the passage, of `{type}`.
        conversation: Give the passage in a turn of its own.
        verbatim: Whether each entity must stand in the passage as it is named.
        seed: Of the draw.

    Paper:
        Zhou et al., UniversalNER, 2023, https://arxiv.org/abs/2308.03279: a teacher's entities turned into one
        question for each type, with absent types drawn by frequency. Wording and code are ours; here each question is
        a row of its own, whose answer alone is learned, while theirs are turns of one conversation for each passage.
    """

    together = False  # what one sample didn't find is learned as absent, beside the one that found it

    def __init__(
        self,
        instruction: str | None = None,
        system: str | None = None,
        examples: list[dict[str, str]] | None = None,
        types: list[str] | None = None,
        negatives: int = 1,
        question: str = "Which parts of the text are of the type: {type}? Reply with a JSON list.",
        conversation: bool = False,
        verbatim: bool = True,
        seed: int = 0,
    ) -> None:
        self.types = _checked_types(types)
        if not isinstance(negatives, int) or negatives < 0:
            raise ValueError(f"negatives is {negatives!r}; expected a number of types for each passage, 0 or more")
        limits = f" Types are: {', '.join(self.types)}; leave out what is of no such type." if self.types else ""
        super().__init__(instruction or f"{_ASK}{limits}\n\nPassage:\n{{prompt}}", system, examples)
        check_places("question", question, ("type",))
        self.negatives = negatives
        self.question = question
        self.conversation = conversation
        self.verbatim = verbatim
        self.seed = seed

    def read(self, row: Mapping[str, Any], text: str) -> Answer:
        """The pairs of a JSON list; its value is the set of them."""
        try:
            items = read_list(text)
        except ValueError as error:
            raise FormatError(str(error)) from None
        passage = passage_of(row)
        pairs = list(dict.fromkeys(self._pair(item, passage) for item in items))
        shown = json.dumps(pairs, ensure_ascii=False)
        return Answer(text, shown, shown, frozenset(pairs))

    def _pair(self, item: Any, passage: str) -> tuple[str, str]:
        pair = isinstance(item, list) and len(item) == 2
        if not pair or not all(isinstance(part, str) and part.strip() for part in item):
            raise FormatError(f"the list holds {json.dumps(item)[:60]}; expected pairs of an entity and its type")
        entity, kind = item[0].strip(), " ".join(item[1].casefold().split())
        if self.types and kind not in self.types:
            raise FormatError(f"{kind[:40]!r} is none of the types {', '.join(self.types)}")
        if self.verbatim and entity not in passage:
            raise FormatError(f"{entity[:40]!r} doesn't stand in the passage")
        return entity, kind

    def rows(self, labelled: Sequence[tuple[int, Mapping[str, Any], Answer]]) -> list[dict[str, Any]]:
        """One row for each passage and type, found ones first."""
        frequency = Counter(kind for *_, answer in labelled for kind in {kind for _, kind in answer.value})
        made = []
        for number, row, answer in labelled:
            pairs = [tuple(pair) for pair in json.loads(answer.answer)]
            found = list(dict.fromkeys(kind for _, kind in pairs))
            for kind in found + self._absent(number, found, frequency):
                spans = json.dumps([entity for entity, other in pairs if other == kind], ensure_ascii=False)
                made.append(self._row(number, row, kind, spans))
        return made

    def _absent(self, number: int, found: Sequence[str], frequency: Mapping[str, int]) -> list[str]:
        """Types that a passage doesn't have."""
        if self.types:
            return [kind for kind in self.types if kind not in found]
        chance = random.Random(f"{self.seed}/{number}")
        left = {kind: count for kind, count in sorted(frequency.items()) if kind not in found}
        drawn: list[str] = []
        while left and len(drawn) < self.negatives:
            drawn += chance.choices(list(left), list(left.values()))
            del left[drawn[-1]]
        return drawn

    def _row(self, number: int, row: Mapping[str, Any], kind: str, spans: str) -> dict[str, Any]:
        passage, question = passage_of(row), fill(self.question, type=kind)
        made: dict[str, Any] = {"prompt": f"{passage}\n\n{question}", "completion": spans}
        if self.conversation:
            turns = [("user", passage), ("assistant", "I have read it."), ("user", question)]
            made["prompt"] = [{"role": role, "content": content} for role, content in turns]
            made["completion"] = [{"role": "assistant", "content": spans}]
        kept = {"domain": row["domain"]} if row.get("domain") is not None else {}
        return made | {"answer": spans, **kept, "type": kind, "source_row": number}


def passage_of(row: Mapping[str, Any]) -> str:
    """The text that is read: a row's prompt, or the last message of it."""
    return text_of(prompt_messages(row)[-1].get("content"))


def _checked_types(types: list[str] | None) -> list[str]:
    if types is None:
        return []
    if not isinstance(types, list) or not types or not all(isinstance(one, str) and one.strip() for one in types):
        raise ValueError(f"types is {types!r}; expected a list of names, such as [person, place]")
    return list(dict.fromkeys(" ".join(one.casefold().split()) for one in types))
