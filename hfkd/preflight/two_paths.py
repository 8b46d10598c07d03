"""One batch's loss and gradient twice: as the trainer computes them, and from the definition on plain forward passes.

The trainer drops prompts before the head, works in chunks, reuses prefixes and takes the gradient on the way. Here the
models' own forwards give all logits, labels are shifted in a loop over rows, and the losses are written out as their
papers do. Where both agree, none of those short cuts changed what is learned. Both run in the precision that training
has. Only losses on whole distributions, and only teachers whose models are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfkd.batch import IGNORE, Batch, View
from hfkd.preflight.findings import Finding
from hfkd.rows import LOWEST, input_device
from hfkd.teachers import CachedTeacher, MixtureTeacher, RoutedTeacher, Teacher
from hfkd.teachers.local import ModelTeacher
from hfkd.terms import Term
from hfkd.trainer import DistillationTrainer

NAME = "loss by two paths"
_LOGIT_BYTES = 2**28
_TOLERANCE = {"float32": 1e-4, "float64": 1e-4}
_ROUGH = 3e-2  # 16 bits, or products of few digits: the two paths round in other places

Definition = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second.clamp(min=LOWEST))).sum(-1)


def _mixed(first: Tensor, second: Tensor, share: float) -> Tensor:
    return (share * first.exp() + (1 - share) * second.exp()).log()


def _jensen_shannon(student: Tensor, teacher: Tensor, settings: Mapping[str, Any]) -> Tensor:
    weight = settings["mixture_weight"]
    middle = _mixed(student, teacher, weight)
    return weight * _kl(student, middle) + (1 - weight) * _kl(teacher, middle)


DEFINITIONS: dict[str, Definition] = {
    "forward_kl": lambda student, teacher, _: _kl(teacher, student),
    "reverse_kl": lambda student, teacher, _: _kl(student, teacher),
    "jensen_shannon": _jensen_shannon,
    "skew_forward_kl": lambda student, teacher, settings: _kl(teacher, _mixed(teacher, student, settings["skew"])),
    "skew_reverse_kl": lambda student, teacher, settings: _kl(student, _mixed(student, teacher, settings["skew"])),
    "total_variation": lambda student, teacher, _: 0.5 * (student.exp() - teacher.exp()).abs().sum(-1),
}
"""[N] nats of each token from log-probabilities [N, V] of student and teacher, by the key of the loss."""


def why_not(trainer: DistillationTrainer) -> str:
    """Why the two can't be compared; empty where they can."""
    terms, teacher = trainer.objective.terms, trainer.teacher
    others = [term.name for term in terms if term.loss.key not in (*DEFINITIONS, "cross_entropy")]
    if others:
        return f"the terms {others} have no definition here on plain distributions"
    if isinstance(teacher, CachedTeacher) and trainer.objective.needs:
        return "the teacher is read from a cache, so there is no model to run plainly"
    members = teacher.teachers.values() if isinstance(teacher, MixtureTeacher | RoutedTeacher) else [teacher]
    known = all(isinstance(one, ModelTeacher) and one.writes and not one.other_vocabulary for one in members)
    if trainer.objective.needs and not known:
        return f"{type(teacher).__name__} isn't a whole model that reads the student's ids"
    return ""


def compare_paths(trainer: DistillationTrainer) -> Iterator[Finding]:
    """Compute one batch's loss and gradient by both paths.

    Args:
        trainer: Ready to train; its weights stay as they are.
    """
    if reason := why_not(trainer):
        yield Finding("pass", NAME, f"Not compared: {reason}.", {"compared": False})
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    training = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout would be drawn differently
    try:
        yield _compare(trainer, model)
    finally:
        for module, mode in training:
            module.training = mode
        model.zero_grad(set_to_none=True)


def _compare(trainer: DistillationTrainer, model: nn.Module) -> Finding:
    trainer.objective.set_step(0, max(1, trainer.args.max_steps))
    inputs = _small_batch(trainer, model)
    gradients, losses = [], []
    for path in (lambda: trainer.compute_loss(model, inputs), lambda: plain_loss(trainer, model, inputs)):
        model.zero_grad(set_to_none=True)
        loss = path()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    precision = _precision(trainer, model)
    tolerance = _TOLERANCE.get(precision, _ROUGH)
    gap = abs(losses[0] - losses[1]) / max(abs(losses[1]), 1e-3)
    slope = _unlike(*gradients)
    tokens = Batch.from_inputs(inputs).student.tokens
    figures = {"compared": True, "rows": int(inputs["labels"].shape[0]), "tokens": tokens, "trainer": losses[0]}
    figures |= {"by_hand": losses[1], "relative_difference": gap, "gradient_difference": slope}
    figures |= {"tolerance": tolerance, "precision": precision}
    words = (
        f"On {figures['rows']} examples with {tokens} tokens to learn the trainer gives {losses[0]:.6f} nats a token, "
        f"the definition on plain forward passes {losses[1]:.6f}: they differ by {gap:.1e} of it, the gradients by "
        f"{slope:.1e} of theirs"
    )
    if gap <= tolerance and slope <= 10 * tolerance:
        return Finding("pass", NAME, f"{words} (rounding of {precision}).", figures)
    return Finding(
        "error",
        NAME,
        f"{words}, more than rounding of {precision} ({tolerance:.0e}) explains. What would be trained isn't what "
        "the recipe says; please report the recipe and the model. teacher.reuse_prefix: false or "
        "training.padding_free: false may avoid it meanwhile.",
        figures,
    )


def _unlike(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """How far two gradients are apart, as a share of the second one's length."""
    names = first.keys() | second.keys()
    gap = sum(float((_of(first, second, name) - _of(second, first, name)).double().square().sum()) for name in names)
    size = sum(float(one.double().square().sum()) for one in second.values())
    return (gap / max(size, 1e-24)) ** 0.5


def _of(wanted: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> Tensor:
    return wanted[name] if name in wanted else torch.zeros_like(other[name])


def _precision(trainer: DistillationTrainer, model: nn.Module) -> str:
    """What products are computed in: the weights' type, or what mixed precision takes in its place."""
    args = trainer.args
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    if args.tf32 and args.device.type == "cuda" and model.dtype == torch.float32:
        return "tf32"
    return str(model.dtype).removeprefix("torch.")


def _small_batch(trainer: DistillationTrainer, model: nn.Module) -> dict[str, Any]:
    """As many of the first examples as plain logits of both views fit a quarter of a gigabyte, at least one."""
    dataset, most = trainer.train_dataset, max(1, trainer.args.train_batch_size)
    width = model.get_output_embeddings().weight.shape[0] * 8
    examples, longest = [], 0
    for index in range(min(most, len(dataset))):
        example = dataset[index]
        views = [view for view in (example["student"], example["teacher"]) if view is not None]
        longest = max([longest, *(len(view["input_ids"]) for view in views)])
        if examples and longest * (len(examples) + 1) * width > _LOGIT_BYTES:
            break
        examples.append(example)
    return trainer._prepare_inputs(trainer.data_collator(examples))


def plain_loss(trainer: DistillationTrainer, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The loss from its definition: all logits of plain forward passes, no chunks, no prefix, one softmax.

    Args:
        trainer: Its objective says which terms count how much, its teacher whose distribution is learned.
        model: The student.
        inputs: What the collator returned.

    Returns:
        Nats a token, a scalar with its gradient.
    """
    batch, teacher = Batch.from_inputs(inputs), None
    with trainer.accelerator.autocast():
        student, targets = _predictions(model, batch.student)
        if trainer.objective.needs:
            with torch.no_grad():
                teacher = _teacher_logits(trainer.teacher, batch).to(student.device)
    if teacher is not None:
        shared = min(student.shape[-1], teacher.shape[-1])
        student, teacher = student[:, :shared], teacher[:, :shared]
    weights = torch.ones(len(targets)) if batch.token_weights is None else batch.token_weights
    total = student.new_zeros(())
    for term in trainer.objective.terms:
        total = total + term.weight * (_values(term, student, teacher, targets) * weights.to(student.device)).sum()
    return total / len(targets)


def _predictions(model: nn.Module, view: View) -> tuple[Tensor, Tensor]:
    """[N, V] float32 logits that predict the learned tokens, and [N] those tokens, row by row."""
    device = input_device(model)
    logits = model(input_ids=view.input_ids.to(device), attention_mask=view.attention_mask.to(device)).logits
    rows, targets = [], []
    for row, labels in enumerate(view.labels.tolist()):
        for place, label in enumerate(labels):
            if place and label != IGNORE:
                rows.append(logits[row, place - 1])
                targets.append(label)
    return torch.stack(rows).float(), torch.tensor(targets, device=logits.device)


def _teacher_logits(teacher: Teacher, batch: Batch) -> Tensor:
    """[N, V] what the teacher says, as logits; of a mixture the logarithm of its mean probability."""
    if not isinstance(teacher, MixtureTeacher | RoutedTeacher):
        with teacher.weights() as model:
            return _predictions(model, batch.teacher_view)[0]
    logits = {name: _teacher_logits(one, batch) for name, one in teacher.teachers.items()}
    shared = min(one.shape[-1] for one in logits.values())
    logits = {name: one[:, :shared] for name, one in logits.items()}
    if isinstance(teacher, MixtureTeacher):
        return sum(teacher.shares[name] * one.softmax(-1) for name, one in logits.items()).log()
    owners = [number for number, labels in zip(batch.route.tolist(), batch.teacher_view.labels, strict=True)
              for _ in range(int((labels[1:] != IGNORE).sum()))]  # fmt: skip
    members = list(logits.values())
    return torch.stack([members[number][row] for row, number in enumerate(owners)])


def _values(term: Term, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
    """[N] what a term says of each token, by its definition."""
    if term.loss.key == "cross_entropy":
        return -student.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    temperature = term.loss.temperature
    pair = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    values = DEFINITIONS[term.loss.key](*pair, term.loss.settings())
    return values * temperature**2 if term.loss.scale_by_temperature_squared else values
