"""A head in shards is gathered once for all chunks: the vocabulary is the widest matrix of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_model
from launching import launch

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "gathers_once.py"


def test_chunks_gather_nothing(tmp_path):
    """As many gathers with chunks of one row as with one chunk for all; and each head is in one of them, once."""
    launch(SCRIPT, tmp_path)
    found = json.loads((tmp_path / "gathers.json").read_text())
    assert found["1"] == found["10000"]
    head = make_model(seed=0).lm_head.weight.numel()
    blocks = make_model(seed=0).config.num_hidden_layers
    wide = [size for size in found["1"] if size >= head]
    assert len(found["1"]) >= 2 * blocks + 2, "student and teacher gather each block and what is left"
    assert len(wide) == 2, "one gather holds the student's head, and one the teacher's"
