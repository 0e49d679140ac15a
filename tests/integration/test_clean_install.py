"""What users get: the wheel holds the whole tree, and the router's extra alone starts a router."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests.model_folders import make_model_folder
from tests.serving import free_port

ROOT = Path(__file__).parents[2]
ROOMS = {
    "protos/mili/v1": "mili/v1",
    "protos/mili/internal": "mili/internal",
    **{room: f"mili/{room}" for room in ("router", "worker", "kernels", "hub", "client", "cli")},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its traces where it builds."""
    copy = tmp_path_factory.mktemp("source") / "mili"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", target, copy], check=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(ROOT / room)}"
        for room, package in ROOMS.items()
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".pyi", ".proto", ".cu", ".cuh")
        and "__pycache__" not in path.parts
    }
    assert packed == expected


@pytest.mark.timeout(300)
def test_the_router_extra_alone_starts_a_router(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", f"{wheel}[router]"], check=True)
    listed = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True)
    installed = {line.split("==")[0].lower() for line in listed.stdout.splitlines()}
    assert not installed & {"torch", "cupy-cuda13x", "transformers", "numpy"}

    model = make_model_folder(tmp_path / "model", "qwen3")
    port = free_port()
    flags = ["--port", str(port), "--admin-port", str(free_port())]
    link = f"ipc://{tmp_path}/link/workers"
    router = subprocess.Popen(
        [python, "-m", "mili.cli.main", "router", model, *flags, "--worker-link", link],
        cwd=tmp_path,
    )
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = HealthStub(channel).Check  # type: ignore[attr-defined]  # not in its stubs
            request = HealthCheckRequest(service="liveness")
            assert check(request, wait_for_ready=True, timeout=20).status == 1
    finally:
        router.terminate()
        assert router.wait(20) == 0
