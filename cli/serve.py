"""`mili serve`: a router and its workers on this machine.

Owns what serve decides for its children: the link between them, ports, threads, memory. Does not
know where a setting came from (settings.py) or how processes are kept alive (supervisor.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from pydantic import BaseModel

from mili.cli.errors import CommandError
from mili.cli.http_config import HttpConfig
from mili.cli.http_front import check_packages
from mili.cli.serve_config import ServeConfig
from mili.cli.settings import to_environment, without_settings
from mili.cli.supervisor import Child, Patience, Supervisor
from mili.hub.folder import read_model_folder
from mili.router.config import RouterConfig
from mili.router.tenants import Tenants
from mili.v1.admin_pb2 import ListWorkersRequest
from mili.v1.admin_pb2_grpc import AdminServiceStub
from mili.worker.config import WorkerConfig

# An ipc address is the path of a socket, and the kernel takes no longer one.
_LONGEST_SOCKET_PATH = 107
# GNU OpenMP's threads spin while they wait; unbounded, two workers starve each other.
_SPIN_COUNT = "10000"
# Seconds for a child to end; a trace takes a while to be written.
_GRACE, _GRACE_WITH_TRACE = 5.0, 60.0
# Addresses to listen on, and where this machine reaches them.
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def serve(config: ServeConfig) -> int:
    """Run until a signal, or until nothing is left that could serve; return the exit code.

    config.model is a folder. Raises CommandError for what no child could serve.
    """
    try:
        read_model_folder(Path(config.model), weights=config.load_format != "random")
        if config.tenants:
            Tenants.read(config.tenants)
    except ValueError as error:
        raise CommandError(str(error)) from None
    with tempfile.TemporaryDirectory(prefix="mili-") as folder:
        link = Path(folder) / "workers"
        if len(os.fsencode(link)) > _LONGEST_SOCKET_PATH:
            raise CommandError(f"TMPDIR is too long for a socket's path: {link}")
        router = router_config(config, f"ipc://{link}")
        free_port("port", router.host, router.port)
        free_port("admin_port", router.admin_host, router.admin_port)
        front = front_config(config, router)
        workers = worker_configs(config, f"ipc://{link}")
        return asyncio.run(_serve(router, workers, front))


async def _serve(
    router: RouterConfig, workers: list[WorkerConfig], front: HttpConfig | None
) -> int:
    profiled = any(worker.profile for worker in workers)
    router_child = _child("router", "router", router, {})
    supervisor = Supervisor(
        router_child,
        [
            _child(worker.name, "worker", worker, _resources(worker, number))
            for number, worker in enumerate(workers)
        ],
        Patience(drain=router.drain_timeout, grace=_GRACE_WITH_TRACE if profiled else _GRACE),
        [] if front is None else [_child("http", "http", front, {})],
    )
    announcement = asyncio.create_task(
        _announce(router, len(workers), lambda: router_child.alive, front)
    )
    try:
        return await supervisor.run()
    finally:
        announcement.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await announcement


def router_config(config: ServeConfig, link: str) -> RouterConfig:
    """Port 0 is settled here, so that a restarted router has the same one."""
    return RouterConfig.model_validate(
        config.model_dump(include=set(RouterConfig.model_fields))
        | {
            "worker_link": link,
            "port": config.port or free_port("port", config.host),
            "admin_port": config.admin_port or free_port("admin_port", config.admin_host),
        }
    )


def front_config(config: ServeConfig, router: RouterConfig) -> HttpConfig | None:
    """Return the HTTP front's settings, None for no front. CommandError for a port it cannot have,
    or without the packages that it needs."""
    if not config.http_port:
        return None
    check_packages()
    free_port("http_port", config.http_host, config.http_port)
    shared = config.model_dump(include=set(HttpConfig.model_fields))
    return HttpConfig.model_validate(shared | {"address": _reachable(router.host, router.port)})


def worker_configs(config: ServeConfig, link: str) -> list[WorkerConfig]:
    """The machine's cores and memory are shared out evenly."""
    cores = len(os.sched_getaffinity(0))
    shared = config.model_dump(include=set(WorkerConfig.model_fields)) | {
        "router": link,
        "num_threads": config.num_threads or max(1, cores // config.workers),
        "kv_cache_memory_fraction": config.kv_cache_memory_fraction / config.workers,
    }
    # The router has the port itself; the workers have those behind it.
    first = config.metrics_port + 1 if config.metrics_port else 0
    return [
        WorkerConfig.model_validate(
            shared | {"name": f"worker-{number}", "metrics_port": first and first + number}
        )
        for number in range(config.workers)
    ]


def _child(name: str, command: str, config: BaseModel, extra: Mapping[str, str]) -> Child:
    """Settings travel as environment variables: `--print-config` in the child shows them."""
    inherited = without_settings(os.environ, (RouterConfig, WorkerConfig, ServeConfig))
    return Child(
        name,
        # -P: the working directory must not offer its folders as modules.
        [sys.executable, "-P", "-m", "mili.cli.main", command],
        {**inherited, **extra, **to_environment(config)},
    )


def _resources(worker: WorkerConfig, number: int) -> dict[str, str]:
    """What of the machine the number-th worker uses: a share of the cores, and a GPU of its own."""
    threads = {
        "OMP_NUM_THREADS": str(worker.num_threads),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", _SPIN_COUNT),
    }
    return {**threads, "CUDA_VISIBLE_DEVICES": _gpu(number)} if worker.device == "cuda" else threads


def _gpu(number: int) -> str:
    """The number-th GPU of those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(number)
    names = visible.split(",") if visible else []
    if number >= len(names):
        raise CommandError(
            f"workers = {number + 1}: each needs a GPU, and CUDA_VISIBLE_DEVICES names "
            f"{len(names)} ({visible!r})"
        )
    return names[number]


def free_port(setting: str, host: str, port: int = 0) -> int:
    """Return the port, or a free one for 0. CommandError if nobody could listen on it."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        host_setting = setting.replace("port", "host")
        raise CommandError(f"{host_setting} = {host}: no such address ({reason})") from None
    family, kind, protocol, _, address = addresses[0]
    with socket.socket(family, kind, protocol) as probe:
        # As gRPC does: connections of a server that just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "another process listens there" if taken else error.strerror
            raise CommandError(
                f"{setting} = {port}: cannot listen on {_bracketed(host)}:{port}: {reason}"
            ) from None
        found = probe.getsockname()[1]
    assert isinstance(found, int)
    return found


async def _announce(
    router: RouterConfig,
    workers: int,
    alive: Callable[[], bool],
    front: HttpConfig | None = None,
) -> None:
    """Print one line when the API answers, for people and for scripts that wait for it.

    alive: whether our router runs, for without it somebody else answers.
    """
    options = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500))
    public = _reachable(router.host, router.port)
    admin = _reachable(router.admin_host, router.admin_port)
    async with (
        grpc.aio.insecure_channel(public, options) as channel,
        # Asked for the name, since the public port may want a token.
        grpc.aio.insecure_channel(admin, options) as operators,
    ):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await _serving(channel)
                answer = await AdminServiceStub(operators).ListWorkers(ListWorkersRequest())
                if answer.workers and alive():
                    break
            await asyncio.sleep(0.2)
    name = answer.workers[0].model
    plural = "worker" if workers == 1 else "workers"
    where = f"grpc on {_bracketed(router.host)}:{router.port}"
    if front is not None:
        await _listening(front)
        where += f", http on {_bracketed(front.http_host)}:{front.http_port}"
    print(f"ready: {where}, model {name}, {workers} {plural}", flush=True)


async def _listening(front: HttpConfig) -> None:
    host = _WILDCARDS.get(front.http_host, front.http_host)
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, front.http_port)
            writer.close()
            return
        await asyncio.sleep(0.1)


async def _serving(channel: grpc.aio.Channel) -> None:
    request = health_pb2.HealthCheckRequest(service="readiness")
    watch = HealthStub(channel).Watch  # type: ignore[attr-defined]  # missing in its stub package
    async for response in watch(request, wait_for_ready=True):
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return


def _reachable(host: str, port: int) -> str:
    """Where this machine reaches a listener: a wildcard address is none to connect to."""
    return f"{_bracketed(_WILDCARDS.get(host, host))}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
