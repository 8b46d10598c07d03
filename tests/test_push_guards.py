"""What a push must not take away or give away: other people's repositories, words that a person wrote on the hub, a
private name that became public; and what must be known before hours are spent.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from caches import build
from conftest import make_model
from hub_server import Fault, File, Hub, Repository, hub_for
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from runs import adapted, adapter_run, logits, whole_run, write_run
from typer.testing import CliRunner

from hfkd.cache import Manifest, TopK
from hfkd.card import card_of_folder, is_untouched
from hfkd.card.marker import marked
from hfkd.cli.main import app
from hfkd.hub import HubError, Upload, check_push, push, push_cache
from hfkd.hub.caches import cache_target
from hfkd.recipe import RecipeError, load_recipe

MINE = {"README.md": b"my precious base model", "model.safetensors": b"precious weights", "config.json": b"{}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to."""
    with hub_for(tmp_path, monkeypatch) as served:
        yield served


def quietly(*args: Any, **settings: Any) -> str:
    """Push; gives what was printed."""
    console = Console(file=io.StringIO(), width=400)
    push(*args, console=console, **settings)
    return console.file.getvalue()


def fill(repository: Repository, files: dict[str, bytes]) -> None:
    """Commit files, as somebody does who isn't hfkd."""
    added = {name: File(content, False) for name, content in files.items()}
    repository.commit("by hand", {**repository.at()["files"], **added})


def cut_run(folder: Path) -> tuple[Path, torch.Tensor]:
    """A LoRA run on a base that was cut out of a larger model, and what its model says."""
    part = make_model(seed=6, num_hidden_layers=1)
    part.save_pretrained(folder / "base")
    part.config._name_or_path = part.name_or_path = str(folder / "base")
    model = adapted(part)
    return write_run(folder, model, lora=True, origin="lab/large"), logits(model)


def with_card(folder: Path) -> Path:
    """A run's folder with the card that `hfkd train` writes."""
    (folder / "README.md").write_text(card_of_folder(folder)[0])
    return folder


def test_somebody_elses_base_is_not_written_over(hub: Hub, tmp_path: Path) -> None:
    """Names that end in `-base` are common, and nobody typed this one: another model of the user's would be lost."""
    made = hub.make("me/it-base")
    fill(made, MINE)
    folder, said = cut_run(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"me/it-base is there already and holds something else.*--base-repo.*--base,"
    ):
        quietly(folder, "me/it")
    with pytest.raises(ValueError, match="holds something else"):
        check_push("me/it", with_base=True)
    assert hub.files("me/it-base") == MINE and ("model", "me/it") not in hub.repositories
    quietly(folder, "me/it", base_repo="me/cut")
    assert hub.files("me/it-base") == MINE and "model.safetensors" in hub.files("me/cut")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/it")), said)
    hub.make("me/other-base")  # nothing is in it
    for _ in range(2):
        quietly(folder, "me/other")
    assert len(hub.messages("me/other-base")) == 1
    with pytest.raises(ValueError, match="--base-repo is where .*leave it out"):
        quietly(folder, "me/it", base="me/cut", base_repo="me/cut")


def test_somebody_elses_data_set_is_not_written_over(hub: Hub, tmp_path: Path) -> None:
    """The same for the name with `-cache`."""
    build(tmp_path / "cache", TopK(4))
    folder, _ = whole_run(tmp_path / "run")
    mine = {"README.md": b"# My rows", "part-00009.parquet": b"mine"}
    fill(hub.make("me/it-cache", "dataset"), mine)
    with pytest.raises(ValueError, match=r"me/it-cache .* holds something else.*--cache-repo OWNER/NAME or delete it"):
        quietly(folder, "me/it", cache=tmp_path / "cache")
    assert hub.files("me/it-cache", "dataset") == mine and ("model", "me/it") not in hub.repositories
    for _ in range(2):
        quietly(folder, "me/two", cache=tmp_path / "cache")
    assert "manifest.json" in hub.files("me/two-cache", "dataset")


def test_a_base_on_a_branch_is_found(hub: Hub, tmp_path: Path) -> None:
    """With the base on a branch and the adapter looking on the main one, what was uploaded can't be loaded."""
    folder, said = cut_run(tmp_path / "run")
    quietly(folder, "me/it", revision="dev")
    assert not hub.files("me/it") and not hub.files("me/it-base")
    loaded = AutoPeftModelForCausalLM.from_pretrained("me/it", revision="dev")
    assert torch.equal(logits(loaded), said)


def test_a_card_that_was_filled_in_on_the_hub_stays(hub: Hub, tmp_path: Path) -> None:
    """The card asks a person to fill it in, and people do that in the hub's editor: the next push would lose it."""
    folder = with_card(whole_run(tmp_path / "run")[0])
    quietly(folder, "me/it")
    there = hub.repositories["model", "me/it"]
    words = hub.files("me/it")["README.md"].replace(b"**TO FILL IN**", b"Written by a person")
    assert b"Written by a person" in words
    fill(there, {"README.md": words})
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "training": {"train_loss": 1.0}}))
    assert "README.md of me/it was written by a person" in quietly(folder, "me/it")
    assert hub.files("me/it")["README.md"] == words and b"train_loss" in hub.files("me/it")["report.json"]
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    quietly(folder, "me/it")
    assert hub.files("me/it")["README.md"].endswith(b"# Mine\n"), "what a person writes here goes"


def test_a_card_that_was_masked_is_still_known(hub: Hub, tmp_path: Path) -> None:
    """Masking changes what the digest was made of; taken for a person's, the card would stay as it is for ever."""
    folder, _ = whole_run(tmp_path / "run")
    (folder / "README.md").write_text(marked("---\nlibrary_name: peft\n---\n\n# Of /scratch/anna/x"))
    quietly(folder, "me/it")
    card = hub.files("me/it")["README.md"].decode()
    assert is_untouched(card) and "# Of x\n" in card


def test_pictures_of_a_person_stay(hub: Hub, tmp_path: Path) -> None:
    """hfkd owns what it wrote, and not a folder's name."""
    folder, _ = whole_run(tmp_path / "run")
    there = hub.make("me/it")
    fill(there, {"plots/my_ablation.png": b"x", "plots/reliability.png": b"of an earlier run"})
    quietly(folder, "me/it")
    assert "plots/my_ablation.png" in hub.files("me/it") and "plots/reliability.png" not in hub.files("me/it")


def test_a_repository_that_appears_public_is_not_written_to(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the making somebody may be faster; private by default must hold then too."""
    folder, _ = whole_run(tmp_path / "run")
    create = HfApi.create_repo

    def slower(self: HfApi, repo_id: str, **settings: Any) -> Any:
        hub.make(repo_id, private=False)
        return create(self, repo_id, **settings)

    monkeypatch.setattr(HfApi, "create_repo", slower)
    with pytest.raises(ValueError, match=r"me/it is there already and is public.*Say --public"):
        quietly(folder, "me/it")
    assert not hub.files("me/it") and not hub.uploads()


def test_one_that_is_made_public_meanwhile_is_not_written_to(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for a switch in the settings while the base is sent, which takes minutes."""
    folder, _ = cut_run(tmp_path / "run")
    there, commit = hub.make("me/it"), HfApi.create_commit

    def opened(self: HfApi, repo_id: str, *args: Any, **settings: Any) -> Any:
        there.private = False
        return commit(self, repo_id, *args, **settings)

    monkeypatch.setattr(HfApi, "create_commit", opened)
    with pytest.raises(ValueError, match="me/it is there already and is public"):
        quietly(folder, "me/it")
    assert hub.files("me/it-base") and not hub.files("me/it")


@pytest.mark.parametrize("listed", ["README.md", "chat_template.jinja", "plots"])
def test_links_are_not_followed(hub: Hub, tmp_path: Path, listed: str) -> None:
    """A link gives a listed name to anything: the lines of a `.env` would be the card."""
    folder, _ = whole_run(tmp_path / "run")
    (folder / "secrets").mkdir()
    for name in ("secrets/x", "secrets/loss.png"):
        (folder / name).write_bytes((folder / "plots/loss.png").read_bytes() if "png" in name else b"swordfish\n")
    path = folder / listed
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(folder / ("secrets" if listed == "plots" else "secrets/x"))
    with pytest.raises(ValueError, match="is a link"):
        quietly(folder, "me/it")
    assert not hub.repositories


def test_a_folder_may_be_a_link(hub: Hub, tmp_path: Path) -> None:
    """`outputs/latest` often is one."""
    whole_run(tmp_path / "run")
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    quietly(tmp_path / "latest", "me/it")
    assert "model.safetensors" in hub.files("me/it")


def test_the_card_names_the_base_that_was_told(hub: Hub, tmp_path: Path) -> None:
    """Who follows a card that loads a folder of somebody's machine fails, though the adapter itself is right."""
    folder, _ = adapter_run(tmp_path / "run", "models/small", source="folder")
    with_card(folder)
    before = (folder / "README.md").read_bytes()
    assert b"TO FILL IN**, here and in" in before, "want a card of a folder"
    quietly(folder, "me/it", base="me/small")
    card = hub.files("me/it")["README.md"].decode()
    assert ModelCard(card).data.base_model == "me/small" and 'from_pretrained("me/small")' in card
    assert "here and in `adapter_config.json`" not in card and is_untouched(card)
    assert (folder / "README.md").read_bytes() == before, "the run's own card is changed"
    (folder / "README.md").write_text("# Mine\n")
    assert "may be of a folder" in quietly(folder, "me/it", base="me/small")


def test_weights_that_would_stay_or_double_are_refused(hub: Hub, tmp_path: Path) -> None:
    """An index without its weights, or two sets of them, is success that nobody can load."""
    folder, _ = whole_run(tmp_path / "a")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    shutil.copy(whole, folder / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="delete what is of an earlier save"):
        quietly(folder, "me/it")
    whole.rename(folder / "weights_a.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "weights_a.safetensors"}}))
    with pytest.raises(ValueError, match="names weights_a.safetensors; expected parts like model-00001-of-00002"):
        quietly(folder, "me/it")
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match="no weights"):
        quietly(folder, "me/it")
    assert not hub.repositories


def test_a_tokenizer_replaces_the_one_before(hub: Hub, tmp_path: Path) -> None:
    """A template of an earlier push would be used with the new tokenizer."""
    first, second = whole_run(tmp_path / "a")[0], whole_run(tmp_path / "b")[0]
    (first / "chat_template.jinja").write_text("A")
    (second / "chat_template.jinja").unlink(missing_ok=True)
    quietly(first, "me/it")
    assert "chat_template.jinja" in hub.files("me/it")
    quietly(second, "me/it")
    assert "chat_template.jinja" not in hub.files("me/it") and "tokenizer.json" in hub.files("me/it")
    for path in second.glob("*token*"):
        path.unlink()
    quietly(second, "me/it")
    assert "tokenizer.json" in hub.files("me/it"), "a push without a tokenizer takes none away"


def test_hfkd_cache_asks_before_it_builds(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused token after the hours in which a teacher was run."""
    built: list[str] = []
    monkeypatch.setattr("hfkd.run.caching.build_cache", lambda *args, **settings: built.append("built"))
    make_model().save_pretrained(tmp_path / "model")
    recipe = {
        "student": {"model": str(tmp_path / "model")},
        "teacher": {"kind": "local", "model": str(tmp_path / "model")},
        "data": {"train": {"path": "rows.jsonl"}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = ["cache", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--push", "me/open"]
    hub.make("me/open", "dataset", private=False)
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 2 and "is public" in done.output and not built
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Wrong" * 6)
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 2 and "refused the token" in " ".join(done.output.split()) and not built


def test_a_public_base_is_known_before_training(hub: Hub) -> None:
    """Training takes hours, and the base goes with its end."""
    hub.make("me/it-base", private=False)
    check_push("me/it")
    with pytest.raises(ValueError, match="me/it-base is there already and is public"):
        check_push("me/it", with_base=True)


def test_who_was_only_slower_tries_again(hub: Hub, tmp_path: Path) -> None:
    """A commit of somebody else is no reason to choose another name."""
    folder, _ = whole_run(tmp_path / "run")
    hub.faults = [Fault("POST", "me/it/commit", 412), Fault("POST", "me/it/commit", 409)]
    quietly(folder, "me/it")
    assert len(hub.messages("me/it")) == 1 and len(hub.waits) == 2
    hub.faults = [Fault("POST", "me/new/commit", 412, times=1000)]
    with pytest.raises(HubError, match=r"me/new was changed by somebody else each time.*\(412\)"):
        quietly(folder, "me/new")


def test_a_commit_of_another_is_not_built_over(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out, kept and deleted was decided by a look; where that is old, the look is taken again."""
    folder = with_card(whole_run(tmp_path / "run")[0])
    quietly(folder, "me/it")
    there, commit, times = hub.repositories["model", "me/it"], HfApi.create_commit, []

    def slower(self: HfApi, repo_id: str, *args: Any, **settings: Any) -> Any:
        if not times:
            fill(there, {"README.md": b"# A person's\n"})
        times.append(1)
        return commit(self, repo_id, *args, **settings)

    monkeypatch.setattr(HfApi, "create_commit", slower)
    (folder / "recipe.yaml").write_text("a: 1\n")
    with_card(folder)
    quietly(folder, "me/it")
    assert len(times) == 2 and hub.files("me/it")["README.md"] == b"# A person's\n"
    assert hub.files("me/it")["recipe.yaml"] == b"a: 1\n"


def test_an_answer_that_was_lost_was_a_change(hub: Hub, tmp_path: Path) -> None:
    """ "All of it was there already" of what was uploaded a second ago sends a user looking for a mistake."""
    folder, _ = whole_run(tmp_path / "run")
    hub.faults = [Fault("POST", "me/it/commit", -1)]
    assert "me/it: uploaded." in quietly(folder, "me/it") and len(hub.messages("me/it")) == 1


def test_whose_token_it_was_is_true(hub: Hub, tmp_path: Path) -> None:
    """Who is told to mend HF_TOKEN, which wasn't used, mends it for an hour."""
    folder, _ = whole_run(tmp_path / "run")
    with pytest.raises(HubError, match="given with the call") as caught:
        quietly(folder, "me/it", token="hf_" + "Bad" * 10)
    assert "The one in HF_TOKEN was taken" not in str(caught.value)


def test_an_organisation_that_is_private_by_default(hub: Hub, tmp_path: Path) -> None:
    """What is left unsaid is decided by somebody else, so it is always said."""
    folder, _ = whole_run(tmp_path / "run")
    hub.private_by_default = {"lab"}
    quietly(folder, "lab/open", private=False)
    quietly(folder, "me/shut")
    assert not hub.repositories["model", "lab/open"].private and hub.repositories["model", "me/shut"].private


def test_a_large_file_goes_in_parts(hub: Hub, tmp_path: Path) -> None:
    """Weights of more than 5 GB do."""
    folder, _ = whole_run(tmp_path / "run")
    hub.part_size = 50_000
    quietly(folder, "me/it")
    assert hub.files("me/it")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert max(map(len, hub.parts.values())) >= 3


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("license: my-own", "list of ids"),
        ("base_model: models/of/mine", "base_model"),
        ("datasets: [my rows]", "datasets"),
        ("model-index: [{name: x, results: [{metrics: [{type: a}]}]}]", "model-index"),
        ("a: [", "bad YAML"),
    ],
)
def test_a_header_that_the_hub_refuses_is_told(hub: Hub, tmp_path: Path, header: str, words: str) -> None:
    """Told by name, before the weights are sent; and the cards that hfkd makes pass the same look."""
    folder, _ = whole_run(tmp_path / "run")
    (folder / "README.md").write_text(f"---\n{header}\n---\n\n# Mine\n")
    with pytest.raises(HubError, match=words):
        quietly(folder, "me/it")
    assert not hub.uploads()


def card_of(folder: Path, teacher: str) -> str:
    """The card of a cache whose manifest names another teacher; such a manifest itself is refused."""
    manifest = Manifest.read(folder)
    manifest.contract["teacher"]["model"] = teacher
    manifest.write(folder)
    with pytest.raises(ValueError, match=r"manifest\.json in .* holds a folder"):
        cache_target(folder, "me/it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfkd.hub.caches.collect", lambda folder, names: [Upload(name, b"") for name in names])
        return cache_target(folder, "me/it").uploads[0].content.decode()


def test_a_card_of_a_cache_is_gone_over(hub: Hub, tmp_path: Path) -> None:
    """A manifest that was written elsewhere may name a folder, and a data set's card a person fills in."""
    cache = tmp_path / "cache"
    build(cache, TopK(4))
    push_cache(cache, "me/cache")
    page = hub.files("me/cache", "dataset")["README.md"]
    assert is_untouched(page.decode())
    fill(hub.repositories["dataset", "me/cache"], {"README.md": page + b"Mine.\n"})
    push_cache(cache, "me/cache")
    assert hub.files("me/cache", "dataset")["README.md"].endswith(b"Mine.\n")
    assert "anna" not in card_of(cache, "/gpfs/anna/models/big")


def test_a_quantised_base_is_not_merged_after_the_training(tmp_path: Path) -> None:
    """The push would say so, hours later."""
    recipe = {
        "student": {
            "model": "me/base",
            "lora": {"r": 2},
            "load_kwargs": {"quantization_config": {"load_in_4bit": True}},
        },
        "teacher": {"kind": "self"},
        "data": {"train": {"path": "rows.jsonl"}, "demonstrations": {"count": 1}},
        "hub": {"push": True, "repo_id": "me/it", "merged": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="hub.merged: the base is quantised"):
        load_recipe(tmp_path / "recipe.yaml")
