"""Two tokenizations of one text, side by side: the spans that both cut out of it.

A span is the smallest piece of text at whose two ends both tokenizers have a token boundary. Whatever a model says of
the tokens of a span, it says of that piece of text, so that two models can be compared there. Works on places of
characters alone; it knows no row, no prompt and no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hfkd.batch import IGNORE

Offsets = Sequence[tuple[int, int]]
"""Where each token begins and ends in a text, in characters."""

NO_SPAN = -1
"""The number of a token that belongs to no span."""


class NothingInCommon(ValueError):
    """One of two vocabularies can write nothing of an answer that the other one writes."""


@dataclass(frozen=True)
class Placed:
    """A text and its tokens.

    Args:
        text: The text.
        ids: Its token ids.
        offsets: Where each of them lies in the text.
        special: Which of them are special tokens that are written in the text.
        unknown: Which of them stand for text that the tokenizer can't write.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    special: list[bool]
    unknown: list[bool]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> Placed:
        """Tokenize a text, without the special tokens that belong around any text.

        Raises:
            ValueError: The tokenizer can't say where its tokens lie.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} can't say which characters its "
                "tokens cover, so it can't be laid beside another one; load its fast form (use_fast=True, a folder "
                "with tokenizer.json)"
            )
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(found["input_ids"]), [tuple(pair) for pair in found["offset_mapping"]]
        names, known = tokenizer.convert_ids_to_tokens(ids), set(tokenizer.all_special_ids)
        # One id may be both the unknown token and the end token: only what is written in the text is the latter.
        written = [
            token in known and text[start:end].strip() == name
            for token, name, (start, end) in zip(ids, names, offsets, strict=True)
        ]
        unknown = [token == tokenizer.unk_token_id and not one for token, one in zip(ids, written, strict=True)]
        return cls(text, ids, offsets, written, unknown)

    def behind(self, tokens: int, characters: int) -> Placed:
        """What follows so many tokens that cover so many characters."""
        offsets = [(max(0, start - characters), max(0, end - characters)) for start, end in self.offsets[tokens:]]
        return Placed(self.text[characters:], self.ids[tokens:], offsets, self.special[tokens:], self.unknown[tokens:])


def align(student: Sequence[Placed], teacher: Sequence[Placed]) -> tuple[list[int], list[int]]:
    """Number the spans of an answer.

    Special tokens are paired in their order, each a span of its own; where one side has none (an end token that only
    one template writes), the other's belongs to no span. Nor does text that one tokenizer can't write: what is said of
    an unknown token isn't said of the text. The text before the first special token has to be the same, white space
    around it aside; text behind one is paired where it is the same.

    Args:
        student: The pieces of the answer (the assistant's turns) as the student reads them.
        teacher: The same as the teacher reads them.

    Returns:
        The number of the span of each token, for the student and for the teacher; -1 where it belongs to none. Both
        have the same numbers, in ascending order.

    Raises:
        NothingInCommon: There is no span at all.
        ValueError: The two views hold different texts.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"the student's view learns {len(student)} assistant turns and the teacher's {len(teacher)}; use chat "
            "templates that both mark their assistant turns ({% generation %}), or rows with one answer"
        )
    ours, theirs, count = [], [], 0
    for first, second in zip(student, teacher, strict=True):
        for side, found in zip((ours, theirs), _piece(first, second), strict=True):
            side += [number if number == NO_SPAN else number + count for number in found]
        count = 1 + max(ours, default=NO_SPAN)
    if count == 0:
        raise NothingInCommon(
            "student and teacher have no piece of the answer's text in common, as where one vocabulary can't write "
            "it; take the row out, or set data.too_long to drop"
        )
    return ours, theirs


def common_spans(ours: Offsets, theirs: Offsets, length: int) -> tuple[list[int], list[int]]:
    """Number the spans of a text.

    What lies between two tokens (spaces that a tokenizer drops, or doesn't count as part of the word that follows)
    belongs to the second of them. Tokens that share a character (bytes of one, say) share a span. An empty token
    belongs to the text that follows it, at the end to the last.

    Args:
        ours: Where the tokens of one tokenizer lie, in their order.
        theirs: Where those of the other lie.
        length: Characters of the text.

    Returns:
        The number of the span of each token, from 0, for both; all -1 where one of them has no token or the text is
        empty.
    """
    if not ours or not theirs or length == 0:
        return [NO_SPAN] * len(ours), [NO_SPAN] * len(theirs)
    first, second = _cuts(ours, length), _cuts(theirs, length)
    shared = sorted(first.keys() & second.keys())
    return tuple(
        _numbers([cuts[place] for place in shared], len(offsets))
        for cuts, offsets in ((first, ours), (second, theirs))
    )


def span_column(numbers: Iterable[int], labels: Sequence[int]) -> list[int]:
    """The numbers of a view's spans, one for each position: those of the supervised tokens in order, -1 elsewhere."""
    found = iter(numbers)
    return [next(found) if label != IGNORE else NO_SPAN for label in labels]


def _cuts(offsets: Offsets, length: int) -> dict[int, int]:
    """The characters inside a text before which no token is cut, each with the number of tokens before it."""
    starts, reached, ends = [], 0, []
    for start, end in offsets:
        starts.append(min(start, reached))
        reached = max(reached, end)
        ends.append(reached)
    found: dict[int, int] = {}
    lowest = length
    for place in range(len(offsets) - 1, 0, -1):
        lowest, cut = min(lowest, starts[place]), ends[place - 1]
        if lowest >= cut and 0 < cut < length:
            found[cut] = place  # the first of several: empty tokens go with what follows
    return found


def _numbers(cuts: Sequence[int], count: int) -> list[int]:
    """The span of each of `count` tokens, where each cut says how many lie before it."""
    bounds = [0, *cuts, count]
    return [span for span in range(len(bounds) - 1) for _ in range(bounds[span], bounds[span + 1])]


@dataclass(frozen=True)
class _Run:
    """Tokens [first, last) of a piece, which is one special token or the text between two."""

    first: int
    last: int
    start: int
    end: int


def _piece(ours: Placed, theirs: Placed) -> tuple[list[int], list[int]]:
    """Number the spans of one piece."""
    found = [NO_SPAN] * len(ours.ids), [NO_SPAN] * len(theirs.ids)
    count = 0
    for place, runs in enumerate(zip(_runs(ours), _runs(theirs), strict=False)):
        if place % 2:
            numbers = [0], [0]
        elif (numbers := _text(ours, theirs, *runs)) is None and place == 0:
            raise ValueError(
                f"student and teacher don't read the same answer: {_shown(ours, runs[0])} and "
                f"{_shown(theirs, runs[1])}; their chat templates must write an answer in the same words, or set "
                "prompt.style to text"
            )
        elif numbers is None:
            break
        for side, own, run in zip(found, numbers, runs, strict=True):
            side[run.first : run.last] = [number if number == NO_SPAN else number + count for number in own]
        count += 1 + max(numbers[0], default=NO_SPAN)
    return found


def _runs(tokens: Placed) -> Iterator[_Run]:
    """Text and special tokens in turn, beginning and ending with text, which may be empty."""
    first = start = 0
    for place, special in enumerate(tokens.special):
        if special:
            opens, closes = tokens.offsets[place]
            yield _Run(first, place, start, opens)
            yield _Run(place, place + 1, opens, closes)
            first, start = place + 1, closes
    yield _Run(first, len(tokens.ids), start, len(tokens.text))


def _text(ours: Placed, theirs: Placed, first: _Run, second: _Run) -> tuple[list[int], list[int]] | None:
    """Number the spans of two runs of text; None where they hold different texts."""
    sides = (ours, first), (theirs, second)
    texts = [tokens.text[run.start : run.end] for tokens, run in sides]
    bare = [text if texts[0] == texts[1] else text.strip() for text in texts]
    if bare[0] != bare[1]:
        return None
    length = len(bare[0])
    kept, offsets = [], []
    for (tokens, run), text in zip(sides, texts, strict=True):
        begin = run.start + (len(text) - len(text.lstrip()) if len(text) > length else 0)
        own = [(start - begin, end - begin) for start, end in tokens.offsets[run.first : run.last]]
        kept.append([start == end or (end > 0 and start < length) for start, end in own])
        bounded = [(min(max(start, 0), length), min(max(end, 0), length)) for start, end in own]
        offsets.append([pair for pair, inside in zip(bounded, kept[-1], strict=True) if inside])
    numbers = common_spans(*offsets, length)
    found, lost = [], {NO_SPAN}
    for (tokens, run), inside, own in zip(sides, kept, map(iter, numbers), strict=True):
        found.append([next(own) if one else NO_SPAN for one in inside])
        unknown = tokens.unknown[run.first : run.last]
        lost |= {number for number, one in zip(found[-1], unknown, strict=True) if one}
    return tuple([NO_SPAN if number in lost else number for number in side] for side in found)


def _shown(tokens: Placed, run: _Run) -> str:
    text = tokens.text[run.start : run.end]
    return repr(text if len(text) <= 60 else text[:57] + "...")
