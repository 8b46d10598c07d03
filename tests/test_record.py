"""The run record: complete, whole, and without anything that must not leave a machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfkd.files import write_json
from hfkd.masking import mask, mask_secrets, safe_command
from hfkd.record import (
    UNFINISHED,
    OutputFolderError,
    RunRecord,
    check_output_folder,
    clear_output_folder,
    recipe_fingerprint,
    rows_fingerprint,
)

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ0123456789"[:34]


def test_a_planted_token_is_nowhere_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is pushed to the hub with the model; a token in it is a token given away."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SOME_VARIABLE", "planted-in-the-environment")
    recipe = {
        "student": {"model": f"https://user:{TOKEN}@host/model", "load_kwargs": {"token": "plain-but-secret"}},
        "data": {"train": {"path": f"https://host/rows.jsonl?access_token={TOKEN}"}, TOKEN: 1},
        "training": {"hub_token": "short-one", "run_name": f"with {TOKEN} inside"},
    }
    record = RunRecord(recipe, "f00", command=safe_command(["hfkd", "train", "r.yaml", f"training.hub_token={TOKEN}"]))
    record.metrics = {"notes": [f"Authorization: Bearer {TOKEN}", "password=hunter2, and more", "sk-" + "a1" * 12]}
    text = record.write(tmp_path).read_text()
    for secret in (TOKEN, "plain-but-secret", "short-one", "hunter2", "planted-in-the-environment", "a1a1a1"):
        assert secret not in text, secret
    assert "and more" in text


@pytest.mark.parametrize(
    "text",
    [
        "got {'token': 'hidden0'}, and more",
        'got {"size": 1, "api_key": "hidden1 hidden2"}, and more',
        r"said {\"hub_token\": \"hidden3\"}, and more",
        "found {'token': ['hidden4', 'hidden5']} and more",
        "student.load_kwargs={revision: main, token: hidden6} and more",
        "teacher={load_kwargs: {password: 'hidden 7'}} and more",
        "https://hidden8@host/rows and more",
        "https://user:hidden9@host/rows and more",
        "Authorization: Basic hidden10== and more",
        "{'Authorization': 'token hidden11', 'and more': 1}",
        "aws_secret_key=hidden12 and more",
        "f(token='hidden13', and more)",
        'f(password="hidden 14"); and more',
        "hfkd train r.yaml --hub_token hidden15 and more",
        "hfkd train r.yaml --api-key=hidden16 and more",
    ],
)
def test_a_secret_in_a_text_is_masked(text: str) -> None:
    """Messages show the values that they complain of in any notation, and a message is what is copied."""
    assert "hidden" not in mask_secrets(text) and "and more" in mask_secrets(text), mask_secrets(text)


def test_a_secret_in_data_is_masked() -> None:
    """A key says what its value is, whatever form that has."""
    data = {"token": ["hidden"], "secret_key": "hidden", "headers": {"Authorization": "Bearer hidden"}, "kept": 1}
    data |= {"credentials": {"user": "hidden"}, "hf_token": ("hidden", "hidden")}
    masked = mask(data)
    assert "hidden" not in str(masked) and masked["kept"] == 1 and masked["token"] == "***"


def test_ordinary_words_are_kept() -> None:
    """A record with masks where nothing was secret can't be repeated."""
    plain = {
        "max_new_tokens": 32,
        "token": None,
        "stop": ["\n"],
        "pad_token": "<|im_end|>",
        "mode": "tokens",
        "question": "Question: {prompt}\nAnswer:",
        "system": "The secret of a token is its meaning.",
        "average_tokens_across_devices": True,
        "model": "org/hf_model",
        "path": "openai/gsm8k",
        "bytes_per_token": 2.5,
        "address": "ssh://git@host/rows and https://host/a?mail=ada@host",
        "basic": "A basic understanding of the token: it is a word, and its secret: none.",
        "template": "{prompt}\nToken: the word\nSecret: none",
        "shown": "{'pad_token': '<eos>', 'token': True, 'bytes_per_token': 2.5, 'api_key': None}",
        "flow": "{token: true, pad_token: <eos>, bytes_per_token: 2.5, max_new_tokens: 3}",
    }
    assert mask(plain) == plain


def test_folders_name_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home folder is a user's name."""
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.chdir(tmp_path)
    assert mask("/home/ada/models/a and /home/ada") == "~/models/a and ~"
    assert mask(["/Users/grace/x", "/home/other/y", Path("/root/z")]) == ["~/x", "~/y", "~/z"]
    assert mask(f"{tmp_path}/outputs/a") == "outputs/a"
    assert mask("/home/adam/x") == "~/x"
    assert mask("data/root/x and a/home/b") == "data/root/x and a/home/b"


def test_the_record_says_what_was_run(tmp_path: Path) -> None:
    """A figure without the versions and the device that made it can't be compared with another."""
    record = json.loads(RunRecord({"student": {}}, "f00").write(tmp_path).read_text())
    assert {"python", "torch", "transformers", "peft", "accelerate", "datasets", "hfkd"} <= record["versions"].keys()
    assert {"device", "count", "processes"} <= record["hardware"].keys()
    assert record["status"] == "started"


def test_half_a_file_is_never_left(tmp_path: Path) -> None:
    """A record that breaks off looks like a damaged run; the one before must survive a failure."""
    path = write_json(tmp_path / "run.json", {"a": 1})
    circle: dict = {}
    circle["itself"] = circle
    with pytest.raises(ValueError, match="Circular"):
        write_json(path, circle)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [other.name for other in tmp_path.iterdir()] == ["run.json"]


def test_rows_have_a_fingerprint() -> None:
    """Two runs on data that differ in one letter must not claim the same data."""
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    same = [{"completion": "b", "prompt": "a"}, {"prompt": "c", "completion": "d"}]
    assert rows_fingerprint(rows) == rows_fingerprint(same)
    assert rows_fingerprint(rows)["rows"] == 2
    assert rows_fingerprint(rows) != rows_fingerprint(rows[::-1])
    assert rows_fingerprint(rows) != rows_fingerprint([rows[0], {"prompt": "c", "completion": "e"}])


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"max_steps": 60}, False),
        ({"logging_steps": 1, "output_dir": "b", "save_steps": 3, "run_policy": "resume", "report_to": "none"}, True),
        ({"learning_rate": 1e-3}, False),
        ({"seed": 1}, False),
    ],
)
def test_what_may_differ_between_a_run_and_its_continuation(changes: dict, same: bool) -> None:
    """A run resumed under another learning rate is neither run, nor is one that goes further: it visits other rows."""
    recipe = {"student": {"model": "a"}, "training": {"max_steps": 30, "output_dir": "a"}, "hub": {"push": False}}
    other = {**recipe, "training": {**recipe["training"], **changes}, "hub": {"push": True}}
    assert (recipe_fingerprint(recipe) == recipe_fingerprint(other)) is same
    assert recipe_fingerprint(recipe) != recipe_fingerprint({**recipe, "student": {"model": "b"}})


def test_output_folders(tmp_path: Path) -> None:
    """Weights, record and checkpoints of one folder must be of one run."""
    check_output_folder(tmp_path / "new", "refuse", "f00")
    (tmp_path / "notes.txt").touch()
    check_output_folder(tmp_path, "refuse", "f00")
    with pytest.raises(OutputFolderError, match="notes.txt, which is a file; expected a folder"):
        check_output_folder(tmp_path / "notes.txt", "refuse", "f00")
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(OutputFolderError, match="holds another run; .*--resume .*--overwrite"):
        check_output_folder(tmp_path, "refuse", "f00")
    with pytest.raises(OutputFolderError, match="has checkpoints but no run.json"):
        check_output_folder(tmp_path, "resume", "f00")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OutputFolderError, match="run.json is damaged"):
        check_output_folder(tmp_path, "resume", "f00")
    RunRecord({}, "f00").write(tmp_path)
    check_output_folder(tmp_path, "resume", "f00")
    with pytest.raises(OutputFolderError, match="made by another recipe .fingerprint f00, this one has b00"):
        check_output_folder(tmp_path, "resume", "b00")
    with pytest.raises(OutputFolderError, match="no key that run.json shows differs"):
        check_output_folder(tmp_path, "resume", "b00", {})
    check_output_folder(tmp_path, "overwrite", "b00")
    assert (tmp_path / "checkpoint-10").exists(), "a check must not delete"
    (tmp_path / UNFINISHED / "checkpoint-20").mkdir(parents=True)
    clear_output_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_new_token_is_the_same_run() -> None:
    """Tokens expire; a run that can be gone on with under the old one alone is lost."""

    def recipe(token: str | None, revision: str = "main") -> dict:
        loading = {"revision": revision, **({} if token is None else {"token": token})}
        members = {"a": {"load_kwargs": loading}}
        data = {"train": {"options": loading}}
        return {
            "student": {"load_kwargs": loading},
            "teacher": {"load_kwargs": loading, "members": members},
            "data": data,
        }

    assert recipe_fingerprint(recipe("old")) == recipe_fingerprint(recipe("new")) == recipe_fingerprint(recipe(None))
    assert recipe_fingerprint(recipe("old")) != recipe_fingerprint(recipe("old", revision="other"))
    assert recipe_fingerprint({"student": {"load_kwargs": {"pad_token": "a"}}}) != recipe_fingerprint(
        {"student": {"load_kwargs": {"pad_token": "b"}}}
    )


def test_a_command_line_keeps_no_secret_and_no_folder() -> None:
    """What was typed is the shortest way to repeat a run, and where tokens are typed."""
    command = ["/home/ada/.venv/bin/hfkd", "train", "r.yaml", "--token", "abc", f"student.load_kwargs.token={TOKEN}"]
    assert safe_command(command) == ["hfkd", "train", "r.yaml", "--token", "***", "student.load_kwargs.token=***"]
    assert safe_command([]) == []


def test_a_recipe_that_differs_is_told_by_its_keys(tmp_path: Path) -> None:
    """Two hashes that differ tell nobody which of a hundred settings was changed since last week."""
    before = {
        "student": {"model": "a", "load_kwargs": {"token": TOKEN}},
        "loss": {"terms": [{"kind": "forward_kl", "weight": 1.0}]},
        "training": {"learning_rate": 0.1, "save_steps": 5, "max_steps": 30},
        "data": {"stop": "x" * 500},
    }
    now = {
        "student": {"model": "a", "load_kwargs": {"token": TOKEN + "x"}},
        "loss": {"terms": [{"kind": "reverse_kl", "weight": 1.0}, {"kind": "cross_entropy"}]},
        "training": {"learning_rate": 0.1, "save_steps": 9, "seed": 7, "max_steps": 30},
        "data": {"stop": "y" * 500},
    }
    RunRecord(before, recipe_fingerprint(before)).write(tmp_path)
    check_output_folder(tmp_path, "resume", recipe_fingerprint(before), before)
    with pytest.raises(OutputFolderError) as caught:
        check_output_folder(tmp_path, "resume", recipe_fingerprint(now), now)
    told = str(caught.value)
    assert 'loss.terms.0.kind (was "forward_kl", is "reverse_kl")' in told
    assert 'loss.terms.1 (was not set, is {"kind": "cross_entropy"})' in told
    assert "training.seed (was not set, is 7)" in told and "data.stop (was" in told
    assert TOKEN not in told and "save_steps" not in told and "max_steps" not in told and len(told) < 900


@pytest.mark.parametrize("policy", ["refuse", "resume", "overwrite"])
def test_a_folder_that_cannot_be_written_into(tmp_path: Path, policy: str) -> None:
    """A read-only disk is found out when the first result is written, hours after it could have been."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out can't be written into"):
        check_output_folder(tmp_path / "file" / "out", policy, "f00")
