"""Packages of Node that tests call, kept between runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from tests.external_tool import run_tool


def node_modules(*packages: str) -> Path:
    """Return a folder node_modules with these packages (name@version), installed once.

    A machine without npm skips the test, as `run_tool` says.
    """
    cache = Path(os.environ.get("MILI_CACHE", "~/.cache/mili")).expanduser() / "tests"
    name = "npm-" + hashlib.sha256(" ".join(packages).encode()).hexdigest()[:16]
    if not (cache / name).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "made"
            options = ("--no-audit", "--no-fund", "--ignore-scripts", "--no-save")
            run_tool("npm", "install", *options, "--prefix", made, *packages)
            # Another process may have been faster.
            with contextlib.suppress(OSError):
                made.rename(cache / name)
    return cache / name / "node_modules"
