"""A made-up run and its report with every part that there can be, for the tests of pictures and pages."""

from __future__ import annotations

import copy
import math
import random


def shot_result(shots: int, accuracy: float, items: int = 48, verdict: str = "", cut: int = 0) -> dict:
    """The fields that a report keeps of one number of demonstrations."""
    squared, count = 1.96**2, items
    middle = (accuracy + squared / (2 * count)) / (1 + squared / count)
    half = 1.96 / (1 + squared / count) * math.sqrt(accuracy * (1 - accuracy) / count + squared / (4 * count**2))
    return {
        "shots": shots,
        "items": items,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / items),
        "interval": [middle - half, middle + half],
        "most_frequent_answer": "blew",
        "most_frequent_share": 1 / 48,
        "distinct_answers": 46,
        "distinct_gold_answers": 48,
        "top_answer": "held",
        "top_answer_share": 0.0625,
        "verdict": verdict,
        "cut": cut,
    }


def details(**stages: dict[int, float]) -> dict:
    """`k_shot_details` of accuracies by stage and demonstrations."""
    return {
        stage: {str(shots): shot_result(shots, accuracy) for shots, accuracy in results.items()}
        for stage, results in stages.items()
    }


def _bins(sharpness: float, tokens: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    bins = []
    for place in range(1, 10):
        confidence = place / 10 + 0.05 + draw.uniform(-0.02, 0.02)
        accuracy = min(max(confidence**sharpness + draw.uniform(-0.04, 0.04), 0.0), 1.0)
        count = int(tokens * (0.02 + 0.5 * (place / 9) ** 4))
        bins.append(
            {
                "low": place / 10,
                "high": (place + 1) / 10,
                "tokens": count,
                "confidence": confidence,
                "accuracy": accuracy,
            }
        )
    return bins


def _by_position(start: float, distance: float) -> list[dict]:
    ranges = [(place, place) for place in range(12)] + [(12, 15), (16, 23), (24, 39)]
    return [
        {
            "first": first,
            "last": last,
            "tokens": max(int(200 * (last - first + 1) * 0.86**last), 3),
            "agreement": min(start + 0.05 * math.sqrt(first), 0.97),
            "forward_kl": distance * 0.85**first,
        }
        for first, last in ranges
    ]


def _quality(error: float, brier: float, accuracy: float, perplexity: float, sharpness: float, seed: int) -> dict:
    return {
        "accuracy": accuracy,
        "perplexity": perplexity,
        "expected_calibration_error": error,
        "brier": brier,
        "reliability": _bins(sharpness, 900, seed),
    }


def fidelity(stage: str) -> dict:
    """What a measurement of the fidelity gives; the student is closer to its teacher `after`."""
    after = stage == "after"
    agreement, forward = (0.893, 0.21) if after else (0.512, 2.34)
    words = [" walked", "\n", " to", "ing", " the", " 1", "ed", "<|im_end|>", " größer", "\u202etxt"]
    return {
        "texts": 48,
        "tokens": 1132,
        "agreement": agreement,
        "agreement_interval": [agreement - 0.03, agreement + 0.024],
        "agreement_when_teacher_wrong": 0.71 if after else None,
        "teacher_wrong": 138,
        "forward_kl": forward,
        "forward_kl_interval": [forward * 0.8, forward * 1.25],
        "reverse_kl": forward * 1.4,
        "reverse_kl_interval": [forward * 1.1, forward * 1.8],
        "captured_mass": {"k": 64, "student": 0.981 if after else 0.744, "teacher": 0.992},
        "entropy": {"student": 0.62, "teacher": 0.55, "gap": 0.07},
        "student": _quality(0.034, 0.21, 0.86, 1.62, 1.1, 1) if after else _quality(0.19, 0.64, 0.46, 9.4, 1.9, 2),
        "teacher": _quality(0.021, 0.18, 0.88, 1.48, 0.95, 3),
        "by_position": _by_position(0.72, 0.6) if after else _by_position(0.2, 4.6),
        "worst_tokens": [
            {
                "text": word,
                "tokens": 12 - place,
                "forward_kl": 1.9 / (place + 1),
                "total": (12 - place) * 1.9 / (place + 1),
                "student": " walk",
                "teacher": word,
            }
            for place, word in enumerate(words)
        ],
        "support": "vocabulary",
        "notes": [],
    }


def difference(
    shots: int, share: float, ends: tuple[float, float], *, start: str = "before", task: str = "past_tense"
) -> dict:
    """A paired difference, as a report has it."""
    chance = 0.3 if ends[0] <= 0 <= ends[1] else 0.0004
    figures = {"items": 48, "difference": share, "interval": list(ends), "p_value": chance}
    return {"task": task, "shots": str(shots), "from": start, "to": "after", **figures}


def history(count: int = 30, terms: bool = True) -> list[dict]:
    """Logged entries whose loss falls with some noise."""
    draw = random.Random(0)
    entries = []
    for step in range(1, count + 1):
        kl = 2.9 * math.exp(-6 * step / count) + draw.uniform(0.05, 0.35)
        entry = {"step": step, "learning_rate": 1e-4, "loss": kl, "loss/forward_kl": kl}
        if terms:
            ce = 1.2 * math.exp(-2 * step / count) + draw.uniform(0.0, 0.2)
            entry |= {"loss": kl + 0.3 * ce, "loss/cross_entropy": ce, "loss/forward_kl/kept_mass": 90.0}
        entries.append(entry)
    return entries


REPORT = {
    "schema": 1,
    "k_shot": {"before": {"0": 0.0, "1": 0.54, "8": 0.9}, "after": {"0": 0.94, "1": 0.96, "8": 0.98}},
    "k_shot_details": details(
        before={0: 0.0, 1: 0.5417, 8: 0.8958},
        after={0: 0.9375, 1: 0.9583, 8: 0.9792},
        gold={0: 0.9583, 1: 0.9375, 8: 0.9583},
        teacher={8: 0.8958},
    ),
    "forgetting": [
        {
            "task": "plural",
            "k_shot": {"before": {"0": 0.0, "8": 0.9375}, "after": {"0": 0.125, "8": 0.9167}},
            "details": details(before={0: 0.0, 8: 0.9375}, after={0: 0.125, 8: 0.9167}),
        }
    ],
    "differences": [
        difference(0, 0.9375, (0.854, 1.0)),
        difference(1, 0.4167, (0.271, 0.562)),
        difference(8, 0.0833, (-0.021, 0.188)),
        difference(0, -0.0208, (-0.083, 0.042), start="gold"),
        difference(1, 0.0208, (-0.042, 0.083), start="gold"),
        difference(8, 0.0208, (0.0, 0.062), start="gold"),
        difference(0, 0.125, (0.042, 0.229), task="plural"),
        difference(8, -0.0208, (-0.083, 0.042), task="plural"),
    ],
    "fidelity": {"before": fidelity("before"), "after": fidelity("after")},
    "loss_history": history(),
    "training": {"train_runtime": 37.5, "train_loss": 0.71, "epoch": 2.3},
    "durations": {"evaluation_before": 16.4, "training": 37.84, "evaluation_after": 11.05, "gold_baseline": 47.14},
}
REPORT["k_shot_details"]["before"]["0"] |= {
    "verdict": "collapsed: gives no answer to 60% of the questions, and always answering 'blew' would score 2.1%",
    "cut": 7,
}

RUN = {
    "recipe": {
        "student": {
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "revision": None,
            "lora": {"r": 16, "alpha": 32.0},
        },
        "teacher": {"kind": "self", "weights": "adapter_off", "model": None, "revision": None},
        "data": {
            "train": {"path": "recipes/secokd/data/past_tense.jsonl", "name": None, "split": "train"},
            "demonstrations": {"count": 8},
            "student_shots": [0, 1],
            "prompt": {"question": "Question: {prompt}\nAnswer:", "answer": " {completion}\n"},
            "answer": "teacher",
        },
        "loss": {"terms": [{"kind": "forward_kl", "weight": 1.0, "name": None, "temperature": 2.0}]},
        "training": {"max_steps": 30, "learning_rate": 2e-4, "per_device_train_batch_size": 8},
    },
    "fingerprint": "865cb437f92e3cb784528ae5c882995f03cec6704fae77d3f19f8772edb17f92",
    "status": "finished",
    "command": ["hfkd", "train", "recipes/secokd/past_tense.yaml", "training.max_steps=30"],
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "hfkd": "0.1.0"},
    "hardware": {"device": "cpu", "count": 1, "processes": 1, "cpu_threads": 2},
    "student": {"source": "hub"},
    "parameters": {"total": 139_400_000, "trained": 4_884_480},
    "origins": {
        "student": {
            "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "source": "hub",
            "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            "licence": "apache-2.0",
        },
        "teacher": {
            "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "source": "hub",
            "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            "licence": "apache-2.0",
        },
        "train": {"id": "past_tense.jsonl", "source": "file", "revision": None, "licence": None},
    },
    "data": {
        "train": {"rows": 104, "sha256": "80814b8970a27a8b48895fc3dd74917c320f13a2565c8a373c375773321fce2c"},
        "evaluation": {"rows": 48, "sha256": "e1398e5f66afd9a064e91267b7e6be8ce79d00ba26e2403d7c5ef8cb05683d7f"},
        "teacher_answers": {"rows": 104, "empty": 2},
        "training_examples": {"examples": 102, "too_long": 3, "demonstrations": 0},
    },
    "teacher": {"kind": "self", "weights": "adapter_off", "reuse_prefix": True},
    "objective": [{"name": "forward_kl", "weight": 1.0, "kind": "forward_kl", "temperature": 2.0}],
    "metrics": {"train_runtime": 37.5, "train_loss": 0.71},
    "durations": {"evaluation_before": 16.4, "training": 37.84, "evaluation_after": 11.05, "gold_baseline": 47.14},
    "energy": {"joules": 4210.0, "devices": ["cpu package 0"], "source": "rapl", "seconds": 118.2},
}


def whole_run() -> dict:
    """A fresh copy of what `run.json` holds."""
    return copy.deepcopy(RUN)


def whole_report() -> dict:
    """A fresh copy of what `report.json` holds."""
    return copy.deepcopy(REPORT)
