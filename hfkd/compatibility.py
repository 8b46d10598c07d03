"""Do student, teacher, objective, answers and data fit together? Whatever can't work is refused here, before a step.

Reads what the parts say of themselves; it runs no model and changes nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import TrainingArguments

from hfkd.data.views import DistillationDataset
from hfkd.objective import Objective
from hfkd.rollout.base import GenerationSettings
from hfkd.rollout.on_policy import Mixture
from hfkd.rows import base_model_of
from hfkd.sharding import ends_share_behind_a_copy, fsdp_version, is_sharded
from hfkd.signal import DISTRIBUTION, STATES
from hfkd.teachers import SeveralTeachers, Teacher
from hfkd.teachers.moving import ShadowTeacher
from hfkd.zero import zero_stage

logger = logging.getLogger(__name__)


def check_processes(use_cpu: bool = False, fsdp: Any = None) -> None:
    """Refuse more processes on this machine than it has GPUs, before the first of them fails on one that isn't there,
    and shards on CPUs.

    Args:
        use_cpu: Whether the run asks for no GPU.
        fsdp: What the training arguments say of FSDP; empty where the launcher alone decides.

    Raises:
        ValueError: Says how many there are of both, or what to take out.
    """
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    sharded = bool(fsdp) or _is_on("ACCELERATE_USE_FSDP")
    if use_cpu or _is_on("ACCELERATE_USE_CPU"):
        if sharded and max(wanted, int(os.environ.get("WORLD_SIZE", "1"))) > 1 and not _shards_on_cpu():
            raise ValueError(
                "The run asks for FSDP and for no GPU (use_cpu), and accelerate shards nothing on CPUs: each process "
                "would train a whole student, beside a teacher in shards. Take use_cpu out, or launch with "
                "recipes/accelerate/ddp.yaml."
            )
        return
    if wanted <= 1:
        return
    found = torch.cuda.device_count()
    if not torch.accelerator.is_available() and not sharded:
        raise ValueError(
            f"{wanted} processes were started without a GPU, and each would train alone; set ACCELERATE_USE_CPU=true."
        )
    if 0 < found < wanted or (not torch.accelerator.is_available() and sharded):
        otherwise = " (without one, accelerate would train on the CPU and shard nothing)" if not found else ""
        raise ValueError(
            f"{wanted} processes were started on this machine, one for each GPU, and it has {found}{otherwise}. Set "
            f"num_processes of the accelerate config to {max(found, 1)} (times the machines), or "
            "CUDA_VISIBLE_DEVICES if it hides some."
        )


def _shards_on_cpu() -> bool:
    """Whether accelerate shards models there."""
    return False


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def check_layers(model: nn.Module, accelerator: Any) -> None:
    """Refuse to shard a student whose layers can't be found: it would be gathered whole at every step.

    Args:
        model: The student, not wrapped yet.
        accelerator: The trainer's.

    Raises:
        ValueError: Names the architecture and the setting.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or not getattr(accelerator, "is_fsdp2", False):
        return
    policy = plugin.auto_wrap_policy
    if getattr(policy, "func", policy) is not transformer_auto_wrap_policy:
        return  # cut by size, or not at all, because the config says so
    base, given = base_model_of(model), plugin.transformer_cls_names_to_wrap
    names = sorted(given or getattr(base, "_no_split_modules", None) or ())
    known = {type(module).__name__ for module in model.modules()}
    missing = [name for name in names if name not in known]
    if names and not missing:
        return
    said = "fsdp_transformer_layer_cls_to_wrap is" if given else "the architecture names the classes"
    near = sorted(name for name in known if name.endswith(("Layer", "Block")))
    raise ValueError(
        f"The student, a {type(base).__name__}, can't be sharded: its layers can't be found ({said} {names}"
        f"{f', and it has no {missing[0]}' if missing else ''}). Set fsdp_transformer_layer_cls_to_wrap in the "
        f"accelerate config to the class of its layers{f' ({near} perhaps)' if near else ''}, or launch without FSDP."
    )


def check_sharding(accelerator: Any, model: nn.Module, teacher: Teacher | None) -> None:
    """Refuse models that can't work on weights that are spread over the processes, before a teacher is loaded.

    Args:
        accelerator: The trainer's.
        model: The student, not wrapped yet.
        teacher: One, or several; needn't be prepared.

    Raises:
        ValueError: Names the part, and what to do.
    """
    kind = _sharding(accelerator)
    if kind is None:
        return
    _check_plugin(accelerator, model)
    base = base_model_of(model)
    if getattr(base, "is_quantized", False):
        raise ValueError(
            f"The student is quantised, and quantised weights can't be cut into shards ({kind}). Load it in bfloat16, "
            "or launch with recipes/accelerate/ddp.yaml."
        )
    if accelerator.distributed_type == DistributedType.FSDP and ends_share_behind_a_copy(base):
        raise ValueError(
            f"An adapter trains a copy of an end of {type(base).__name__} whose own weights are shared by both ends "
            f"(modules_to_save, tie_word_embeddings), and torch can't cut such weights ({kind}). Take lm_head and "
            "embed_tokens out of modules_to_save, or launch with recipes/accelerate/ddp.yaml."
        )
    members = teacher.teachers if isinstance(teacher, SeveralTeachers) else {"": teacher}
    for member in members.values():
        if isinstance(member, ShadowTeacher):
            raise ValueError(
                f"{type(member).__name__} swaps the student's weights, which can't be done while they are spread over "
                f"the processes ({kind}). Take SelfTeacher ('adapter_off', 'live' or 'frozen_copy'), or launch with "
                "recipes/accelerate/ddp.yaml."
            )


def check_learning_terms(accelerator: Any, objective: Objective) -> None:
    """Refuse parameters of losses where neither FSDP nor DeepSpeed's engine would know them.

    Args:
        accelerator: The trainer's.
        objective: Prepared, so that it has the parameters that it will have.

    Raises:
        ValueError: Names the terms.
    """
    stage = zero_stage(accelerator)
    kind = _sharding(accelerator) or (f"DeepSpeed ZeRO-{stage}" if stage else None)
    if kind is None:
        return
    learning = [term.name for term in objective.terms if any(one.requires_grad for one in term.loss.parameters())]
    learning = learning or [name for name, one in objective.named_parameters() if one.requires_grad]
    if learning:
        raise ValueError(
            f"The terms {learning} hold parameters of their own (projections, networks), which Accelerate can't "
            f"optimise beside a sharded student ({kind}). Launch with recipes/accelerate/ddp.yaml, or take terms "
            "without parameters."
        )


def check_wrapped(accelerator: Any, model: nn.Module) -> None:
    """Refuse an evaluation of a student that FSDP2 hasn't cut yet, which accelerate does with its optimizer only.

    Args:
        accelerator: The trainer's.
        model: The student.

    Raises:
        ValueError: Says when it can be evaluated.
    """
    if getattr(accelerator, "is_fsdp2", False) and not is_sharded(model):
        raise ValueError(
            "The student isn't in shards yet: under FSDP2 accelerate cuts it when training begins, together with its "
            "optimizer, and evaluates nothing before. Set eval_on_start=True for an evaluation before the first step, "
            "call evaluate() after train(), or launch it without FSDP."
        )


def _check_plugin(accelerator: Any, model: nn.Module) -> None:
    """Refuse settings of FSDP with which weights are misread or lost."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if fsdp_version(accelerator) != 2:
        raise ValueError(
            "The run was launched with FSDP version 1, whose flattened weights the objective can't read. Set "
            "fsdp_version: 2 in the accelerate config (recipes/accelerate/fsdp2.yaml does)."
        )
    if getattr(plugin, "cpu_ram_efficient_loading", False):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is on: all processes but the first would hold empty weights until the "
            "student is sharded, and teachers and evaluations read them before. Set it to false in the accelerate "
            "config."
        )
    if not hasattr(model, "peft_config") or not getattr(plugin, "activation_checkpointing", False):
        return
    if "SHARDED_STATE_DICT" in str(plugin.state_dict_type):
        raise ValueError(
            "An adapter is trained with fsdp_activation_checkpointing and checkpoints of shards: such a checkpoint "
            "can't be resumed, because peft doesn't find the weights of layers that are wrapped, and keeps fresh ones "
            "without a word (peft 0.21, accelerate 1.15). Set fsdp_state_dict_type: FULL_STATE_DICT; an adapter is "
            "small."
        )


def _sharding(accelerator: Any) -> str | None:
    """The way in which the student will be cut, in words; None where each process has it whole."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"FSDP version {fsdp_version(accelerator)}"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return f"DeepSpeed ZeRO-{stage}" if stage == 3 else None
    return None


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
