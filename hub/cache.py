"""Where pulled models live: `models/<name>` below ~/.cache/mili.

Owns names, the place, and the promise that a folder appears there only complete, however many
processes pull at once and whenever they are killed. Does not know how a model is made.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from mili.hub.errors import PullError

SHORT_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.))*")
HUB_ID = re.compile(rf"{SHORT_NAME.pattern}/{SHORT_NAME.pattern}")

log = structlog.get_logger()


def cache_folder() -> Path:
    """Return MILI_CACHE, else mili below XDG_CACHE_HOME, else ~/.cache/mili."""
    if own := os.environ.get("MILI_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mili"


def existing_folder(name: str) -> Path | None:
    """Return the folder that `name` is the path of, if it is one. Takes any text."""
    path = os.path.expanduser(name)
    return Path(path) if os.path.isdir(path) else None


def model_path(name: str) -> Path:
    """Return where the model of that short name is, or would be."""
    assert SHORT_NAME.fullmatch(name), name
    return cache_folder() / "models" / name


def is_short_name(name: str) -> bool:
    return SHORT_NAME.fullmatch(name) is not None


def is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None


@contextmanager
def new_model(name: str) -> Iterator[Path | None]:
    """Yield an empty folder to fill, which becomes model_path(name) at the end of the block.

    Yields None if the model is there, perhaps because another process made it while this one
    waited. If the block raises, nothing is left. OSError becomes PullError.
    """
    final = model_path(name)
    partial = final.with_name(f".{name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _lock(final.with_name(f".{name}.lock")):
            if final.exists():
                yield None
                return
            # Whoever left it was killed: the lock is ours.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                yield partial
                partial.rename(final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise PullError(f"{final} cannot be written: {error}") from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file; the kernel lets go of it when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Another process is pulling this model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
