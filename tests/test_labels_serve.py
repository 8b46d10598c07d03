"""A real server that speaks the protocol: `transformers serve`, with a tiny model that has learned two verbs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from label_server import lines_of, plan_tree, write_plan

from hfkd.data.load import Source, load_rows
from hfkd.labels import label_rows, load_plan
from hfkd.labels.endpoint import EndpointError
from hfkd.recipe import load_recipe

VERBS = {"walk": "walked", "go": "went"}


def learn(folder: Path) -> None:
    """A model that answers the two verbs, and nothing else, in the chat template."""
    model, tokenizer = make_model(seed=0), make_tokenizer()
    batch = []
    for verb, past in VERBS.items():
        asked = [{"role": "user", "content": verb}]
        turns = [*asked, {"role": "assistant", "content": past}]
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        batch.append((torch.tensor([ids]), torch.tensor([[-100] * len(before) + ids[len(before) :]])))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1, "the tiny model hasn't learned its verbs"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and model's name of a running server."""
    folder = tmp_path_factory.mktemp("served")
    learn(folder)
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--log-level", "error"]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, folder / "log.txt")
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server didn't start: {log.read_text()}")


def test_a_real_server_labels_rows_that_a_recipe_reads(served: tuple[str, str], tmp_path: Path) -> None:
    """A client that speaks only to our own imitation of the protocol speaks to nobody."""
    url, model = served
    rows = [{"prompt": verb, "answer": past} for verb, past in VERBS.items()]
    filters = [{"kind": "verifier", "verifier": "exact"}, {"kind": "format", "max_chars": 12}]
    tree = plan_tree(tmp_path, url, rows, endpoint={"model": model, "timeout": 60}, filters=filters)
    tree |= {"generation": {"max_tokens": 16, "seed": 5}}
    summary = label_rows(load_plan(write_plan(tmp_path, tree)))
    assert summary["rows"]["labelled"] == 2 and summary["requests"]["faults"] == {}
    assert summary["tokens"]["prompt"] > 10 and summary["tokens"]["completion"] >= 2
    loaded = load_rows(Source(str(tmp_path / "out/rows.jsonl")))
    assert [row["completion"] for row in loaded] == list(VERBS.values())

    recipe = tmp_path / "student.yaml"
    recipe.write_text(
        "student: {model: org/small}\nteacher: {kind: none}\ndata: {train: {path: out/rows.jsonl}, prompt: {style: "
        "chat}}\nloss: {terms: [{kind: cross_entropy}]}\ntraining: {max_steps: 1}\n"
    )
    assert Path(load_recipe(recipe).data.train.path).name == "rows.jsonl"


def test_a_real_cut_is_seen(served: tuple[str, str], tmp_path: Path) -> None:
    """Half an answer is in good form more often than not: only the finish reason tells it."""
    url, model = served
    endpoint = {"model": model, "timeout": 60, "attempts": 2}
    tree = plan_tree(tmp_path, url, ["walk"], endpoint=endpoint, generation={"max_tokens": 1})
    with pytest.raises(ValueError, match="None of the 1 rows has a label in the end \\(1 x cut\\)"):
        label_rows(load_plan(write_plan(tmp_path, tree)))
    assert "it didn't end within 1 tokens" in lines_of(tmp_path / "out/rejected.jsonl")[0]["reasons"][0]
    assert not (tmp_path / "out/rows.jsonl").exists()


def test_a_real_refusal_is_told(served: tuple[str, str], tmp_path: Path) -> None:
    """A model that the server doesn't serve is a fault of the plan, in the server's own words."""
    tree = plan_tree(tmp_path, served[0], ["walk", "go"], endpoint={"model": "another", "give_up_after": 2})
    with pytest.raises(EndpointError, match="2 questions in a row were given up; the last: refused: 400.*pinned"):
        label_rows(load_plan(write_plan(tmp_path, tree)))
