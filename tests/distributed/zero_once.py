"""What each of two processes runs under DeepSpeed's ZeRO: cases of the battery, one after the other."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from launching import forget_choice
from path_battery import losses, make_case, whole_weights

from hfkd.sharding import Placement


def zero_on_cpu() -> None:
    """Let Accelerate choose DeepSpeed where it is asked for, which it does for devices other than CPUs only. All that
    follows from the choice is Accelerate's and DeepSpeed's own.
    """
    original = AcceleratorState.__init__

    def chosen(self: Any, *args: Any, deepspeed_plugin: Any = None, **settings: Any) -> None:
        original(self, *args, deepspeed_plugin=deepspeed_plugin, **settings)
        if deepspeed_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            deepspeed_plugin.set_mixed_precision(self._mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.distributed_type, self.deepspeed_plugins = DistributedType.DEEPSPEED, deepspeed_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED

    AcceleratorState.__init__ = chosen


def settings_of(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration that the training arguments complete; nothing is too small to be cut."""
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    completed = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(completed, "auto"),
    }


def main(folder: Path, stage: int, cases: list[str]) -> None:
    """Train the cases and save what came out."""
    zero_on_cpu()
    results = {}
    for case in cases:
        forget_choice()
        trainer = make_case(case, folder, processes=2, deepspeed=settings_of(stage))
        before = whole_weights(trainer.model)
        trainer.train()
        student = Placement.of(trainer.model)
        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            after = whole_weights(trainer.model)
        results[case] = {"losses": losses(trainer), "before": before, "after": after}
        results[case] |= {"type": trainer.accelerator.distributed_type.value, "student": asdict(student)}
        if case.split()[1] == "local":
            results[case]["teacher"] = asdict(Placement.of(trainer.teacher.own_model))
        evaluated = trainer.evaluate(trainer.train_dataset)
        results[case]["eval_loss"] = evaluated["eval_loss"]
    torch.save(results, folder / f"zero{stage}-{PartialState().process_index}.pt")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
