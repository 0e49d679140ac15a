"""The safetensors format: a header that says where each tensor lies, then the tensors.

Owns the reading of headers and the writing of files, tensor by tensor, so that a model larger than
memory can be written. Does not know what a tensor means and never reads one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mili.hub.errors import ModelFolderError

ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}  # bytes
MAX_HEADER_BYTES = 100_000_000


class StoredTensor(NamedTuple):
    """dtype: as the format names it, known to ITEM_SIZE or not. start, size: bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Header(NamedTuple):
    """raw: the header's bytes. tensors: by name. data_start: offset of the first tensor."""

    raw: bytes
    tensors: Mapping[str, StoredTensor]
    data_start: int
    file_size: int


class TensorSpec(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return ITEM_SIZE[self.dtype] * math.prod(self.shape)


def read_header(path: Path) -> Header:
    """Read the header and check that the file is exactly as long as it promises."""
    with path.open("rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if file_size < 8 or length > MAX_HEADER_BYTES:
            raise ModelFolderError(
                f"{path} is not a safetensors file ({file_size} bytes; "
                "is it a Git LFS pointer?): pull the model again"
            )
        raw = file.read(length)
    data_start = 8 + length
    if file_size < data_start:
        raise _wrong_size(path, file_size, data_start, "at least ")
    tensors = _parse(path, raw, data_start)
    expected = max((each.start + each.size for each in tensors.values()), default=data_start)
    if file_size != expected:
        raise _wrong_size(path, file_size, expected)
    return Header(raw, tensors, data_start, file_size)


def _parse(path: Path, raw: bytes, data_start: int) -> dict[str, StoredTensor]:
    try:
        entries: dict[str, Any] = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _read_entry(entry, data_start) for name, entry in entries.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelFolderError(
            f"{path} has an unreadable safetensors header: pull the model again"
        ) from error
    for name, (dtype, shape, start, size) in tensors.items():
        whole = ITEM_SIZE.get(dtype, 0) * math.prod(shape)
        if start < data_start or size < 0 or (dtype in ITEM_SIZE and size != whole):
            raise ModelFolderError(
                f"{path} has {size} bytes for {name}, {dtype} {list(shape)}: pull the model again"
            )
    return tensors


def _read_entry(entry: Any, data_start: int) -> StoredTensor:  # noqa: ANN401
    begin, end = map(int, entry["data_offsets"])
    shape = tuple(map(int, entry["shape"]))
    return StoredTensor(str(entry["dtype"]), shape, data_start + begin, end - begin)


def _wrong_size(path: Path, actual: int, expected: int, at_least: str = "") -> ModelFolderError:
    return ModelFolderError(
        f"{path} is {actual} bytes long, but its header promises {at_least}{expected}: "
        "the file was cut short or damaged, pull the model again"
    )


def write(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[memoryview]) -> None:
    """Write one file. `tensors` yields the bytes of each of `specs`, in the same order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": (offset, offset + spec.size),
        }
        offset += spec.size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for spec, tensor in zip(specs, tensors, strict=True):
            assert tensor.nbytes == spec.size, f"{spec.name}: {tensor.nbytes} bytes"
            file.write(tensor)
