"""What each of two processes runs: a recipe of several adapters, whole, and gone on with where it was stopped."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from accelerate import PartialState
from rich.console import Console

from hfkd.recipe import load_recipe
from hfkd.run import run_recipe


def main(path: Path, folder: Path) -> None:
    """Run it, take the second adapter back, and resume."""
    here = [f"training.output_dir={folder}", "training.per_device_train_batch_size=1", "training.ddp_backend=gloo"]
    run_recipe(load_recipe(path, here), console=Console(file=io.StringIO()))
    PartialState().wait_for_everyone()
    record = folder / "second" / "run.json"
    if PartialState().is_main_process:
        before = json.loads(record.read_text())
        record.write_text(json.dumps({**before, "status": "preempted"}))
        (folder / "second" / "adapter_model.safetensors").unlink()
    PartialState().wait_for_everyone()
    screen = io.StringIO()
    run_recipe(load_recipe(path, [*here, "training.run_policy=resume"]), console=Console(file=screen, width=200))
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        (folder / "screen.txt").write_text(screen.getvalue())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
