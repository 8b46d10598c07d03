"""The curve and the samples as the trackers themselves keep them: TensorBoard, Trackio and W&B, all without a network.
A tracker that isn't installed is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_tracking import EVALUATED, asking, logged
from training import make_trainer


def train(folder: Path, tracker: str, **settings: Any) -> list[dict[str, float]]:
    """Two steps that change next to nothing, with an evaluation after each and one question that is answered right;
    returns what the trainer logged of the curve.
    """
    callback = asking()
    settings = {**EVALUATED, "learning_rate": 1e-9, "report_to": [tracker], "callbacks": [callback], **settings}
    trainer = make_trainer(folder, **settings)
    said = callback._ask(trainer).results[2].predictions
    secret = {"prompt": "a | b\n# c", "completion": "hf_abcdefghijklmnop"}
    callback.items = [secret, *({**item, "answer": text} for item, text in zip(callback.items, said, strict=True))]
    trainer.train()
    curve = logged(trainer)
    assert [entry["step"] for entry in curve] == [1, 2] and curve[0]["eval_k_shot_2"] > 0.5
    return curve


def test_tensorboard(tmp_path, monkeypatch):
    """Read back by TensorBoard's own reader: tags and steps are what a browser shows."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    curve = train(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for name in ("k_shot_0", "k_shot_2", "k_shot_2_standard_error", "k_shot_2_top_answer_share"):
        points = [(event.step, event.value) for event in events.Scalars(f"eval/{name}")]
        assert points == [(entry["step"], pytest.approx(entry[f"eval_{name}"])) for entry in curve]
    assert "eval/loss" in events.Tags()["scalars"]
    texts = events.Tensors("eval/samples/text_summary")
    assert [text.step for text in texts] == [1, 2]
    text = texts[0].tensor_proto.string_val[0].decode()
    assert "#### 0 shots: wrong\n\n    a | b\n    # c\n    \n    ->" in text and "    gold: ***" in text
    assert "hf_" not in text


def test_trackio(tmp_path, monkeypatch):
    """Read back from Trackio's own store on this disk."""
    pytest.importorskip("trackio", minversion="0.21")
    from trackio.sqlite_storage import SQLiteStorage

    at_home(monkeypatch, tmp_path / "trackio")
    curve = train(tmp_path / "run", "trackio", project="curves", run_name="first")
    lines = SQLiteStorage.get_logs("curves", "first")
    found = [line for line in lines if "eval/k_shot_2" in line]
    assert [(line["train/global_step"], line["eval/k_shot_2"]) for line in found] == [
        (entry["step"], entry["eval_k_shot_2"]) for entry in curve
    ]
    assert "eval/k_shot_2_standard_error" in found[0]
    tables = [line for line in lines if "eval/samples" in line]
    assert [line["train/global_step"] for line in tables] == [1, 2]
    rows = tables[0]["eval/samples"]["_value"]
    assert list(rows[0]) == ["question", "shots", "completion", "gold", "right"]
    assert [(row["question"], row["shots"], row["gold"]) for row in rows[:2]] == [
        ("a | b\n# c", 0, "***"),
        ("a | b\n# c", 2, "***"),
    ]
    assert [row["right"] for row in rows if row["shots"] == 2] == [False, True]


def at_home(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let Trackio keep its runs in a folder of the test's: it chose its own when it was imported."""
    import trackio.utils

    kept = trackio.utils.TRACKIO_DIR
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "trackio":
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, Path) and (value == kept or kept in value.parents):
                monkeypatch.setattr(module, attribute, folder / value.relative_to(kept))


def test_wandb(tmp_path, monkeypatch):
    """In offline mode; read back from the files that `wandb sync` would send."""
    wandb = pytest.importorskip("wandb")
    folders = {name: str(tmp_path) for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR")}
    for name, value in {"MODE": "offline", "SILENT": "true", **folders}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        curve = train(tmp_path / "run", "wandb")
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
        wandb.teardown()  # waits until all is on the disk
    assert summary["eval/k_shot_2"] == curve[-1]["eval_k_shot_2"] and summary["train/global_step"] == 2
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    lines = [line for line in history(path.read_bytes()) if "eval/k_shot_2" in line]
    for name in ("k_shot_2", "k_shot_2_standard_error", "k_shot_0_top_answer_share"):
        found = [(line["train/global_step"], line[f"eval/{name}"]) for line in lines]
        assert found == [(entry["step"], entry[f"eval_{name}"]) for entry in curve]
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/eval/samples_*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["question", "shots", "completion", "gold", "right"]
    assert table["data"][0][:2] == ["a | b\n# c", 0] and table["data"][0][3] == "***"


def history(data: bytes) -> list[dict[str, Any]]:
    """The logged lines of a W&B file: a log of LevelDB's form, blocks of 32 KiB, records in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    lines, place, body = [], 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        body += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(body)
            body = b""
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines
