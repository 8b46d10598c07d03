"""Do student and teacher read the same tokens? Compared before any weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hfkd.cache import Manifest
from hfkd.errors import VocabularyError
from hfkd.loading import load_config_of, readable
from hfkd.preflight.findings import Finding
from hfkd.recipe.schema import Recipe, StudentSection, TeacherSection
from hfkd.run.models import load_tokenizer
from hfkd.teachers import check_same_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_NAME = "vocabulary"


def compare_vocabularies(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, chats: bool) -> Iterator[Finding]:
    """Hold the student's tokenizer against its model, and each teacher's against the student's.

    Args:
        recipe: Says who the teachers are.
        tokenizer: The student's.
        chats: Whether prompts are chat messages, so that chat templates matter.
    """
    scored = _scored(recipe.student)
    figures = {"student_tokens": len(tokenizer), "student_scored": scored}
    if len(tokenizer) > scored:
        yield Finding(
            "error",
            _NAME,
            f"The student's tokenizer writes {len(tokenizer)} ids, but the model reads and scores {scored} only. Take "
            "the tokenizer that belongs to the model, or resize the model's embeddings and save it first.",
            figures,
        )
    if recipe.teacher.cache is not None:
        yield _cached(recipe.teacher.cache, scored, figures)
        return
    others = {name: section for name, section in teachers_of(recipe).items() if section.model is not None}
    if not others:
        yield Finding("pass", _NAME, f"{_words(recipe)} ({len(tokenizer)} ids).", figures)
    for name, section in others.items():
        yield from _compare(name, section, tokenizer, chats, figures)


def teachers_of(recipe: Recipe) -> dict[str, TeacherSection]:
    """The recipe's teachers by how a message calls them; none where there is no teacher."""
    section = recipe.teacher
    if section.members:
        return {f"the teacher {name!r}": member for name, member in section.members.items()}
    return {} if section.kind == "none" else {"the teacher": section}


def _words(recipe: Recipe) -> str:
    kinds = {section.kind for section in teachers_of(recipe).values()}
    if not kinds:
        return "There is no teacher, so the student's tokenizer stands alone"
    if kinds <= {"self", "ema", "snapshot", "early_exit"}:
        return "The teacher has the student's weights and reads its very tokens"
    return "The teacher is a class of your own; its tokenizer is compared when it is loaded"


def _cached(folder: str, scored: int, figures: dict[str, Any]) -> Finding:
    theirs = Manifest.read(folder).contract["vocab_size"]
    figures = {**figures, "teacher_scored": theirs}
    if theirs > scored:
        text = f"The cache holds {theirs} ids and the student scores {scored} only. Build it anew with this recipe."
        return Finding("error", _NAME, text, figures)
    return Finding(
        "pass", _NAME, f"The cache was made over {theirs} of the {scored} ids that the student scores.", figures
    )


def _compare(
    name: str, section: TeacherSection, ours: PreTrainedTokenizerBase, chats: bool, figures: dict[str, Any]
) -> Iterator[Finding]:
    """One teacher with a model of its own."""
    theirs, scored = load_tokenizer(section), _scored(section)
    figures = {**figures, "teacher": section.model, "teacher_tokens": len(theirs), "teacher_scored": scored}
    known = theirs.get_vocab()
    common = sum(token in known for token in ours.get_vocab())
    figures["tokens_in_common"] = common
    if section.kind == "cross_tokenizer":
        text = f"{name} has a tokenizer of its own: {common} of the student's {len(ours)} tokens are in it, too."
        yield Finding("pass", _NAME, _sentence(text), figures)
        return
    try:
        check_same_tokens(ours, theirs)
    except VocabularyError as error:
        unlike = _unlike(ours, theirs)
        figures["ids_that_differ"] = unlike
        yield Finding("error", _NAME, f"{error} In all {unlike} ids stand for different tokens.", figures)
        return
    if len(ours) > scored:
        text = (
            f"The student's tokenizer writes {len(ours)} ids, but {name} can read the first {scored} only. Use a "
            "teacher of the same family."
        )
        yield Finding("error", _NAME, text, figures)
        return
    text = f"{name} has the same tokens under the same ids; {len(ours)} are written, {_heads(figures)}."
    yield Finding("pass", _NAME, _sentence(text), figures)
    yield from _habits(name, ours, theirs, chats)


def _habits(
    name: str, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, chats: bool
) -> Iterator[Finding]:
    """Where two tokenizers with the same tokens use them in other ways."""
    if ours.eos_token_id != theirs.eos_token_id:
        yield Finding(
            "warning",
            _NAME,
            f"The student ends its texts with {ours.eos_token!r} and {name} with {theirs.eos_token!r}; what the "
            "teacher says of the last token of an answer is then of little use. Set both tokenizers to the same end.",
        )
    if chats and theirs.chat_template and theirs.chat_template != ours.chat_template:
        yield Finding(
            "warning",
            _NAME,
            f"The chat template of {name} isn't the student's, in which it will read all prompts; a model that was "
            "trained on another form may say less than it knows. Save the teacher's chat template with the student's "
            "tokenizer if in doubt.",
        )


def _heads(figures: dict[str, Any]) -> str:
    ours, theirs = figures["student_scored"], figures["teacher_scored"]
    if ours == theirs:
        return f"and both score {ours}"
    return f"and the first {min(ours, theirs)} are compared (the student scores {ours}, the teacher {theirs})"


def _unlike(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> int:
    """How many ids that both have stand for different tokens."""
    first, second = ({index: token for token, index in one.get_vocab().items()} for one in (ours, theirs))
    return sum(first[index] != second[index] for index in first.keys() & second.keys())


def _scored(section: StudentSection | TeacherSection) -> int:
    """The ids that a model scores, by its configuration; a padded vocabulary has more than its tokenizer."""
    return int(_config_of(section).vocab_size)


def position_counts(recipe: Recipe) -> dict[str, int]:
    """How many positions the models of `student` and `teacher` were made for, as far as their configurations say; of
    several teachers the fewest.
    """
    counts = {"student": [_positions(recipe.student)], "teacher": []}
    if recipe.teacher.cache is None:
        for section in teachers_of(recipe).values():
            counts["teacher"].append(_positions(recipe.student if section.model is None else section))
    known = {who: [count for count in found if count] for who, found in counts.items()}
    return {who: min(found) for who, found in known.items() if found}


def _positions(section: StudentSection | TeacherSection) -> int | None:
    return getattr(_config_of(section), "max_position_embeddings", None)


def _config_of(section: StudentSection | TeacherSection) -> PreTrainedConfig:
    """Of the part of a model that reads text."""
    origin = section.origin if isinstance(section, StudentSection) else section.model
    located = {**section.load_kwargs, "revision": section.revision, "trust_remote_code": section.trust_remote_code}
    config = readable(lambda: load_config_of(origin, located), f"the configuration of {origin}")
    return config.get_text_config()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
