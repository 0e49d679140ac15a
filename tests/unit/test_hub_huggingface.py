"""Pulls from a hub: a local HTTP server that speaks as much of the hub's API as is asked of it.

HF_ENDPOINT and the cache's place are read when huggingface_hub is imported, so that each pull runs
in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

COMMIT = "c" * 40
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 10,
    "max_position_embeddings": 20,
}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "model.safetensors": save({"a": np.arange(1000, dtype=np.float32)}),
    "consolidated.safetensors": b"the same once more",
    "onnx/model.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "README.md": b"# A model",
}
WANTED = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
CODE = """
import sys
from mili.hub.errors import ModelFolderError
from mili.hub.pull import pull
from mili.hub.resolve import resolve
try:
    print({"pull": pull, "resolve": resolve}[sys.argv[1]](sys.argv[2]))
except ModelFolderError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Hub(BaseHTTPRequestHandler):
    """org/model is there, org/gated needs permission, org/broken fails, others do not exist."""

    log: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.log.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path == "/api/models/org/model/revision/main":
            siblings = [{"rfilename": name} for name in FILES]
            self.answer_json({"id": "org/model", "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/org/model/tree/{COMMIT}":
            self.answer_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                    for name, data in FILES.items()
                ]
            )
        elif path.startswith(start := f"/org/model/resolve/{COMMIT}/"):
            data = FILES[path.removeprefix(start)]
            self.answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": sha1(data).hexdigest()})
        elif "/org/gated/" in path:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif "/org/broken/" in path:
            self.answer(500, b"", {})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


class HubUser:
    """Runs pull and resolve in processes that talk to the hub at `port`."""

    def __init__(self, port: int, home: Path, log: list[str]) -> None:
        self.log = log
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(home / "huggingface"),
            "MILI_CACHE": str(home / "mili"),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0",
        }

    def __call__(self, what: str, name: str) -> tuple[str, str]:
        """Return the path that was printed and the last line of the error, one of them empty."""
        run = subprocess.run(
            [sys.executable, "-c", CODE, what, name],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in run.stderr, run.stderr
        assert "%|" not in run.stderr, "a progress bar where there is no terminal"
        path = run.stdout.splitlines()[-1] if run.returncode == 0 else ""
        return path, run.stderr.splitlines()[-1] if run.returncode else ""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    Hub.log = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def user(server: ThreadingHTTPServer, tmp_path: Path) -> HubUser:
    return HubUser(server.server_port, tmp_path, Hub.log)


def test_a_pull_and_what_comes_after_it(user: HubUser) -> None:
    assert "`mili pull org/model`" in user("resolve", "org/model")[1]
    assert user.log == []

    path, error = user("pull", "org/model")
    assert error == ""
    assert sorted(file.name for file in Path(path).iterdir()) == WANTED
    for name in WANTED:
        assert (Path(path) / name).read_bytes() == FILES[name]
    assert user("resolve", "org/model") == (path, "")

    user.log.clear()
    assert user("pull", "org/model") == (path, "")
    assert not any("/resolve/" in line for line in user.log), "a second pull downloads nothing"

    user.log.clear()
    user.environment["HF_HUB_OFFLINE"] = "1"
    assert user("pull", "org/model") == (path, "")
    assert user.log == []

    (Path(path) / "model.safetensors").unlink()
    assert "`mili pull org/model`" in user("resolve", "org/model")[1]


def test_a_pull_that_is_kept_when_the_hub_is_gone(user: HubUser) -> None:
    path, _ = user("pull", "org/model")
    user.environment["HF_ENDPOINT"] = "http://127.0.0.1:1"
    assert user("pull", "org/model") == (path, "")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("org/nothing", "has no such model, or a private one; check the name, or set HF_TOKEN"),
        ("org/gated", "access is restricted; ask for it on http://127.0.0.1"),
        ("org/broken", "answered with HTTP status 500"),
        ("org/model.git", "HFValidationError"),
    ],
)
def test_what_a_hub_may_refuse(user: HubUser, name: str, problem: str) -> None:
    _, error = user("pull", name)
    assert error.startswith(f"PullError: {name} cannot be pulled: ")
    assert problem in error


def test_a_hub_that_is_down(user: HubUser) -> None:
    user.environment["HF_ENDPOINT"] = "http://127.0.0.1:1"
    _, error = user("pull", "org/model")
    assert "http://127.0.0.1:1 cannot be reached" in error
    assert "check the network, or HF_ENDPOINT" in error


def test_offline_without_the_model(user: HubUser) -> None:
    user.environment["HF_HUB_OFFLINE"] = "1"
    _, error = user("pull", "org/model")
    assert "HF_HUB_OFFLINE is set" in error
    assert user.log == []


def test_a_model_without_safetensors(user: HubUser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FILES, "model.safetensors")
    _, error = user("pull", "org/model")
    assert error.startswith("PullError: org/model was pulled, but cannot be used: ")
    assert "has no *.safetensors" in error
