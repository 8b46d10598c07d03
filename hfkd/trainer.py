"""`DistillationTrainer`: a `transformers.Trainer` whose loss is an objective over a student and a teacher.

Per micro-batch it runs, inside the wrapped model's forward, the teacher on its view, the student on its own, and the
objective over both. The loss is a sum over tokens times the number of processes over the number of supervised tokens
of the whole step, on all processes and in all micro-batches; this is the only place of the project that divides. It
doesn't know how prompts are built or what the terms measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from hfkd.batch import Batch, predicted
from hfkd.callbacks import Steps
from hfkd.compatibility import (
    check_devices,
    check_layers,
    check_learning_terms,
    check_parts,
    check_second_view,
    check_sharding,
    check_wrapped,
)
from hfkd.config import DistillationConfig
from hfkd.data.collate import DistillationCollator
from hfkd.data.prompts import PromptStyle
from hfkd.data.views import DistillationDataset
from hfkd.data.weights import TokenWeights
from hfkd.distributed import run_inside, same_everywhere, total_over_processes
from hfkd.errors import NothingToLearn
from hfkd.examples import as_views
from hfkd.faults import check_sum
from hfkd.gradients import check_gradients_can_be_told_apart, norms_by_term
from hfkd.loading import load_tokenizer_of
from hfkd.long_runs import LongRunTrainer
from hfkd.metrics import Meter, per_token
from hfkd.objective import LossSum, Objective, build_objective
from hfkd.packing import run_view
from hfkd.revision.base import Reviser
from hfkd.rollout.base import Rollout
from hfkd.rollout.buffer import OffPolicyBuffer
from hfkd.rollout.on_policy import Mixture, Writer
from hfkd.rows import DenseRows, Head, RowLayout, supervised
from hfkd.sampling.base import ExampleSampler
from hfkd.signal import STATES, TeacherSignal
from hfkd.states import recording
from hfkd.student import as_it_was, check_head, make_student, pad_token
from hfkd.teachers import Teacher, as_teacher, evaluating
from hfkd.writing import asks_teacher, attach_deciders, made_ready, make_writer


class DistillationTrainer(LongRunTrainer):
    """Train a student to say what a teacher says.

    Args:
        model: The student: a causal LM, a PEFT model, or a hub id or folder.
        teacher: A `Teacher`, a model, a hub id, `"self"` (the base under the adapter, else a frozen copy), or None
            where no term needs one.
        objective: A recipe key such as `"forward_kl"`, a list of terms, or an `Objective`.
        args: Settings; None takes the defaults.
        train_dataset: Rows with `prompt` and `completion` or `messages` (see `hfkd.data`), a `DistillationDataset`,
            or, with a `data_collator` of your own, anything that it turns into the inputs of `Batch.from_inputs`.
        eval_dataset: The same for evaluation, or several by name.
        processing_class: The tokenizer; loaded beside the model where that is a name.
        peft_config: Makes the student a PEFT model.
        data_collator: In place of `DistillationCollator`.
        prompts: How rows become prompts; None asks nothing of the prompt: rows are taken as they stand (chat rows
            through the template).
        demonstrations: Rows that the teacher's prompt shows, and the student's draws from.
        student_shots: Numbers of demonstrations in the student's prompt, one drawn anew at each visit.
        token_weights: How much each supervised token counts: a column of the rows, or a function of a row and its
            supervised ids (see `hfkd.data.weights`); None counts all alike.
        answer: Who writes the text that is learned from: `dataset`; `student` or `teacher`, anew at every step; or
            shares of them, `{"student": 0.5, "dataset": 0.5}`, of which one is drawn for each step. On the student's
            own text, terms that learn the text itself (cross-entropy) are left out.
        rollout: How text is written; None greedily, up to 32 tokens or a stop string of `prompts`, with transformers.
        buffer: Keeps what was written, to be learned from again; None keeps nothing.
        sampler: Which example comes next; None draws as `Trainer` does.
        revisers: What changes the batches of a step before their tokens are counted, in this order.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.
        trainer_kwargs: More arguments of `Trainer`.

    Raises:
        ValueError: Model, teacher, objective and data don't fit together; said before training starts.
    """

    # The loss is divided by the token count of the whole step, so accumulation must not divide it again.
    loss_is_scaled_for_ga = True

    _eval_sums: list[LossSum] | None = None
    sampler: ExampleSampler | None = None
    _heads_checked = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        teacher: Teacher | PreTrainedModel | str | None = None,
        objective: Objective | str | Sequence[Mapping[str, Any]] = "forward_kl",
        args: DistillationConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        prompts: PromptStyle | None = None,
        demonstrations: Sequence[Mapping[str, Any]] = (),
        student_shots: Sequence[int] = (0,),
        token_weights: TokenWeights | None = None,
        answer: str | Mapping[str, float] = "dataset",
        rollout: Rollout | None = None,
        buffer: OffPolicyBuffer | None = None,
        sampler: ExampleSampler | None = None,
        revisers: Sequence[Reviser] = (),
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **trainer_kwargs: Any,
    ) -> None:
        args = args or DistillationConfig("trainer_output")
        self.objective = build_objective(objective, args.chunk_size, args.tail, args.compile_losses)
        has_adapter = peft_config is not None or hasattr(model, "peft_config")
        self.teacher = as_teacher(teacher, has_adapter)
        mixture = Mixture.of(answer)
        self._asks_teacher = asks_teacher(self.objective, sampler, revisers)
        check_parts(self.objective, self.teacher, mixture, has_adapter)
        if processing_class is None and isinstance(model, str):
            processing_class = load_tokenizer_of(model, args.model_init_kwargs)
        self._prompts = prompts or PromptStyle(question="{prompt}", answer="{completion}", separator="\n", stop=())
        self._view_settings = {
            **{"args": args, "token_weights": token_weights, "own_collator": data_collator is not None},
            **{"demonstrations": demonstrations, "student_shots": student_shots},
            "teacher": self.teacher if self._asks_teacher or mixture.shares.get("teacher") else None,
        }
        placeholder = mixture.writes and not mixture.shares.get("dataset")
        train_dataset = self._views(train_dataset, processing_class, placeholder=placeholder)
        eval_dataset = self._views(eval_dataset, processing_class, name="evaluation")
        check_second_view(self.objective, self.teacher, train_dataset, mixture)
        super().__init__(
            model=make_student(model, peft_config, args),
            args=args,
            data_collator=data_collator or DistillationCollator(pad_token(processing_class)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), Steps(self)],
            optimizers=optimizers,
            **trainer_kwargs,
        )
        self._prepare_teacher(train_dataset, eval_dataset)
        self._prepare_objective()
        self.writer = self._make_writer(mixture, rollout, buffer)
        self.meter = Meter(self.args.device)
        attach_deciders(self, sampler, revisers)

    # --- before training

    def _views(self, rows: Any, tokenizer: PreTrainedTokenizerBase | None, **options: Any) -> Any:
        """Rows as two views, or several sets of them by name; what is meant for a collator of the user's own as it
        is.
        """
        if isinstance(rows, Mapping):
            return {name: self._views(some, tokenizer, **options) for name, some in rows.items()}
        return as_views(rows, tokenizer, self._prompts, **self._view_settings, **options)

    def _prepare_teacher(self, dataset: Any, eval_dataset: Any) -> None:
        check_devices(self.args)
        check_layers(self.model, self.accelerator)
        check_sharding(self.accelerator, self.model, self.teacher)
        if self.teacher is None:
            return
        self.teacher.prepare(self.accelerator, self.model)
        if self.processing_class is not None:
            self.teacher.check_vocabulary(self.processing_class)
        if not self._asks_teacher:
            return
        if self.args.padding_free:
            self.teacher.drop_padding()
        if isinstance(dataset, DistillationDataset):
            self.teacher.meet(dataset)
            self.teacher.share_prefix(dataset.shared_prefix)
        several = eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]
        for known in (one for one in several if isinstance(one, DistillationDataset)):
            self.teacher.meet(known, training=False)

    def _make_writer(self, mixture: Mixture, rollout: Rollout | None, buffer: OffPolicyBuffer | None) -> Writer | None:
        """What writes the text of a step, where it isn't the data set's."""
        return make_writer(
            *(mixture, rollout, buffer),
            model=self.model,
            student=self._student,
            teacher=self.teacher,
            dataset=self.train_dataset,
            tokenizer=self.processing_class,
            style=self._prompts,
            seed=self.args.seed,
        )

    @contextmanager
    def _student(self) -> Iterator[nn.Module]:
        """The student as it is now, in the precision that it is trained in."""
        with self.accelerator.autocast():
            yield self.accelerator.unwrap_model(self.model)

    def _prepare_objective(self) -> None:
        """Let the losses make what depends on the models' shapes, and tell the teacher which layers to show."""
        if self.args.log_gradient_norms:
            check_gradients_can_be_told_apart(self.accelerator, self.args)
        if self.args.max_steps > 0:
            self.objective.check_schedules(self.args.max_steps)
        if STATES in self.objective.needs:
            with self.teacher.weights() as model:
                self.objective.prepare(self.model, model)
            self.teacher.keep_states(self.objective.layers[1])
        else:
            self.objective.prepare(self.model)
        check_learning_terms(self.accelerator, self.objective)
        self.objective.to(self.args.device)
        same_everywhere(self.objective.parameters())

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    # --- a step

    def get_batch_samples(
        self, epoch_iterator: Iterable, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Take the micro-batches of a step, let their text be written anew and revised where that is wanted, and
        count the supervised tokens on all processes.

        Raises:
            NothingToLearn: There is no supervised token in the whole step.
        """
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        batches = made_ready(self, batches)
        supervised_here = sum(int(predicted(batch["labels"]).sum()) for batch in batches)
        totals = total_over_processes([supervised_here, self.preemption.asked], device)
        tokens, stopping = totals.tolist()
        self.preemption.hear(stopping)
        self.watch.begin(batches)
        if tokens == 0:
            raise NothingToLearn(
                f"No token is supervised in the {len(batches)} micro-batches of step {self.state.global_step + 1}: "
                f"every label is -100. "
                "Check that completions aren't empty and that your collator sets `labels`."
            )
        return batches, totals[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum the objective over a micro-batch and divide by the tokens of the step.

        Args:
            model: The wrapped student.
            inputs: What the collator returned.
            return_outputs: Whether to return the `LossSum` too.
            num_items_in_batch: Supervised tokens of the step on all processes; None takes this micro-batch's own.

        Raises:
            NonFiniteLoss: The value is not finite, and `num_items_in_batch` is None. In a training step it is raised
                by all processes once the gradient is there (see `hfkd.faults`).
        """
        result = self.objective_sum(model, Batch.from_inputs(inputs))
        if num_items_in_batch is None:
            check_sum(result, self.state.global_step + 1)
            loss = result.total / max(result.tokens, 1)
        else:
            # Accelerate averages gradients over processes; the count is already summed over them.
            loss = result.total * (self.accelerator.num_processes / float(num_items_in_batch))
            loss = self.watch.add(result, loss)
            self.meter.add(result)
        return (loss, result) if return_outputs else loss

    def objective_sum(self, model: nn.Module, batch: Batch) -> LossSum:
        """Run teacher, student and objective on one micro-batch, inside the wrapped forward. Override it to change
        what is compared.

        Args:
            model: The wrapped student.
            batch: Both views.

        Returns:
            Sums over the supervised tokens of this micro-batch (nats).
        """
        module = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            total, result = run_inside(model, module, self._inside, module, batch)
        return replace(result, total=total)

    def _inside(self, module: nn.Module, batch: Batch) -> tuple[Tensor, LossSum]:
        if not self._heads_checked:
            self._heads_checked = True
            self._check_heads(module, batch)
        signal: TeacherSignal | None = None
        if self.objective.needs:
            with self.meter.teaching(self.model.training):
                signal = self.teacher.signal(batch, self.objective.needs)
        view = batch.student
        with recording(module, self.objective.layers[0]) as recorder:
            hidden, labels = run_view(module, view, self.args.padding_free)
        states = {layer: supervised(state, labels) for layer, state in recorder.finish(hidden).items()}
        student = DenseRows(supervised(hidden, labels), Head.of(module))
        rows = (student, signal, view.targets, batch.token_weights, RowLayout.of(view.labels))
        if self.args.log_gradient_norms and self.model.training and self._will_log():
            self.meter.gradients = norms_by_term(
                *(self.objective, module, rows, states, batch.own_text, batch.private)
            )
        measure = self.args.log_agreement and signal is not None and self._will_log()
        beside = {"states": states, "own_text": batch.own_text, "private": batch.private}
        result = self.objective(*rows, measure_agreement=measure, **beside)
        return result.total, result  # the total by itself, for the hooks that wrappers hang on what comes out

    def _will_log(self) -> bool:
        every = max(1, int(getattr(self.state, "logging_steps", 0) or 1))
        return not self.model.training or (self.state.global_step + 1) % every == 0

    def _check_heads(self, module: nn.Module, batch: Batch) -> None:
        """Hold the logits rebuilt from each head against the model's own, once, on a few tokens of the first batch."""
        with torch.no_grad():
            with evaluating(module):
                check_head(module, batch.student, self.args.padding_free)
            if self.objective.needs:
                view, flat = batch.teacher_view, self.args.padding_free
                self.teacher.check_heads(lambda model: check_head(model, view, flat))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the meter's figures to a training log line."""
        if self.model.training and "loss" in logs:
            logs = {**logs, **self.meter.flush()}
        super().log(logs, start_time)

    # --- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `Trainer`; rows are made into views first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._views(eval_dataset, self.processing_class, name="evaluation")
        return super().get_eval_dataloader(eval_dataset)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Compute the loss of one evaluation batch; its sums are kept, so that the mean is taken over tokens and not
        over batches.
        """
        with torch.no_grad():
            loss, result = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if self._eval_sums is not None:
            self._eval_sums.append(result)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`, with the loss per token over the whole set, and each term beside it."""
        check_wrapped(self.accelerator, self.model)
        self._eval_sums = []
        with self.meter.paused(), as_it_was(self):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums, self._eval_sums = self._eval_sums, None
        agreement = bool(self.objective.needs) and self.args.log_agreement
        for name, value in per_token(sums, self.args.device, agreement).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    # --- what learns and what is kept

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The student's parameters, and those that the losses hold."""
        optimizer = super().create_optimizer(*args, **kwargs)
        learned = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        fresh = [parameter for parameter in learned if id(parameter) not in known]
        if fresh:
            optimizer.add_param_group({"params": fresh, "weight_decay": 0.0})
        return optimizer
