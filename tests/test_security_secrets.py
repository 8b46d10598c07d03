"""Secrets that are planted wherever a user may put them, and searched for in every byte that is written or printed."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import make_model, make_tokenizer
from training import ROWS, make_trainer
from typer.testing import CliRunner

from hfkd import DistillationConfig
from hfkd.cli.main import app
from hfkd.hub import plan_push
from hfkd.masking import safe_command, shareable, shareable_text
from hfkd.recipe import RecipeError, load_recipe
from hfkd.record import RunRecord

HUB_TOKEN = "hf_" + "PlAnTeDiNtHeEnViRoNmEnT0123456789x"
SECRETS = {
    "HF_TOKEN": HUB_TOKEN,
    "WANDB_API_KEY": "3f9c" * 10,
    "AWS_SECRET_ACCESS_KEY": "pLaNtEd/aws+secret/key0123456789",
    "load_kwargs": "hf_" + "pLaNtEdInLoAdKwArGs0123456789abcd",
    "teacher_kwargs": "a-token-of-no-known-form",
    "data": "another-token-of-no-known-form",
    "run_name": "sk-" + "pLaNtEd0" * 4,
    "command": "hf_" + "pLaNtEdOnThEcOmMaNdLiNe012345678",
    "url": "pa55word-in-a-url",
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with models and data in another one that is given by its whole path."""
    away = tmp_path / "away" / "at-this-machine"
    for number, name in enumerate(("student", "teacher")):
        make_model(seed=number).save_pretrained(away / name)
        make_tokenizer().save_pretrained(away / name)
    (away / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:14]))
    desk = tmp_path / "desk"
    desk.mkdir()
    monkeypatch.chdir(desk)
    recipe = {
        "student": {
            "model": str(away / "student"),
            "lora": {"r": 2},
            "load_kwargs": {"token": SECRETS["load_kwargs"]},
        },
        "teacher": {
            "kind": "local",
            "model": str(away / "teacher"),
            "load_kwargs": {"token": SECRETS["teacher_kwargs"]},
        },
        "data": {
            "train": {"path": str(away / "rows.jsonl"), "options": {"token": SECRETS["data"]}},
            "generation": {"max_new_tokens": 2},
        },
        "evaluation": {"shots": [0], "size": 2, "max_new_tokens": 2},
        "training": {
            "max_steps": 2,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "run_name": f"tried with {SECRETS['run_name']}",
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return desk


@pytest.fixture
def hfkd(desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., str]:
    """The command, with a planted environment; gives all that it prints, a traceback too."""
    for name in (name for name in SECRETS if name.isupper()):
        monkeypatch.setenv(name, SECRETS[name])

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["hfkd", *arguments])
        result = CliRunner().invoke(app, list(arguments))
        shown = [result.output, *capfd.readouterr()]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            shown += traceback.format_exception(result.exception)
        return "".join(shown)

    return call


def found_in(folder: Path, *more: str) -> list[str]:
    """Where a secret, or one of more texts, lies in any file below a folder, or in a file's name."""
    wanted = {**SECRETS, **{text: text for text in more}}
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes() + str(path.relative_to(folder)).encode()
        found += [f"{path.relative_to(folder)}: {name}" for name, text in wanted.items() if text.encode() in content]
    return found


def test_a_run_leaves_no_secret(desk: Path, hfkd: Callable[..., str]) -> None:
    """What a run leaves is uploaded, mailed and put into tickets; a token in it is a token given away."""
    token = f"student.load_kwargs.token={SECRETS['command']}"
    printed = hfkd("train", "recipe.yaml", "training.output_dir=out", token)
    assert "Student" in printed and (desk / "out" / "README.md").exists(), printed
    assert (desk / "out" / "checkpoint-2" / "optimizer.pt").exists()
    names = {path.name for path in (desk / "out").iterdir()}
    assert {"run.json", "report.json", "recipe.yaml", "README.md"} <= names
    assert found_in(desk / "out") == []
    assert not [name for name, text in SECRETS.items() if text in printed]
    sent = {one.path: one for one in plan_push(desk / "out", base="me/base")}
    assert {"report.html", "adapter_model.safetensors", "README.md", "plots/loss.png"} <= set(sent)
    assert sent["report.html"].content == desk / "out" / "report.html", "the page of a run is changed"


def test_a_cache_leaves_no_secret(desk: Path, hfkd: Callable[..., str]) -> None:
    """A cache is made to be passed on."""
    printed = hfkd("cache", "recipe.yaml", "--out", "cache", "--codec", "topk", "--k", "4")
    assert (desk / "cache" / "manifest.json").exists(), printed
    assert found_in(desk / "cache", str(desk.parent)) == []
    assert not [name for name, text in SECRETS.items() if text in printed]


def test_an_evaluation_leaves_no_secret(desk: Path, hfkd: Callable[..., str]) -> None:
    """Scores are shown around."""
    printed = hfkd("evaluate", "recipe.yaml", "--json", "scores/scores.json")
    assert (desk / "scores" / "scores.json").exists(), printed
    assert found_in(desk / "scores", str(desk.parent)) == []
    assert not [name for name, text in SECRETS.items() if text in printed]


def test_no_path_of_this_machine_in_what_is_published(desk: Path, hfkd: Callable[..., str]) -> None:
    """Where a model lay is nobody's business; the base of an adapter alone has to be found again."""
    printed = hfkd("train", str(desk / "recipe.yaml"), f"training.output_dir={desk / 'out'}")
    assert (desk / "out" / "README.md").exists(), printed
    for name in ("run.json", "report.json", "recipe.yaml", "README.md"):
        text = (desk / "out" / name).read_text()
        assert str(desk.parent) not in text and "at-this-machine" not in text, name
    record = json.loads((desk / "out" / "run.json").read_text())
    assert record["recipe"]["student"]["model"] == "student"
    assert record["recipe"]["teacher"]["model"] == record["teacher"]["model"] == "teacher"
    assert record["command"] == ["hfkd", "train", "recipe.yaml", "training.output_dir=out"]
    kept = [path.relative_to(desk / "out").as_posix() for path in (desk / "out").rglob("*") if path.is_file()]
    holding = [name for name in kept if str(desk.parent).encode() in (desk / "out" / name).read_bytes()]
    assert {Path(name).name for name in holding} <= {"adapter_config.json", "trainer_state.json"}, holding


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "recipe.yaml", f"hub.token={SECRETS['command']}"],
        ["train", "recipe.yaml", f"training.hub_token={SECRETS['teacher_kwargs']}"],
        ["train", "recipe.yaml", f"student.model=https://user:{SECRETS['url']}@host.invalid/model"],
        ["train", "recipe.yaml", f"data.train.path=https://user:{SECRETS['url']}@host.invalid/a.jsonl"],
        ["train", "recipe.yaml", f"data.train.path=https://user:{SECRETS['url']}@host.invalid/a.jsonl", "--traceback"],
        ["train", "recipe.yaml", f"student.dtype={SECRETS['command']}"],
        ["train", "recipe.yaml", f"student.load_kwargs={SECRETS['command']}"],
        ["train", "recipe.yaml", f"--token={SECRETS['command']}"],
        ["train", f"missing-{SECRETS['command']}.yaml"],
        ["evaluate", "recipe.yaml", f"student.revision={SECRETS['command']}", "student.model=org/none"],
        ["cache", "recipe.yaml", "--out", "cache", f"teacher.model={SECRETS['command']}"],
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[2:]).partition("=")[0],
)
def test_an_error_shows_no_secret(hfkd: Callable[..., str], arguments: list[str]) -> None:
    """A message is what a user copies into an issue."""
    printed = hfkd(*arguments)
    assert "rror" in printed, printed
    assert not [name for name, text in SECRETS.items() if text in printed], printed


def test_broken_yaml_shows_no_secret(desk: Path, hfkd: Callable[..., str]) -> None:
    """The parser shows the line that it stumbled over."""
    Path("broken.yaml").write_text(f"student: {{model: a, load_kwargs: {{token: {SECRETS['command']}: x}}}}\n")
    printed = hfkd("train", "broken.yaml")
    assert "no valid YAML" in printed and SECRETS["command"] not in printed, printed
    with pytest.raises(RecipeError) as caught:
        load_recipe("broken.yaml")
    assert SECRETS["command"] not in str(caught.value)


def test_what_a_run_makes_on_the_hub_is_private(tmp_path: Path) -> None:
    """A tracker makes its page as the model's repository is made: where nothing was said, completions were public."""
    assert DistillationConfig(str(tmp_path), use_cpu=True).hub_private_repo is True
    assert DistillationConfig(str(tmp_path), use_cpu=True, hub_private_repo=False).hub_private_repo is False


def test_no_tracker_is_said_in_several_ways(tmp_path: Path) -> None:
    """ "Names 'none'; expected none" sends nobody the right way."""
    for none in (None, "none", ["none"], []):
        assert DistillationConfig(str(tmp_path), use_cpu=True, report_to=none).report_to == []
    with pytest.raises(ValueError, match="'none' stands alone or not at all"):
        DistillationConfig(str(tmp_path), use_cpu=True, report_to=["tensorboard", "none"])


@pytest.mark.parametrize("settings", [{"hub_token": "secret"}, {"model_init_kwargs": {"token": "secret"}}])
def test_settings_hold_no_token(tmp_path: Path, settings: dict) -> None:
    """Trackers are sent the settings, and transformers pickles them beside the model that it pushes."""
    with pytest.raises(ValueError, match="a token is among the settings .* HF_TOKEN") as caught:
        DistillationConfig(str(tmp_path), use_cpu=True, **settings)
    assert "'secret'" not in str(caught.value)
    DistillationConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"token": True, "revision": "main"})


def test_a_trainer_leaves_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    """In Python there is no recipe that could be masked: what is in the environment must stay there."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRETS[name])
    with caplog.at_level(logging.DEBUG):
        trainer = make_trainer(tmp_path / "out", save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").exists()
    assert not list(tmp_path.rglob("training_args.bin"))
    assert found_in(tmp_path) == []
    printed = caplog.text + "".join(capfd.readouterr())
    assert not [name for name, text in SECRETS.items() if text in printed]


def test_whole_paths_are_told_by_their_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder outside of the working folder has no short name; what merely looks like a path is a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "model").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    there = str(tmp_path / "there" / "model")
    record = RunRecord({"student": {"model": there}, "data": {"prompt": {"system": "/no_think", "stop": ["/"]}}}, "f")
    recipe = record.to_dict()["recipe"]
    assert recipe == {"student": {"model": "model"}, "data": {"prompt": {"system": "/no_think", "stop": ["/"]}}}
    command = safe_command(["hfkd", "train", f"{there}.yaml", f"student.model={there}", f"teacher={{model: {there}}}"])
    assert command == ["hfkd", "train", "model.yaml", "student.model=model", "teacher={model: model}"]


def test_paths_of_other_machines_are_told_by_their_last_part() -> None:
    """A record that is copied and written anew elsewhere, or after a disk was taken away, still names people."""
    command = safe_command(
        ["/opt/x/hfkd", "student.model=/some/anna/my model", "teacher.model=C:\\anna\\m", "a=~/anna/b"]
    )
    assert command == ["hfkd", "student.model=my model", "teacher.model=m", "a=b"]
    known = {
        "model": "/gone/anna/m",
        "id": "owner/name",
        "url": "https://host/a/b",
        "stop": ["/s/", "//"],
        "say": "/go on",
    }
    assert shareable(known) == {**known, "model": "m"}


def test_a_text_of_any_length_can_be_masked() -> None:
    """What is longer than a path can be is no path; asking the disk for it ended every push."""
    long = "/" + "A1" * 300 + "/" + "b" * 5000
    assert shareable_text(f"x {long} y") == f"x {long} y" and safe_command(["hfkd", long])
    assert shareable({"a": long * 3})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<code>/home/anna</code>", "<code>~</code>"),
        ("see /scratch/anna/x.", "see x."),
        ("from file:///odd/anna/x on", "from x on"),
        (r"in C:\Users\anna\x, then", "in x, then"),
        (r"the map f:\mathbb R\to R", r"the map f:\mathbb R\to R"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("https://host/data/x/y", "https://host/data/x/y"),
    ],
)
def test_paths_in_sentences(text: str, kept: str) -> None:
    """Markup, formulas and addresses stay as they are."""
    assert shareable_text(text) == kept
