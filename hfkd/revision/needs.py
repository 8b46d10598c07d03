"""What a reviser that asks the teacher needs of a trainer."""

from __future__ import annotations

from typing import Any

from hfkd.data.views import DistillationDataset, shown_demonstrations


def check_teacher(trainer: Any, name: str, why: str) -> None:
    """Refuse a trainer whose teacher can't be asked, or would be asked with the student's prompt by mistake.

    Args:
        trainer: A `DistillationTrainer`.
        name: Of the reviser, for the message.
        why: What the teacher does for it.

    Raises:
        ValueError: There is no teacher, or no term asks it, so that its own prompts were never made.
    """
    if trainer.teacher is None:
        raise ValueError(f"{name}: {why}, and there is no teacher. Pass `teacher=`.")
    dataset = trainer.train_dataset
    if not isinstance(dataset, DistillationDataset) or dataset.teacher_view:
        return
    rows = (dataset.row(index) for index in range(len(dataset)))
    if any(shown_demonstrations(row, dataset.demonstrations) or row.get("privileged_context") for row in rows):
        raise ValueError(
            f"{name}: {why}, and no term of the objective asks the teacher, so it would read the student's prompt and "
            "not its own with demonstrations or a privileged_context. Add a term that asks it, such as forward_kl."
        )
