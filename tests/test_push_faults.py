"""What goes wrong between a machine and the hub: told in words, nothing half there, and once more is enough."""

from __future__ import annotations

import datetime
import io
import re
import traceback
from collections.abc import Iterator
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from hub_server import READER, TOKEN, Fault, File, Hub, hub_for
from huggingface_hub import constants
from rich.console import Console
from runs import whole_run
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hfkd.uploads
from hfkd.cli.push import push as command
from hfkd.hub import HubError, push
from hfkd.uploads.words import seconds_to_wait, status_of

OFTEN = 1000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to."""
    with hub_for(tmp_path, monkeypatch) as served:
        yield served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run."""
    return whole_run(tmp_path / "run")[0]


def quietly(folder: Path, repo_id: str = "me/it", **settings: object) -> str:
    """Push; gives what was printed."""
    console = Console(file=io.StringIO(), width=200)
    push(folder, repo_id, console=console, **settings)
    return console.file.getvalue()


def check_whole(hub: Hub, folder: Path, repo_id: str = "me/it", commits: int = 1) -> None:
    """All that was to arrive is there, once."""
    assert len(hub.messages(repo_id)) == commits
    assert hub.files(repo_id)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    AutoModelForCausalLM.from_pretrained(repo_id)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "whoami", 0),
        ("GET", "api/models/me/it$", -1),
        ("POST", "repos/create", 0),
        ("POST", "repos/create", -1),
        ("POST", "validate-yaml", 503),
        ("POST", "preupload", 0),
        ("POST", "objects/batch", 503),
        ("PUT", "storage", 0),
        ("PUT", "storage", -1),
        ("PUT", "storage", 500),
        ("POST", "/verify", 0),
        ("POST", "api/models/me/it/commit", 0),
        ("POST", "api/models/me/it/commit", -1),
        ("POST", "api/models/me/it/commit", 502),
    ],
)
def test_what_passes_by_itself_is_tried_again(hub: Hub, folder: Path, method: str, path: str, status: int) -> None:
    """A night's run whose upload ends with the first hiccup of the network; and one whose second try doubles it."""
    hub.faults = [Fault(method, path, status, body="<html>busy</html>" if status > 0 else "")]
    quietly(folder)
    assert hub.faults[0].times == 0, "the fault wasn't met"
    check_whole(hub, folder)
    assert hub.waits, "nothing was waited for"


@pytest.mark.parametrize(("method", "path"), [("PUT", "storage"), ("POST", "commit")])
@pytest.mark.parametrize("status", [0, 503])
def test_after_a_broken_connection_once_more_is_enough(
    hub: Hub, folder: Path, method: str, path: str, status: int
) -> None:
    """Half a model on the hub is one that somebody loads."""
    hub.faults = [Fault(method, path, status, times=OFTEN)]
    with pytest.raises(HubError, match=r"Run the same command again: what arrived isn't sent twice") as caught:
        quietly(folder)
    assert not hub.files("me/it") and hub.repositories["model", "me/it"].private, "something is half there"
    assert TOKEN not in str(caught.value) and "signature" not in str(caught.value)
    hub.faults, before = [], hub.uploads()
    quietly(folder)
    check_whole(hub, folder)
    if path == "commit":
        assert hub.uploads() == before, "the weights are sent twice"
    quietly(folder)
    check_whole(hub, folder)


@pytest.mark.parametrize("path", ["whoami", "repos/create", "objects/batch", "api/models/me/it/commit"])
def test_too_many_requests_wait_as_long_as_asked(hub: Hub, folder: Path, path: str) -> None:
    """Whoever asks again at once is kept out longer."""
    method = "GET" if path == "whoami" else "POST"
    hub.faults = [Fault(method, path, 429, headers={"Retry-After": "37"})]
    quietly(folder)
    check_whole(hub, folder)
    assert any(wait in (37, 38) for wait in hub.waits)


def test_who_asks_for_an_hour_is_not_waited_for(hub: Hub, folder: Path) -> None:
    """A command that says nothing for an hour is taken for dead, and killed."""
    hub.faults = [Fault("POST", "repos/create", 429, times=OFTEN, headers={"ratelimit": '"api";r=0;t=3600'})]
    with pytest.raises(HubError, match=r"too many requests from this account \(429\)"):
        quietly(folder)
    assert not hub.waits


def test_a_date_is_a_time_to_wait_for(hub: Hub, folder: Path) -> None:
    """`Retry-After` may be a date."""
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    hub.faults = [Fault("POST", "repos/create", 503, headers={"Retry-After": format_datetime(soon, usegmt=True)})]
    text = quietly(folder)
    assert any(95 < wait <= 100 for wait in hub.waits) and "failed (503); trying again in" in text


def test_a_refused_token_leaves_no_trace(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's output is pasted into issues; a token in it is a token given away."""
    odd = "plain-word-of-no-known-form"
    monkeypatch.setenv("HF_TOKEN", odd)
    hub.faults = [Fault("GET", "whoami", 401, body=f'{{"error": "Invalid token {odd}"}}')]
    with pytest.raises(HubError) as caught:
        quietly(folder)
    assert "refused the token (401)" in str(caught.value) and "The one in HF_TOKEN was taken" in str(caught.value)
    assert odd not in "".join(traceback.format_exception(caught.value))
    app = typer.Typer()
    app.command()(command)
    for options in ([], ["--traceback"]):
        done = CliRunner().invoke(app, [str(folder), "me/it", *options])
        shown = done.output + "".join(traceback.format_exception(done.exception) if done.exception else [])
        assert done.exit_code != 0 and odd not in shown and "401" in shown
    assert not hub.repositories


def test_a_token_that_ends_in_the_middle(hub: Hub, folder: Path) -> None:
    """A token may be revoked while gigabytes are under way."""
    hub.faults = [Fault("POST", "api/models/me/it/commit", 401, headers={"X-Error-Message": f"expired: {TOKEN}"})]
    with pytest.raises(HubError, match="refused the token") as caught:
        quietly(folder)
    assert TOKEN not in str(caught.value)
    quietly(folder)
    check_whole(hub, folder)


def test_no_token_and_one_that_may_only_read(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are found before anything is sent, with the command that mends it."""
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match="may only read"):
        quietly(folder)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"There is no token.*hf auth login"):
        quietly(folder)
    assert [method for method, _ in hub.requests] == ["GET"]


def test_names_of_others(hub: Hub, folder: Path) -> None:
    """Who may write there is what a user can find out; that nothing came of it must be said."""
    with pytest.raises(HubError, match=r"with someone/it \(403\). It is that of me \(of lab\)") as caught:
        quietly(folder, "someone/it")
    assert "The hub says: You don't have the rights" in str(caught.value)
    hub.faults = [Fault("POST", "repos/create", 409, body='{"error": "You already created this model repo"}')]
    with pytest.raises(HubError, match=r"me/it is taken.*\(409\)"):
        quietly(folder)
    hub.make("someone/open", private=False)
    with pytest.raises(HubError, match="403"):
        quietly(folder, "someone/open", private=False)
    quietly(folder, "lab/it")
    check_whole(hub, folder, "lab/it")


@pytest.mark.parametrize("name", ["it", "me/it/x", "me/", "/it", "me/a b", "me/-it", "me/it.git", "me/a--b", ""])
def test_a_name_that_cant_be_one_is_told_before_the_network(hub: Hub, folder: Path, name: str) -> None:
    """A misspelt name must not cost a merge of gigabytes."""
    with pytest.raises(ValueError, match=re.escape(f"The repository's name is {name!r}: ") + ".*Expected owner/name"):
        quietly(folder, name)
    assert not hub.requests


def test_offline_is_told_before_the_network(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own error names an address, and not the setting that a run on a cluster left behind."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        quietly(folder)
    assert not hub.requests
    quietly(folder, dry_run=True)


def test_gone_and_too_large(hub: Hub, folder: Path) -> None:
    """Neither passes by itself, so neither is tried again; each has another remedy."""
    missing = {"X-Error-Code": "RepoNotFound"}
    hub.faults = [Fault("POST", "preupload", 404, headers=missing)]
    with pytest.raises(HubError, match=r"me/it isn't there \(404\)"):
        quietly(folder)
    hub.faults = [Fault("PUT", "storage", 413)]
    with pytest.raises(HubError, match=r"too large for .* \(413\).*max_shard_size"):
        quietly(folder)
    hub.faults = [Fault("POST", "repos/create", 402, body='{"error": "Private storage is full"}')]
    with pytest.raises(HubError, match=r"paid plan.*Private storage is full"):
        quietly(folder, "me/other")
    assert not hub.waits


def test_a_file_that_the_storage_refuses(hub: Hub, folder: Path) -> None:
    """The storage answers 200 with an error for one file."""
    answer = '{"objects": [{"oid": "a", "size": 1, "error": {"code": 422, "message": "no space left"}}]}'
    hub.faults = [Fault("POST", "objects/batch", 200, body=answer)]
    with pytest.raises(HubError, match=r"can't take one of the files.*no space left"):
        quietly(folder)


def test_a_card_that_the_hub_refuses(hub: Hub, folder: Path) -> None:
    """The header of a card that somebody edited may be wrong: better told before the weights are sent."""
    (folder / "README.md").write_text("---\nlibrary_name: [x]\n---\n")
    with pytest.raises(HubError, match='"library_name" must be a string'):
        quietly(folder)
    assert not hub.uploads()


def test_files_that_the_repository_ignores(hub: Hub, folder: Path) -> None:
    """What a .gitignore leaves out is missing without a word from the client."""
    made = hub.make("me/it")
    made.commit("ignore", {**made.at()["files"], ".gitignore": File(b"model.safetensors\n", False)})
    with pytest.raises(HubError, match=r"hasn't taken model.safetensors: its .gitignore"):
        quietly(folder)


def test_no_library_is_imported_that_is_not_declared() -> None:
    """huggingface_hub 1 speaks by `httpx` and 2 by `httpx2`: an import of either takes hfkd from half the users."""
    package = Path(hfkd.uploads.__file__).parents[1]
    asking = [path for path in package.rglob("*.py") if re.search(r"^\s*(import|from) httpx", path.read_text(), re.M)]
    assert not asking and len(list(package.rglob("*.py"))) > 100


@pytest.mark.parametrize("library", ["httpx", "httpx2._exceptions"])
def test_errors_of_either_library_are_known(library: str) -> None:
    """A broken connection that isn't known for one is not tried again."""
    kind = type("TransportError", (Exception,), {"__module__": library})
    lost = type("ConnectTimeout", (kind,), {"__module__": library})
    assert seconds_to_wait(lost("x"), 1) == 4
    refused = type("HTTPStatusError", (Exception,), {"__module__": library})("x")
    refused.response = SimpleNamespace(status_code=503, headers={})
    assert status_of(refused) == 503 and seconds_to_wait(refused, 0) == 2


def test_errors_of_the_machine_are_not_the_hubs(hub: Hub, folder: Path) -> None:
    """A bug that is tried again three times takes longer to be found."""
    assert seconds_to_wait(KeyError("x"), 0) is None and seconds_to_wait(PermissionError("x"), 0) is None
    assert seconds_to_wait(ConnectionResetError("x"), 2) == 8
