"""`hfkd push` against a hub in this process: what arrives, what never does, and what a user is told."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_model
from hub_server import TOKEN, File, Hub, hub_for
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from runs import NEVER, SECRET, adapted, adapter_run, logits, whole_run, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hfkd.hub import Push, check_push, plan_push, push

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to."""
    with hub_for(tmp_path, monkeypatch) as served:
        yield served


@pytest.fixture
def base(hub: Hub, tmp_path: Path) -> str:
    """A base model on the hub, for adapters."""
    make_model(seed=0).save_pretrained(tmp_path / "base-files")
    repository = hub.make("me/base", private=False)

    files = {path.name: File(path.read_bytes(), False) for path in (tmp_path / "base-files").iterdir()}
    repository.commit("weights", {**repository.at()["files"], **files})
    return "me/base"


def quietly(*args: object, **settings: object) -> tuple[Push, str]:
    """Push, and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    return push(*args, console=console, **settings), console.file.getvalue()


def test_an_adapter_arrives_whole_and_nothing_else_does(hub: Hub, base: str, tmp_path: Path) -> None:
    """An optimizer state, a pickle or rows of data that are public once are public for ever."""
    folder, said = adapter_run(tmp_path / "run", base)
    done, text = quietly(folder, "me/it")
    files = hub.files("me/it")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(
        files
    )
    assert {"README.md", "run.json", "report.json", "report.html", "recipe.yaml", "plots/loss.png"} <= set(files)
    assert not set(NEVER) & set(files) and SECRET.encode() not in hub.everything()
    for name in ("adapter_model.safetensors", "tokenizer.json", "run.json", "plots/loss.png"):
        assert files[name] == (folder / name).read_bytes(), f"{name} isn't as it was"
    assert hub.repositories["model", "me/it"].private
    assert len(hub.messages("me/it")) == 1 and done.sent[0].changed
    assert f"{hub.endpoint}/me/it: uploaded" in text and "Stays here: .env, .git/, _nonfinite-step-3/" in text
    loaded = AutoPeftModelForCausalLM.from_pretrained("me/it")
    assert torch.equal(logits(loaded), said)
    assert (
        AutoTokenizer.from_pretrained("me/it")("walk").input_ids
        == AutoTokenizer.from_pretrained(folder)("walk").input_ids
    )
    words = json.loads(files["report.json"])["fidelity"]["after"]["worst_tokens"]
    assert words[0]["text"] == " the", "what is shown of the text goes along"


def test_a_whole_model_and_its_second_push(hub: Hub, tmp_path: Path) -> None:
    """A second push that doubles what is there makes a history that nobody can read, and costs the upload again."""
    folder, said = whole_run(tmp_path / "run")
    quietly(folder, "me/whole", private=False)
    assert not hub.repositories["model", "me/whole"].private
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/whole")), said)
    sent, before = hub.uploads(), hub.files("me/whole")
    done, text = quietly(folder, "me/whole", private=False)
    assert not done.sent[0].changed and "all of it was there already" in text
    assert len(hub.messages("me/whole")) == 1 and hub.uploads() == sent and hub.files("me/whole") == before
    (folder / "report.html").write_text("<p>Better.</p>")
    quietly(folder, "me/whole", private=False, message="Mend the report")
    assert hub.messages("me/whole")[-1] == "Mend the report" and hub.uploads() == sent
    assert hub.files("me/whole")["report.html"] == b"<p>Better.</p>"


def test_merged_weights_are_the_model_that_was_trained(hub: Hub, base: str, tmp_path: Path) -> None:
    """A merged model that says something else than the adapter was never evaluated by anybody."""
    folder, said = adapter_run(tmp_path / "run", base)
    before = sorted(path.name for path in folder.iterdir())
    quietly(folder, "me/merged", merged=True)
    files = hub.files("me/merged")
    assert "model.safetensors" in files and not any(name.startswith("adapter_") for name in files)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained("me/merged")), said, atol=1e-4)
    assert ModelCard(files["README.md"].decode()).data.library_name == "transformers"
    assert sorted(path.name for path in folder.iterdir()) == before, "the run's folder is changed"
    quietly(folder, "me/merged", merged=True)
    assert len(hub.messages("me/merged")) == 1, "the same weights are merged into other bytes"


def test_weights_of_an_earlier_push_go(hub: Hub, base: str, tmp_path: Path) -> None:
    """A whole model that stays beside an adapter would be loaded instead of its base."""
    whole, _ = whole_run(tmp_path / "whole")
    quietly(whole, "me/it")
    kept = hub.repositories["model", "me/it"]

    kept.commit("mine", {**kept.at()["files"], "LICENSE": File(b"MIT", False)})
    folder, said = adapter_run(tmp_path / "run", base)
    quietly(folder, "me/it")
    files = hub.files("me/it")
    assert "model.safetensors" not in files and "config.json" not in files and files["LICENSE"] == b"MIT"
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/it")), said)


def test_a_base_that_was_cut_out_goes_along(hub: Hub, tmp_path: Path) -> None:
    """On the whole model the adapter of a part is another one; and a path says nothing to anybody else."""
    part = make_model(seed=6, num_hidden_layers=1)
    part.save_pretrained(tmp_path / "run/base")
    part.config._name_or_path = part.name_or_path = str(tmp_path / "run/base")
    model = adapted(part)
    folder = write_run(tmp_path / "run", model, lora=True, origin="lab/large")
    assert str(tmp_path) in (folder / "adapter_config.json").read_text(), "want a path of this machine"
    quietly(folder, "me/it")
    assert json.loads(hub.files("me/it")["adapter_config.json"])["base_model_name_or_path"] == "me/it-base"
    assert set(hub.files("me/it-base")) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert b"A part of `lab/large`" in hub.files("me/it-base")["README.md"]
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/it")), logits(model))
    assert str(tmp_path).encode() not in hub.everything() and hub.repositories["model", "me/it-base"].private
    quietly(folder, "me/one", merged=True)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained("me/one")), logits(model), atol=1e-4)


@pytest.mark.parametrize("named", ["/somewhere/models/small", "models/small", ""])
def test_a_base_in_a_folder_is_refused_with_a_way_out(hub: Hub, base: str, tmp_path: Path, named: str) -> None:
    """An adapter that names a folder can't be loaded by anybody, and tells where it lay."""
    folder, said = adapter_run(tmp_path / "run", base, source="folder")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
    with pytest.raises(ValueError, match="--base OWNER/BASE"):
        quietly(folder, "me/it")
    assert ("model", "me/it") not in hub.repositories
    quietly(folder, "me/it", base=base)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/it")), said)


def test_a_dry_run_asks_the_network_nothing(hub: Hub, base: str, tmp_path: Path) -> None:
    """What a dry run lists is what a user agrees to: it must be all, and the right sizes."""
    folder, _ = adapter_run(tmp_path / "run", base)
    done, text = quietly(folder, "me/it", dry_run=True)
    assert not hub.requests and not done.sent and "Nothing was sent: a dry run." in text
    listed = done.targets[0].uploads
    assert all(one.path in text for one in listed)
    count = sum(one.size for one in listed) / 1024
    assert f"{len(listed)} files, {count:.1f} KiB in all." in text and "private if it is new" in text
    quietly(folder, "me/it")
    assert {one.path: one.size for one in listed} == {name: len(one) for name, one in hub.files("me/it").items()}
    assert [one.path for one in plan_push(folder)] == [one.path for one in listed]


def test_a_card_is_made_where_none_is(hub: Hub, base: str, tmp_path: Path) -> None:
    """A model without a card is one that nobody can judge; one that a person wrote must not be lost."""
    folder, _ = adapter_run(tmp_path / "run", base)
    _, text = quietly(folder, "me/it")
    card = ModelCard(hub.files("me/it")["README.md"].decode())
    assert card.data.library_name == "peft" and card.data.base_model == base
    assert "README.md isn't there and was made now" in text and not (folder / "README.md").exists()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    _, text = quietly(folder, "me/it", merged=True)
    assert hub.files("me/it")["README.md"].decode().endswith("# Mine\n") and "may be of the adapter" in text


def test_a_public_repository_is_not_written_to_unasked(hub: Hub, base: str, tmp_path: Path) -> None:
    """`private` would be a promise that an old repository breaks."""
    hub.make("me/it", private=False)
    folder, _ = adapter_run(tmp_path / "run", base)
    with pytest.raises(ValueError, match=r"is there already and is public.*Say --public"):
        quietly(folder, "me/it")
    assert not hub.files("me/it") and not hub.uploads()
    quietly(folder, "me/it", private=False)
    assert "adapter_model.safetensors" in hub.files("me/it")
    hub.make("me/hidden", private=True)
    _, text = quietly(folder, "me/hidden", private=False)
    assert "is private; it stays so" in text and hub.repositories["model", "me/hidden"].private


def test_a_branch_is_made_where_it_isnt(hub: Hub, tmp_path: Path) -> None:
    """A revision that silently becomes the main branch replaces what others load."""
    folder, said = whole_run(tmp_path / "run")
    hub.make("me/it")
    quietly(folder, "me/it", revision="v2")
    assert not hub.files("me/it") and "model.safetensors" in hub.files("me/it", revision="v2")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/it", revision="v2")), said)


def test_wrong_folders_are_told(hub: Hub, base: str, tmp_path: Path) -> None:
    """Half a run on the hub looks like a whole one to everybody else."""
    folder, _ = adapter_run(tmp_path / "run", base)
    cases = {"expected that of a run": tmp_path / "nowhere", "has no weights": tmp_path / "empty"}
    (tmp_path / "empty/checkpoint-3").mkdir(parents=True)
    for words, one in cases.items():
        with pytest.raises(ValueError, match=words):
            push(one, "me/it")
    with pytest.raises(ValueError, match="It has checkpoint-3: finish the run"):
        push(tmp_path / "empty", "me/it")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="both an adapter"):
        push(folder, "me/it")
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="damaged or not whole"):
        push(folder, "me/it")
    whole, _ = whole_run(tmp_path / "whole")
    with pytest.raises(ValueError, match="nothing to merge"):
        push(whole, "me/it", merged=True)
    (whole / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        push(whole, "me/it")
    (whole / "run.json").unlink()
    (whole / "plots/loss.png").unlink()
    (whole / "plots/loss.png").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="loss.png is a link"):
        push(whole, "me/it")
    assert not [one for one in hub.requests if one[0] in ("POST", "PUT")]


def test_parts_of_another_save_stay(tmp_path: Path) -> None:
    """Shards that the index doesn't name are of other weights; one that isn't there makes half a model."""
    folder, _ = whole_run(tmp_path / "run")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    for name in (names[0], "model-00003-of-00003.safetensors"):
        (folder / name).write_bytes(whole)
    with pytest.raises(ValueError, match="00002-of-00002.safetensors, which isn't in"):
        plan_push(folder)
    (folder / names[1]).write_bytes(whole)
    assert [one.path for one in plan_push(folder) if "-of-" in one.path] == names


def test_the_command_in_a_process_of_its_own(hub: Hub, base: str, tmp_path: Path) -> None:
    """What a user types, with HF_ENDPOINT and HF_TOKEN as users set them."""
    folder, _ = adapter_run(tmp_path / "run", base)
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    code = "import typer; from hfkd.cli.push import push; typer.run(push)"
    line = [sys.executable, "-c", code, str(folder), "me/typed", "--public", "--message", "From the shell"]
    done = subprocess.run(line, env={**known, **settings}, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.messages("me/typed") == ["From the shell"] and not hub.repositories["model", "me/typed"].private
    assert TOKEN not in done.stdout + done.stderr and "signature" not in done.stdout + done.stderr


def test_whether_a_push_could_work_is_known_before(hub: Hub) -> None:
    """A run of a night that ends with "the name is taken" could have said so before."""
    check_push("me/new")
    hub.make("me/open", private=False)
    with pytest.raises(ValueError, match="is public"):
        check_push("me/open")
    assert ("model", "me/new") not in hub.repositories, "only a look"
    with pytest.raises(ValueError, match="it has no owner"):
        check_push("new")


def test_the_error_of_the_command_has_exit_code_2() -> None:
    """A script must be able to tell that nothing was uploaded."""
    import typer

    from hfkd.cli.push import push as command

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["nowhere", "me/it", "--cache-repo", "me/x"])
    assert done.exit_code == 2 and "--cache-repo names the data set" in done.output
    done = CliRunner().invoke(app, ["nowhere", "me/it/x"])
    assert done.exit_code == 2 and "Expected owner/name" in " ".join(done.output.split())
