"""The schema of a recipe: every key that a YAML recipe may have, with its type, its limits and its default.

Says what a key may hold by itself; which keys go together is `hfkd.recipe.checks`, and `hfkd.recipe` reads the file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, model_validator

from hfkd.recipe.fields import (
    Count,
    Dtype,
    Number,
    Options,
    Positive,
    Shots,
    ShotsOrNone,
    Text,
    block_numbers,
    epoch_or_steps,
    names_or_one,
    weight_or_schedule,
    writer_or_shares,
)
from hfkd.recipe.reinforcement import ReinforcementSection


class Section(BaseModel):
    """A part of a recipe; a key that it doesn't know is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class LoraSection(Section):
    """The adapter that the student trains; without it all weights of the student are trained."""

    r: Positive = 16
    alpha: Annotated[Number, Field(gt=0)] = 32.0
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[Any, BeforeValidator(names_or_one)] = "all-linear"
    modules_to_save: list[Text] | None = None


class InitSection(Section):
    """A student cut out of a larger model: a copy with these decoder blocks alone (a number spreads them evenly), with
    fewer attention heads, or with a narrower MLP.
    """

    source: Text = Field(alias="from")
    keep_layers: Annotated[int | list[int] | None, BeforeValidator(block_numbers)] = None
    heads: Positive | None = None
    intermediate: Positive | None = None

    @model_validator(mode="after")
    def _something_is_cut(self) -> InitSection:
        if self.keep_layers is None and self.heads is None and self.intermediate is None:
            raise ValueError("expected keep_layers, heads or intermediate: what of the model is kept")
        return self

    @property
    def narrows(self) -> bool:
        """Whether blocks are made narrower."""
        return self.heads is not None or self.intermediate is not None


class StudentSection(Section):
    """The model that learns: a whole one (`model`), or a part of one (`init`).

    `revision`, `dtype` and `load_kwargs` (of `from_pretrained`, as they are) belong to whichever of the two is given.
    """

    model: Text | None = None
    init: InitSection | None = None
    revision: Text | None = None
    dtype: Dtype = "float32"
    trust_remote_code: StrictBool = False
    attn_implementation: Text | None = None
    load_kwargs: Options = {}
    lora: LoraSection | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSection:
        if (self.model is None) == (self.init is None):
            got = "neither" if self.model is None else "both"
            raise ValueError(
                f"expected model (a whole model) or init (a part of one: keep_layers, heads, intermediate), got {got}"
            )
        return self

    @property
    def origin(self) -> str:
        """Where its weights and its tokenizer are read."""
        return self.model if self.init is None else self.init.source

    @property
    def origin_key(self) -> str:
        """The key that says so, for messages."""
        return "student.model" if self.init is None else "student.init.from"


class TeacherSection(Section):
    """Whose distribution the student learns. Which of the keys belong to which `kind` is checked later.

    `cache` is the folder of a cache that `hfkd cache` made with this recipe; the teacher itself isn't loaded then.
    """

    kind: Text
    weights: Literal["adapter_off", "live", "frozen_copy"] = "adapter_off"
    model: Text | None = None
    revision: Text | None = None
    dtype: Dtype = "auto"
    trust_remote_code: StrictBool = False
    load_kwargs: Options = {}
    reuse_prefix: StrictBool = True
    offload: StrictBool = False
    decay: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    interval: Positive = 1
    every: Annotated[Any, BeforeValidator(epoch_or_steps)] = "epoch"
    layer: Positive | None = None
    norm: Literal["final", "trained"] = "final"
    fit_steps: Positive = 50
    only_where_layers_disagree: StrictBool = False
    cache: Text | None = None
    column: Text | None = None
    members: dict[Text, MemberSection] = {}
    options: Options = {}


class MemberSection(TeacherSection):
    """One of several teachers, with its share where their distributions are mixed."""

    weight: Annotated[Number, Field(gt=0)] = 1.0


class SourceSection(Section):
    """Where rows are: a file, folder, hub id or `reasoning_gym:<task>`. `columns` maps our names to its own."""

    path: Text
    name: Text | None = None
    split: Text = "train"
    format: Text | None = None
    columns: dict[str, Text] = {}
    size: Positive | None = None
    seed: int = 0
    revision: Text | None = None
    options: Options = {}


class DemonstrationsSection(Section):
    """Worked examples that the teacher reads: from a file, a column of each row, or drawn from the training rows."""

    count: Count = 0
    seed: int = 0
    path: Text | None = None
    name: Text | None = None
    split: Text = "train"
    format: Text | None = None
    columns: dict[str, Text] = {}
    column: Text | None = None

    @model_validator(mode="after")
    def _one_place(self) -> DemonstrationsSection:
        if self.path is not None and self.column is not None:
            raise ValueError("expected path (a file of demonstrations) or column (a column of each row), not both")
        if self.count == 0 and (self.path is not None or self.column is not None):
            raise ValueError("names where demonstrations come from, but count is 0; expected count >= 1")
        return self


class PromptSection(Section):
    """How a row becomes a prompt; the same fields and defaults as `hfkd.data.prompts.PromptStyle`."""

    style: Literal["text", "chat"] = "text"
    system: str | None = None
    question: str = "Question: {prompt}\nAnswer:"
    answer: str = " {completion}\n"
    separator: str = "\n"
    stop: list[Text] = ["\n"]
    teacher_context: str = "{privileged_context}\n\n{prompt}"
    builder: Text | None = None


class GenerationSection(Section):
    """How text is written, by the teacher or by the student; temperature 0 is greedy.

    `buffer_size` texts are kept on each process, and a share `reuse` of the steps learns from them again.
    """

    max_new_tokens: Positive = 32
    temperature: Annotated[Number, Field(ge=0)] = 0.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    batch_size: Positive = 32
    backend: Literal["transformers", "vllm"] = "transformers"
    vllm: Options = {}
    buffer_size: Count = 0
    reuse: Annotated[Number, Field(ge=0, lt=1)] = 0.0


class PartSection(BaseModel):
    """A sampler, a reviser or a transform; every key besides `kind` is an argument of its class."""

    model_config = ConfigDict(extra="allow")

    kind: Text


class DataSection(Section):
    """What both models read. Lengths are in tokens; `student_shots` is drawn anew at each visit of an example.

    `answer: teacher` has the teacher write all answers once, before training; shares, and `student`, have them written
    at each step. `sampler` says which example comes next, `transforms` make the rows that are trained on, and `revise`
    changes each step's batches.
    """

    train: SourceSection
    demonstrations: DemonstrationsSection = Field(default_factory=DemonstrationsSection)
    student_shots: Shots = [0]
    prompt: PromptSection = Field(default_factory=PromptSection)
    answer: Annotated[Any, BeforeValidator(writer_or_shares)] = "dataset"
    generation: GenerationSection = Field(default_factory=GenerationSection)
    max_length: Positive = 2048
    teacher_max_length: Positive | None = None
    too_long: Literal["raise", "drop"] = "raise"
    whole_text: StrictBool = False
    token_weights: Text | None = None  # a column, or package.module:function
    sampler: PartSection | None = None
    transforms: list[PartSection] = []
    revise: list[PartSection] = []
    seed: int = 0

    @property
    def parts(self) -> dict[str, PartSection]:
        """What decides what is learned, by its key, in the order in which it does."""
        found = {f"data.transforms.{number}": part for number, part in enumerate(self.transforms)}
        if self.sampler is not None:
            found["data.sampler"] = self.sampler
        return found | {f"data.revise.{number}": part for number, part in enumerate(self.revise)}

    @property
    def shares(self) -> dict[str, float]:
        """Who writes the answers of a step in training; what was written before belongs to the data set."""
        if isinstance(self.answer, dict):
            return {name: share for name, share in self.answer.items() if share}
        return {"student" if self.answer == "student" else "dataset": 1.0}


class TermSection(BaseModel):
    """One loss of the objective; every key besides `kind`, `weight` and `name` is an argument of the loss."""

    model_config = ConfigDict(extra="allow")

    kind: Text
    weight: Annotated[Any, BeforeValidator(weight_or_schedule)] = 1.0
    name: Text | None = None


class LossSection(Section):
    """The objective: a weighted sum of losses, computed over `chunk_size` tokens at a time (by itself when null).

    `tail` is what becomes of the mass outside a sparse teacher's ids; `compile_losses` is for `torch.compile`.
    """

    terms: Annotated[list[TermSection], Field(min_length=1)] = [TermSection(kind="forward_kl")]
    chunk_size: Positive | None = None
    tail: Literal["bucket", "renormalize"] = "bucket"
    compile_losses: StrictBool = False


class ForgettingSection(SourceSection):
    """Another task, asked before and after training, to see what was forgotten."""

    size: Positive = 48
    demonstrations: Count = 8
    extract: Text | None = None


class EvaluationSection(Section):
    """k-shot accuracy before and after. Without `path` the items are held out of the training rows.

    With `shots: []` nothing is asked, and the items are texts to measure the fidelity to the teacher on. `samples`
    items' completions, for each number of shots, go to the trackers at each evaluation in training.
    """

    path: Text | None = None
    name: Text | None = None
    split: Text = "test"
    format: Text | None = None
    columns: dict[str, Text] = {}
    revision: Text | None = None
    options: Options = {}
    size: Positive = 48
    shots: ShotsOrNone = [0, 1, 8]
    fidelity: StrictBool = True
    samples: Count = 4
    extract: Text = "text"
    tolerance: Annotated[Number, Field(ge=0)] = 0.0
    max_new_tokens: Positive = 16
    batch_size: Positive = 48
    reshuffle: StrictBool = False
    seed: int = 0
    gold_baseline: StrictBool = False
    forgetting: list[ForgettingSection] = []


class AdapterSection(Section):
    """What one of several adapters has of its own; what it doesn't give is the recipe's (`hfkd.recipe.adapters`)."""

    data: Options = {}
    teacher: Options = {}
    loss: Options = {}
    evaluation: Options | None = {}
    training: Options = {}


class HubSection(Section):
    """Whether the result is sent to the hub, and where to; `base` is the hub's id of the model under an adapter, where
    the student is read from a folder, and `merged` sends both as one model.
    """

    push: StrictBool = False
    repo_id: Text | None = None
    private: StrictBool = True
    base: Text | None = None
    merged: StrictBool = False


TeacherSection.model_rebuild()


class Recipe(Section):
    """A whole run in one file. `training` takes the fields of `DistillationConfig`, that is of `TrainingArguments`.

    With `adapters` it is a run for each of them, with what it says of its own in place of the recipe's.
    """

    student: StudentSection
    teacher: TeacherSection
    data: DataSection
    loss: LossSection = Field(default_factory=LossSection)
    reinforcement: ReinforcementSection | None = None
    evaluation: EvaluationSection | None = None
    training: Options = {}
    hub: HubSection = Field(default_factory=HubSection)
    adapters: dict[Text, AdapterSection] = {}

    @model_validator(mode="after")
    def _distils_what_is_drawn(self) -> Recipe:
        """Beside a reward the teacher's term is the reverse KL, unless the recipe names another one."""
        if self.reinforcement is not None and "terms" not in self.loss.model_fields_set:
            self.loss = self.loss.model_copy(update={"terms": [TermSection(kind="reverse_kl")]})
        return self

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain data that can be written as JSON or YAML."""
        return self.model_dump(mode="json", by_alias=True)
