"""Make the CURVE keys of a worker link.

Owns the layout of a key folder. Does not know the command line, nor who reads the keys:
router/worker_keys.py and worker/worker_keys.py do.
"""

from __future__ import annotations

import os
from pathlib import Path

import zmq


def generate_keys(folder: Path) -> list[Path]:
    """Write one router and one worker pair into `folder` and return the files.

    router.key and worker.key hold a public and a secret key in Z85, a line each; router.pub and
    authorized/worker.pub the public key alone. A router needs router.key and authorized/, a
    worker needs worker.key and router.pub. Raises FileExistsError rather than overwrite a key.
    """
    authorized = folder / "authorized"
    files = {
        (folder / "router.key", 0o600): (folder / "router.pub", 0o644),
        (folder / "worker.key", 0o600): (authorized / "worker.pub", 0o644),
    }
    paths = [path for pair in files.items() for path, _ in pair]
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} exists: remove it first to make new keys")
    for directory in (folder, authorized):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for (key, key_mode), (pub, pub_mode) in files.items():
        public, secret = zmq.curve_keypair()
        _write(key, b"%s\n%s\n" % (public, secret), key_mode)
        _write(pub, b"%s\n" % public, pub_mode)
    return paths


def _write(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
