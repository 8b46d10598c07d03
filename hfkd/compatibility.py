"""Do student, teacher, objective, answers and data fit together? Whatever can't work is refused here, before a step.

Reads what the parts say of themselves; it runs no model and changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from hfkd.data.views import DistillationDataset
from hfkd.objective import Objective
from hfkd.rollout.base import GenerationSettings
from hfkd.rollout.on_policy import Mixture
from hfkd.signal import DISTRIBUTION, STATES
from hfkd.teachers import Teacher

logger = logging.getLogger(__name__)


def check_devices(args: TrainingArguments) -> None:
    """Refuse several GPUs in one process.

    Raises:
        ValueError: transformers would run them as DataParallel.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, and transformers would run them as DataParallel, which can't work "
            "here. Start one process per GPU with `accelerate launch`, or show one with CUDA_VISIBLE_DEVICES=0."
        )


def check_parts(objective: Objective, teacher: Teacher | None, mixture: Mixture, has_adapter: bool) -> None:
    """Compare what can be compared before any text is read.

    Args:
        objective: Says what its terms need.
        teacher: Says what it has.
        mixture: Who writes the text.
        has_adapter: Whether the student has one.

    Raises:
        ValueError: They don't fit together.
    """
    _check_teacher(objective, teacher, has_adapter)
    _check_answers(objective, mixture, teacher)


def check_second_view(objective: Objective, teacher: Teacher | None, dataset: Any, mixture: Mixture) -> None:
    """Refuse a teacher with the student's weights and the student's prompt.

    Args:
        objective: Its terms may learn the text, and so move the student away from such a teacher.
        teacher: Says whether it begins as the student.
        dataset: Says whether the prompts differ.
        mixture: Who writes; on the student's own text those terms are left out.

    Raises:
        ValueError: There would be nothing to learn.
    """
    if not objective.needs or not isinstance(dataset, DistillationDataset) or dataset.second_view:
        return
    if teacher.needs_second_view:
        raise ValueError(
            "The self-teacher reads the same prompt as the student with the same weights: there would be nothing to "
            "learn. Give it demonstrations (`demonstrations=`), or rows with a `privileged_context`."
        )
    moves = any(term.loss.learns_text for term in objective.terms) and set(mixture.shares) != {"student"}
    if teacher.begins_as_student and not moves:
        raise ValueError(
            "The teacher begins as the student and reads the same prompt, and no term learns the text: both would "
            "stay where they are. Give it demonstrations (`demonstrations=`) or a `privileged_context`, or add "
            "cross_entropy."
        )


def check_readers_of_draws(objective: Objective) -> None:
    """Refuse terms that can't read a teacher that is known through drawn ids only.

    Raises:
        ValueError: Names them.
    """
    reading = [term for term in objective.terms if DISTRIBUTION in term.loss.needs]
    blind = [term.name for term in reading if not getattr(term.loss, "reads_samples", False)]
    if blind:
        raise ValueError(
            f"The teacher is known through drawn ids only (codec sampled), and the terms {blind} read whole "
            "distributions. Use forward_kl, or a cache with the codec topk or hidden."
        )


def check_room(
    dataset: Any, settings: GenerationSettings | None, positions: Mapping[str, int | None] | None = None
) -> None:
    """Make sure that an answer of the greatest length fits behind every prompt.

    Args:
        dataset: The training set.
        settings: Of the text that is to be written; None where they aren't known.
        positions: How many positions the models of `student` and `teacher` have, as far as that is known.

    Raises:
        ValueError: A view would be longer than its limit, or the whole text is learned, so that there is no prompt.
    """
    if not isinstance(dataset, DistillationDataset):
        return
    if dataset.whole_text:
        raise ValueError(
            "whole_text learns every token, so there is no prompt behind which text could be written. Take it out, or "
            "use answer='dataset'."
        )
    if settings is None:
        return
    limits = (
        ("student", dataset.max_length, f"max_length={dataset.max_length}"),
        ("teacher", dataset.teacher_max_length, f"teacher_max_length={dataset.teacher_max_length}"),
        *((view, count, f"the {count} positions of its model") for view, count in (positions or {}).items() if count),
    )
    for view, limit, words in limits:
        longest = dataset.longest_prompts[view]
        if longest + settings.max_new_tokens > limit:
            raise ValueError(
                f"The longest prompt of the {view} has {longest} tokens and may be answered with "
                f"{settings.max_new_tokens} more, above {words}. Raise the limit if you can, lower max_new_tokens, or "
                "show fewer demonstrations; nothing is cut in silence."
            )


def _check_teacher(objective: Objective, teacher: Teacher | None, has_adapter: bool) -> None:
    """Compare what the terms ask for with what the teacher has.

    Raises:
        ValueError: There is no teacher, it lacks something, it has another vocabulary or fewer ids than a term can
            read, or it needs an adapter that isn't there.
    """
    needs = objective.needs
    if needs and teacher is None:
        raise ValueError(
            f"The terms {[term.name for term in objective.terms]} ask for a teacher's {sorted(needs)}, but there is "
            "no teacher. Pass `teacher=`, or take `objective='cross_entropy'`."
        )
    if teacher is None:
        return
    if not needs <= teacher.provides:
        states = " Hidden states are shown by LocalTeacher and SelfTeacher." if STATES in needs else ""
        kind = type(teacher).__name__
        raise ValueError(f"The terms need {sorted(needs)}, but {kind} provides {sorted(teacher.provides)}.{states}")
    if teacher.needs_adapter and not has_adapter:
        raise ValueError(
            "A self-teacher with weights='adapter_off' needs a student with an adapter, and there is none to switch "
            "off. Pass a `peft_config`, or take weights='frozen_copy' or 'live'."
        )
    if teacher.drawn:
        check_readers_of_draws(objective)
    if not teacher.other_vocabulary:
        return
    reading = [term for term in objective.terms if term.loss.needs]
    blind = [term.name for term in reading if not getattr(term.loss, "reads_other_vocabulary", False)]
    if blind:
        raise ValueError(
            f"The teacher has a vocabulary of its own, and the terms {blind} compare probabilities id by id. Use uld "
            "or span_likelihood, or a teacher of the student's family."
        )


def _check_answers(objective: Objective, mixture: Mixture, teacher: Teacher | None) -> None:
    """Look whether something can be learned from text that the student writes.

    Raises:
        ValueError: All terms learn the text itself, or the teacher has no prompt of its own to be asked with.
    """
    if not mixture.writes:
        return
    if mixture.shares.get("student") and all(term.loss.learns_text for term in objective.terms):
        raise ValueError(
            f"The student is to learn from text that it writes itself, and the terms "
            f"{[term.name for term in objective.terms]} learn the text: it would be taught what it says already. Add "
            "a term that asks the teacher (reverse_kl), or train on answer='dataset'."
        )
    left_out = [term.name for term in objective.terms if term.loss.learns_text]
    if left_out and set(mixture.shares) == {"student"}:
        logger.warning("The student writes all text, on which %s never count: they learn the text itself.", left_out)
    if teacher is None:
        raise ValueError("Text is to be written while training, and there is no teacher to judge it. Pass `teacher=`.")
    if mixture.shares.get("teacher") and not teacher.writes:
        raise ValueError(
            f"The teacher is to write answers, and {type(teacher).__name__} has no one model that could. Use "
            "answer='dataset' or answer='student'."
        )
    if teacher.other_vocabulary:
        raise ValueError(
            "Text that is written while training can't be given to a teacher with another tokenizer. Use "
            "answer='dataset', or a teacher of the student's family."
        )
