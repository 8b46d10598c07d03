"""Accuracy with k demonstrations in the prompt, and whether the figure means anything.

For each k the model answers every item greedily. Beside the accuracy stand its standard error, what a constant answer
would earn, and how many different answers were given: a model that fell back to the most frequent answer looks like
one that learned something, until these are read together. Knows nothing of training or of how the model came to be.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from hfkd.data.messages import Row, completion_text
from hfkd.data.prompts import PromptBuilder
from hfkd.data.select import check_leakage
from hfkd.eval.answers import EXTRACTORS, match
from hfkd.intervals import wilson_interval
from hfkd.rollout.base import GenerationSettings
from hfkd.rollout.hf import HFRollout

_LONGEST_QUOTE = 30


@dataclass
class ShotResult:
    """What one model scored with one number of demonstrations. Shares and accuracy are fractions.

    Attributes:
        shots: Demonstrations in the prompt.
        items: Questions asked.
        accuracy: Share of right answers.
        standard_error: Of the accuracy, sqrt(p (1 - p) / items).
        most_frequent_answer: The gold answer that occurs most often.
        most_frequent_share: What it would score if it were given to every question.
        distinct_answers: How many different answers the model gave; no answer counts as one.
        top_answer: The answer that the model gave most often; empty where that is none.
        top_answer_share: How often, as a share of the items.
        verdict: What is wrong with the figure, in words; empty where nothing is.
        predictions: The extracted answers in the order of the items; empty where none was found.
        distinct_gold_answers: How many different gold answers there are.
        cut: Answers that reached the limit of tokens before they ended.
        texts: What the model wrote, whole, in the order of the items.
        right: Whether each prediction is the gold answer, in the same order.
        interval: 95 % interval of the accuracy after Wilson, which is sound for few items and near 0 and 1.
    """

    shots: int
    items: int
    accuracy: float
    standard_error: float
    most_frequent_answer: str
    most_frequent_share: float
    distinct_answers: int
    top_answer: str
    top_answer_share: float
    verdict: str
    predictions: list[str] = field(default_factory=list)
    distinct_gold_answers: int = 0
    cut: int = 0
    texts: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    interval: tuple[float, float] = (0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**asdict(self), "interval": list(self.interval)}


@dataclass
class KShotReport:
    """The results of one model, by number of demonstrations.

    Attributes:
        results: One result for each number of demonstrations.
    """

    results: dict[int, ShotResult]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All fields as JSON values, the number of demonstrations as a string."""
        return {str(shots): result.to_dict() for shots, result in self.results.items()}

    def accuracies(self) -> dict[str, float]:
        """Only the accuracies, as fractions, the number of demonstrations as a string."""
        return {str(shots): result.accuracy for shots, result in self.results.items()}

    def notes(self) -> list[str]:
        """The lines that have to be read with the table: verdicts, and answers that were cut."""
        lines = []
        for result in self.results.values():
            if result.verdict:
                lines.append(f"{_shots(result.shots)}: {result.verdict}.")
            if result.cut:
                lines.append(
                    f"{_shots(result.shots)}: {result.cut} of {result.items} answers were cut at the limit of tokens."
                )
        return lines

    def table(self, title: str) -> Table:
        """Lay the results out for a terminal, with the notes beneath."""
        notes = "\n".join(escape(line) for line in self.notes()) or None
        table = Table(title=title, caption=notes, caption_justify="left", caption_style="bold yellow")
        for heading in ("Shots", "Accuracy ± s.e.", "Most frequent\ngold answer", "Most frequent\nanswer given"):
            table.add_column(heading, justify="right")
        table.add_column("Distinct answers\ngiven / gold", justify="right")
        for result in self.results.values():
            table.add_row(
                str(result.shots),
                f"{result.accuracy:.1%} ± {result.standard_error:.1%}",
                escape(f"{_quote(result.most_frequent_answer)} {result.most_frequent_share:.1%}"),
                escape(f"{_quote(result.top_answer)} {result.top_answer_share:.1%}"),
                f"{result.distinct_answers} / {result.distinct_gold_answers}",
            )
        return table


def evaluate_k_shot(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Row],
    demonstrations: Sequence[Row],
    builder: PromptBuilder,
    *,
    shots: Sequence[int] = (0, 1, 8),
    extract: str = "text",
    tolerance: float = 0.0,
    max_new_tokens: int = 16,
    batch_size: int = 48,
    seed: int = 0,
    reshuffle: bool = False,
    description: str | None = None,
) -> KShotReport:
    """Score a model on held-out items with several numbers of demonstrations.

    Args:
        model: The model whose present weights answer.
        tokenizer: Of the model.
        items: Held-out rows; the gold answer is `answer`, or the completion where there is none.
        demonstrations: Rows to show before the question.
        builder: Turns a row and demonstrations into a prompt; its stop strings end the answers of text prompts.
        shots: Numbers of demonstrations. The first k are shown, so that a larger k shows the same ones and more.
        extract: Name in `EXTRACTORS` of what reads the answer out of the text.
        tolerance: For numbers, see `hfkd.eval.answers.match`.
        max_new_tokens: Limit of an answer, in tokens.
        batch_size: Rows that are generated together.
        seed: Of the reshuffling.
        reshuffle: Choose and order the demonstrations anew for each item, as a function of the seed and the item's
            place.
        description: Words for a progress bar; None shows no bar.

    Returns:
        One result for each number of demonstrations, in rising order.

    Raises:
        ValueError: There are no items, fewer demonstrations than shots, an unknown extractor, or an item is among the
            demonstrations.
    """
    # Lists, because a slice of a `Dataset` is a table of columns, not rows.
    shots, items, demonstrations = sorted(set(shots)), list(items), list(demonstrations)
    _check(items, demonstrations, shots, extract)
    check_leakage(demonstrations if reshuffle else demonstrations[: shots[-1]], items)
    golds = [gold_answer(row) for row in items]
    stop = builder.style.stop if isinstance(builder.prompt(items[0]), str) else ()
    settings = GenerationSettings(max_new_tokens=max_new_tokens, stop=tuple(stop), batch_size=batch_size)
    rollout = HFRollout(tokenizer, settings)
    results = {}
    for count in shots:
        shown = [chosen_demonstrations(demonstrations, count, place, seed, reshuffle) for place in range(len(items))]
        prompts = [builder.encode_prompt(row, before) for row, before in zip(items, shown, strict=True)]
        completions = rollout.generate(model, prompts, f"{description}, {_shots(count)}" if description else None)
        predictions = [EXTRACTORS[extract](completion.text) for completion in completions]
        results[count] = score(count, predictions, golds, tolerance)
        results[count].texts = [completion.text for completion in completions]
        results[count].cut = sum(not completion.finished for completion in completions)
    return KShotReport(results)


def chosen_demonstrations(
    demonstrations: Sequence[Row], count: int, index: int, seed: int = 0, reshuffle: bool = False
) -> list[Row]:
    """The demonstrations for one item: the first ones, or drawn by seed and place (fewer are a part of more)."""
    if not reshuffle:
        return list(demonstrations[:count])
    order = random.Random(f"{seed}:{index}").sample(range(len(demonstrations)), len(demonstrations))
    return [demonstrations[place] for place in order[:count]]


def gold_answer(row: Row) -> str:
    """The answer that counts as right: `answer`, or what the completion says.

    Raises:
        ValueError: The row has none of them.
    """
    return completion_text(row) if row.get("answer") is None else str(row["answer"]).strip()


def score(shots: int, predictions: Sequence[str | None], golds: Sequence[str], tolerance: float = 0.0) -> ShotResult:
    """Compare answers with gold ones and look at how both are spread.

    Args:
        shots: Demonstrations in the prompts.
        predictions: Extracted answers, None where none was found.
        golds: Right answers, as many.
        tolerance: For numbers, see `hfkd.eval.answers.match`.
    """
    items = len(golds)
    given = [prediction or "" for prediction in predictions]
    right = [match(ours, gold, tolerance) for ours, gold in zip(predictions, golds, strict=True)]
    accuracy = sum(right) / items
    most_frequent, distinct_gold, _ = _spread(golds)
    top, distinct, top_share = _spread(given)
    result = ShotResult(
        shots=shots,
        items=items,
        accuracy=accuracy,
        standard_error=_standard_error(accuracy, items),
        most_frequent_answer=most_frequent,
        most_frequent_share=sum(match(most_frequent, gold, tolerance) for gold in golds) / items,
        distinct_answers=distinct,
        top_answer=top,
        top_answer_share=top_share,
        verdict="",
        predictions=given,
        distinct_gold_answers=distinct_gold,
        right=right,
        interval=wilson_interval(sum(right), items),
    )
    result.verdict = _verdict(result)
    return result


def _check(items: Sequence[Row], demonstrations: Sequence[Row], shots: Sequence[int], extract: str) -> None:
    if len(items) == 0:
        raise ValueError("There are no items to evaluate on; expected at least one held-out row.")
    if not shots or shots[0] < 0:
        raise ValueError(f"shots is {list(shots)}; expected numbers of demonstrations, 0 or more, like [0, 1, 8].")
    if shots[-1] > len(demonstrations):
        raise ValueError(
            f"shots asks for {shots[-1]} demonstrations and there are {len(demonstrations)}. Give more "
            "demonstrations, or take the number out of shots."
        )
    if extract not in EXTRACTORS:
        raise ValueError(f"extract is {extract!r}; expected one of {', '.join(EXTRACTORS)}.")


def _standard_error(share: float, items: int) -> float:
    return math.sqrt(share * (1 - share) / items)


def _spread(answers: Sequence[str]) -> tuple[str, int, float]:
    """The most frequent answer as it was first written, the number of different ones, and its share."""
    keys = [" ".join(answer.casefold().split()).rstrip(".") for answer in answers]
    counts = Counter(keys)
    key, count = counts.most_common(1)[0]
    return answers[keys.index(key)].strip(), len(counts), count / len(answers)


def _verdict(result: ShotResult) -> str:
    """Say in words that the accuracy is within two standard errors of what a constant answer earns."""
    constant = result.most_frequent_share
    error = result.standard_error or _standard_error(constant, result.items)
    if result.accuracy - constant > 2 * error:
        return ""
    always = f"always answering {_quote(result.most_frequent_answer)}"
    # With two gold answers one of the two is half of what is given, so that alone is no sign of a collapse.
    several = result.distinct_gold_answers > 2
    if result.top_answer_share >= (0.5 if several else 0.9) or (several and result.distinct_answers <= 2):
        given = f"answers {_quote(result.top_answer)} to" if result.top_answer else "gives no answer to"
        given = f"{given} {result.top_answer_share:.0%} of the questions"
        return f"collapsed: {given}, and {always} would score {constant:.1%}"
    return f"no better than {always} ({constant:.1%})"


def _shots(count: int) -> str:
    return f"{count} shot{'' if count == 1 else 's'}"


def _quote(answer: str) -> str:
    text = " ".join(answer.split())
    return f"'{text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 1] + '…'}'" if text else "no answer"
