"""The command line: quick to answer, strict about what it is given, and short about what went wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

import hfkd.run
import hfkd.run.evaluation
from hfkd.cli.main import app

RECIPE = {
    "student": {"model": "org/small", "lora": {}},
    "teacher": {"kind": "self"},
    "data": {"train": {"path": "verbs.jsonl"}, "demonstrations": {"count": 8}},
    "evaluation": {},
    "training": {"max_steps": 3},
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


def call(*arguments: str) -> SimpleNamespace:
    result = CliRunner().invoke(app, list(arguments))
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr, exception=result.exception)


def test_help_and_version_import_no_torch() -> None:
    """Waiting ten seconds for a help text drives people away."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom hfkd.cli.main import app\n"
        "for words in (['--help'], *([name, '--help'] for name in ('train', 'evaluate', 'label', 'reason')), "
        "['--version']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0, words\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'trl', 'matplotlib', 'openai'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


def test_version() -> None:
    """A bug report needs it."""
    result = call("--version")
    assert result.code == 0 and result.out.startswith("hfkd ")


def test_train_hands_over_recipe_overrides_and_flags(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is parsed and lost is a run that was overwritten, or not resumed."""
    seen = []
    monkeypatch.setattr(hfkd.run, "run_recipe", lambda loaded, command: seen.append(loaded))
    assert call("train", recipe, "training.max_steps=7", "loss.terms.0.kind=reverse_kl", "--resume").code == 0
    assert call("train", recipe, "--overwrite", "training.max_steps=8").code == 0
    assert call("train", recipe).code == 0
    assert [loaded.training.get("run_policy") for loaded in seen] == ["resume", "overwrite", None]
    assert [loaded.training["max_steps"] for loaded in seen] == [7, 8, 3]
    assert seen[0].loss.terms[0].kind == "reverse_kl"


def test_evaluate_hands_over_its_options(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An adapter that is named and not loaded gives the base model's figures under its name."""
    seen = {}
    monkeypatch.setattr(
        hfkd.run.evaluation, "evaluate_recipe", lambda loaded, **options: seen.update(options, it=loaded)
    )
    assert call("evaluate", recipe, "evaluation.size=4", "--adapter", "out", "--json", "scores.json").code == 0
    assert seen["it"].evaluation.size == 4
    assert (seen["adapter"], seen["json_path"]) == (Path("out"), Path("scores.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.max_step=3"], "training.max_step: unknown key; did you mean max_steps"),
        (["--resume", "--overwrite"], "--resume continues the run in the output folder and --overwrite deletes it"),
        (["data.train.path=missing.jsonl"], "missing.jsonl"),
        (["nonsense"], "expected section.key=value"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_users_error_is_one_message(recipe: str, command: str, arguments: list[str], words: str) -> None:
    """Sixty lines of traceback hide the one line that helps."""
    if command == "evaluate" and arguments[0].startswith("--"):
        pytest.skip("evaluate has no such flags")
    result = call(command, recipe, *arguments)
    assert result.code == 2
    assert words in result.err and result.err.startswith("Error: ")
    assert "Traceback" not in result.err
    if arguments[0].startswith("--"):
        return
    shown = call(command, recipe, *arguments, "--traceback")
    assert isinstance(shown.exception, (ValueError, OSError)), "--traceback must let the error through"


def test_a_missing_recipe_is_named(recipe: str) -> None:
    """The commonest slip must have the clearest answer."""
    result = call("train", recipe.replace("recipe.yaml", "recpie.yaml"))
    assert result.code == 2
    assert "there is no such file; did you mean" in result.err


def test_a_bug_keeps_its_traceback(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours dressed as a user's can't be reported, and can't be mended."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(hfkd.run, "run_recipe", broken)
    assert isinstance(call("train", recipe).exception, RuntimeError)


def test_the_launch_script_is_the_train_command(recipe: str, tmp_path: Path) -> None:
    """`accelerate launch` must run what `hfkd train` runs, with the same messages."""
    root = Path(__file__).parent.parent
    script = [sys.executable, str(root / "scripts" / "distill.py"), recipe, "training.max_step=3"]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    result = subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 2
    assert "did you mean max_steps" in result.stderr
