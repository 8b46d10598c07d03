"""How a run went, as far as its record says: whether it ended as it should, and how many steps it made.

What a recipe asks for is no proof that it was done: a step is said to be made where the run finished, or logged it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfkd.card.reading import count, entries, section, text

_NOT_AS_ASKED = "So the weights and the figures here, if there are any, are not those of the run that was asked for."
_ENDINGS = {
    "started": "its record says that it began and not that it ended: it may have been killed, or be at work still.",
    "failed": "its record says 'failed': it ended with an error.",
    "preempted": "its record says 'preempted': it was stopped before its end, and nobody went on with it.",
}


def ending(run: Mapping[str, Any]) -> str:
    """What has to be known of a run that isn't known to have finished; empty for one that is."""
    status = text(run, "status")
    if status == "finished":
        return ""
    if not status:
        return "This run may not be finished: nothing here says how it ended."
    return f"This run is not finished: {_ENDINGS.get(status, f'its record says {status!r}.')} {_NOT_AS_ASKED}"


def steps_words(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """How many optimizer steps were made, of how many that were asked for."""
    history, training = entries(report, "loss_history"), section(run, "recipe.training")
    logged, asked = max((count(entry, "step") for entry in history), default=0), count(training, "max_steps")
    every = count(training, "logging_steps", 10)
    finished = text(run, "status") == "finished"
    as_asked = logged == asked or finished and (not logged or 0 <= asked - logged < max(every, 1))
    if asked > 0 and as_asked:
        return f"{asked} optimizer steps"
    if logged > 0:
        of = f" of the {asked} that were asked for" if asked > 0 else ""
        exactly = finished and every == 1 and not of
        return f"{logged} optimizer steps" if exactly else f"at least {logged} optimizer steps{of}"
    return f"up to {asked} optimizer steps were asked for, and how many were made isn't recorded" if asked > 0 else ""
