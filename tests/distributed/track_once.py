"""What each of two processes runs: sixteen words with questions at each evaluation. Each writes what it logged and
what it learned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from test_tracking import EVALUATED, Board, asking, logged
from training import make_trainer, trained_weights


def main(folder: Path) -> None:
    """Train and save."""
    board = Board()
    trainer = make_trainer(
        folder / "run", **EVALUATED, per_device_train_batch_size=4, ddp_backend="gloo", callbacks=[asking(), board]
    )
    trainer.train()
    place = PartialState().process_index
    torch.save(trained_weights(trainer), folder / f"weights-{place}.pt")
    seen = {"curve": logged(trainer), "samples": board.texts}
    (folder / f"seen-{place}.json").write_text(json.dumps(seen))
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
