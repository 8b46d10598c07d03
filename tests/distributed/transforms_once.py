"""What each of two processes runs where rows are transformed with models. Each writes what it has made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from conftest import make_model, make_tokenizer
from training import ROWS

from hfkd.data.prompts import PromptBuilder
from hfkd.teachers import LocalTeacher
from hfkd.transforms import Workshop
from hfkd.transforms.confounders import ConfounderRows
from hfkd.transforms.influence import InfluenceWeights


def transformed(folder: Path | None) -> dict[str, list[dict]]:
    """Seven rows, an odd number, by both transforms; process 1 has a student that differs in the last digits."""
    student, teacher = make_model(seed=0), LocalTeacher(make_model(seed=1))
    if PartialState().process_index:
        student.lm_head.weight.data.mul_(1 + 1e-6)
    shop = Workshop(student, teacher, PromptBuilder(make_tokenizer()), held_out=ROWS[10:14], folder=folder)
    return {
        "influence": InfluenceWeights(loss="forward_kl", drop=0.2).apply(ROWS[:7], shop),
        "confounders": ConfounderRows(share=0.2).apply(ROWS[:7], shop),
    }


def main(folder: Path) -> None:
    """Transform twice: the second time the folder of the first process knows the numbers."""
    process = PartialState(cpu=True).process_index
    own = folder / f"run-{process}"
    for turn in range(2):
        (folder / f"rows-{process}-{turn}.json").write_text(json.dumps(transformed(own)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
