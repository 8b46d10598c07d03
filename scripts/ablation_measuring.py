"""How near a student is to its teacher on held-out texts, for `ablation.py`.

Both read the same tokens, and every token but the first is predicted. It reads model folders and prints nothing.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from hfkd.loading import load_causal_lm
from hfkd.rows import Head, decode
from hfkd.student import keep_layers

BATCH = 8
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


@cache
def held_out_ids(model: str, path: str, tokens: int) -> Tensor:
    """The first tokens of each text of a JSONL file: [texts, tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return torch.tensor([tokenizer(text)["input_ids"][:tokens] for text in texts], device=DEVICE)


@cache
def teacher_states(model: str, path: str, tokens: int) -> tuple[Tensor, Head]:
    """The teacher's last hidden states of all texts, computed once a process, and its head."""
    teacher = _load(model)
    return _states(teacher, held_out_ids(model, path, tokens)), Head.of(teacher).detached()


def measure_folder(folder: str, teacher: str, path: str, tokens: int) -> dict[str, float]:
    """Hold the student in a folder against the teacher.

    Args:
        folder: Of the student.
        teacher: Of the teacher and of the tokenizer.
        path: JSONL with a column `text`, each text with at least so many tokens.
        tokens: Of each text.

    Returns:
        `forward_kl` and `reverse_kl` in nats a token, `agreement` (share of the tokens for which both find the same
        one likeliest), and the student's `perplexity` of the texts.
    """
    return _measure(_load(folder), teacher, path, tokens)


def measure_baselines(teacher: str, keep: Any, path: str, tokens: int) -> dict[str, dict[str, float]]:
    """The same figures for the teacher itself, and for the student before training, with its blocks as `keep` says."""
    model = _load(teacher)
    return {
        "untrained student": _measure(keep_layers(model, keep), teacher, path, tokens),
        "teacher": _measure(model, teacher, path, tokens),
    }


def _load(folder: str) -> PreTrainedModel:
    return load_causal_lm(folder, dtype=torch.float32).to(DEVICE).eval()


@torch.no_grad()
def _states(model: nn.Module, ids: Tensor) -> Tensor:
    """[texts, tokens - 1, H]: the last token predicts nothing that is known."""
    batches = ids.split(BATCH)
    return torch.cat([decode(model, part, torch.ones_like(part)).last_hidden_state[:, :-1] for part in batches])


@torch.no_grad()
def _measure(student: PreTrainedModel, teacher: str, path: str, tokens: int) -> dict[str, float]:
    ids = held_out_ids(teacher, path, tokens)
    theirs, teacher_head = teacher_states(teacher, path, tokens)
    ours, head = _states(student, ids), Head.of(student)
    sums = torch.zeros(4, dtype=torch.float64)
    for target, own, other in zip(ids[:, 1:], ours, theirs, strict=True):  # one text at a time: [tokens, V] twice
        log_q = head.logits(own).float().log_softmax(-1)
        log_p = teacher_head.logits(other).float().log_softmax(-1)
        forward = (log_p.exp() * (log_p - log_q)).sum()
        reverse = (log_q.exp() * (log_q - log_p)).sum()
        same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        nats = -log_q.gather(-1, target[:, None]).sum()
        sums += torch.stack([forward, reverse, same, nats]).double().cpu()
    mean = (sums / ids[:, 1:].numel()).tolist()
    return {"forward_kl": mean[0], "reverse_kl": mean[1], "agreement": mean[2], "perplexity": math.exp(mean[3])}
