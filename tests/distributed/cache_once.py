"""What each of two processes runs: builds the cache of a recipe, or trains from one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from training import make_trainer, trained_weights

from hfkd.cache import CacheError, TopK
from hfkd.recipe import load_recipe
from hfkd.run.caching import build_cache
from hfkd.teachers.cached import CachedTeacher


def main(folder: Path, case: str) -> None:
    """Do it and save what came out."""
    if case == "build":
        build_cache(
            load_recipe(folder / "recipe.yaml", ["training.ddp_backend=gloo"]), folder / "two", TopK(16), batch_size=3
        )
        return
    settings = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    try:
        trainer = make_trainer(folder / "run", teacher=CachedTeacher(folder / "cache"), **settings)
    except CacheError as error:
        (folder / f"error-{PartialState().process_index}.txt").write_text(str(error))
        PartialState().wait_for_everyone()  # one that leaves first takes the other's connection with it
        return
    before = trained_weights(trainer)
    trainer.train()
    update = {name: value - before[name] for name, value in trained_weights(trainer).items()}
    if PartialState().is_main_process:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save(update, folder / "update.pt")
        (folder / "numbers.json").write_text(json.dumps({"losses": losses}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
