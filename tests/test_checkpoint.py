"""What lies beside the student in a checkpoint, and what is said where it doesn't."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hfkd.checkpoint
from hfkd.checkpoint import load_companions, save_companions


class Kept(nn.Module):
    """An owner of one tensor."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    """A part that is written and not read begins anew in silence."""
    made, found = ([Kept(value + place) for place in range(3)] for value in (1.0, 0.0))
    save_companions(str(tmp_path), *made)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("objective.safetensors", "teacher.safetensors", "texts.0.safetensors"),
    }
    load_companions(str(tmp_path), *found)
    assert [float(one.value.detach()) for one in found] == [1.0, 2.0, 3.0]
    load_companions(str(tmp_path / "none"), nn.Module(), None)


def test_a_part_that_is_not_there_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to take the same teacher, who has the same teacher looks for the fault everywhere but in
    `save_only_model`, or in the number of processes.
    """
    nothing = nn.Module()
    with pytest.raises(FileNotFoundError, match=r"no teacher.safetensors, but Kept has.*save_only_model") as caught:
        load_companions(str(tmp_path), nothing, Kept(1.0))
    assert "processes" not in str(caught.value)
    save_companions(str(tmp_path), nothing, None, Kept(1.0))
    monkeypatch.setattr(hfkd.checkpoint, "PartialState", lambda: SimpleNamespace(process_index=1, num_processes=2))
    with pytest.raises(FileNotFoundError, match=r"no texts.1.safetensors.*number of processes .*made with \(here 2\)"):
        load_companions(str(tmp_path), nothing, None, Kept(1.0))
