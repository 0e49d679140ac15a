"""What `mili serve` decides for its children, and what start-up must not import."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mili.cli import models
from mili.cli.errors import CommandError
from mili.cli.http_config import HttpConfig
from mili.cli.http_front import check_packages
from mili.cli.main import main
from mili.cli.models import with_model_folder
from mili.cli.serve import (
    _child,
    _gpu,
    _resources,
    free_port,
    front_config,
    router_config,
    worker_configs,
)
from mili.cli.serve_config import ServeConfig
from mili.cli.settings import variable
from mili.router.config import RouterConfig

LINK = "ipc:///tmp/x/workers"


def config(**settings: object) -> ServeConfig:
    return ServeConfig.model_validate({"model": "/m", **settings})


def test_the_cores_and_the_memory_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    workers = worker_configs(config(workers=3), LINK)
    assert [worker.name for worker in workers] == ["worker-0", "worker-1", "worker-2"]
    assert {worker.num_threads for worker in workers} == {2}
    assert {worker.kv_cache_memory_fraction for worker in workers} == {0.25 / 3}
    assert {worker.kv_cache_memory_bytes for worker in workers} == {None}, "or it would be exact"
    assert {worker.router for worker in workers} == {LINK}


def test_more_workers_than_cores_have_a_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert {w.num_threads for w in worker_configs(config(workers=2), LINK)} == {1}


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["0", "1"]), ("3,5", ["3", "5"]), ("GPU-1f,MIG-2e,7", ["GPU-1f", "MIG-2e", "7"])],
)
def test_each_worker_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    workers = worker_configs(config(workers=len(names), device="cuda"), LINK)
    given = [_resources(worker, number) for number, worker in enumerate(workers)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in given] == names
    assert {each["OMP_NUM_THREADS"] for each in given} == {str(workers[0].num_threads)}


def test_more_workers_than_visible_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(
        CommandError, match=r"workers = 3: .* CUDA_VISIBLE_DEVICES names 2 \('3,5'\)"
    ):
        _gpu(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(CommandError, match="names 0"):
        _gpu(0)


def test_a_worker_on_the_cpu_sees_what_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    (worker,) = worker_configs(config(num_threads=3), LINK)
    assert _resources(worker, 0).keys() == {"OMP_NUM_THREADS", "GOMP_SPINCOUNT"}
    assert _resources(worker, 0)["OMP_NUM_THREADS"] == "3"


def test_what_the_user_gave_is_kept() -> None:
    (alone,) = worker_configs(config(), LINK)
    assert alone.kv_cache_memory_bytes is None
    given = config(workers=2, num_threads=5, num_gpu_blocks_override=9)
    for worker in worker_configs(given, LINK):
        assert worker.num_threads == 5
        assert (worker.num_gpu_blocks_override, worker.kv_cache_memory_bytes) == (9, None)


def test_port_0_becomes_a_port_that_restarts_keep() -> None:
    router = router_config(config(port=0, admin_port=0), LINK)
    assert 0 not in (router.port, router.admin_port)
    assert router.worker_link == LINK
    assert router_config(config(port=7), LINK).port == 7


def test_a_port_that_is_taken_and_a_host_that_is_none_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(CommandError, match=f"admin_port = {port}: .*another process"):
            free_port("admin_port", "127.0.0.1", port)
    assert free_port("port", "127.0.0.1", port) == port
    with pytest.raises(CommandError, match=r"admin_host = nonsense\.invalid: no such address"):
        free_port("admin_port", "nonsense.invalid")


def test_the_http_front_is_off_unless_it_has_a_port() -> None:
    router = router_config(config(host="0.0.0.0", port=7), LINK)
    assert front_config(config(), router) is None
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(CommandError, match=f"http_port = {port}: .*another process"):
            front_config(config(http_port=port), router)
    front = front_config(config(http_port=port, drain_timeout=3), router)
    assert front == HttpConfig(address="127.0.0.1:7", http_port=port, drain_timeout=3)


def test_the_http_front_says_which_package_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("mili.client.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(CommandError, match="needs the package uvicorn"):
        check_packages()


def test_a_child_shows_the_settings_that_serve_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is set for serve must not reach a child behind its back."""
    monkeypatch.setenv("MILI_WORKER_LINK", "tcp://elsewhere:1")
    monkeypatch.setenv("MILI_PIPELINE_DEPTH", "7")
    router = router_config(config(port=1234), LINK)
    child = _child("router", "router", router, {})
    shown = subprocess.run(
        [*child._command, "--print-config"],
        env=dict(child._environment),
        capture_output=True,
        text=True,
        timeout=20,
    )
    rows = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines()}
    for name in ("worker_link", "port"):
        assert rows[name][0] == str(getattr(router, name))
        assert rows[name][1:] == ["environment", variable(name)]
    assert rows["worker_timeout"] == ["1.0", "default"]


def test_a_model_keeps_the_name_it_was_called_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILI_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    named = with_model_folder(RouterConfig(model="tiny"), pull=False)
    assert (named.model, named.served_model_name) == (str(folder), ("tiny",))
    other = with_model_folder(RouterConfig(model="tiny", served_model_name=("a",)), pull=False)
    assert other.served_model_name == ("a",)
    monkeypatch.chdir(folder)
    relative = with_model_folder(RouterConfig(model="."), pull=False)
    assert (relative.model, relative.served_model_name) == (str(folder), ())


def test_pull_is_used_only_for_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILI_CACHE", str(tmp_path))
    pulled: list[str] = []

    def fake_pull(name: str) -> Path:
        pulled.append(name)
        return tmp_path

    monkeypatch.setattr(models, "pull_model", fake_pull)
    with_model_folder(config(model="tiny"), pull=True)
    with_model_folder(config(model=str(tmp_path)), pull=True)
    assert pulled == ["tiny"]


def test_start_up_imports_nothing_heavy() -> None:
    heavy = [
        "torch",
        "grpc",
        "starlette",
        "uvicorn",
        "zmq",
        "numpy",
        "tokenizers",
        "structlog",
        "huggingface_hub",
    ]
    code = f"import json, sys, mili.cli.main; print(json.dumps([*sys.modules.keys() & {heavy}]))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert json.loads(shown.stdout) == []


LOGGING = """
import logging, sys, structlog
from mili.cli.logging import set_up_logging
set_up_logging("router", "info", sys.argv[1])
structlog.get_logger().debug("hidden")
structlog.get_logger().info("shown", number=3)
logging.getLogger("grpc._server").info("hidden")
logging.getLogger("somewhere").warning("from %s", "stdlib")
def fail(prompt):
    raise RuntimeError("broken")
fail("secret " + "words")
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_every_log_line_has_one_format_and_goes_to_stderr(log_format: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOGGING, log_format], capture_output=True, text=True, timeout=20
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "hidden" not in ended.stderr
    assert "secret words" not in ended.stderr
    if log_format == "json":
        lines = [json.loads(line) for line in ended.stderr.splitlines()]
        assert [line["event"] for line in lines] == ["shown", "from stdlib", "uncaught exception"]
        assert {line["process"] for line in lines} == {"router"}
        assert [line["level"] for line in lines] == ["info", "warning", "critical"]
        assert "RuntimeError: broken" in lines[2]["exception"]
        assert all(line["timestamp"].endswith("Z") for line in lines)
    else:
        assert "process=router number=3" in ended.stderr
        assert "RuntimeError: broken" in ended.stderr


def test_keygen_prints_its_files_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keygen", str(tmp_path / "keys")]) == 0
    assert str(tmp_path / "keys" / "router.key") in capsys.readouterr().out.splitlines()
    assert main(["keygen", str(tmp_path / "keys")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mili: ")
    assert error.count("\n") == 1
