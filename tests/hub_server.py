"""A hub in this process: the documented calls that `huggingface_hub` makes for an upload and a download, over HTTP,
with faults on request. Git's own ids of files, so that the client's comparison with what is there is put to the test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

from hfkd.card.licences import HUB_LICENCES

TOKEN = "hf_" + "Writer" * 6
READER = "hf_" + "Reader" * 6
LFS_FROM = 100_000
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class File:
    """A file of a repository, as its own id and its place in the storage say."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """A repository: its commits, the last one last, each with all of its files."""

    private: bool
    commits: list[dict[str, Any]] = field(default_factory=list)
    branches: dict[str, int] = field(default_factory=dict)

    def commit(self, message: str, files: dict[str, File], branch: str = "main") -> str:
        listing = json.dumps([message, len(self.commits), {path: one.oid for path, one in files.items()}])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits.append({"oid": oid, "message": message, "files": files})
        self.branches[branch] = len(self.commits) - 1
        return oid

    def at(self, revision: str = "main") -> dict[str, Any] | None:
        if revision in self.branches:
            return self.commits[self.branches[revision]]
        return next((one for one in self.commits if one["oid"] == revision), None)


@dataclass
class Fault:
    """What goes wrong, how often, with the next requests that match.

    Attributes:
        method: Of the request.
        path: A pattern that is searched for in its path.
        status: What is answered; 0 drops the connection in the middle of what is sent, and -1 after it was done.
        times: How often.
        headers: Of the answer.
        body: Of the answer.
    """

    method: str
    path: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""


class Hub:
    """The state behind the server, for tests to look at and to set."""

    def __init__(self) -> None:
        self.accounts = {
            TOKEN: {"name": "me", "orgs": [{"name": "lab"}], "role": "write"},
            READER: {"name": "me", "orgs": [], "role": "read"},
        }
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.received = 0
        self.endpoint = ""
        self.private_by_default: set[str] = set()
        """Organisations whose repositories are private where nothing is said."""
        self.part_size: int | None = None
        """Bytes above which a large file is sent in parts; None sends each whole."""
        self.parts: dict[str, dict[int, bytes]] = {}

    def make(self, repo_id: str, kind: str = "model", private: bool = True) -> Repository:
        made = Repository(private)
        made.commit("initial commit", {".gitattributes": File(GITATTRIBUTES, False)})
        self.repositories[kind, repo_id] = made
        return made

    def files(self, repo_id: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """What the repository holds, but for the file that each has from its beginning."""
        commit = self.repositories[kind, repo_id].at(revision)
        return {path: one.content for path, one in commit["files"].items() if path != ".gitattributes"}

    def messages(self, repo_id: str, kind: str = "model") -> list[str]:
        return [one["message"] for one in self.repositories[kind, repo_id].commits[1:]]

    def everything(self) -> bytes:
        """All bytes that any repository ever held, and all names."""
        parts = [b"".join(self.storage.values())]
        for repository in self.repositories.values():
            for commit in repository.commits:
                parts.append(commit["message"].encode())
                parts += [path.encode() + b"\n" + one.content for path, one in commit["files"].items()]
        return b"\n".join(parts)

    def uploads(self) -> int:
        """How often the bytes of a large file were sent."""
        return sum(method == "PUT" for method, _ in self.requests)


class _Dropped(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.hub.requests.append((self.command, unquote(parts.path)))
        fault = self._fault()
        length = int(self.headers.get("Content-Length") or 0)
        try:
            if fault is not None and fault.status == 0:
                self.rfile.read(length // 2)
                raise _Dropped
            self.body = self.rfile.read(length) if length else self._chunks()
            if fault is not None and fault.status > 0:
                self._send(fault.status, fault.body.encode(), fault.headers)
                return
            status, body, headers = self._route(unquote(parts.path), parse_qs(parts.query))
            if fault is not None:
                raise _Dropped
            self._send(status, body, headers)
        except _Dropped:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fault(self) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, unquote(self.path)):
                fault.times -= 1
                return fault
        return None

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, path: str, query: dict[str, list[str]]) -> tuple[int, bytes, dict[str, str]]:
        for method, pattern, call in _ROUTES:
            if self.command in method.split() and (found := re.fullmatch(pattern, path)):
                return call(self, query, **found.groupdict())
        return _error(404, f"no such call: {self.command} {path}")

    def _account(self) -> dict[str, Any] | None:
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return self.hub.accounts.get(token) if kind == "Bearer" else None

    def _find(self, kind: str | None, name: str) -> Repository | None:
        """A repository as this token sees it; a private one of others isn't there."""
        found = self.hub.repositories.get(((kind or "models").rstrip("/").removesuffix("s"), name))
        return None if found is None or (found.private and not self._owns(name)) else found

    def _owns(self, name: str) -> bool:
        account = self._account()
        return account is not None and name.split("/")[0] in (account["name"], *(o["name"] for o in account["orgs"]))

    # --- the calls

    def who(self, query: Any) -> tuple[int, bytes, dict[str, str]]:
        account = self._account()
        if account is None:
            return _error(401, "Invalid credentials in Authorization header")
        auth = {"type": "access_token", "accessToken": {"displayName": "x", "role": account["role"]}}
        return _json({"type": "user", "name": account["name"], "orgs": account["orgs"], "auth": auth})

    def create(self, query: Any) -> tuple[int, bytes, dict[str, str]]:
        asked, account = json.loads(self.body), self._account()
        if account is None:
            return _error(401, "Invalid username or password.")
        owner = asked.get("organization") or account["name"]
        name, kind = f"{owner}/{asked['name']}", asked.get("type") or "model"
        if not self._owns(name) or account["role"] == "read":
            return _error(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        if (kind, name) in self.hub.repositories:
            return _error(409, f"You already created this {kind} repo")
        by_default = "private" if owner in self.hub.private_by_default else "public"
        self.hub.make(name, kind, private=asked.get("visibility", by_default) == "private")
        return _json({"url": f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name})

    def info(self, query: Any, kind: str, name: str, revision: str | None = None) -> tuple[int, bytes, dict[str, str]]:
        found, commit, wrong = self._commit_of(kind, name, revision or "main")
        if wrong:
            return wrong
        siblings = [{"rfilename": path} for path in sorted(commit["files"])]
        return _json({"id": name, "sha": commit["oid"], "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, query: Any, kind: str, name: str, revision: str, folder: str = "") -> Any:
        _, commit, wrong = self._commit_of(kind, name, revision)
        if wrong:
            return wrong
        inside = f"{folder.strip('/')}/" if folder else ""
        listed = [path for path in sorted(commit["files"]) if path.startswith(inside)]
        if folder and not listed:
            return _error(404, "Entry not found", "EntryNotFound")
        return _json([_described(path, commit["files"][path]) for path in listed])

    def paths_info(self, query: Any, kind: str, name: str, revision: str) -> Any:
        _, commit, wrong = self._commit_of(kind, name, revision)
        wanted = (
            json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
        )
        return wrong or _json([_described(path, commit["files"][path]) for path in wanted if path in commit["files"]])

    def branch(self, query: Any, kind: str, name: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        found = self._find(kind, name)
        if found is None:
            return _missing()
        if revision in found.branches:
            return _error(409, "Reference already exists")
        found.branches[revision] = found.branches["main"]
        return _json({})

    def preupload(self, query: Any, kind: str, name: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        _, commit, wrong = self._commit_of(kind, name, revision)
        if wrong:
            return wrong
        answers = []
        ignore = commit["files"].get(".gitignore", File(b"", False)).content.decode().splitlines()
        for one in json.loads(self.body)["files"]:
            large = one["path"].endswith((".safetensors", ".parquet", ".png")) or one["size"] > LFS_FROM
            there = commit["files"].get(one["path"])
            oid = None if there is None else there.sha256 if there.is_lfs else there.oid
            mode = "lfs" if large else "regular"
            ignored = _is_ignored(one["path"], ignore)
            answers.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        return _json({"files": answers})

    def batch(self, query: Any, name: str, kind: str | None = None) -> tuple[int, bytes, dict[str, str]]:
        if self._find(kind, name) is None:
            return _missing()
        asked = json.loads(self.body)
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        objects = []
        for one in asked["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.storage:
                upload = {"href": f"{self.hub.endpoint}/storage/{one['oid']}?signature=secret"}
                verify = {"href": f"{self.hub.endpoint}/verify"}
                if self.hub.part_size and one["size"] > self.hub.part_size:
                    upload = self._in_parts(one)
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return _json({"transfer": "basic", "objects": objects})

    def _in_parts(self, one: dict[str, Any]) -> dict[str, Any]:
        """Where to send each part of a large file, and where to say that all were sent."""
        size = self.hub.part_size
        place = f"{self.hub.endpoint}/storage/{one['oid']}"
        header = {f"{part:05d}": f"{place}/{part}?signature=secret" for part in range(1, -(-one["size"] // size) + 1)}
        return {"href": f"{place}/complete", "header": {"chunk_size": str(size), **header}}

    def store_part(self, query: Any, oid: str, part: str) -> tuple[int, bytes, dict[str, str]]:
        self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def complete(self, query: Any, oid: str) -> tuple[int, bytes, dict[str, str]]:
        sent, told = self.hub.parts.get(oid, {}), json.loads(self.body)["parts"]
        etags = {one["partNumber"]: one["etag"].strip('"') for one in told}
        if etags != {part: hashlib.md5(content).hexdigest() for part, content in sent.items()}:
            return _error(400, "the parts aren't those that were sent")
        self.body = b"".join(sent[part] for part in sorted(sent))
        return self.store(query, oid)

    def store(self, query: Any, oid: str) -> tuple[int, bytes, dict[str, str]]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return _error(400, "the bytes aren't those that were announced")
        self.hub.storage[oid] = self.body
        self.hub.received += len(self.body)
        return 200, b"", {"ETag": f'"{oid}"'}

    def verify(self, query: Any) -> tuple[int, bytes, dict[str, str]]:
        asked = json.loads(self.body)
        there = len(self.hub.storage.get(asked["oid"], b"")) == asked["size"]
        return _json({}) if there else _error(404, "the file isn't there")

    def validate(self, query: Any) -> tuple[int, bytes, dict[str, str]]:
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            errors = list(_wrong_metadata(yaml.safe_load(content.split("---\n")[1]) or {}))
        except yaml.YAMLError as error:
            errors = [f"bad YAML: {type(error).__name__}"]
        if errors:
            answer = {"error": "Bad", "errors": [{"message": one} for one in errors], "warnings": []}
            return 400, json.dumps(answer).encode(), {}
        return _json({"errors": [], "warnings": []})

    def commit(self, query: Any, kind: str, name: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        found, before, wrong = self._commit_of(kind, name, revision)
        if wrong:
            return wrong
        account = self._account()
        if account is None:
            return _error(401, "Invalid username or password.")
        if not self._owns(name) or account["role"] == "read":
            return _error(403, "you must have write access to the repository to upload")
        lines = [json.loads(line) for line in self.body.splitlines()]
        assert lines[0]["key"] == "header"
        if lines[0]["value"].get("parentCommit", before["oid"]) != before["oid"]:
            return _error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(before["files"])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    return _error(400, f"the content of {value['path']} was never uploaded")
                files[value["path"]] = File(self.hub.storage[value["oid"]], True)
            elif value["path"] in files:
                del files[value["path"]]
            else:
                return _error(404, "A file with this name doesn't exist", "EntryNotFound")
        oid = found.commit(lines[0]["value"]["summary"], files, revision)
        return _json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def resolve(self, query: Any, name: str, revision: str, file: str, kind: str | None = None) -> Any:
        _, commit, wrong = self._commit_of(kind, name, revision)
        if wrong:
            return wrong
        one = commit["files"].get(file)
        if one is None:
            return _error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit["oid"]})
        etag = one.sha256 if one.is_lfs else one.oid
        headers = {"X-Repo-Commit": commit["oid"], "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        if one.is_lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(one.content))}
        return 200, one.content, headers

    def _commit_of(self, kind: str | None, name: str, revision: str) -> tuple[Any, Any, Any]:
        found = self._find(kind, name)
        if found is None:
            return None, None, _missing()
        commit = found.at(revision)
        return found, commit, None if commit else _error(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def _json(value: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {}


def _error(status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> Any:
    known = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
    return status, json.dumps({"error": message}).encode(), known


def _missing() -> tuple[int, bytes, dict[str, str]]:
    return _error(404, "Repository not found", "RepoNotFound")


def _is_ignored(path: str, lines: list[str]) -> bool:
    """Whether a .gitignore leaves a file out; the last line that matches counts."""
    ignored = False
    for line in map(str.strip, lines):
        pattern = line.lstrip("!").strip("/")
        names = [path] if "/" in pattern else [path, *path.split("/")]
        if pattern and not line.startswith("#") and any(fnmatchcase(name, pattern) for name in names):
            ignored = not line.startswith("!")
    return ignored


def _wrong_metadata(data: dict[str, Any]) -> Iterator[str]:
    """What the hub's documentation of a card's header forbids."""
    for key in ("library_name", "pipeline_tag", "license", "license_name"):
        if not isinstance(data.get(key, ""), str):
            yield f'"{key}" must be a string'
    if isinstance(data.get("license"), str) and data["license"] not in {*HUB_LICENCES, "other", "unknown"}:
        yield '"license" must be one of the list of ids, or other'
    for key in ("base_model", "datasets"):
        names = data.get(key, [])
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
                yield f'"{key}" with value {name!r} is not valid. Use a model id from https://hf.co/models.'
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        yield '"tags" must be an array of strings'
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not all(map(_is_result, model.get("results", []))):
            yield '"model-index" is malformed: a name, and a task, a dataset and metrics for each result, are required'


def _is_result(result: dict[str, Any]) -> bool:
    task, dataset = result.get("task") or {}, result.get("dataset") or {}
    metrics = result.get("metrics") or [{}]
    known = task.get("type"), dataset.get("type"), dataset.get("name")
    return all(known) and all("type" in one and "value" in one for one in metrics)


def _described(path: str, one: File) -> dict[str, Any]:
    told: dict[str, Any] = {"type": "file", "path": path, "size": len(one.content), "oid": one.oid}
    if one.is_lfs:
        told["lfs"] = {"oid": one.sha256, "size": len(one.content), "pointerSize": 134}
    return told


_API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_PAGE = r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", r"/api/whoami-v2", _Handler.who),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", _API, _Handler.info),
    ("GET", _API + r"/revision/(?P<revision>.+)", _Handler.info),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler.tree),
    ("POST", _API + r"/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("POST", _API + r"/branch/(?P<revision>.+)", _Handler.branch),
    ("POST", _API + r"/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", _API + r"/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", _PAGE + r"\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/storage/(?P<oid>\w+)", _Handler.store),
    ("PUT", r"/storage/(?P<oid>\w+)/(?P<part>\d+)", _Handler.store_part),
    ("POST", r"/storage/(?P<oid>\w+)/complete", _Handler.complete),
    ("POST", r"/verify", _Handler.verify),
    ("GET HEAD", _PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
)


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client of this process talks to, logged in; its waits are skipped and noted in `hub.waits`."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session
    from transformers.utils import hub as transformers_hub

    with serve() as hub:
        hub.waits = []
        monkeypatch.setattr("time.sleep", hub.waits.append)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        try:
            yield hub
        finally:
            close_session()
