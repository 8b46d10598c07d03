"""Memory stays where it is: a leak of a megabyte a step ends a run of days, at an hour that nobody chose."""

from __future__ import annotations

import gc
import resource
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from training import make_trainer
from transformers import TrainerCallback

from hfkd import LocalTeacher
from hfkd.rollout import GenerationSettings, HFRollout, OffPolicyBuffer

EARLY, LATE = 100, 500


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Measure(TrainerCallback):
    """Counts live tensors by shape, their bytes and the process's memory at some steps."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Counter, int, int]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (EARLY, LATE):
            gc.collect()
            tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
            size = sum(one.numel() * one.element_size() for one in tensors)
            self.found[state.global_step] = (Counter(tuple(one.shape) for one in tensors), size, resident())


CASES = {
    "adapter, shared prefix": dict,
    "local teacher, full student": lambda: {"teacher": LocalTeacher(make_model(seed=1)), "demonstrations": []},
    "own text, kept": lambda: {
        "answer": {"student": 0.5, "dataset": 0.5},
        "rollout": HFRollout(make_tokenizer(), GenerationSettings(max_new_tokens=4)),
        "buffer": OffPolicyBuffer(16, 0.5),
    },
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_memory_after_500_steps_is_that_after_100(tmp_path, case):
    """Whatever keeps a batch, a graph or a row of figures of each step grows without end."""
    measure = Measure()
    settings = {"max_steps": LATE, "per_device_train_batch_size": 2, "logging_steps": 50, "learning_rate": 0.01}
    trainer = make_trainer(tmp_path, callbacks=[measure], **settings, **CASES[case]())
    trainer.train()
    (early, early_bytes, early_resident), (late, late_bytes, late_resident) = measure.found[EARLY], measure.found[LATE]
    assert early.total() > 20
    # A batch of six tensors more or less is at hand where texts were written; one more a step would be 400.
    assert late.total() <= early.total() + 20, f"more tensors: {(late - early).most_common(5)}"
    assert late_bytes <= early_bytes * 1.05
    assert late_resident - early_resident < 20e6, f"{(late_resident - early_resident) / 1e6:.1f} MB more"
