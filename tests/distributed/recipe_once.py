"""What each of two processes runs: a whole recipe, in shards because the environment says so."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from launching import shard_on_cpu
from path_battery import share_here

import hfkd.run.conduct
from hfkd.recipe import load_recipe
from hfkd.run import run_recipe


def main(path: Path, overrides: list[str]) -> None:
    """Run it, and note what each trainer's models hold once it has trained."""
    shard_on_cpu()
    shares: list[dict[str, float]] = []
    make = hfkd.run.conduct.make_trainer

    def noted(run, rows, model, teacher, *rest):
        trainer = make(run, rows, model, teacher, *rest)
        train = trainer.train

        def trained(**settings):
            found = {} if teacher is None else {"teacher": share_here(teacher.model)}
            outcome = train(**settings)
            shares.append({**found, "student": share_here(trainer.model)})
            return outcome

        trainer.train = trained
        return trainer

    hfkd.run.conduct.make_trainer = noted
    run_recipe(load_recipe(path, overrides))
    torch.save(shares, path.parent / f"shares-{PartialState().process_index}.pt")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
