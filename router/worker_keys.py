"""The router's CURVE keys, and the check of a worker's key when it connects.

Owns the reading of a key folder and the ZAP handler, ZeroMQ's door-keeper: without its consent no
byte of a peer reaches the worker link. Does not know frames or workers.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import NamedTuple

import structlog
import zmq
from zmq.utils import z85

log = structlog.get_logger()

# Strangers are reported at most this often.
COMPLAINT_SECONDS = 10.0
ZAP_ENDPOINT = "inproc://zeromq.zap.01"


class RouterKeys(NamedTuple):
    """The router's pair, in Z85, and the folder that lists the workers' public keys."""

    public: bytes
    secret: bytes
    authorized: Path


def read_router_keys(folder: Path) -> RouterKeys:
    """Read router.key and check that authorized/ is there. Raises ValueError."""
    public, secret = _read_keys(folder / "router.key", count=2)
    authorized = folder / "authorized"
    if not authorized.is_dir():
        raise ValueError(f"{authorized} is missing: put the workers' public keys there, as *.pub")
    return RouterKeys(public, secret, authorized)


def _read_keys(path: Path, count: int) -> list[bytes]:
    """Read `count` Z85 keys; a file with a secret in it may be nobody else's to read."""
    try:
        if count > 1 and path.stat().st_mode & 0o027:
            raise ValueError(f"{path} can be read or changed by others: run chmod 600 on it")
        words = path.read_bytes().split()
    except OSError as error:
        raise ValueError(f"cannot read key file {path}: {error.strerror}") from error
    if len(words) != count or not all(_is_key(word) for word in words):
        raise ValueError(f"{path} is not a key file: `mili keygen` makes one")
    return words


def _is_key(word: bytes) -> bool:
    return len(word) == 40 and all(byte in z85.Z85CHARS for byte in word)


class DoorKeeper:
    """Answers ZeroMQ's question whether a peer may come in (ZAP, RFC 27).

    authorized/ is read at each connection: a key that is added or removed counts at once.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], authorized: Path) -> None:
        self._authorized = authorized
        self._complained_at = float("-inf")
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ZAP_ENDPOINT)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self.answer)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def answer(self) -> None:
        """Answer everything that was asked: the descriptor only tells of changes."""
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            version, request_id, _, address, _, mechanism, *credentials = (
                self._socket.recv_multipart()
            )
            allowed = mechanism == b"CURVE" and self._allows(credentials[0])
            if not allowed:
                self._complain(address.decode(errors="replace"))
            status = [b"200", b"OK"] if allowed else [b"400", b"key is not authorized"]
            self._socket.send_multipart([version, request_id, *status, b"", b""])

    def _complain(self, address: str) -> None:
        if time.monotonic() - self._complained_at > COMPLAINT_SECONDS:
            self._complained_at = time.monotonic()
            log.warning("worker key is not authorized", address=address)

    def _allows(self, key: bytes) -> bool:
        """key: 32 bytes, as the peer proved to own it."""
        wanted = z85.encode(key)
        for path in self._authorized.glob("*.pub"):
            try:
                if wanted in _read_keys(path, count=1):
                    return True
            except ValueError as error:
                log.warning("authorized key ignored", reason=str(error))
        return False
