"""A chat endpoint in this process, over HTTP, that answers as it is told and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


@dataclass
class Say:
    """One reply.

    Attributes:
        text: The content; None for a null.
        status: Of HTTP.
        headers: More of them.
        body: In place of a completion.
        delay: Seconds before it.
        reason: The finish reason.
        usage: Tokens of prompt and completion; None leaves them out.
    """

    text: Any = "yes"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    delay: float = 0.0
    reason: str = "stop"
    usage: tuple[int, int] | None = (10, 2)

    def content(self) -> bytes:
        """The bytes of the reply."""
        if self.body is not None:
            return self.body.encode()
        if self.status != 200:
            return json.dumps({"error": {"message": "fault on request", "code": "made_up"}}).encode()
        message = {"role": "assistant", "content": self.text}
        made: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        made["choices"] = [{"index": 0, "message": message, "finish_reason": self.reason}]
        if self.usage is not None:
            names = dict(zip(("prompt_tokens", "completion_tokens"), self.usage, strict=True))
            made["usage"] = names | {"total_tokens": sum(self.usage)}
        return json.dumps(made).encode()


Answerer = Callable[[dict[str, Any], int], Say]
"""Of the body of a request and how many came before it."""


@dataclass
class Endpoint:
    """What runs: its address, and what it was asked, as bodies and headers of the requests."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)


@contextmanager
def endpoint(answer: Answerer | list[Say]) -> Iterator[Endpoint]:
    """Serve until the block ends; of a list the last reply is repeated."""
    replies = answer if callable(answer) else lambda body, number: answer[min(number, len(answer) - 1)]
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(running.asked)
                running.asked.append(body)
                running.headers.append({name.lower(): value for name, value in self.headers.items()})
                running.moments.append(time.monotonic())
            say = replies(body, number)
            time.sleep(say.delay)
            content = say.content()
            try:
                self.send_response(say.status)
                for name, value in {"Content-Type": "application/json", **say.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client didn't wait

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    running = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()


def question_of(body: dict[str, Any]) -> str:
    """The last message of a request."""
    return body["messages"][-1]["content"]


def plan_tree(folder: Any, url: str, prompts: list[str] | list[dict[str, Any]], **sections: Any) -> dict[str, Any]:
    """A plan as plain data, with its rows written into the folder; sections are merged into it."""
    rows = [{"prompt": one} if isinstance(one, str) else one for one in prompts]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "endpoint": {"url": url, "model": "m", "timeout": 5, "backoff": 0.01, "attempts": 3, "parallel": 1},
        "data": {"path": str(folder / "questions.jsonl")},
        "template": {"kind": "label"},
        "output_dir": str(folder / "out"),
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return tree


def write_plan(folder: Any, tree: dict[str, Any]) -> Any:
    """The path of a plan."""
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def lines_of(path: Any) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
