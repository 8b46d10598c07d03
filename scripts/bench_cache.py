"""What a cached teacher costs and what its codecs lose, side by side in one run: `python scripts/bench_cache.py`.

First caches of the training texts are built, timed beside the teacher alone. Then the same student, cut out of the
teacher, trains an epoch from each cache, from the teacher in memory, and on the text alone with cross-entropy, by
turns; the first losses are compared before anything is said of speed. At last every codec keeps the held-out texts,
and what a loss reads from it is held against what it reads from the teacher itself. Nothing here measures how well a
student learns.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from bench_cache_errors import CODECS, measure_errors, report_errors
from bench_measuring import (
    add_common_arguments,
    load,
    print_lines,
    print_table,
    print_targets,
    setting,
    span,
    synchronize,
    take_threads,
    write_json,
)
from bench_steps import StepTimes
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from transformers.utils import logging

from hfkd import DistillationConfig, DistillationTrainer, PromptStyle
from hfkd.batch import Batch, View
from hfkd.cache import CacheWriter, Codec, Manifest, text_contract, texts_of
from hfkd.data.passages import opening
from hfkd.data.prompts import PromptBuilder
from hfkd.data.views import DistillationDataset
from hfkd.rows import DenseRows, Head
from hfkd.student import keep_layers
from hfkd.teachers import LocalTeacher, Teacher
from hfkd.teachers.cached import CachedTeacher

MODEL = Path("outputs/models/SmolLM2-135M-Instruct")
TEXTS, HELD_OUT = (Path("outputs/ablation/passages") / name for name in ("train.jsonl", "held_out.jsonl"))
STYLE = PromptStyle(question="{prompt}", answer=" {completion}", separator="\n", stop=())
PLAIN, MEMORY, ALONE = "cross-entropy, no teacher", "teacher in memory", "the teacher alone"
TRAINED = ("topk K=64", "topk K=64, compact", "sampled 50", "sampled 50, compact", "hidden float32")
LIMIT = 1.1
MOST_TOKENS = 96


def read_texts(path: Path, count: int, tokenizer: PreTrainedTokenizerBase) -> DistillationDataset:
    """The openings of the first documents of a file, learned as a whole.

    Raises:
        SystemExit: There is no such file.
    """
    if not path.is_file():
        raise SystemExit(f"{path} isn't there. Let `python scripts/ablation.py` fetch it, or give a file: --texts.")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [opening(json.loads(line)) for line in lines if len(json.loads(line)["text"].split()) > 1]
    builder = PromptBuilder(tokenizer, STYLE)
    fitting = [row for row in rows if len(tokenizer(f"{row['prompt']} {row['completion']}").input_ids) <= MOST_TOKENS]
    return DistillationDataset(fitting[:count], builder, max_length=MOST_TOKENS + 2, whole_text=True)


class Speaker:
    """What a cache is built from: the teacher's rows of a view.

    Args:
        model: The teacher's.
        remember: Whether to run a view once only, where it is not the time that counts.
    """

    def __init__(self, model: PreTrainedModel, remember: bool = False) -> None:
        self.teacher = LocalTeacher(model)
        self.known: dict[bytes, DenseRows] | None = {} if remember else None
        self.head = Head.of(model).detached()
        self.device = next(model.parameters()).device

    def __call__(self, view: View) -> DenseRows:
        """Run the teacher."""
        key = view.input_ids.cpu().numpy().tobytes()
        if self.known is not None and key in self.known:
            return self.known[key]
        rows = self.teacher.signal(Batch(view), frozenset({"distribution"})).rows
        if self.known is not None:
            self.known[key] = rows
        return rows


def build(folder: Path, data: DistillationDataset, codec: Codec, speaker: Speaker, batch: int) -> Manifest:
    """Make a cache as `hfkd cache` does."""
    temperature = 1.0 if codec.reads_logits else None
    writer = CacheWriter(
        folder,
        list(texts_of(data)),
        codec,
        {**text_contract(data), "teacher": {"kind": "local"}, "temperature": temperature},
        speaker.head,
        pad_token_id=data.builder.tokenizer.pad_token_id or 0,
        batch_size=batch,
        device=speaker.device,
    )
    writer.open()
    writer.begin()
    writer.write(speaker)
    return writer.finish()


def build_all(root: Path, data: DistillationDataset, speaker: Speaker, batch: int) -> dict[str, dict[str, Any]]:
    """Build a cache of each codec that is trained from, and time them beside the teacher alone."""
    found: dict[str, dict[str, Any]] = {}
    codecs: dict[str, Codec | None] = {ALONE: None, **{name: CODECS[name] for name in TRAINED}}
    build(root / "warm up", data, CODECS[TRAINED[0]], speaker, batch)
    for name, codec in codecs.items():
        start, worked = time.perf_counter(), time.process_time()
        facts = {} if codec is None else build(root / name, data, codec, speaker, batch).facts
        if codec is None:
            _speak(data, speaker, batch)
        synchronize(str(speaker.device))
        took = {"seconds": time.perf_counter() - start, "processor": time.process_time() - worked}
        found[name] = {**took, "bytes_per_token": facts.get("bytes_per_token")}
    return found


def _speak(data: DistillationDataset, speaker: Speaker, batch: int) -> None:
    from hfkd.cache.writer import pad_view

    texts = sorted(texts_of(data), key=lambda text: -len(text["input_ids"]))
    for start in range(0, len(texts), batch):
        speaker(pad_view(texts[start : start + batch], 0, speaker.device))


def tokens_of(data: DistillationDataset) -> int:
    """How many tokens are supervised."""
    return sum(label != -100 for text in texts_of(data) for label in text["labels"][1:])


class Times(StepTimes):
    """Seconds on the clock, and on the processor: those say more on a machine that others use too."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.worked: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step ended."""
        super().on_step_end(*args, **kwargs)
        self.worked.append(time.process_time())

    @property
    def processor(self) -> list[float]:
        """Of each step but the first."""
        return [end - start for start, end in zip(self.worked, self.worked[1:], strict=False)]


def train(
    student: PreTrainedModel, teacher: Teacher | None, data: DistillationDataset, batch: int, device: str
) -> dict[str, Any]:
    """One epoch: seconds of each step but the first, which checks and warms up, and the loss of the first."""
    times = Times(device)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = DistillationConfig(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            learning_rate=3e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            seed=0,
        )
        trainer = DistillationTrainer(
            student,
            teacher,
            "cross_entropy" if teacher is None else "forward_kl",
            settings,
            train_dataset=data,
            processing_class=data.builder.tokenizer,
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)
        opened = time.perf_counter() - start
        trainer.train()
    figures = {"seconds": times.seconds, "processor": times.processor, "opened": opened}
    return {**figures, "loss": trainer.state.log_history[0]["loss"]}


def compare_epochs(
    student: PreTrainedModel,
    teachers: Mapping[str, Callable[[], Teacher | None]],
    data: DistillationDataset,
    batch: int,
    repeats: int,
    device: str,
) -> dict[str, dict[str, Any]]:
    """Train the same student with each teacher, by turns.

    Returns:
        What each turn found, by teacher.

    Raises:
        SystemExit: The exact cache and the teacher in memory begin at different losses.
    """
    found: dict[str, dict[str, list]] = {name: {} for name in teachers}
    for _ in range(repeats):
        for name, make in teachers.items():
            gc.collect()
            for key, value in train(copy.deepcopy(student), make(), data, batch, device).items():
                found[name].setdefault(key, []).append(value)
    exact, here = (found[name]["loss"][0] for name in ("hidden float32", MEMORY))
    if not abs(exact - here) <= 1e-5 * abs(here):
        raise SystemExit(f"The first losses differ: {exact} from the exact cache, {here} from the teacher in memory.")
    return found


def report_builds(found: dict[str, dict[str, Any]], tokens: int) -> None:
    """Print the first table."""
    rows = []
    for name, entry in found.items():
        size = "" if entry["bytes_per_token"] is None else f"{entry['bytes_per_token']:,.1f}"
        speeds = (f"{tokens / entry[key]:,.0f}" for key in ("seconds", "processor"))
        rows.append((name, f"{entry['seconds']:.3g}", *speeds, size))
    title = f"Building a cache of {tokens:,} tokens, the teacher's run included"
    headings = ("codec", "seconds", "tokens per second", "per second of processor time", "bytes per token on disk")
    print_table(title, headings, rows)


def report_epochs(found: dict[str, dict[str, Any]], tokens: int) -> list[dict]:
    """Print the second table, and hold it against the target."""
    rows, targets = [], []
    for name, entry in found.items():
        epochs = [sum(seconds) for seconds in entry["seconds"]]
        ratio, worked = (_ratio(entry[key], found[PLAIN][key]) for key in ("seconds", "processor"))
        figures = (f"{statistics.median(epochs):.3g}", span(epochs), f"{ratio:.2f}", f"{worked:.2f}")
        opened = f"{statistics.median(entry['opened']):.2g}"
        rows.append((name, *figures, opened, f"{entry['loss'][0]:.4f}"))
        if name in TRAINED:
            words = (
                f"an epoch from {name} costs {ratio:.2f} x {PLAIN} ({worked:.2f} x in processor time), wanted at most "
                f"{LIMIT}"
            )
            figures = {"ratio": ratio, "processor_ratio": worked, "limit": LIMIT, "met": ratio <= LIMIT}
            targets.append({"name": name, **figures, "words": words})
    headings = ("text from", "seconds (median)", "least to most", "x plain", "x in processor time", "to open, s")
    title = f"An epoch of {tokens:,} tokens but its first step; x plain is the median over turns"
    print_table(title, (*headings, "first loss"), rows)
    return targets


def _ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    return statistics.median(sum(one) / sum(other) for one, other in zip(ours, theirs, strict=True))


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="the teacher's folder")
    parser.add_argument("--layers", type=int, default=10, help="of the teacher's blocks, which make the student")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="JSON lines with the column text, to train on")
    parser.add_argument("--held-out", type=Path, default=HELD_OUT, help="the same, to measure errors on")
    parser.add_argument("--rows", type=int, default=48, help="texts of an epoch")
    parser.add_argument("--held-out-rows", type=int, default=64, help="texts to measure errors on")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="turns of training")
    parser.add_argument("--parts", nargs="+", default=["build", "epoch", "error"], choices=["build", "epoch", "error"])
    add_common_arguments(parser)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print the tables."""
    options = _arguments(words)
    take_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device).eval()
    print_lines(f"{setting(options.device)}; float32; teacher: {options.model.name}", load())
    report: dict[str, Any] = {"setting": setting(options.device), "model": options.model.name}
    with tempfile.TemporaryDirectory() as scratch:
        datasets.config.HF_DATASETS_CACHE = Path(scratch) / "opened"
        _measure(options, model, tokenizer, Path(scratch), report)
    write_json(report, options.json)


def _measure(
    options: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    report: dict[str, Any],
) -> None:
    speaker, student = Speaker(model.requires_grad_(False)), keep_layers(model, options.layers).requires_grad_()
    data = read_texts(options.texts, options.rows, tokenizer)
    if {"build", "epoch"} & set(options.parts):
        report["build"] = build_all(scratch, data, speaker, options.batch)
        report_builds(report["build"], tokens_of(data))
    if "epoch" in options.parts:
        teachers = {PLAIN: lambda: None, **{name: _opener(scratch / name) for name in TRAINED}}
        teachers[MEMORY] = lambda: LocalTeacher(model)
        found = compare_epochs(student, teachers, data, options.batch, options.repeats, options.device)
        report["epoch"] = {"found": found, "targets": report_epochs(found, tokens_of(data))}
        print_targets(report["epoch"]["targets"])
    if "error" in options.parts:
        held_out = read_texts(options.held_out, options.held_out_rows, tokenizer)
        caches = {name: scratch / "held out" / name for name in CODECS}
        sizes, speaker = {}, Speaker(model, remember=True)
        count = model.config.num_hidden_layers
        near = keep_layers(model, [number for number in range(count) if number != count // 2])
        students: dict[str, nn.Module] = {f"{options.layers} blocks": student.eval(), "all blocks but one": near}
        for name, folder in caches.items():
            facts = build(folder, held_out, CODECS[name], speaker, options.batch).facts
            shape = (speaker.head.vocab_size, speaker.head.weight.shape[1], model.dtype.itemsize)
            sizes[name] = {"disk": facts["bytes_per_token"], "most": CODECS[name].bytes_per_token(*shape)}
        found = measure_errors(speaker, students, held_out, caches, options.batch)
        report["error"] = {"bytes_per_token": sizes, **found}
        report_errors(report["error"], tokens_of(held_out))


def _opener(folder: Path) -> Callable[[], Teacher]:
    return lambda: CachedTeacher(folder)


if __name__ == "__main__":
    main()
