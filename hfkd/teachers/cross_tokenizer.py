"""A teacher with a tokenizer of its own: it reads the same text cut into other tokens.

Its rows are put beside the student's where both are about to predict the same text after the same text: at the
beginning of each span that both tokenizers cut (`hfkd.data.alignment`).
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkd.batch import Batch, predicted
from hfkd.errors import VocabularyError
from hfkd.loading import load_tokenizer_of
from hfkd.rows import DenseRows
from hfkd.signal import DISTRIBUTION, TeacherSignal
from hfkd.teacher_rows import AlignedRows
from hfkd.teachers.local import LocalTeacher
from hfkd.zero import row_count

_VALUES = 2**24
"""Logits that are made at once to read the text's own probability off them."""


class CrossTokenizerTeacher(LocalTeacher):
    """Any causal LM of any vocabulary, frozen; only losses that read another vocabulary can learn from it.

    Args:
        model: A loaded model, or a hub id or folder to load at `prepare`.
        tokenizer: Its own tokenizer, a fast one; loaded at once where `model` is an id.
        options: More arguments of `LocalTeacher`.

    Raises:
        ValueError: The model is given without its tokenizer, or its tokenizer can't say where its tokens lie.
    """

    other_vocabulary = True
    provides = frozenset({DISTRIBUTION})

    def __init__(
        self, model: PreTrainedModel | str, *, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
    ) -> None:
        super().__init__(model, tokenizer=tokenizer, **options)
        if self.tokenizer is None and not isinstance(model, str):
            raise ValueError(
                "A teacher with another tokenizer was given as a model without it; pass tokenizer=AutoTokenizer."
                "from_pretrained(...), because the data are cut by it."
            )
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer_of(model, self.loading)
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"The teacher's tokenizer {type(self.tokenizer).__name__} can't say which characters its tokens "
                "cover. Give its fast form (use_fast=True, a folder with tokenizer.json)."
            )

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        """Load, freeze and place the model, and make sure that it can read what its tokenizer writes."""
        super().prepare(accelerator, student)
        known = row_count(self.model.get_input_embeddings().weight)
        if len(self.tokenizer) > known:
            raise VocabularyError(
                f"The teacher's tokenizer writes {len(self.tokenizer)} ids, but the teacher can read the first "
                f"{known} only. Give the tokenizer that belongs to the model."
            )

    def signal(self, batch: Batch, needs: frozenset[str]) -> TeacherSignal:
        """Run the model on its own view, and put its rows beside the student's.

        Raises:
            ValueError: The batch has no spans, or the two views have different ones.
        """
        if batch.teacher is None or batch.student_span is None or batch.teacher_span is None:
            raise ValueError(
                "A teacher with another tokenizer needs its own view of each text and the spans of both: give the "
                "trainer rows of text, or a DistillationDataset with `teacher_builder`, and no collator that drops "
                "`student_span` and `teacher_span`."
            )
        rows = super().signal(batch, needs).rows
        ours, theirs = (
            _spans(view.labels, spans)
            for view, spans in ((batch.student, batch.student_span), (batch.teacher, batch.teacher_span))
        )
        if not torch.equal(ours.names, theirs.names):
            raise ValueError(
                f"The student's view has {len(ours.names)} spans and the teacher's {len(theirs.names)}, or other "
                "ones. Each span is a piece of text that both predict; use DistillationCollator."
            )
        of_spans = _sums(text_log_probs(rows, batch.teacher.targets), theirs)
        place = torch.full_like(ours.number, -1)
        place[ours.first] = theirs.first
        inside = ours.number >= 0
        values = torch.zeros(len(place), dtype=of_spans.dtype, device=place.device)
        values[inside] = of_spans[ours.number[inside]]
        return TeacherSignal(AlignedRows(rows, place, ours.run, values))

    def describe(self) -> dict[str, Any]:
        """As any teacher's, and its tokenizer."""
        return {**super().describe(), "kind": "cross_tokenizer", "tokenizer": self.tokenizer.name_or_path}


class _Spans:
    """The spans of the N supervised tokens of a view.

    Args:
        row: [N] the row of the batch that each token belongs to.
        span: [N] the number of its span within the row, -1 for none.

    Attributes:
        run: [N] numbers that are equal within a span, from 0 and ascending; a token outside all spans has its own.
        number: [N] the number of the span among all spans of the batch, -1 for none.
        first: [S] the first token of each span.
        names: [S, 2] the row of the batch, and the number within the row.
    """

    def __init__(self, row: Tensor, span: Tensor) -> None:
        inside = span >= 0
        begins = torch.ones_like(inside)
        begins[1:] = (row[1:] != row[:-1]) | (span[1:] != span[:-1]) | ~inside[1:]
        self.run = begins.long().cumsum(dim=0) - 1
        self.first = (begins & inside).nonzero()[:, 0]
        self.number = torch.where(inside, (begins & inside).long().cumsum(dim=0) - 1, -1)
        self.names = torch.stack([row[self.first], span[self.first]], dim=-1)


def _spans(labels: Tensor, spans: Tensor) -> _Spans:
    """The spans [B, T] of a view at its supervised tokens."""
    marks = predicted(labels)
    return _Spans(marks.nonzero()[:, 0], spans[:, 1:][marks])


def _sums(values: Tensor, spans: _Spans) -> Tensor:
    """[S] the sums over the tokens of each span."""
    inside = spans.number >= 0
    return values.new_zeros(len(spans.first)).index_add_(0, spans.number[inside], values[inside])


def text_log_probs(rows: DenseRows, targets: Tensor) -> Tensor:
    """What a model says of the text itself; logits of a few rows at a time.

    Args:
        rows: [M] rows of the model.
        targets: [M] the ids that the tokens really have.

    Returns:
        [M] log-probabilities (nats), float32 at least.
    """
    rows = rows.detached()
    wide = torch.promote_types(rows.hidden.dtype, torch.float32)
    found = rows.hidden.new_empty(len(rows), dtype=wide)
    size = max(1, min(len(rows), _VALUES // rows.vocab_size))
    buffer = rows.hidden.new_empty(size, rows.vocab_size, dtype=wide)
    for start in range(0, len(rows), size):
        some = slice(start, min(start + size, len(rows)))
        logits = rows.logits(some, buffer)
        found[some] = logits.gather(-1, targets[some, None])[:, 0] - logits.logsumexp(dim=-1)
    return found
