"""`KDRLTrainer`: TRL's GRPO with a teacher on the same answers.

TRL draws the answers, scores them and takes the policy's loss; this trainer judges them with a verifier, asks a
teacher about the drawn tokens and adds its term. With `distillation_weight: 0` it is TRL's trainer, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer

from hfkd.callbacks import Steps
from hfkd.compatibility import check_devices, check_layers, check_parts, check_room, check_sharding
from hfkd.data.prompts import PromptStyle
from hfkd.data.tokenize import prompt_length
from hfkd.data.verify import Verifier, as_verifier
from hfkd.data.views import DistillationDataset
from hfkd.distributed import run_inside, total_over_processes
from hfkd.errors import VerifierError
from hfkd.examples import as_views
from hfkd.long_runs import LongRunTrainer
from hfkd.objective import Objective
from hfkd.reinforcement.asking import foreign_ends, listening, log_probs_of, stop_ids, until_stop, views_of
from hfkd.reinforcement.config import FULL, TOP_K, KDRLConfig, check_terms, objective_of
from hfkd.reinforcement.drawn import Drawn, Tally, count_steps
from hfkd.reinforcement.estimators import ESTIMATORS, bounded_ratio
from hfkd.reinforcement.masks import taught_responses
from hfkd.reinforcement.nft import nft_loss
from hfkd.rollout.base import GenerationSettings
from hfkd.rollout.on_policy import Mixture
from hfkd.rows import DenseRows, Head, RowLayout, head_size, position_count
from hfkd.schedules import Schedule, all_values
from hfkd.signal import TeacherSignal
from hfkd.student import check_head
from hfkd.teachers import Teacher, as_teacher, evaluating
from hfkd.zero import zero_stage


@dataclass(frozen=True)
class _Said:
    """What the student gives to the drawn tokens: [B, T] log-probabilities in their graph, and its last hidden states
    [B, T, H] in the places that predict them, where somebody reads them.
    """

    log_probs: Tensor
    hidden: Tensor | None


class KDRLTrainer(LongRunTrainer, GRPOTrainer):
    """Train a student by a reward and by a teacher, on answers that it draws itself.

    The loss is `reward_weight * L_policy + distillation_weight * L_teacher`. L_policy is TRL's GRPO, or NFT. L_teacher
    is a mean over the taught tokens of the optimizer step, of all processes and accumulated batches; with a mask
    (`distil_where`) over those that are left, so that its weight keeps its meaning. Where earlier weights drew the
    tokens (`num_iterations` above 1, vLLM), k2 and k3 count them by their bounded importance ratio. A checkpoint
    keeps the answers that are still to be learned from, so that a run goes on exactly from each of its steps.

    Args:
        model: The student: a causal LM or a PEFT model.
        teacher: A `Teacher`, a model, a hub id, `"self"`, or None where the reward alone teaches. It reads the prompt
            with the demonstrations and a row's `privileged_context`, so the student itself may be the teacher. One
            that moves is asked as it is at the moment.
        verifier: What says whether an answer is right: `exact`, `contains`, `reasoning_gym`, `package.module:function`
            or a function of a row and a text, see `hfkd.data.verify`. It reads an answer up to its stop string.
        args: Settings; None takes the defaults.
        train_dataset: Rows with a `prompt` and what the verifier reads; their completions don't count. Or a
            `DistillationDataset`.
        processing_class: The tokenizer.
        objective: What `estimator: full` measures; the reverse KL by default.
        prompts: How rows become prompts; None takes them as they stand. Its stop strings end an answer.
        demonstrations: Rows that the teacher's prompt shows, and the student's draws from.
        student_shots: Numbers of demonstrations in the student's prompt, one drawn anew at each pass.
        peft_config: Makes the student a PEFT model.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.

    Raises:
        ValueError: Student, teacher, settings and data don't fit together; said before training starts.
        VerifierError: In training: the verifier raised, or gave no number from 0 to 1. It names the row.

    Paper:
        Xu et al., 2025, https://arxiv.org/abs/2506.02208. Ours: bounds on the log-ratio, the mean over the tokens that
        a mask leaves, end tokens that the teacher doesn't know left out, weights as schedules for both terms (a step
        of both is distillation first, reward afterwards).
    """

    writer, sampler = None, None
    revisers: tuple = ()
    _said: _Said | None = None
    _rewards: Tensor | None = None
    _heads_checked = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        teacher: Teacher | PreTrainedModel | str | None = None,
        verifier: str | Verifier = "exact",
        args: KDRLConfig | None = None,
        *,
        train_dataset: DistillationDataset | Sequence[Mapping[str, Any]],
        processing_class: PreTrainedTokenizerBase,
        objective: Objective | str | Sequence[Mapping[str, Any]] = "reverse_kl",
        prompts: PromptStyle | None = None,
        demonstrations: Sequence[Mapping[str, Any]] = (),
        student_shots: Sequence[int] = (0,),
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args or KDRLConfig("trainer_output")
        self.verifier, self._drawn, self._tally = as_verifier(verifier), Drawn(self), Tally()
        has_adapter = peft_config is not None or hasattr(model, "peft_config")
        self.weights = check_terms(args.distillation_weight, args.reward_weight)
        self.teacher = as_teacher(teacher, has_adapter)
        self.objective = objective_of(objective, args)
        self._check_teacher(has_adapter)
        self.views: DistillationDataset = as_views(
            train_dataset,
            processing_class,
            prompts or PromptStyle(question="{prompt}", answer="{completion}", separator="\n", stop=()),
            args=args,
            demonstrations=demonstrations,
            student_shots=student_shots,
            token_weights=None,
            teacher=self.teacher,
            placeholder=True,
        )
        self._room = GenerationSettings(max_new_tokens=args.max_completion_length)
        check_room(self.views, self._room, {"student": position_count(model)})
        stops = stop_ids(processing_class, self.views.builder.style.stop)
        if stops and args.use_vllm:
            args.generation_kwargs = {**(args.generation_kwargs or {}), "stop_token_ids": stops}
        super().__init__(
            model=model,
            reward_funcs=[self.reward],
            args=args,
            train_dataset=Dataset.from_dict(self._prompts()),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=[*(callbacks or []), Steps(self)],
            optimizers=optimizers,
        )
        self._prepare_objective()
        self._foreign = self._prepare_teacher()
        self._end_at(stops)

    # --- before training

    def _check_teacher(self, has_adapter: bool) -> None:
        if self.teacher is not None:
            check_parts(self.objective, self.teacher, Mixture.of("student"), has_adapter)
        elif max(all_values(self.weights[0])) > 0:
            raise ValueError(
                "distillation_weight is above 0, and there is no teacher. Pass `teacher=`, or set it to 0 for the "
                "reward alone."
            )

    def _prompts(self) -> dict[str, list[Any]]:
        """The rows that TRL draws from: the prompts as texts, for its logs, and their places."""
        prompts = self.views.student_prompts
        return {"prompt": self.views.builder.tokenizer.batch_decode(prompts), "asked": list(range(len(prompts)))}

    def _prepare_objective(self) -> None:
        check_devices(self.args)
        check_layers(self.model, self.accelerator)
        check_sharding(self.accelerator, self.model, self.teacher)
        self.objective.prepare(self.model)
        if any(parameter.requires_grad for parameter in self.objective.parameters()):
            raise ValueError("The objective holds parameters of its own, which nothing would train here; take others.")
        self.objective.to(self.args.device)

    def _prepare_teacher(self) -> Tensor:
        """Let the teacher see the student and the prompts.

        Returns:
            The end tokens that it doesn't know.
        """
        none = torch.tensor([], dtype=torch.long, device=self.args.device)
        if self.teacher is None:
            return none
        sharded = getattr(self.accelerator, "is_fsdp2", False) or zero_stage(self.accelerator) == 3
        if sharded and self._reads_distributions:
            raise ValueError(
                f"estimator is {self.args.estimator!r}, which multiplies with the student's output head, and that is "
                "spread over the processes. Take k2 or k3, or launch with recipes/accelerate/ddp.yaml."
            )
        self.teacher.prepare(self.accelerator, self.model)
        self.teacher.check_vocabulary(self.processing_class)
        if self.teacher.writes:
            with self.teacher.weights() as theirs:
                check_room(self.views, self._room, {"teacher": position_count(theirs)})
        self.teacher.meet(self.views)
        self.teacher.share_prefix(self.views.shared_prefix)
        return none.new_tensor(foreign_ends(self.teacher, self.processing_class, self.eos_token_ids))

    def _end_at(self, stops: Sequence[int]) -> None:
        """Let answers end at these tokens too."""
        if stops:
            self.eos_token_ids = list(dict.fromkeys([*self.eos_token_ids, *stops]))
            if not self.use_vllm:
                self.generation_config.eos_token_id = self.eos_token_ids
                self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    @property
    def _reads_distributions(self) -> bool:
        return self.args.estimator in (FULL, TOP_K)

    # --- the answers

    def get_batch_samples(self, epoch_iterator: Iterable, num_batches: int, device: torch.device) -> Any:
        """As in TRL; the processes tell each other of signals, as before every step."""
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.preemption.hear(float(total_over_processes(float(self.preemption.asked), device)))
        self.watch.begin([])
        return found

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The student's prompts by their places, as the prompt style writes them and not as TRL would."""
        views = [self.views[place]["student"] for place in self._asked]
        return [view["input_ids"][: prompt_length(view)] for view in views], None, {}

    def reward(self, completions: Sequence[str], asked: Sequence[int], **_: Any) -> list[float]:
        """The verifier's word on answers.

        Args:
            completions: The texts; the end token may hold a stop string, which is cut off with what follows it.
            asked: The place of each one's row.

        Raises:
            VerifierError: On all processes at once, with the row of the first fault.
        """
        rewards, fault, stop = [], None, self.views.builder.style.stop
        try:
            for place, text in zip(asked, completions, strict=True):
                rewards.append(self.verifier(self.views.row(place), until_stop(text, stop)))
        except VerifierError as error:
            fault = error
        faults = [one for one in gather_object([fault and str(fault)]) if one]
        if faults:
            raise VerifierError(faults[0]) from fault
        return rewards

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        self._rewards = rewards[:, 0]
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As in TRL; the answers keep their rows' places, their rewards, and whether a teacher teaches them."""
        self.views.set_epoch(int(self.state.epoch or 0))
        self._asked = [row["asked"] for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        rewards, group = self._rewards, self.num_generations
        here = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        output["asked"] = torch.tensor(self._asked, device=rewards.device)
        output["rewards"] = rewards[here]
        output["success"] = rewards.view(-1, group).mean(dim=1).repeat_interleave(group)[here]
        responses = taught_responses(rewards, self.args.distil_where, group, self.args.right_from)[here]
        known = ~torch.isin(output["completion_ids"], self._foreign)
        output["taught"] = responses[:, None] & output["completion_mask"].bool() & known
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As in TRL; where answers were drawn, the tokens of each step that learns from them are counted."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:
            count_steps(self._buffered_inputs, self.args.gradient_accumulation_steps, self.args.device)
        return inputs

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._drawn.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._drawn.load(checkpoint)

    # --- the loss

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As in TRL; what the student said is kept, so that the teacher's term needs no second run of it."""
        module = self.accelerator.unwrap_model(model)
        with listening(module, self._reads_distributions and torch.is_grad_enabled()) as heard:
            found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        tokens = found[0].shape[1]
        self._said = _Said(found[0], heard[-1][:, -tokens - 1 : -1] if heard else None)
        return found

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        step, total = self.state.global_step, self.state.max_steps
        distilled, rewarded = (one.at(step, total) if isinstance(one, Schedule) else one for one in self.weights)
        loss = self._nft(model, inputs) if self.args.policy_loss == "nft" else super()._compute_loss(model, inputs)
        said, self._said = self._said, None
        if rewarded != 1.0:
            loss = rewarded * loss
        if distilled:
            loss = loss + distilled * self._distillation(model, inputs, said)
            self._metrics["train"]["distillation/weight"].append(distilled)
        return loss

    def _share_of_step(self, values: Tensor, tokens: Tensor) -> Tensor:
        """A sum as this micro-batch's part of a mean over the tokens of the step, on all processes."""
        return values / (tokens.clamp(min=1.0) / self.accelerator.num_processes)

    def _nft(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        mask, aux = inputs["completion_mask"], self.aux_loss_enabled
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attended = torch.cat([inputs["prompt_mask"], mask], dim=1)
        new, entropies, routing = self._get_per_token_logps_and_entropies(
            model, ids, attended, mask.shape[1], compute_entropy=True, compute_aux_loss=aux
        )
        old = inputs.get("old_per_token_logps")
        log_ratio = new - (new.detach() if old is None else old)
        values = nft_loss(log_ratio, inputs["rewards"], inputs["success"], self.args.nft_floor)
        values = values * inputs.get("importance_sampling_ratio", 1.0)
        entropy, tokens = total_over_processes([float((entropies * mask).sum()), float(mask.sum())], mask.device)
        self._metrics["train"]["entropy"].append(float(entropy / tokens.clamp(min=1.0)))
        loss = self._share_of_step((values * mask).sum(), inputs["tokens_in_step"])
        if aux:  # of a mixture of experts, as TRL adds it
            loss = loss + self.router_aux_loss_coef * routing / self.current_gradient_accumulation_steps
        return loss

    def _distillation(self, model: nn.Module, inputs: Mapping[str, Any], said: _Said) -> Tensor:
        """The teacher's term, this micro-batch's part of its mean."""
        signal = self._ask(model, inputs)
        taught, ids = inputs["taught"], inputs["completion_ids"]
        student = said.log_probs[taught]
        if self._reads_distributions:
            values = self._divergence(model, signal, said, taught, ids[taught])
        else:
            vocab_size = head_size(self.accelerator.unwrap_model(model))
            theirs = log_probs_of(signal.rows, ids[taught], self.temperature, vocab_size)
            values = ESTIMATORS[self.args.estimator](theirs - student, self.args.log_ratio_limit)
            if (old := inputs.get("old_per_token_logps")) is not None:
                values = values * bounded_ratio(student, old[taught], self.epsilon_low, self.epsilon_high)
            if (drift := inputs.get("importance_sampling_ratio")) is not None:  # of vLLM's weights
                values = values * drift.expand_as(taught)[taught]
            values = values.sum()
        self._tally.add(values.detach(), taught, inputs["completion_mask"])
        if self.accelerator.sync_gradients:  # the last micro-batch of the step
            for name, figure in self._tally.figures(self.args.device).items():
                self._metrics["train"][f"distillation/{name}"].append(figure)
        return self._share_of_step(values, inputs["taught_in_step"])

    def _ask(self, model: nn.Module, inputs: Mapping[str, Any]) -> TeacherSignal:
        """The teacher's word, from within the wrapped student, whose weights may be its own."""
        batch = views_of(inputs, inputs["taught"], self.views, self._tokenizer.pad_token_id)
        module, found = self.accelerator.unwrap_model(model), []

        def inside(*_: Any) -> Tensor:
            if not self._heads_checked:
                self._heads_checked = True
                check_head(module, batch.student)
                self.teacher.check_heads(lambda theirs: check_head(theirs, batch.teacher_view))
            found.append(self.teacher.signal(batch, self.objective.needs))
            return torch.zeros((), device=self.args.device)

        with torch.no_grad(), evaluating(module), self.accelerator.autocast():
            run_inside(model, module, inside, batch.student.input_ids)
        return found[0]

    def _divergence(
        self, model: nn.Module, signal: TeacherSignal, said: _Said, taught: Tensor, targets: Tensor
    ) -> Tensor:
        """The objective over the taught tokens, as a sum."""
        if not len(targets):
            return said.log_probs.sum() * 0.0
        places = (taught.long().cumsum(dim=1) - 1)[taught]
        layout = RowLayout(taught.nonzero()[:, 0], places)
        rows = DenseRows(said.hidden[taught], Head.of(self.accelerator.unwrap_model(model)))
        return self.objective(rows, signal, targets, layout=layout, own_text=True).total

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL would write one beside each checkpoint, in the place of hfkd's own."""
