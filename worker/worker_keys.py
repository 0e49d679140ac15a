"""The worker's CURVE keys.

Owns the reading of a key folder, as `mili keygen` writes it. Does not know sockets.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

KEY_LENGTH = 40  # Z85 characters


class WorkerKeys(NamedTuple):
    """The worker's own pair and the router's public key, in Z85."""

    public: bytes
    secret: bytes
    router: bytes


def read_worker_keys(folder: Path) -> WorkerKeys:
    """Read worker.key and router.pub. Raises ValueError."""
    public, secret = _read_keys(folder / "worker.key", count=2)
    (router,) = _read_keys(folder / "router.pub", count=1)
    return WorkerKeys(public, secret, router)


def _read_keys(path: Path, count: int) -> list[bytes]:
    """Read `count` keys; a file with a secret in it may be nobody else's to read."""
    try:
        if count > 1 and path.stat().st_mode & 0o027:
            raise ValueError(f"{path} can be read or changed by others: run chmod 600 on it")
        words = path.read_bytes().split()
    except OSError as error:
        raise ValueError(f"cannot read key file {path}: {error.strerror}") from error
    if len(words) != count or any(len(word) != KEY_LENGTH for word in words):
        raise ValueError(f"{path} is not a key file: `mili keygen` makes one")
    return words
