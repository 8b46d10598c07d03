"""What running without padding saves, measured side by side in one run: `python scripts/bench_packing.py`.

Micro-batches of texts of a real data set, their lengths as they come, are learned from by `DistillationTrainer` as a
padded batch and as one row (`padding_free`), by turns; loss and gradients of both are compared first. Tokens are real
ones, so that padding is no speed. The optimizer's step is the same on both sides and left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_measuring import (
    add_common_arguments,
    load,
    print_lines,
    print_table,
    print_targets,
    setting,
    span,
    take_threads,
    time_in_turns,
    write_json,
)
from bench_self_teacher import load_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging

from hfkd import DistillationConfig, DistillationTrainer
from hfkd.batch import IGNORE, Batch, View
from hfkd.teachers import LocalTeacher

TEXTS = Path("outputs/ablation/passages/train.jsonl")
PADDED, FLAT = "padded", "padding-free"
WANTED, SPREAD = 1.5, 4.0
CASES = {
    "alone": ("The student alone, cross-entropy", "cross_entropy"),
    "teacher": ("A student and a teacher of its size, forward KL", "forward_kl"),
}


def read_texts(file: Path, folder: str, limit: int) -> list[list[int]]:
    """The token ids of each text of a file that is not too long.

    Args:
        file: A JSON object with `text` on each line.
        folder: Of the tokenizer.
        limit: The most tokens of a text; longer ones are left out.

    Raises:
        SystemExit: The file isn't there.
    """
    if not file.exists():
        raise SystemExit(
            f"{file} isn't there. Run scripts/ablation.py once, which fetches the passages, or give --texts a file "
            'with {"text": ...} on each line.'
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = file.read_text(encoding="utf-8").splitlines()
    texts = tokenizer([json.loads(line)["text"] for line in lines], verbose=False)["input_ids"]
    return [ids for ids in texts if 1 < len(ids) <= limit]


def draw_batches(texts: Sequence[list[int]], size: int, count: int, answers: float, seed: int) -> list[View]:
    """Batches of texts as they come, padded on the right.

    Args:
        texts: Token ids.
        size: Texts of a batch.
        count: Batches.
        answers: The share of each text, at its end, that is learned.
        seed: Of the drawing.
    """
    if len(texts) < size:
        raise SystemExit(f"There are {len(texts)} texts that are short enough, but a batch takes {size}.")
    drawing = random.Random(seed)
    return [_padded(drawing.sample(texts, size), answers) for _ in range(count)]


def _padded(texts: Sequence[list[int]], answers: float) -> View:
    rows = [torch.tensor(ids) for ids in texts]
    ids, mask, labels = (
        torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=filler)
        for parts, filler in ((rows, 0), ([torch.ones_like(row) for row in rows], 0), (rows, IGNORE))
    )
    prompt = ((1 - answers) * mask.sum(dim=-1)).long()
    return View(ids, mask, labels.masked_fill(torch.arange(ids.shape[1]) < prompt[:, None], IGNORE))


class Learner:
    """Loss and gradients of a batch, padded or flat, by one trainer with one set of weights.

    Args:
        model: The student, in float32 on its device.
        teacher: A model, or None.
        objective: A recipe key.
        folder: Of the trainer.
    """

    def __init__(self, model: Any, teacher: Any, objective: str, folder: str) -> None:
        arguments = DistillationConfig(
            folder, padding_free=True, log_agreement=False, disable_tqdm=True, use_cpu=model.device.type == "cpu"
        )
        self.trainer = DistillationTrainer(model, teacher and LocalTeacher(teacher), objective, arguments)

    def run(self, view: View, padding_free: bool) -> float:
        """The loss per token; gradients are left with the parameters."""
        self.trainer.args.padding_free = padding_free
        if self.trainer.teacher is not None:
            self.trainer.teacher.padding_free = padding_free
        self.trainer.model.train().zero_grad()
        inputs = {name: value.to(self.trainer.args.device) for name, value in Batch(view).to_inputs().items()}
        loss = self.trainer.compute_loss(self.trainer.model, inputs, num_items_in_batch=view.tokens)
        loss.backward()
        return float(loss.detach())

    def gradients(self) -> list[Tensor]:
        """Copies of what the last run left."""
        return [one.grad.clone() for one in self.trainer.model.parameters() if one.grad is not None]

    def compare(self, view: View, allowed: float = 1e-4) -> tuple[float, float]:
        """The relative differences of loss and gradients between the two ways.

        Raises:
            SystemExit: They are more than rounding; there would be no sense in timing them.
        """
        loss, gradients = self.run(view, False), self.gradients()
        flat_loss, flat_gradients = self.run(view, True), self.gradients()
        pairs = list(zip(gradients, flat_gradients, strict=True))
        whole = torch.stack([one.norm() for one in gradients]).norm()
        gap = float(torch.stack([(one - other).norm() for one, other in pairs]).norm() / whole)
        apart = abs(loss - flat_loss) / abs(loss)
        if not (gap <= allowed and apart <= allowed):
            raise SystemExit(
                f"Padded and padding-free differ by {apart:.2g} of the loss and {gap:.2g} of the gradients; allowed "
                f"is {allowed:g}."
            )
        return apart, gap


def other_model(folder: Path, device: str) -> PreTrainedModel:
    """The model with weights a little off, so that it has something to teach."""
    set_seed(0)
    model = load_model(folder, device)[0]
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(1 + 0.02 * torch.randn_like(weights))
    return model


def measure(learner: Learner, batches: Sequence[View], device: str) -> dict[str, Any]:
    """Time every batch both ways, by turns."""
    apart, gap = learner.compare(batches[0])  # which warms up, too
    seconds: dict[str, list[float]] = {PADDED: [], FLAT: []}
    for view in batches:
        runs: dict[str, Callable[[], Any]] = {
            name: lambda view=view, flat=name == FLAT: learner.run(view, flat) for name in seconds
        }
        for name, (taken,) in time_in_turns(runs, 1, device).items():
            seconds[name].append(taken)
    real = [int(view.attention_mask.sum()) for view in batches]
    speed = {name: [n / one for n, one in zip(real, taken, strict=True)] for name, taken in seconds.items()}
    gains = [one / other for one, other in zip(*seconds.values(), strict=True)]
    return {"seconds": seconds, "speed": speed, "gains": gains, "loss_gap": apart, "gradient_gap": gap}


def describe(batches: Sequence[View]) -> dict[str, Any]:
    """The lengths, and how much of the batches is padding."""
    lengths = torch.cat([view.attention_mask.sum(dim=-1) for view in batches]).tolist()
    places = sum(view.input_ids.numel() for view in batches)
    learned = sum(view.tokens for view in batches) / sum(lengths)
    return {
        "lengths": {"least": min(lengths), "median": statistics.median(lengths), "most": max(lengths)},
        "padding": 1 - sum(lengths) / places,
        "spread": max(lengths) / min(lengths),
        "learned": learned,
    }


def report(title: str, found: dict[str, Any], told: dict[str, Any]) -> list[dict[str, Any]]:
    """Print the table of a case; returns its target."""
    gain = statistics.median(found["gains"])
    print_table(
        title,
        ("what", "tokens a second (median)", "least to most", "times faster"),
        [
            (name, f"{statistics.median(speed):.4g}", span(speed), f"{gain:.2f}" if name == FLAT else "")
            for name, speed in found["speed"].items()
        ],
    )
    print_lines(
        f"- relative difference of the loss {found['loss_gap']:.2g}, of all gradients {found['gradient_gap']:.2g}"
    )
    if told["spread"] < SPREAD:
        print_lines(f"- lengths vary by {told['spread']:.1f} times only; there is no target below {SPREAD:g}")
        return []
    words = f"padding-free is {gain:.2f} times faster (batches: {span(found['gains'])}), wanted at least {WANTED}"
    return [{"ratio": gain, "met": gain >= WANTED, "words": words}]


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("outputs/models/SmolLM2-135M-Instruct"), help="a folder")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="one JSON object with `text` a line")
    parser.add_argument("--cases", nargs="+", default=["teacher"], choices=list(CASES))
    parser.add_argument("--batch", type=int, default=16, help="texts of a micro-batch")
    parser.add_argument("--batches", type=int, default=3, help="micro-batches to time, each both ways")
    parser.add_argument("--limit", type=int, default=512, help="longest text, in tokens; longer ones are left out")
    parser.add_argument("--answers", type=float, default=1.0, help="share of each text, at its end, that is learned")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing of the batches")
    add_common_arguments(parser)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print each case."""
    options = _arguments(words)
    take_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    texts = read_texts(options.texts, str(options.model), options.limit)
    batches = draw_batches(texts, options.batch, options.batches, options.answers, options.seed)
    told = describe(batches)
    lengths = told["lengths"]
    print_lines(
        f"{setting(options.device)}; float32; model: {options.model.name}",
        load(),
        f"{options.batches} batches of {options.batch} texts of {options.texts.name}: {lengths['least']} to "
        f"{lengths['most']} tokens (median {lengths['median']:g}), {told['spread']:.1f} times from the shortest to "
        f"the longest; {told['padding']:.0%} of the padded batches is padding; {told['learned']:.0%} of the tokens "
        "are learned",
    )
    results: dict[str, Any] = {"setting": setting(options.device), "model": options.model.name, "texts": told}
    for case in options.cases:
        title, objective = CASES[case]
        student = load_model(options.model, options.device)[0]
        teacher = other_model(options.model, options.device) if case == "teacher" else None
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Learner(student, teacher, objective, folder), batches, options.device)
        results[case] = {**found, "targets": report(title, found, told)}
        print_targets(results[case]["targets"])
    write_json(results, options.json)


if __name__ == "__main__":
    main()
