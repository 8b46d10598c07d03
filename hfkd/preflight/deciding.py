"""What a recipe's sampler and transforms have to say before a run: do they go with the rows, and what isn't shown?"""

from __future__ import annotations

from collections.abc import Iterator

from hfkd.data.views import DistillationDataset
from hfkd.preflight.findings import Finding
from hfkd.run.build import Run
from hfkd.run.deciding import check_rows

NAME = "what decides"
REWARDED = "the run is rewarded, and the trials of a check know the teacher's part alone"


def decides(run: Run) -> bool:
    """Whether there is anything to say."""
    data = run.recipe.data
    return data.sampler is not None or bool(data.transforms or data.revise) or run.recipe.reinforcement is not None


def check_deciding(run: Run, dataset: DistillationDataset) -> Iterator[Finding]:
    """Let what decides look at the rows.

    Args:
        run: With its rows.
        dataset: Of the training examples.

    Raises:
        ValueError: Sampler, first transform or a reviser can't work with these rows.
    """
    data = run.recipe.data
    if check_rows(run, dataset):
        yield Finding("pass", NAME, f"{data.sampler.kind} can draw from the {len(dataset)} examples.")
    if data.transforms:
        kinds = ", ".join(section.kind for section in data.transforms)
        yield Finding("pass", NAME, f"Rows are shown as they are before {kinds}, which the run itself does.")
    if run.recipe.reinforcement is not None:
        yield Finding("warning", NAME, f"Memory, loss and duration aren't tried: {REWARDED}.")
