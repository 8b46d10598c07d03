"""Whole optimizer steps of `DistillationTrainer` and of TRL's `SDFTTrainer`, on the same tokens, for
`bench_self_teacher.py`.

Prompts are random words of one token each, so lengths are exact. It times and compares losses; it prints nothing.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench_measuring import package_version, synchronize
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from hfkd import DistillationConfig, DistillationTrainer, PromptStyle, SelfTeacher
from hfkd.data.prompts import PromptBuilder
from hfkd.data.views import teacher_prompts
from hfkd.rollout import GenerationSettings, HFRollout

STYLE = PromptStyle(question="{prompt}", answer=" {completion}", separator=" ", stop=())
OFF_POLICY, WITH_ANSWERS = "hfkd, answers written beforehand", "hfkd, with the writing of the step's answers"
SDFT, SDFT_ALONE = "TRL SDFTTrainer, which writes its answers in the step", "TRL SDFTTrainer, less that writing"


@dataclass(frozen=True)
class Lengths:
    """Sizes in tokens and rows."""

    shared: int
    own: int
    demonstrations: int
    demonstration_tokens: int
    question: int
    answer: int
    batch: int


def words_of(model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """A tokenizer that gives each id of the model a word of its own, `w17w` for 17."""
    vocabulary = {f"w{number}w": number for number in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0w"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0w", eos_token="w2w", pad_token="w2w")


class Words:
    """Draws random words, never one of the first ten (special tokens live there)."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.random = vocab_size, random.Random(0)

    def ids(self, count: int) -> list[int]:
        """So many ids."""
        return [self.random.randrange(10, self.vocab_size) for _ in range(count)]

    def text(self, count: int) -> str:
        """So many words."""
        return " ".join(f"w{number}w" for number in self.ids(count))


@dataclass(frozen=True)
class Task:
    """Questions and demonstrations as text; every word is a token."""

    questions: list[dict]
    demonstrations: list[dict]

    @classmethod
    def of(cls, lengths: Lengths, rows: int, vocab_size: int) -> Task:
        """Draw them."""
        words, count = Words(vocab_size), lengths.demonstrations
        sizes = [
            lengths.demonstration_tokens // count + (place < lengths.demonstration_tokens % count)
            for place in range(count)
        ]
        demonstrations = [
            {"prompt": words.text(size - lengths.answer), "completion": words.text(lengths.answer)} for size in sizes
        ]
        return cls([{"prompt": words.text(lengths.question)} for _ in range(rows)], demonstrations)


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next: data, loss, backward, optimizer and log."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step ended."""
        synchronize(self.device)
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each step but the first, which warms up."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def adapter() -> LoraConfig:
    """The adapter of both."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def settings_of_both(folder: str, lengths: Lengths, steps: int, device: str) -> dict[str, Any]:
    """What both trainers are told alike."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": lengths.batch,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "seed": 0,
    }


def run_ours(model: PreTrainedModel, task: Task, lengths: Lengths, steps: int, device: str) -> dict[str, Any]:
    """Write the answers, then train on them; the first step runs the prefix and checks the head, and isn't counted."""
    tokenizer = words_of(model)
    builder = PromptBuilder(tokenizer, STYLE)
    prompts = teacher_prompts(task.questions, builder, task.demonstrations)
    rollout = HFRollout(tokenizer, GenerationSettings(max_new_tokens=lengths.answer, batch_size=lengths.batch))
    synchronize(device)
    start = time.perf_counter()
    completions = rollout.generate(model, prompts)
    synchronize(device)
    writing = (time.perf_counter() - start) / steps
    rows = [
        {**question, "completion": tokenizer.decode(completion.ids)}
        for question, completion in zip(task.questions, completions, strict=True)
    ]
    times = StepTimes(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model,
            SelfTeacher("adapter_off"),
            "forward_kl",
            DistillationConfig(
                train_sampling_strategy="sequential", **settings_of_both(folder, lengths, steps, device)
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=adapter(),
            prompts=STYLE,
            demonstrations=task.demonstrations,
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "seconds": times.seconds,
        "writing": writing,
        "loss": trainer.state.log_history[0]["loss"],
        "prompts": trainer.train_dataset.teacher_prompts,
        "answers": [len(completion.ids) for completion in completions],
    }


def run_sdft(model: PreTrainedModel, task: Task, lengths: Lengths, steps: int, device: str) -> dict[str, Any]:
    """TRL's trainer on the same tokens: the demonstrations are its privileged context."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    writing: list[float] = []

    class Timed(SDFTTrainer):
        def _generate(self, prompt_ids: list[list[int]]) -> Any:
            start = time.perf_counter()
            found = super()._generate(prompt_ids)
            synchronize(device)
            writing.append(time.perf_counter() - start)
            return found

    tokenizer, times = words_of(model), StepTimes(device)
    builder = PromptBuilder(tokenizer, STYLE)
    shown = [builder.prompt(row, task.demonstrations).removesuffix(builder.prompt(row)) for row in task.questions]
    rows = [{**row, "privileged_context": context} for row, context in zip(task.questions, shown, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        config = SDFTConfig(
            **settings_of_both(folder, lengths, steps, device),
            teacher_model_kind="base",
            generate_from_teacher=True,
            teacher_prompt_template="{privileged_context}{prompt}",
            distillation_mode="full_logits",
            distillation_topk=None,
            distillation_alpha=0.0,
            distillation_is_clip=None,
            max_prompt_length=None,
            max_completion_length=lengths.answer,
            num_generations=1,
            shuffle_dataset=False,
            generation_kwargs={"do_sample": False, "min_new_tokens": lengths.answer},
        )
        trainer = Timed(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=adapter(),
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    build = trainer.teacher_context_builder.select_generation_prompts
    prompts = trainer._tokenize_prompts(build([row["prompt"] for row in rows], shown))
    alone = [step - answer for step, answer in zip(times.seconds, writing[1:], strict=True)]
    return {
        "seconds": times.seconds,
        "alone": alone,
        "loss": trainer.state.log_history[0]["loss"],
        "prompts": prompts,
    }


def check_same_work(ours: dict[str, Any], theirs: dict[str, Any] | None, lengths: Lengths) -> None:
    """See that both read the same prompts, wrote answers of the wanted length and began at the same loss.

    Raises:
        SystemExit: They didn't.
    """
    if set(ours["answers"]) != {lengths.answer}:
        raise SystemExit(f"Answers of {sorted(set(ours['answers']))} tokens were written, wanted {lengths.answer}.")
    if theirs is None:
        return
    if ours["prompts"] != theirs["prompts"]:
        raise SystemExit("The two trainers' teachers read different prompts.")
    if abs(ours["loss"] - theirs["loss"]) > 1e-3 * abs(theirs["loss"]):
        raise SystemExit(f"The first losses differ: ours {ours['loss']}, TRL's {theirs['loss']}.")


def compare_steps(
    fresh_model: Callable[[], PreTrainedModel], lengths: Lengths, steps: int, repeats: int, device: str
) -> dict[str, Any]:
    """Run both trainers by turns; a fresh model each time, because an adapter is put on it."""
    seconds: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    task = Task.of(lengths, steps * lengths.batch, fresh_model().config.vocab_size)
    for _ in range(repeats):
        ours = run_ours(fresh_model(), task, lengths, steps, device)
        theirs = run_sdft(fresh_model(), task, lengths, steps, device) if package_version("trl") else None
        check_same_work(ours, theirs, lengths)
        gc.collect()
        seconds.setdefault(OFF_POLICY, []).extend(ours["seconds"])
        seconds.setdefault(WITH_ANSWERS, []).extend(step + ours["writing"] for step in ours["seconds"])
        if theirs is not None:
            seconds.setdefault(SDFT, []).extend(theirs["seconds"])
            seconds.setdefault(SDFT_ALONE, []).extend(theirs["alone"])
            found["losses"] = (ours["loss"], theirs["loss"])
    return {"seconds": seconds, **found}
