"""Marks which tokens of a step are private, for losses that hide them (`swing`) and for terms that learn the text.

Decodes what is supervised, whoever wrote it, and asks a scorer of `hfkd.privacy`. What becomes of the marks isn't
known here: where no term of the objective heeds them, nothing is hidden.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hfkd.batch import IGNORE
from hfkd.data.views import DistillationDataset
from hfkd.distributed import is_main_process, total_over_processes
from hfkd.named import import_function
from hfkd.privacy import (
    RarityScorer,
    SpanFinder,
    SpanScorer,
    TokenScorer,
    check_shares,
    pattern_finder,
)
from hfkd.revision.base import Reviser

logger = logging.getLogger(__name__)

ALL_MARKED_STEPS = 5
"""Steps in a row after which a scorer that marks every token is refused."""

NONE_MARKED_STEPS = 50
"""Steps after which a scorer that has marked nothing is warned of."""

MARKED = 0.5
"""A token counts as marked where its score is above this: if all are, the scorer tells nothing apart."""

_LOOKED_AT, _COUNTED = 64, 20_000
"""Examples on which a scorer is tried before training, and from which frequencies are counted, at most."""


class PrivateTokens(Reviser):
    """Writes into each batch how private its supervised tokens are, as `private` [B, T].

    From then on the text's own token counts 1 - score in terms that learn the text, and `swing` shows the less of the
    teacher's word. All other terms that ask the teacher (`forward_kl`, losses on hidden states) learn private tokens
    like all others: they hide nothing, and beside `swing` they tell what it hides. Several of these revisers may
    follow each other; the highest score counts. Evaluation losses don't pass here: they count every token in full.

    A mechanism against leaking, and no guarantee: nothing here is differentially private.

    Paper: Li et al. (Swing Distillation), 2022, https://arxiv.org/abs/2212.08349, known to us by its abstract and
    introduction. The scorers are ours.

    Args:
        scorer: `patterns`, `rarity`, or `package.module:function` (or a function) of a text that gives its private
            spans, (start, end) or (start, end, score).
        patterns: With `patterns`: names (emails, numbers, ids) and regular expressions; None takes all names.
        min_digits: With `patterns`: the digits from which on a number counts.
        common: With `rarity`: the share of the training set's tokens from which on an id isn't private.
        rare: With `rarity`: the share up to which it is wholly so.

    Raises:
        ValueError: A setting is out of its limits.
    """

    needs_teacher = False

    def __init__(
        self,
        scorer: str | SpanFinder = "patterns",
        patterns: list[str] | None = None,
        min_digits: int = 4,
        common: float = 1e-3,
        rare: float = 1e-5,
    ) -> None:
        check_shares(common, rare)
        self.common, self.rare = common, rare
        self._find = _finder(scorer, patterns, min_digits)
        self.scorer: TokenScorer | None = None  # until there is a tokenizer
        self._steps, self._found, self._all_marked = 0, False, 0
        self._share = (0.0, 0.0)

    def attach(self, trainer: Any) -> None:
        """Make the scorer, and try it on some examples where their text is known already.

        Raises:
            ValueError: The function can't be imported; there is no tokenizer, or nothing to count frequencies from;
                the scorer marks every token; or with `rarity` the texts are too short for any to be rare.
        """
        super().attach(trainer)
        dataset, tokenizer = trainer.train_dataset, trainer.processing_class
        self.scorer = self._make_scorer(dataset, tokenizer)
        if not isinstance(dataset, DistillationDataset) or trainer.writer is not None:
            return
        labels = (dataset[place]["student"]["labels"] for place in _spread(len(dataset), _LOOKED_AT))
        scores = [score for row in labels for _, some in self._scored(row) for score in some]
        if scores and min(scores) > MARKED:
            raise ValueError(_marks_everything(f"all {len(scores)} tokens of the examples that were looked at"))

    def revise(self, batches: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Add the scores to each batch; nothing else changes.

        Raises:
            ValueError: The scorer has marked every token, on all processes, for several steps.
        """
        revised, tokens, total, marked = [], 0, 0.0, 0
        for inputs in batches:
            scores = torch.zeros(inputs["labels"].shape, dtype=torch.float32)
            for row, labels in enumerate(inputs["labels"].tolist()):
                for start, some in self._scored(labels):
                    scores[row, start : start + len(some)] = torch.tensor(some, dtype=torch.float32)
                    tokens, total = tokens + len(some), total + sum(some)
                    marked += sum(score > MARKED for score in some)
            scores = scores.to(inputs["labels"].device)
            known = inputs.get("private")
            revised.append({**inputs, "private": scores if known is None else torch.maximum(known, scores)})
        self._share = (total, float(tokens))
        self._watch(total_over_processes([tokens, total, marked], self.trainer.args.device).tolist(), step)
        return revised

    def figures(self) -> dict[str, tuple[float, float]]:
        """The mean score of the last step's tokens."""
        return {"private/share": self._share}

    def state_dict(self) -> dict[str, Tensor]:
        """How many steps were looked at, how many in a row were marked all over, and whether anything ever was."""
        return {"seen": torch.tensor([self._steps, self._all_marked, int(self._found)], dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self._steps, self._all_marked, found = state["seen"].tolist()
        self._found = bool(found)

    def _make_scorer(self, dataset: Any, tokenizer: PreTrainedTokenizerBase | None) -> TokenScorer:
        if self._find is not None:
            if tokenizer is None:
                raise ValueError(
                    "private: the trainer has no tokenizer to turn tokens into text with. Pass processing_class=."
                )
            own = isinstance(self._find, str)  # imported only now, when a run was decided on
            return SpanScorer(tokenizer, import_function(self._find, "scorer") if own else self._find)
        if not isinstance(dataset, DistillationDataset):
            raise ValueError(
                "private: scorer is 'rarity', which counts the tokens of the training rows, and train_dataset is "
                f"{'missing' if dataset is None else type(dataset).__name__}. Pass rows, or use 'patterns'."
            )
        counts: Counter[int] = Counter()
        for place in _spread(len(dataset), _COUNTED):
            counts.update(dataset[place]["student"]["input_ids"])
        return RarityScorer(counts, self.common, self.rare)

    def _scored(self, labels: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
        """Where each supervised stretch of a row begins, and its scores. The first position is never predicted."""
        places = enumerate(labels)
        for learned, stretch in groupby(places, key=lambda pair: pair[0] > 0 and pair[1] != IGNORE):
            if learned:
                found = list(stretch)
                yield found[0][0], self.scorer.scores([label for _, label in found])

    def _watch(self, totals: Sequence[float], step: int) -> None:
        """Notice a scorer that tells nothing apart; by figures of all processes, so that they agree."""
        tokens, total, marked = totals
        self._steps, self._found = self._steps + 1, self._found or total > 0
        self._all_marked = self._all_marked + 1 if tokens and marked == tokens else 0
        if self._all_marked >= ALL_MARKED_STEPS:
            raise ValueError(_marks_everything(f"every token of {ALL_MARKED_STEPS} steps up to step {step + 1}"))
        if self._steps == NONE_MARKED_STEPS and not self._found and is_main_process():
            logger.warning(
                "private: the scorer has marked no token in %d steps, so nothing is hidden. Look at what it should "
                "find, or leave it out.",
                NONE_MARKED_STEPS,
            )


def _finder(scorer: str | SpanFinder, patterns: list[str] | None, min_digits: int) -> SpanFinder | str | None:
    """What finds spans, or the name of it; None for rarity, which needs no text."""
    if scorer == "patterns":
        return pattern_finder(patterns, min_digits)
    if patterns is not None:
        raise ValueError(f"patterns is given and scorer is {scorer!r}, which has none; leave one of them out.")
    if scorer == "rarity":
        return None
    if callable(scorer) or (isinstance(scorer, str) and scorer.count(":") == 1):
        return scorer
    raise ValueError(f"scorer is {scorer!r}; expected patterns, rarity, or package.module:function.")


def _spread(count: int, most: int) -> range:
    """At most so many places, spread evenly."""
    return range(0, count, max(1, -(-count // most)))


def _marks_everything(what: str) -> str:
    return (
        f"private: the scorer marks {what} as private (scores above {MARKED}), so next to nothing would be learned of "
        "the teacher. Give it less to find (patterns, min_digits, common and rare, or your function)."
    )
