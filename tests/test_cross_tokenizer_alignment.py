"""Two tokenizations of one text: the spans that both cut, and how they reach a batch."""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, CORPUS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from hfkd.batch import IGNORE, Batch
from hfkd.data.alignment import NO_SPAN, Placed, align, common_spans
from hfkd.data.collate import DistillationCollator
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.data.views import DistillationDataset

ROOT = Path(__file__).resolve().parent.parent
GPT2 = Path(os.environ.get("HFKD_GPT2_TOKENIZER", ROOT / "outputs/models/gpt2-tokenizer"))
SMOL = ROOT / "outputs/models/SmolLM2-135M-Instruct"


@cache
def trained_unigram() -> str:
    """Trained once: it doesn't come out the same twice."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted({letter for text in CORPUS for letter in text})
    trainer = trainers.UnigramTrainer(
        vocab_size=160,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def unigram() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: marks words with a space before them, also the first one."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_unigram()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE.replace("<|im_end|>", "</s>"),
    )


def byte_level(add_prefix_space: bool = False, trim: bool = False) -> PreTrainedTokenizerFast:
    """Bytes joined by few rules, so that characters fall into parts; with a space before the text, or with offsets
    that leave spaces out.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    if trim:
        from tokenizers import processors

        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text.upper() + text for text in CORPUS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="e", pad_token="e")


PIECES = [
    *"abcXYZ.,;!\n",
    " ",
    "  ",
    "   ",
    "the",
    "ing",
    "Answer",
    "walk",
    "42",
    "1234",
    "é",
    "ñ",
    "中文",
    "日本",
    "🎉",
    "👩‍👩‍👧",
    "🇩🇪",
]


def random_text(draw: random.Random) -> str:
    """Words, spaces, digits, letters with accents, characters of several bytes and of several code points."""
    return "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 30)))


def plain_spans(ours: list[tuple[int, int]], theirs: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The pieces of the text by their definition: cut wherever neither side has a token on both sides of the cut."""

    def covered(offsets):
        found, reached = [], 0
        for start, end in offsets:
            found.append((min(start, reached), max(end, reached)))
            reached = max(reached, end)
        return [*found[:-1], (found[-1][0], length)]

    def free(offsets, place):
        return not any(start < place < end for start, end in offsets)

    sides = covered(ours), covered(theirs)
    cuts = [place for place in range(1, length) if all(free(side, place) for side in sides)]
    return list(zip([0, *cuts], [*cuts, length], strict=True))


# --- the spans


@pytest.mark.parametrize(
    ("ours", "theirs", "length", "expected"),
    [
        ([(0, 5), (5, 11)], [(0, 5), (5, 6), (6, 11)], 11, ([0, 1], [0, 1, 1])),
        ([(0, 3), (3, 6)], [(0, 2), (2, 6)], 6, ([0, 0], [0, 0])),
        ([(0, 1), (0, 1), (1, 2)], [(0, 1), (1, 2)], 2, ([0, 0, 1], [0, 1])),  # parts of a character
        ([(0, 2), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)], 3, ([0, 0, 1], [0, 0, 1])),  # a letter and part of one
        ([(0, 5), (6, 11)], [(0, 5), (5, 11)], 11, ([0, 1], [0, 1])),  # the space isn't counted
        ([(0, 5), (6, 11)], [(0, 5), (5, 6), (6, 11)], 11, ([0, 1], [0, 1, 1])),
        ([(0, 0), (0, 2), (2, 2), (2, 4)], [(0, 2), (2, 4)], 4, ([0, 0, 1, 1], [0, 1])),  # empty tokens
        ([(0, 2), (2, 2)], [(0, 2)], 2, ([0, 0], [0])),
        ([(0, 2)], [(0, 1), (1, 1)], 2, ([0], [0, 0])),  # the end isn't covered
        ([(2, 2), (2, 5)], [(0, 2), (2, 5)], 5, ([0, 1], [0, 1])),  # a token of spaces that aren't counted
        ([], [(0, 2)], 2, ([], [-1])),
        ([(0, 0)], [(0, 0)], 0, ([-1], [-1])),
    ],
)
def test_spans_by_hand(ours, theirs, length, expected):
    """Prevents cuts inside a character, or beside the space that belongs to a word: rows of other texts would meet."""
    assert common_spans(ours, theirs, length) == expected
    assert common_spans(theirs, ours, length) == expected[::-1]


PAIRS = {
    "bpe and unigram": lambda: (make_tokenizer(), unigram()),
    "two bpe": lambda: (make_tokenizer(), byte_level()),
    "prefix space": lambda: (make_tokenizer(), byte_level(add_prefix_space=True)),
    "trimmed offsets": lambda: (byte_level(trim=True), make_tokenizer()),
    "trimmed and unigram": lambda: (byte_level(add_prefix_space=True, trim=True), unigram()),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_spans_of_many_texts_follow_the_definition(pair):
    """Prevents an alignment that is right for English words and wrong for an emoji in the hundredth answer."""
    ours, theirs = PAIRS[pair]()
    draw = random.Random(0)
    several = 0
    for _ in range(300):
        text = random_text(draw)
        sides = [Placed.of(tokenizer, text) for tokenizer in (ours, theirs)]
        if not all(side.ids for side in sides):
            continue
        numbers = common_spans(*(side.offsets for side in sides), len(text))
        pieces = plain_spans(*(side.offsets for side in sides), len(text))
        several += len(pieces) > 1
        for side, found in zip(sides, numbers, strict=True):
            assert sorted(set(found)) == list(range(len(pieces))), text
            assert found == sorted(found), text
            for (start, end), number in zip(side.offsets, found, strict=True):
                first, last = pieces[number]
                assert start == end or (first <= start and end <= last), (text, side.offsets, found)
    assert several > 200


@pytest.mark.parametrize("make", [make_tokenizer, unigram, byte_level], ids=["bpe", "unigram", "bytes"])
def test_the_same_tokenizer_makes_each_token_a_span(make):
    """Prevents a comparison that is coarser than it need be. Parts of a character stay together: nobody can say where
    within it they end.
    """
    tokenizer, draw = make(), random.Random(1)
    for _ in range(100):
        # Behind a space: a mark that a tokenizer puts before the first word shares that word's first character.
        text = " " + random_text(draw).encode("ascii", "ignore").decode().lstrip(" ")
        placed = Placed.of(tokenizer, text)
        if placed.ids:
            expected = list(range(len(placed.ids)))
            assert common_spans(placed.offsets, placed.offsets, len(text)) == (expected, expected), text
    split = Placed.of(make_tokenizer(), "🎉")
    assert len(split.ids) > 1 and common_spans(split.offsets, split.offsets, 1)[0] == [0] * len(split.ids)


# --- pieces of an answer


def placed(text: str, *tokens: str) -> Placed:
    """Tokens that are written out; in <> a special one."""
    assert "".join(tokens) == text
    offsets, reached = [], 0
    for token in tokens:
        offsets.append((reached, reached + len(token)))
        reached += len(token)
    return Placed(
        text,
        list(range(len(tokens))),
        offsets,
        [token.startswith("<") for token in tokens],
        ["?" in token for token in tokens],
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (("we", "nt", "<end>"), ("went", "<stop>"), ([0, 0, 1], [0, 1])),  # end tokens are a span of their own
        (("we", "nt", "<end>", "\n"), ("went",), ([0, 0, -1, -1], [0])),
        (("went",), ("w", "ent", "<stop>"), ([0], [0, 0, -1])),
        (("went", "<end>", "\n"), ("went", "<stop>", "\n"), ([0, 1, 2], [0, 1, 2])),
        (("went", "<end>", "\n"), ("went", "<stop>", "<pad>"), ([0, 1, -1], [0, 1, -1])),
        (("went",), (" we", "nt", " "), ([0], [0, 0, -1])),  # white space that one template writes
        (("wen", "t"), ("\n", "went"), ([0, 0], [-1, 0])),
        ((" wen", "t"), (" wen", "t"), ([0, 1], [0, 1])),
        (("\n",), ("\n",), ([0], [0])),
        (("we", "nt", " a?", "!"), ("went", " ", "a?", "!"), ([0, 0, -1, 2], [0, -1, -1, 2])),  # can't be written
    ],
)
def test_special_tokens_and_white_space_around_an_answer(ours, theirs, expected):
    """Prevents an end token that is compared with a word, and a template's space that costs the first word."""
    pieces = [placed("".join(side), *side) for side in (ours, theirs)]
    assert align([pieces[0]], [pieces[1]]) == expected
    assert align([pieces[1]], [pieces[0]]) == expected[::-1]


def test_several_turns_are_numbered_on():
    """Prevents spans of two turns that share a number and are taken for one piece of text."""
    ours = [placed("ab<e>", "a", "b", "<e>"), placed("cd<e>", "cd", "<e>")]
    theirs = [placed("ab<f>", "ab", "<f>"), placed("cd<f>", "c", "d", "<f>")]
    assert align(ours, theirs) == ([0, 0, 1, 2, 3], [0, 1, 2, 2, 3])
    with pytest.raises(ValueError, match="learns 2 assistant turns and the teacher's 1"):
        align(ours, theirs[1:])


def test_different_texts_are_refused():
    """Prevents likelihoods of two different answers side by side."""
    with pytest.raises(ValueError, match="don't read the same answer: 'went' and 'gone'"):
        align([placed("went", "went")], [placed("gone", "gone")])
    with pytest.raises(ValueError, match="no piece of the answer's text in common"):
        align([placed("w?", "w", "?")], [placed("w?", "w?")])


# --- data


ROWS = [{"prompt": "go", "completion": "went away"}, {"prompt": "walk", "completion": "walked, 42 éa 🎉"}]


def dataset(
    style: str = "text", rows: list[dict] = ROWS, teacher=None, prompt: dict | None = None, **settings
) -> DistillationDataset:
    written = PromptStyle(style=style, **prompt or {})
    builders = [PromptBuilder(tokenizer, written) for tokenizer in (make_tokenizer(), teacher or unigram())]
    return DistillationDataset(rows, builders[0], teacher_builder=builders[1], **settings)


def texts(tokenizer, view: dict, spans: list[int]) -> list[str]:
    """What the tokens of each span are, written out."""
    numbers = sorted(set(spans) - {NO_SPAN})
    return [
        tokenizer.decode([token for token, span in zip(view["input_ids"], spans, strict=True) if span == number])
        for number in numbers
    ]


@pytest.mark.parametrize("style", ["text", "chat"])
def test_each_view_is_cut_by_its_own_tokenizer(style):
    """Prevents a teacher that reads the student's ids as its own words, and spans that hold other texts."""
    data = dataset(style)
    ours, theirs = data.builder.tokenizer, data.teacher_builder.tokenizer
    assert data.second_view
    for place, row in enumerate(ROWS):
        example = data[place]
        assert example["teacher"]["input_ids"] == [
            token for ids, _ in data.teacher_builder.encode_turns(row) for token in ids
        ]
        for side in ("student", "teacher"):
            spans, labels = example[f"{side}_span"], example[side]["labels"]
            assert len(spans) == len(labels)
            builder = data.builder if side == "student" else data.teacher_builder
            pieces = [token for piece in builder.answer_pieces(row) for token in piece.ids]
            assert pieces == [label for label in labels if label != IGNORE]
            assert all(label != IGNORE for span, label in zip(spans, labels, strict=True) if span != NO_SPAN)
        mine, others = (
            texts(tokenizer, example[side], example[f"{side}_span"])
            for tokenizer, side in ((ours, "student"), (theirs, "teacher"))
        )
        assert len(mine) == len(others) > 1
        for first, second in zip(mine, others, strict=True):
            assert first.strip() == second.strip() or "<unk>" in second or {first, second} == {"<|im_end|>", "</s>"}
        ends = style == "chat"
        assert "".join(mine).strip().startswith("went away" if place == 0 else "walked 42 a")  # it can't write a comma
        assert ends == ("<|im_end|>" in mine)


def test_the_shared_prefix_and_the_draws_stay():
    """Prevents a teacher's prefix in the student's ids, and spans that move with the student's demonstrations."""
    shown = [{"prompt": "sing", "completion": "sang"}, {"prompt": "jump", "completion": "jumped"}]
    data = dataset(demonstrations=shown, student_shots=(0, 1))
    prefix = data.shared_prefix
    assert prefix and data.teacher_builder.encode_prompt(ROWS[0], shown)[: len(prefix)] == prefix
    seen = set()
    for epoch in range(6):
        data.set_epoch(epoch)
        example = data[0]
        seen.add(len(example["student"]["input_ids"]))
        assert [span for span in example["student_span"] if span != NO_SPAN] == list(data._spans[0][0])
        assert len(example["student_span"]) == len(example["student"]["labels"])
    assert len(seen) > 1


def test_a_row_that_both_write_differently_is_named():
    """Prevents a run on answers that the teacher's template changed."""
    louder = unigram()
    louder.chat_template = louder.chat_template.replace(
        "{{ message['content'] }}</s>", "{{ message['content'] }}!</s>"
    )
    with pytest.raises(
        ValueError, match="training row 0: student and teacher don't read the same answer: 'went away'"
    ):
        dataset("chat", teacher=louder)


def test_an_answer_that_one_vocabulary_cannot_write_is_dropped_where_asked():
    """Prevents one foreign row from ending a run over a file that is to be cleaned as it is read."""
    rows = [ROWS[0], {"prompt": "sing", "completion": "漢字"}, ROWS[1]]
    bare = {"answer": "{completion}"}
    with pytest.raises(ValueError, match="training row 1: .*no piece of the answer's text in common.*too_long to dr"):
        dataset(rows=rows, prompt=bare)
    data = dataset(rows=rows, prompt=bare, too_long="drop")
    assert data.dropped == 1 and data.kept == [0, 2] and len(data._spans) == len(data) == 2
    assert [data[place]["teacher_span"] for place in range(2)] == [
        dataset(prompt=bare)[place]["teacher_span"] for place in range(2)
    ]
    with pytest.raises(
        ValueError, match="none of 1 training rows is left: 1 are longer .*, or hold nothing that both"
    ):
        dataset(rows=rows[1:2], prompt=bare, too_long="drop")
    louder = unigram()
    louder.chat_template = louder.chat_template.replace(
        "{{ message['content'] }}</s>", "{{ message['content'] }}!</s>"
    )
    with pytest.raises(ValueError, match="don't read the same answer"):  # no fault of the row
        dataset("chat", teacher=louder, too_long="drop")


def test_a_tokenizer_that_does_not_know_its_places_is_refused():
    """Prevents an error from deep within about offsets."""

    class Slow:
        is_fast, name_or_path = False, "slow/one"

    with pytest.raises(ValueError, match="'slow/one' can't say which characters its tokens cover"):
        Placed.of(Slow(), "text")


# --- batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_spans_are_padded_with_their_tokens(side):
    """Prevents spans that lie beside other tokens than theirs in every batch of unequal lengths."""
    data = dataset()
    collator = DistillationCollator(data.builder.tokenizer.pad_token_id + 50_000, side)
    batch = Batch.from_inputs(collator([data[0], data[1]]))
    for view, spans, name in (
        (batch.student, batch.student_span, "student"),
        (batch.teacher, batch.teacher_span, "teacher"),
    ):
        assert spans.shape == view.labels.shape and spans.dtype == torch.int64
        assert ((spans == NO_SPAN) | (view.labels != IGNORE)).all()
        for place in range(2):
            real = view.attention_mask[place] == 1
            assert spans[place][real].tolist() == data[place][f"{name}_span"]
            assert (spans[place][~real] == NO_SPAN).all()
    assert batch.teacher.input_ids.max() < 50_000, "the student's padding id may lie outside the teacher's vocabulary"
    assert batch.student.input_ids.max() > 50_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_span": [-1, 0, 0]}, "the student's view has the spans .* and the teacher's"),
        ({"student_span": [0, 0, 1]}, "numbers a token that isn't learned"),
        ({"student_span": [-1, 0]}, "has 2 numbers for 3 tokens"),
        ({"student_span": [-1, 1, 0]}, "aren't ascending"),
        ({"teacher_span": None}, "has spans but no 'teacher_span'"),
        ({"student_span": [-1] * 3, "teacher_span": [-1] * 3}, "at least one"),
    ],
)
def test_spans_that_do_not_fit_are_refused(change, words):
    """Prevents a collator or a data set of a user's own that puts rows of different texts side by side."""
    view = {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}
    good = {"student": view, "teacher": view, "index": 3, "student_span": [-1, 0, 1], "teacher_span": [-1, 0, 1]}
    DistillationCollator(0)([good])
    with pytest.raises(ValueError, match=f"example 3.*{words}"):
        DistillationCollator(0)([good | change])
    with pytest.raises(ValueError, match="has no 'student_span'"):
        DistillationCollator(0)([good, {name: good[name] for name in ("student", "teacher", "index")}])


# --- real tokenizers


def real_pair() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    files = GPT2 / "encoder.json", GPT2 / "vocab.bpe"
    if not all(file.exists() for file in files) or not SMOL.exists():
        pytest.skip(f"needs GPT-2's encoder.json and vocab.bpe in {GPT2}, and SmolLM2 in {SMOL}")
    return AutoTokenizer.from_pretrained(SMOL), GPT2Tokenizer(vocab=str(files[0]), merges=str(files[1]))


def test_smollm2_beside_gpt2():
    """Prevents an alignment that holds for toy vocabularies alone: here digits, spaces and accents are cut apart."""
    ours, theirs = real_pair()
    text = " Hello  world 🎉🎉 naïve 123456\n"
    sides = [Placed.of(tokenizer, text) for tokenizer in (ours, theirs)]
    numbers = common_spans(*(side.offsets for side in sides), len(text))
    pieces = plain_spans(*(side.offsets for side in sides), len(text))
    assert [text[start:end] for start, end in pieces] == [
        *(" Hello", " ", " world", " 🎉", "🎉", " naïve", " 123", "456", "\n")
    ]
    assert [numbers[0].count(span) for span in range(9)] == [1, 1, 1, 3, 3, 2, 4, 3, 1]
    assert [numbers[1].count(span) for span in range(9)] == [1, 1, 1, 3, 3, 1, 1, 1, 1]
    draw = random.Random(2)
    for _ in range(200):
        text = random_text(draw)
        sides = [Placed.of(tokenizer, text) for tokenizer in (ours, theirs)]
        pieces = plain_spans(*(side.offsets for side in sides), len(text))
        for side, found in zip(sides, common_spans(*(s.offsets for s in sides), len(text)), strict=True):
            assert sorted(set(found)) == list(range(len(pieces)))
            assert all(pieces[n][0] <= a and b <= pieces[n][1] for (a, b), n in zip(side.offsets, found, strict=True))
    builders = [PromptBuilder(tokenizer, PromptStyle()) for tokenizer in (ours, theirs)]
    rows = [{"prompt": "go", "completion": "went, 1234 times — naïvely 🎉"}]
    example = DistillationDataset(rows, builders[0], teacher_builder=builders[1])[0]
    written = [
        texts(tokenizer, example[side], example[f"{side}_span"])
        for tokenizer, side in ((ours, "student"), (theirs, "teacher"))
    ]
    assert written[0] == written[1] and "".join(written[0]) == " went, 1234 times — naïvely 🎉\n"
