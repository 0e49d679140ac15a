"""What the worker link refuses to do, and with which words."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from mili.cli.keygen import generate_keys
from mili.internal.v1 import step_pb2 as pb
from mili.router.config import RouterConfig
from mili.router.worker_keys import read_router_keys
from mili.router.worker_link import WorkerLink
from mili.router.workers import WorkerGroup, Workers
from mili.worker.connection import Connection
from mili.worker.progress import Progress
from mili.worker.worker_keys import read_worker_keys


class Deaf:
    def on_ready(self, group: WorkerGroup) -> None: ...

    def on_result(self, group: WorkerGroup, result: pb.StepResult) -> None: ...

    def on_lost(self, group: WorkerGroup, reason: str, *, died: bool) -> None: ...


def make_link(address: str, **settings: object) -> WorkerLink:
    config = RouterConfig.model_validate({"model": "m", "worker_link": address, **settings})
    return WorkerLink(config, Workers(Deaf(), interface_sha256=b"i" * 32), pytest.fail)


@pytest.mark.parametrize(
    "address",
    ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://192.0.2.1:5000", "tcp://eth0:1"],
)
def test_no_link_beyond_this_machine_without_keys(address: str) -> None:
    with pytest.raises(ValueError, match=r"set worker_keys .* or insecure_worker_link"):
        make_link(address)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://localhost:0"])
async def test_loopback_needs_no_keys(address: str) -> None:
    link = make_link(address)
    link.start()
    assert not link.endpoint.endswith(":0")
    link.close()


async def test_insecure_when_told_so() -> None:
    link = make_link("tcp://0.0.0.0:0", insecure_worker_link=True)
    link.start()
    link.close()


@pytest.mark.parametrize("address", ["udp://127.0.0.1:1", "127.0.0.1:1", "tcp://", "ipc:workers"])
def test_an_address_of_no_known_kind(address: str) -> None:
    with pytest.raises(ValueError, match="worker_link must be tcp://address:port or ipc://path"):
        make_link(address)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "tcp://127.0.0.1:http", "tcp://localhost:"])
async def test_an_address_that_does_not_exist(address: str) -> None:
    with pytest.raises(ValueError, match="is not an address of this machine"):
        make_link(address, insecure_worker_link=True).start()


async def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot listen on {address}: Address already in use"):
            make_link(address).start()


async def test_a_socket_file_in_use(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/link/sock"
    first = make_link(address)
    first.start()
    with pytest.raises(OSError, match="another router listens"):
        make_link(address).start()
    first.close()
    second = make_link(address)
    second.start()
    second.close()


async def test_the_folder_of_a_socket_is_ours_alone(tmp_path: Path) -> None:
    link = make_link(f"ipc://{tmp_path}/made/sock")
    link.start()
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700
    link.close()
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="must be ours alone"):
        make_link(f"ipc://{tmp_path}/open/sock").start()
    with pytest.raises(ValueError, match="absolute path"):
        make_link("ipc://relative/sock").start()


def test_generated_keys_are_read_by_both_sides(tmp_path: Path) -> None:
    os.umask(os.umask(0o077))
    files = generate_keys(tmp_path / "keys")
    assert [stat.S_IMODE(path.stat().st_mode) for path in files if path.suffix == ".key"] == [
        0o600,
        0o600,
    ]
    router, worker = read_router_keys(tmp_path / "keys"), read_worker_keys(tmp_path / "keys")
    assert worker.router == router.public
    assert len({router.public, router.secret, worker.public, worker.secret}) == 4
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(FileExistsError, match="remove it first"):
        generate_keys(tmp_path / "keys")
    assert {path: path.read_bytes() for path in files} == before


def test_key_files_that_are_missing_open_or_broken(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with pytest.raises(ValueError, match=r"cannot read key file .*router\.key: No such file"):
        read_router_keys(keys)
    with pytest.raises(ValueError, match=r"cannot read key file .*worker\.key: No such file"):
        read_worker_keys(keys)
    generate_keys(keys)
    for path, read in (
        (keys / "router.key", read_router_keys),
        (keys / "worker.key", read_worker_keys),
    ):
        path.chmod(0o644)
        with pytest.raises(ValueError, match="chmod 600"):
            read(keys)
        path.chmod(0o600)
        path.write_text("not\nkeys\n")
        with pytest.raises(ValueError, match="is not a key file"):
            read(keys)
    (keys / "router.pub").unlink()
    generate = tmp_path / "other"
    generate_keys(generate)
    (generate / "authorized" / "worker.pub").unlink()
    (generate / "authorized").rmdir()
    with pytest.raises(ValueError, match="authorized is missing"):
        read_router_keys(generate)


def test_a_worker_says_so_when_the_router_has_no_address() -> None:
    with pytest.raises(ValueError, match="router nonsense is not an address"):
        Connection("nonsense", pb.Hello(), Progress())
