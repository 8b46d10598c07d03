"""A labelling from its plan to its files: rows read, questions asked, answers filtered, rows and summary written.

Every row of the source ends in rows.jsonl or, with its reason, in rejected.jsonl; the summary adds them up.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from hfkd.data.load import Source, load_rows
from hfkd.data.messages import prompt_key
from hfkd.files import try_folder, write_json, write_whole
from hfkd.labels.asking import Asker, Question
from hfkd.labels.card import card_text
from hfkd.labels.endpoint import Endpoint
from hfkd.labels.filters import Filter, Labelled
from hfkd.labels.ledger import LEDGER_NAME, Ledger, alone
from hfkd.labels.parts import make_filters, make_template
from hfkd.labels.plan import LabelPlan
from hfkd.labels.templates import Answer, Template
from hfkd.masking import shareable

ROWS_NAME, REJECTED_NAME, SUMMARY_NAME = "rows.jsonl", "rejected.jsonl", "summary.json"


def label_rows(plan: LabelPlan, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Have a teacher label the rows of a plan. Run it again where it was killed: what is in the ledger isn't asked.

    Args:
        plan: See `hfkd.labels.plan.load_plan`.
        say: Takes lines of progress.

    Returns:
        What is in summary.json.

    Raises:
        EndpointError: The endpoint can't be used, or the budget is spent. Answers so far are kept.
        VerifierError: A verifier is broken.
        ValueError: A part of the plan is refused, rows can't be read, or no row has a label in the end.
        OSError: The folder can't be written to.
    """
    template, filters = make_template(plan), make_filters(plan)
    endpoint = Endpoint(plan.endpoint)
    folder = Path(plan.output_dir)
    try_folder(folder)
    rows = list(load_rows(Source(**plan.data.model_dump()), require_completion=False))
    with closing(endpoint), alone(folder):
        started = time.monotonic()
        asker = Asker(endpoint, Ledger(folder / LEDGER_NAME), plan.endpoint, plan.generation, say=say)
        labelled = _ask(rows, template, asker, plan.samples)
        for key, one in filters:
            _apply(key, one, labelled, asker)
        kept = [(one.number, one.row, answer) for one in labelled for answer in _chosen(one, plan.keep)]
        learned = template.rows(kept)
        summary = _summary(plan, labelled, learned, asker, time.monotonic() - started)
        _write(folder, plan, labelled, learned, summary)
    if not learned:
        raise ValueError(
            f"None of the {len(rows)} rows has a label in the end ({_in_words(summary['rows']['rejected'])}); look at "
            f"{folder / REJECTED_NAME} and change the template, the filters or the teacher."
        )
    return summary


def _ask(rows: Sequence[Mapping[str, Any]], template: Template, asker: Asker, samples: int) -> list[Labelled]:
    """All samples of all rows."""
    questions = [
        Question(template.messages(row), lambda text, row=row: template.read(row, text), sample)
        for row in rows
        for sample in range(samples)
    ]
    outcomes = iter(asker.ask_all(questions, "labels"))
    labelled = []
    for number, row in enumerate(rows):
        found = [next(outcomes) for _ in range(samples)]
        answers = [outcome.value for outcome in found if outcome.value is not None]
        reasons = [(outcome.kind, outcome.words) for outcome in found if outcome.value is None]
        labelled.append(Labelled(number, row, samples, answers, reasons, len({answer.text for answer in answers})))
    return labelled


def _apply(key: str, one: Filter, labelled: Sequence[Labelled], asker: Asker) -> None:
    """Drop what a filter finds fault with."""
    left = [each for each in labelled if each.answers]
    verdicts = one.judge(left, lambda questions: asker.ask_all(questions, key))
    for each, faults in zip(left, verdicts, strict=True):
        pairs = list(zip(each.answers, faults, strict=True))
        each.answers = [answer for answer, fault in pairs if not fault]
        each.reasons += [(key, fault) for _, fault in pairs if fault]


def _chosen(one: Labelled, keep: str) -> list[Answer]:
    """The first answer, or all with different completions."""
    different: dict[str, Answer] = {}
    for answer in one.answers:
        different.setdefault(answer.completion, answer)
    return list(different.values())[: 1 if keep == "first" else None]


def _summary(
    plan: LabelPlan, labelled: Sequence[Labelled], learned: Sequence[Mapping[str, Any]], asker: Asker, seconds: float
) -> dict[str, Any]:
    from hfkd import __version__

    lost = [one for one in labelled if not one.answers]
    totals, run = asker.ledger.totals, asker.run
    return {
        "rows": {
            "read": len(labelled),
            "labelled": len(labelled) - len(lost),
            "rejected": dict(Counter(one.reasons[-1][0] for one in lost)),
            "written": len(learned),
        },
        "answers": {
            "asked": sum(one.asked for one in labelled),
            "passed": sum(len(one.answers) for one in labelled),
            "dropped": dict(Counter(kind for one in labelled for kind, _ in one.reasons)),
        },
        "requests": {
            "sent": totals.requests,
            "sent_by_this_run": run.requests,
            "faults": dict(totals.faults),
            "answers_reused": asker.reused,
        },
        "tokens": {
            "prompt": totals.prompt_tokens,
            "completion": totals.completion_tokens,
            "requests_without_count": totals.uncounted,
        },
        "cost": asker.cost(),
        "seconds": round(seconds, 1),
        "warnings": list(_warnings(plan, labelled, asker)),
        "plan": shareable(plan.resolved()),
        "hfkd": __version__,
    }


def _warnings(plan: LabelPlan, labelled: Sequence[Labelled], asker: Asker) -> Iterable[str]:
    """What a user should know before training on this."""
    if plan.samples > 1 and len(labelled) >= 4 and all(one.different <= 1 for one in labelled):
        yield (
            f"the {plan.samples} samples of each row are the same text: the endpoint doesn't seem to sample, so "
            "agreement says nothing; some servers heed the model's own generation config only (generation.extra)"
        )
    if asker.ledger.totals.uncounted:
        yield (
            f"{asker.ledger.totals.uncounted} requests came back without a count of their tokens; tokens and cost are "
            "at least what is said"
        )
    repeated = len(labelled) - len({prompt_key(one.row) if one.row.get("prompt") else one.number for one in labelled})
    if repeated:
        yield f"{repeated} rows have a prompt that another has too; their questions were asked once"
    answers = Counter(one.answers[0].answer for one in labelled if one.answers)
    if len(labelled) >= 8 and answers and answers.most_common(1)[0][1] > 0.9 * answers.total():
        yield f"{answers.most_common(1)[0][1]} of {answers.total()} answers are {answers.most_common(1)[0][0][:40]!r}"


def _write(
    folder: Path,
    plan: LabelPlan,
    labelled: Sequence[Labelled],
    learned: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> None:
    """The files of a labelling; rows.jsonl isn't touched if there are none."""
    rejected = [
        {
            "source_row": one.number,
            "prompt": one.row.get("prompt") or one.row.get("messages"),
            "reasons": [f"{kind}: {words}" if not words.startswith(kind) else words for kind, words in one.reasons],
        }
        for one in labelled
        if not one.answers
    ]
    write_whole(folder / REJECTED_NAME, _lines(rejected))
    if learned:
        write_whole(folder / ROWS_NAME, _lines(learned))
        write_whole(folder / "README.md", card_text(plan, summary))
    write_json(folder / SUMMARY_NAME, summary)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode("utf-8", errors="replace").decode()  # half a character of a damaged reply


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items()) or "none was read"
