"""A checkpoint's tensors: each taken once, by name and shape, and none left over.

Owns which file a tensor is in and the count of what was taken. Does not know what a tensor is for,
nor how its bytes get to the device (tensor_reader.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, NamedTuple, Protocol, Self

import structlog
import torch

from mili.hub.errors import ModelFolderError
from mili.hub.folder import ModelFolder
from mili.hub.progress import Progress, show_bars
from mili.hub.safetensors_file import StoredTensor, read_header
from mili.worker.random_weights import RandomCheckpoint
from mili.worker.tensor_reader import HostReader, StagedReader, TensorReader

log = structlog.get_logger()

_CPU = torch.device("cpu")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LISTED = 8


class WeightSource(Protocol):
    """Where a model's weights come from. Every method raises ModelFolderError for what is wrong."""

    num_bytes: int  # of the tensors that were taken, as they are stored

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Return a tensor that must exist in this shape."""

    def take_into(self, target: torch.Tensor, name: str) -> None:
        """Fill target, which may be a part of a larger tensor, with one that has its shape."""

    def take_derived(self, name: str, expected: torch.Tensor, source: str) -> None:
        """Take a tensor that need not exist, and must equal what it is derived from if it does."""

    def finish(self) -> None:
        """Wait until all is in place. Every tensor must have been taken."""


@contextmanager
def open_weights(
    folder: ModelFolder,
    load_format: Literal["auto", "random"],
    dtype: torch.dtype,
    device: torch.device = _CPU,
) -> Iterator[WeightSource]:
    """Yield the weights of a folder, or random ones in the shapes of its config."""
    if load_format == "random":
        tied = bool(folder.config.get("tie_word_embeddings", False))
        yield RandomCheckpoint(dtype, device, tied=tied)
        return
    with Checkpoint(folder.weight_files, dtype, device) as checkpoint:
        yield checkpoint


class _Entry(NamedTuple):
    path: Path
    file: BinaryIO
    tensor: StoredTensor


class Checkpoint:
    """The tensors of some safetensors files, converted to `dtype` on `device` as they are taken.

    A GPU's values may be used on the stream that is current in `take`, and anywhere after `finish`.
    """

    def __init__(
        self, files: Sequence[Path], dtype: torch.dtype, device: torch.device = _CPU
    ) -> None:
        self.num_bytes = 0
        self._dtype = dtype
        self._device = device
        self._taken: set[str] = set()
        self._started = time.perf_counter()
        with ExitStack() as resources:
            self._entries = _with_prefix(_open(files, resources))
            self._total = sum(entry.tensor.size for entry in self._entries.values())
            self._reader: TensorReader = (
                StagedReader(device) if device.type == "cuda" else HostReader()
            )
            resources.callback(self._reader.close)
            self._progress: Progress = resources.enter_context(
                show_bars() if sys.stderr.isatty() else nullcontext(_no_progress)
            )
            self._resources = resources.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the files and end what reads them."""
        self._resources.close()

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Return a tensor that must exist in this shape."""
        entry = self._find(name, shape)
        target = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._read(name, entry, target)
        return target

    def take_into(self, target: torch.Tensor, name: str) -> None:
        """Fill target, which may be a part of a larger tensor, with one that has its shape."""
        self._read(name, self._find(name, target.shape), target)

    def take_derived(self, name: str, expected: torch.Tensor, source: str) -> None:
        """Take a tensor that need not exist, and must equal what it is derived from if it does."""
        if name not in self._entries:
            return
        stored = self.take(name, *expected.shape)
        if not torch.equal(stored, expected.to(self._device, self._dtype)):
            raise ModelFolderError(
                f"{name} in {self._entries[name].path} differs from {source}, which it should equal"
            )

    def finish(self) -> None:
        """Every tensor must have been taken: one that was not means another model than we think."""
        left = sorted(self._entries.keys() - self._taken)
        if left:
            more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
            raise ModelFolderError(
                f"the weight files have {len(left)} tensors that this architecture does not use: "
                f"{', '.join(left[:_LISTED])}{more}"
            )
        self._reader.wait()
        seconds = time.perf_counter() - self._started
        log.info(
            "weights are loaded",
            megabytes=round(self.num_bytes / 1e6),
            seconds=round(seconds, 2),
            megabytes_per_second=round(self.num_bytes / seconds / 1e6),
        )

    def _find(self, name: str, shape: Sequence[int]) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise ModelFolderError(f"the weight files have no {name}: is the checkpoint complete?")
        if entry.tensor.shape != tuple(shape):
            raise ModelFolderError(
                f"{name} in {entry.path} has the shape {list(entry.tensor.shape)}; "
                f"config.json asks for {list(shape)}"
            )
        if entry.tensor.dtype not in _DTYPES:
            raise ModelFolderError(
                f"{name} in {entry.path} is {entry.tensor.dtype}; MILI reads {', '.join(_DTYPES)}"
            )
        return entry

    def _read(self, name: str, entry: _Entry, target: torch.Tensor) -> None:
        tensor = entry.tensor
        try:
            self._reader.read(entry.file, tensor.start, _DTYPES[tensor.dtype], target)
        except OSError as error:
            raise ModelFolderError(f"{entry.path} cannot be read: {error}") from error
        self._taken.add(name)
        self.num_bytes += tensor.size
        self._progress("loading weights", self.num_bytes, self._total)


def _open(files: Sequence[Path], resources: ExitStack) -> dict[str, _Entry]:
    """Open the files; return the tensors by name."""
    entries: dict[str, _Entry] = {}
    for path in files:
        file = resources.enter_context(path.open("rb", buffering=0))
        for name, tensor in read_header(path).tensors.items():
            if name in entries:
                raise ModelFolderError(f"{path} repeats {name} of {entries[name].path}")
            entries[name] = _Entry(path, file, tensor)
    return entries


def _with_prefix(entries: dict[str, _Entry]) -> dict[str, _Entry]:
    """Name the tensors of a body that was saved without its head, as of Qwen3-Embedding, as usual:
    model.layers.0 for layers.0.
    """
    if "embed_tokens.weight" not in entries:
        return entries
    return {f"model.{name}": entry for name, entry in entries.items()}


def _no_progress(what: str, done: int, total: int) -> None:
    """Without a terminal there is only the log line at the end."""
