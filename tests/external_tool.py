"""Programs that tests call but MILI does not need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def run_tool(name: str, *arguments: str | Path, stdin: str = "") -> str:
    """Run it, expect success, and return what it printed.

    A machine without it skips the test, except where CI=true says that nothing may be missing.
    """
    folders = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    path = shutil.which(name, path=folders)
    if path is None:
        reason = f"{name} is not installed here"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    done = subprocess.run(
        [path, *arguments], input=stdin, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout
