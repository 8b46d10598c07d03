"""How many bytes a process holds of what: arithmetic, without a model and without torch.

    student       = (weight + learning * (gradient + state)) * parameters, each divided by n where it lies in shards
    teacher       = bytes * parameters: whole, divided by n, in CPU memory, or nowhere
    gathered      = one layer of a model in shards, twice (the next one is fetched meanwhile), and the heads
    activations   = (2 * layers + 34) * tokens * hidden, or 34 * layers * tokens * hidden without checkpointing
    objective     = 4 buffers of chunk * vocabulary in float32 (the two logits, and as much again for what a loss makes
                    of them), and the gradient of the head in float32 where it learns

`n` is the number of processes. DDP and one process divide nothing, ZeRO-2 divides gradients and state, FSDP2 and
ZeRO-3 all three. Weights, gradients and state are exact, all else is an estimate: activations of layers in 16 bits,
with an attention that keeps no matrix of scores. What the communication, the allocator and the framework take isn't
counted: leave a fifth of the device for it. Of a recipe's own models, texts and losses `hfkd.preflight.memory` knows
more: it runs a step without numbers, and takes from here only what shards divide and gather.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Sharding = Literal["none", "zero2", "full"]
TeacherPlace = Literal["like_student", "replicated", "offloaded", "cached", "adapter_off"]

BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of a number, by its type."""

_WIDE = 4
_ACTIVATIONS = 34
"""Bytes a token, layer and hidden unit that the backward reads, in 16 bits, without the matrix of attention scores."""


@dataclass(frozen=True)
class ModelSize:
    """What is known of a model before it's loaded.

    Args:
        parameters: Of the whole model; a tied head counts once.
        layers: Number of decoder blocks.
        hidden: Width of the last states.
        vocabulary: Rows of the head.
        tied: Whether the embeddings are the head.
    """

    parameters: float
    layers: int
    hidden: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        """Read them off a model and its configuration.

        Args:
            model: A causal LM of transformers, its weights there or not; an adapter is no part of its size.
        """
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = model.config.get_text_config()
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        own = [weight for name, weight in model.named_parameters() if "lora_" not in name]
        return cls(
            sum(weight.numel() for weight in own),
            config.num_hidden_layers,
            config.hidden_size,
            config.vocab_size,
            head is None or head.weight is embeddings.weight,
        )

    @property
    def head(self) -> int:
        """Numbers in the output head."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> float:
        """Numbers in one decoder block, all being alike."""
        return max(0.0, self.parameters - self.head * (1 if self.tied else 2)) / self.layers


@dataclass(frozen=True)
class Setup:
    """How a run is laid out.

    Args:
        processes: Number of devices.
        sharding: What is divided among them: `none` (one process, DDP), `zero2` (gradients and optimizer state) or
            `full` (FSDP2, ZeRO-3: the weights too).
        student_dtype: Of the weights that learn, or of all with an adapter.
        teacher_dtype: Of the teacher's.
        learning: The share of the student's parameters that learns: 1, or an adapter's (numbers of the adapter over
            numbers of the model, beside it and not among it).
        state_bytes: Of the optimizer, for each number that learns: 8 for AdamW in float32, 2 for AdamW in 8 bits, 0
            for SGD.
        tokens: Positions that a process runs at once: rows of a micro-batch times their length.
        checkpointing: Whether only the inputs of the layers are kept, and layers are run again in the backward.
        chunk: Supervised rows that are projected at once (`DistillationConfig.chunk_size`).
        teacher: Where it is: as the student (in shards where that is), a copy on every process, in CPU memory and
            streamed, in a cache (nowhere), or the student itself with its adapter off.
    """

    processes: int = 1
    sharding: Sharding = "none"
    student_dtype: str = "float32"
    teacher_dtype: str = "bfloat16"
    learning: float = 1.0
    state_bytes: float = 8.0
    tokens: int = 4096
    checkpointing: bool = True
    chunk: int = 1024
    teacher: TeacherPlace = "like_student"


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process, and beside it.

    Attributes:
        weights: The student's, its adapter included.
        gradients: Of what learns.
        optimizer: Its state.
        teacher: The teacher's weights.
        gathered: What is whole for a moment: layers and heads of models in shards.
        activations: What the student's backward reads, an estimate.
        objective: Buffers of a chunk, and the head's gradient.
        cpu: In this process's CPU memory; not in the total.
    """

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    gathered: float
    activations: float
    objective: float
    cpu: float = field(default=0.0)

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(value for name, value in asdict(self).items() if name != "cpu")


def memory(student: ModelSize, teacher: ModelSize | None, setup: Setup) -> Memory:
    """Bytes that each process of a run holds, by what they are for; the formula is at the head of this module.

    Args:
        student: The model that learns.
        teacher: The model that speaks; None where there is none, or where it's the student itself.
        setup: How the run is laid out.

    Raises:
        ValueError: The setup contradicts itself.

    Example:
        >>> small = ModelSize(0.5e9, layers=24, hidden=896, vocabulary=151936, tied=True)
        >>> one = memory(small, None, Setup(teacher="cached"))
        >>> [round(value / 1e9, 1) for value in (one.weights, one.gradients, one.optimizer)]
        [2.0, 2.0, 4.0]
    """
    _check(teacher, setup)
    share = shares(setup)
    width = BYTES[setup.student_dtype]
    learned = setup.learning * student.parameters
    adapter = learned * _WIDE if setup.learning < 1 else 0.0
    gradient_width = width if setup.learning == 1 else _WIDE
    speaks, cpu = _teacher(teacher, setup)
    return Memory(
        weights=(student.parameters * width + adapter) * share["weights"],
        gradients=learned * gradient_width * share["gradients"],
        optimizer=learned * setup.state_bytes * share["optimizer"],
        teacher=speaks,
        gathered=gathered(student, teacher, setup),
        activations=_activations(student, setup),
        objective=_objective(student, teacher, setup),
        cpu=cpu,
    )


def _check(teacher: ModelSize | None, setup: Setup) -> None:
    if setup.processes < 1 or not 0 < setup.learning <= 1:
        raise ValueError(
            f"processes is {setup.processes} and learning is {setup.learning}; expected at least 1 process, and a "
            "share of the parameters above 0 and up to 1."
        )
    if teacher is None and setup.teacher not in ("cached", "adapter_off"):
        raise ValueError(
            f"The teacher is to lie {setup.teacher!r}, but its size isn't given. Pass its `ModelSize`, or take "
            "'cached' or 'adapter_off'."
        )
    if setup.teacher == "adapter_off" and setup.learning == 1:
        raise ValueError("The teacher is the student without its adapter, but all of the student learns.")


def _teacher(teacher: ModelSize | None, setup: Setup) -> tuple[float, float]:
    """Bytes of the teacher's weights on the device, and in CPU memory."""
    if teacher is None or setup.teacher in ("cached", "adapter_off"):
        return 0.0, 0.0
    here = teacher.parameters * BYTES[setup.teacher_dtype] * shares(setup)["teacher"]
    return (0.0, here) if setup.teacher == "offloaded" else (here, 0.0)


def shares(setup: Setup) -> dict[str, float]:
    """How much of the weights, the gradients, the optimizer's state and the teacher's weights each process has, on its
    device or beside it: 1, or 1 / n of what lies in shards.

    Args:
        setup: How the run is laid out.
    """
    n = setup.processes
    whole, others = {"none": (1, 1), "zero2": (1, n), "full": (n, n)}[setup.sharding]
    teacher = n if setup.sharding == "full" and setup.teacher != "replicated" else 1
    return {"weights": 1 / whole, "gradients": 1 / others, "optimizer": 1 / others, "teacher": 1 / teacher}


def gathered(student: ModelSize, teacher: ModelSize | None, setup: Setup) -> float:
    """What is whole for a moment: the larger of the two models' layers, which run one after the other; and the heads,
    which the objective reads together. Bytes.

    Args:
        student: The model that learns.
        teacher: The model that speaks; None where there is none.
        setup: How the run is laid out.
    """
    layers, heads, in_shards = [0.0], 0.0, setup.sharding == "full" and setup.processes > 1
    if in_shards:
        width = BYTES[setup.student_dtype]
        layers.append(2 * student.layer * width)
        heads += student.head * width
    moves = setup.teacher == "offloaded" or (in_shards and setup.teacher == "like_student")
    if teacher is not None and moves:
        width = BYTES[setup.teacher_dtype]
        layers.append(2 * teacher.layer * width)
        heads += teacher.head * width
    return max(layers) + heads


def _activations(student: ModelSize, setup: Setup) -> float:
    tokens = float(setup.tokens * student.hidden)
    kept = 2 * student.layers + _ACTIVATIONS if setup.checkpointing else _ACTIVATIONS * student.layers
    return kept * tokens


def _objective(student: ModelSize, teacher: ModelSize | None, setup: Setup) -> float:
    """Rows of a cache are a few numbers each, so then the student's logits stand alone."""
    rows = min(setup.chunk, setup.tokens)
    theirs = 0 if setup.teacher == "cached" else (teacher or student).vocabulary
    buffers = 2 * rows * (student.vocabulary + theirs) * _WIDE
    return float(buffers + (student.head * _WIDE if setup.learning == 1 else 0))
