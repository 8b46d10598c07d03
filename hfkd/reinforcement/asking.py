"""What a teacher says of answers that were just drawn: views for it, its log-probabilities of the drawn tokens, and
the tokens that end a text.

Knows padded rollouts and teachers; it knows no reward and no trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hfkd.batch import Batch
from hfkd.data.route import route_of
from hfkd.data.tokenize import prompt_length
from hfkd.data.views import DistillationDataset
from hfkd.plan import rows_that_fit
from hfkd.rollout.decoding import eos_ids
from hfkd.rollout.texts import Text, write_batch
from hfkd.rows import base_model_of
from hfkd.teacher_rows import LogitRows
from hfkd.teachers import SeveralTeachers, Teacher


def views_of(rollouts: Mapping[str, Tensor], taught: Tensor, views: DistillationDataset, pad_id: int) -> Batch:
    """Both views of the answers that are taught.

    Args:
        rollouts: `prompt_ids`, `prompt_mask` [B, P], `completion_ids` [B, T] and `asked` [B], the place of each row in
            `views`.
        taught: [B, T] marks the tokens of which the teacher is to speak: in each row the first ones, or none.
        views: Gives the teacher's prompts.
        pad_id: Stands where there is no token.

    Returns:
        A batch whose supervised tokens are those that are marked, row by row. Where none is, one row that learns
        nothing, so that every process asks its teacher as often.
    """
    rows = taught.any(dim=1).nonzero()[:, 0].tolist() or [0]
    texts = [_text(rollouts, taught, views, row) for row in rows]
    ids = rollouts["prompt_ids"]
    like = dict.fromkeys(("input_ids", "attention_mask", "labels"), ids)
    if views.second_view:
        like |= dict.fromkeys(("teacher_input_ids", "teacher_attention_mask", "teacher_labels"), ids)
    if views.route is not None:
        like["route"] = ids
    return Batch.from_inputs(write_batch(texts, like, pad_id, "right", own_text=True))


def _text(rollouts: Mapping[str, Tensor], taught: Tensor, views: DistillationDataset, row: int) -> Text:
    index = int(rollouts["asked"][row])
    prompt = rollouts["prompt_ids"][row][rollouts["prompt_mask"][row].bool()].tolist()
    theirs = None
    if views.second_view:
        read = views.read_by_teacher(index)
        theirs = read["input_ids"][: prompt_length(read)]
    route = None if views.route is None else route_of(views.route, views.row(index))
    return Text(prompt, theirs, rollouts["completion_ids"][row][taught[row]].tolist(), route)


def log_probs_of(rows: LogitRows, targets: Tensor, temperature: float, vocab_size: int) -> Tensor:
    """What a teacher gives to tokens, some rows at a time.

    Args:
        rows: N distributions.
        targets: [N] token ids.
        temperature: Divides the logits, as it does where the tokens are drawn.
        vocab_size: The ids that the student scores; those beyond are left out of the distribution.

    Returns:
        [N] log-probabilities (nats), float32, without a graph.

    Raises:
        ValueError: The rows aren't whole distributions over the student's vocabulary.
    """
    if not isinstance(rows, LogitRows):
        raise ValueError(
            f"The teacher gave {type(rows).__name__}, and what it says of drawn tokens needs its whole distribution "
            "over the student's vocabulary. Take a teacher that is a model with the student's tokenizer."
        )
    rows = rows.first(min(rows.vocab_size, vocab_size)).detached()
    size = min(len(targets), rows_that_fit(rows.vocab_size, targets.device))
    buffer = torch.empty(size, rows.vocab_size, dtype=torch.float32, device=targets.device)
    found = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
    for start in range(0, len(targets), max(1, size)):
        some = slice(start, min(start + size, len(targets)))
        said = torch.log_softmax(rows.logits(some, buffer).float() / temperature, dim=-1)
        found[some] = said.gather(-1, targets[some][:, None])[:, 0]
    return found


@contextmanager
def listening(module: nn.Module, listens: bool) -> Iterator[list[Tensor]]:
    """Keep the last hidden states [B, T, H] of each run of a causal LM, in their graph.

    Args:
        module: The model, not wrapped.
        listens: Whether to do so at all.
    """
    heard: list[Tensor] = []
    if not listens:
        yield heard
        return
    decoder = base_model_of(module).base_model
    handle = decoder.register_forward_hook(lambda *said: heard.append(said[-1].last_hidden_state))
    try:
        yield heard
    finally:
        handle.remove()


def stop_ids(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> list[int]:
    """The tokens with which a text ends because they hold a stop string.

    Args:
        tokenizer: The student's.
        stop: Stop strings of one character, such as a line end.

    Raises:
        ValueError: One is longer, so that it could lie across tokens, or no token holds it.
    """
    if not stop:
        return []
    known = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    found: set[int] = set()
    for text in stop:
        ends = [token for token, word in enumerate(known) if text in word] if len(text) == 1 else []
        if not ends:
            raise ValueError(
                f"The prompts' stop string is {text!r}; expected one character that is in some token, such as a line "
                "end: TRL ends an answer at tokens. Change `stop` of the prompt, or leave it empty, so that answers "
                "end where the student ends them."
            )
        found.update(ends)
    return sorted(found)


def until_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop string, as an evaluation reads it."""
    places = [place for place in (text.find(one) for one in stop) if place >= 0]
    return text[: min(places, default=None)]


def foreign_ends(teacher: Teacher | None, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[int]:
    """The end tokens with which the teacher doesn't end a text, so that it can't judge them.

    Args:
        teacher: Prepared; one, or several.
        tokenizer: The student's, which a teacher without one of its own reads too.
        ends: The end tokens of the student.
    """
    members = teacher.teachers.values() if isinstance(teacher, SeveralTeachers) else [teacher]
    foreign: set[int] = set()
    for member in members:
        if member is None or not member.writes:
            continue
        with member.weights() as model:
            foreign |= set(ends) - set(eos_ids(model, member.tokenizer or tokenizer))
    return sorted(foreign)
