"""Two names for what a model folder holds: its interface, and its weights.

Router and worker compare these, so that a worker of another model never joins. Owns what goes into
a hash. Reads of each weight file its header and its two ends only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mili.hub.safetensors_file import read_header

if TYPE_CHECKING:
    from mili.hub.folder import ModelFolder

END_BYTES = 1 << 20


def interface_sha256(folder: ModelFolder) -> bytes:
    """Hash what text and token ids mean: configs, tokenizer, chat template."""
    return _sha256(
        json.dumps(folder.config, sort_keys=True).encode(),
        folder.tokenizer_path.read_bytes(),
        json.dumps(folder.tokenizer_config, sort_keys=True).encode(),
        (folder.chat_template or "").encode(),
        folder.generation.raw_json.encode(),
    )


def weights_sha256(folder: ModelFolder) -> bytes:
    """Hash each weight file's name, header, size, first and last MiB of tensors."""
    parts: list[bytes] = []
    for path in folder.weight_files:
        header = read_header(path)
        parts += [path.name.encode(), header.raw, *file_ends(path, start=header.data_start)]
    return _sha256(*parts)


def random_weights_sha256(config: Mapping[str, Any], device: str, seed: int = 0) -> bytes:
    """Name weights that are drawn, not read. config: of config.json. device: what draws them."""
    return _sha256(json.dumps(config, sort_keys=True).encode(), device.encode(), b"%d" % seed)


def file_ends(path: Path, start: int = 0) -> tuple[bytes, bytes, bytes]:
    """Return the file's size and its first and last MiB after `start`."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(start)
        first = file.read(END_BYTES)
        file.seek(max(start, size - END_BYTES))
        last = file.read(END_BYTES)
    return size.to_bytes(8, "little"), first, last


def fingerprint(path: Path) -> str:
    """Return a name, in hex, for a large file that is not read whole."""
    return _sha256(*file_ends(path)).hex()


def _sha256(*parts: bytes) -> bytes:
    """Hash the parts with their lengths, so that no two lists of parts run together."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
