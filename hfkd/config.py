"""The settings of a training run: `transformers.TrainingArguments` and the few that distillation adds.

What is learned (terms, teacher, prompts) isn't set here; how it is run is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hfkd.compatibility import check_processes

RUN_POLICIES = ("refuse", "resume", "overwrite")
# The packages of which one must be installed for a tracker; the others check for themselves when the trainer is made.
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


@dataclass
class DistillationConfig(TrainingArguments):
    """Settings of a `DistillationTrainer`; everything else is as in `TrainingArguments`.

    Args:
        chunk_size: Supervised tokens projected to the vocabulary at once; None chooses from its size and the free
            memory. Changes memory, not the loss.
        max_length: The most tokens of the student's view, prompt and answer together.
        teacher_max_length: The same for the teacher's view; None takes `max_length`.
        too_long: What happens to an example above its limit: `raise`, or `drop` (counted). Nothing is ever cut.
        padding_free: Run the student, and the teacher where it reuses no prefix, on each batch as one row without
            padding; the loss is the same. For models of plain attention layers; their attention is replaced unless it
            is flash attention.
        tail: What becomes of the mass outside a sparse teacher's ids: `bucket` (one more entry) or `renormalize`.
        compile_losses: Let `torch.compile` fuse the elementwise steps of the losses; needs a C++ compiler on a CPU.
        log_gradient_norms: Log the gradient norm of each term, at the price of one more backward pass a term on the
            steps that are logged.
        log_agreement: Log on how many tokens student and teacher have the same likeliest token.
        model_init_kwargs: Arguments of `from_pretrained` where the student is given by name.
        run_policy: What to do with an output folder that holds another run: `refuse`, `resume` it or `overwrite` it
            (recipes only).
    """

    chunk_size: int | None = field(default=None, metadata={"help": "Supervised tokens projected at once."})
    padding_free: bool = field(default=False, metadata={"help": "Run each batch as one row without padding."})
    tail: str = field(default="bucket", metadata={"help": "bucket or renormalize."})
    compile_losses: bool = field(default=False, metadata={"help": "Fuse the losses' elementwise steps."})
    log_gradient_norms: bool = field(default=False, metadata={"help": "Log each term's gradient norm."})
    max_length: int = field(default=2048, metadata={"help": "The most tokens of the student's view."})
    teacher_max_length: int | None = field(default=None, metadata={"help": "The most tokens of the teacher's view."})
    too_long: str = field(default="raise", metadata={"help": "raise or drop."})
    log_agreement: bool = field(default=True, metadata={"help": "Log the agreement with the teacher."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained."}
    )
    run_policy: str = field(default="refuse", metadata={"help": "refuse, resume or overwrite."})

    # Defaults that differ from TrainingArguments, because two views have columns that no model's forward names,
    # because a loss that nobody sees helps nobody, and because trackers are asked for, not met.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Trackers."})
    # A run that goes on must not forget how long early stopping has been patient.
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Whether callbacks that keep a state get it back on resume."}
    )

    def __post_init__(self) -> None:
        """Check what can't work."""
        check_processes(self.use_cpu, self.fsdp)  # before torch fails on a device that isn't there
        if self.report_to is None:
            self.report_to = "none"
        super().__post_init__()
        _check_trackers(self.report_to)
        if self.hub_private_repo is None:
            # What is made for this run, a tracker's own page too, is private unless told otherwise.
            self.hub_private_repo = True
        loading = self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}
        self._refuse(
            isinstance(self.hub_token, str) or isinstance(loading.get("token"), str),
            "a token is among the settings (hub_token, or model_init_kwargs), which trackers and training_args.bin "
            "keep. Set the environment variable HF_TOKEN, or log in with `hf auth login`",
        )
        if self.ddp_find_unused_parameters is None:
            # The objective reaches every parameter that learns; looking for others walks the graph at every step.
            self.ddp_find_unused_parameters = False
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and torch warns at every epoch
        self._refuse(
            self.remove_unused_columns, "remove_unused_columns is on; the columns of the teacher's view would be lost"
        )
        self._refuse(
            not self.average_tokens_across_devices,
            "average_tokens_across_devices is off; the loss would change with the number of processes",
        )
        self._refuse(self.label_smoothing_factor > 0, "label_smoothing_factor is set; the objective doesn't use it")
        self._refuse(self.too_long not in ("raise", "drop"), f"too_long is {self.too_long!r}; expected raise or drop")
        self._refuse(
            self.tail not in ("bucket", "renormalize"), f"tail is {self.tail!r}; expected bucket or renormalize"
        )
        self._refuse(
            self.run_policy not in RUN_POLICIES,
            f"run_policy is {self.run_policy!r}; expected one of {', '.join(RUN_POLICIES)}",
        )

    @staticmethod
    def _refuse(wrong: bool, text: str) -> None:
        if wrong:
            raise ValueError(f"DistillationConfig: {text}. Leave it at its default or correct it.")


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that can't be reached now: Trainer would say so once the models are loaded, and a recipe once
    the student has been asked.
    """
    for name in names:
        if name in ("none", "all"):
            raise ValueError(
                f"DistillationConfig: report_to is {list(names)}, and {name!r} stands alone or not at all; expected "
                f"{name!r}, or the names of trackers."
            )
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"DistillationConfig: report_to names {name!r}, which is no tracker; expected none, all, or some of "
                f"{', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name in _TRACKERS and not any(map(find_spec, _TRACKERS[name])):
            raise ValueError(
                f"DistillationConfig: report_to names {name!r}, which isn't installed. Run `pip install {name}`, or "
                "take it out of report_to."
            )
