"""Do two tokenizers mean the same tokens by the same ids? The same size is no proof, and padded sizes are no
objection.
"""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkd.errors import VocabularyError
from hfkd.zero import row_count


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Compare the two id -> token maps.

    Ids that only one of them has (added tokens, a longer tail) are let pass: the objective compares the ids that both
    models score.

    Args:
        student: The tokenizer that the data were made with.
        teacher: The teacher's own.

    Raises:
        VocabularyError: An id stands for different tokens; names the first.
    """
    if student is teacher:
        return
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            raise VocabularyError(
                f"Student and teacher don't share a vocabulary: id {index} is {ours[index]!r} for the student and "
                f"{theirs[index]!r} for the teacher ({len(ours)} and {len(theirs)} tokens). The teacher reads the "
                "student's ids, so they must mean the same, for `answer: teacher` as well. Use a teacher of the same "
                "family, or train with `cross_entropy` on text that the teacher wrote elsewhere."
            )


def check_embeddings(student: PreTrainedTokenizerBase, teacher: PreTrainedModel) -> None:
    """Make sure that the teacher can read every id that the student's tokenizer writes.

    Args:
        student: The tokenizer that the data were made with.
        teacher: The teacher's model.

    Raises:
        VocabularyError: The teacher has fewer embeddings than the tokenizer has ids.
    """
    known = row_count(teacher.get_input_embeddings().weight)
    if len(student) > known:
        raise VocabularyError(
            f"The student's tokenizer writes {len(student)} ids, but the teacher can read the first {known} only. Use "
            "a teacher of the same family, or train with `cross_entropy` on text that it wrote elsewhere."
        )
