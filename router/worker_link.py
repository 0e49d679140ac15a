"""The socket of the worker link: a ZeroMQ ROUTER on the asyncio loop.

Owns the bind, its safety, and the moving of frames between socket and protocol. Does not know
what a frame means.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import zmq

from mili.router.config import RouterConfig
from mili.router.worker_keys import DoorKeeper, RouterKeys, read_router_keys
from mili.router.workers import MAX_FRAME_BYTES, Workers

log = structlog.get_logger()

TICK_SECONDS = 0.1
HIGH_WATER_MARK = 1000
# Frames taken in one go before other work of the loop gets its turn.
BATCH = 256
# ZeroMQ's own heartbeat, in milliseconds: it only clears away connections that are half open.
CONNECTION_HEARTBEAT = 1000
CONNECTION_TIMEOUT = 5000


class WorkerLink:
    """Where workers connect. Call start, send and close on the loop's thread."""

    def __init__(
        self, config: RouterConfig, workers: Workers, on_fault: Callable[[Exception], None]
    ) -> None:
        """on_fault: a frame or a tick raised, so that nobody knows what state we are in.

        Raises ValueError if the settings would open the link to strangers.
        """
        self.endpoint = config.worker_link
        self._on_fault = on_fault
        self._workers = workers
        self._keys = read_router_keys(config.worker_keys) if config.worker_keys else None
        check_exposure(config)

    def start(self) -> None:
        """Bind. Raises OSError if the address is in use, ValueError if there is no such one."""
        if self.endpoint.startswith("ipc://"):
            prepare_socket_file(Path(self.endpoint.removeprefix("ipc://")))
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._door = DoorKeeper(self._context, self._keys.authorized) if self._keys else None
        self._socket = _make_socket(self._context, self._keys, ipv6="[" in self.endpoint)
        try:
            self._socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            self._close_sockets()
            raise _bind_error(self.endpoint, error) from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._descriptor = self._socket.fileno()
        self._loop.add_reader(self._descriptor, self._drain)
        self._again: asyncio.Handle | None = None
        self._workers.connect(self.send)
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        log.info("worker link is open", endpoint=self.endpoint, curve=self._keys is not None)

    def close(self) -> None:
        """Stop. What was not sent is dropped: workers notice the silence."""
        self._timer.cancel()
        self._loop.remove_reader(self._descriptor)
        if self._again:
            self._again.cancel()
        self._close_sockets()
        if self.endpoint.startswith("ipc://"):
            Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def send(self, routing_id: bytes, frame: bytes) -> bool:
        """Send a frame, or return False when the peer's queue is full or the peer is away."""
        try:
            self._socket.send_multipart((routing_id, frame), flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                raise
            return False
        finally:
            # The descriptor tells of changes once, and sending may have taken that away.
            if self._again is None and self._readable():
                self._again = self._loop.call_soon(self._drain)
        return True

    def _drain(self) -> None:
        """Receive what is there; come back soon if it is more than a batch."""
        if self._again:
            self._again.cancel()
        self._again = None
        for _ in range(BATCH):
            try:
                parts = self._socket.recv_multipart(flags=zmq.DONTWAIT)
            except zmq.Again:
                return
            if len(parts) == 2:
                with self._faults_reported():
                    self._workers.receive(parts[0], parts[1], time.monotonic())
        if self._again is None:
            self._again = self._loop.call_soon(self._drain)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        self._drain()
        with self._faults_reported():
            self._workers.tick(time.monotonic())

    @contextmanager
    def _faults_reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._on_fault(error)

    def _readable(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def _close_sockets(self) -> None:
        self._socket.close()
        if self._door:
            self._door.close()
        self._context.term()


def check_exposure(config: RouterConfig) -> None:
    """Refuse to listen beyond this machine without keys, unless told so."""
    transport, _, address = config.worker_link.partition("://")
    if transport not in ("tcp", "ipc") or not address:
        raise ValueError(
            f"worker_link must be tcp://address:port or ipc://path: {config.worker_link!r}"
        )
    if transport == "ipc" or config.worker_keys or config.insecure_worker_link:
        return
    host = address.rpartition(":")[0].strip("[]")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError(
            f"worker_link {config.worker_link} can be reached from other machines: set worker_keys "
            "(mili keygen makes them), or insecure_worker_link if the network is trusted"
        )


def prepare_socket_file(path: Path) -> None:
    """Check that nobody else can reach or replace the socket, and that it is not in use."""
    if not path.is_absolute():
        raise ValueError(f"worker_link needs an absolute path after ipc://, not {path}")
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(f"{folder}, the folder of worker_link, must be ours alone (chmod 700)")
    # ZeroMQ takes an existing socket file away from its owner without a word: ask first.
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError(errno.EADDRINUSE, f"another router listens on ipc://{path}")


def _make_socket(
    context: zmq.Context[zmq.Socket[bytes]], keys: RouterKeys | None, *, ipv6: bool
) -> zmq.Socket[bytes]:
    link = context.socket(zmq.ROUTER)
    link.setsockopt(zmq.ROUTER_MANDATORY, 1)
    link.setsockopt(zmq.LINGER, 0)
    link.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    link.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    link.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    link.setsockopt(zmq.IPV6, ipv6)
    link.setsockopt(zmq.HEARTBEAT_IVL, CONNECTION_HEARTBEAT)
    link.setsockopt(zmq.HEARTBEAT_TIMEOUT, CONNECTION_TIMEOUT)
    if keys:
        link.setsockopt(zmq.CURVE_SERVER, 1)
        link.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        link.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        link.setsockopt(zmq.ZAP_DOMAIN, b"mili")
        link.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return link


def _bind_error(endpoint: str, error: zmq.ZMQError) -> Exception:
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        return OSError(error.errno, f"cannot listen on {endpoint}: {os.strerror(error.errno)}")
    return ValueError(f"worker_link {endpoint} is not an address of this machine: {error.strerror}")
