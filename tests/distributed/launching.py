"""Starts a script on two gloo processes of this machine, and makes Accelerate shard models there. Shared by the
two-process tests and their scripts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
"""Training arguments that ask for FSDP2."""

SHARDED_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch` sets for a configuration file that asks for FSDP2."""


def launch(script: Path, *args: Any, timeout: float = 300, **environment: str) -> str:
    """Run a script on two processes.

    Args:
        script: A file with a `main`.
        *args: Of its command line.
        timeout: In seconds; a process that waits for another one for ever fails here.
        **environment: More variables.

    Returns:
        What they printed.
    """
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), *map(str, args)]
    environment = {**os.environ, **settings, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def shard_on_cpu() -> None:
    """Let Accelerate choose FSDP where it is asked for, which it does for devices other than CPUs only. All that
    follows from the choice is Accelerate's own.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    from hfkd import compatibility

    original = AcceleratorState.__init__

    def chosen(self: Any, *args: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = chosen
    compatibility._shards_on_cpu = lambda: True


def forget_choice() -> None:
    """Let the next trainer of this process choose anew."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()
    if PartialState().num_processes > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
