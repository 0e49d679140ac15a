"""From a file into a tensor: straight into the host's memory, in chunks to a GPU.

Owns the threads, the staging memory and their order. Does not know names or file formats.
"""

from __future__ import annotations

import math
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import BinaryIO, Protocol

import torch

from mili.hub.errors import ModelFolderError

HOST_BYTES = 32 << 20
CHUNK_BYTES = 2 << 20
NUM_CHUNKS = 32


class TensorReader(Protocol):
    """Reads tensors to one device."""

    def read(self, file: BinaryIO, start: int, dtype: torch.dtype, target: torch.Tensor) -> None:
        """Fill target with the values of `dtype` that begin at byte `start` of the file.

        target: on the reader's device, of any dtype and strides. Raises ModelFolderError or OSError
        where the file cannot be read. On a GPU the values are there for what follows on the current
        stream, and for everyone after `wait`.
        """

    def wait(self) -> None:
        """Wait until every value is in place."""

    def close(self) -> None:
        """End what reads in the background."""


class HostReader:
    """Reads to a CPU, on the caller's thread: into place, or through a buffer to be converted."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def read(self, file: BinaryIO, start: int, dtype: torch.dtype, target: torch.Tensor) -> None:
        if target.dtype == dtype and target.is_contiguous():
            _fill(target.view(-1), file, start)
            return
        if not self._memory.numel():
            self._memory = torch.empty(HOST_BYTES, dtype=torch.uint8)
        for part in _parts(target, dtype, HOST_BYTES):
            stored = self._memory[: part.numel() * dtype.itemsize].view(dtype)
            _fill(stored, file, start)
            part.copy_(stored.view(part.shape))
            start += stored.nbytes

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class StagedReader:
    """Reads to a GPU, so that disk, bus and device work at the same time.

    Threads read the chunks of one tensor into a ring of page-locked memory; the caller's thread
    sends each chunk on as soon as it and those before it are there, on its own stream, and has the
    device convert it. Nothing is ever whole in the host's memory. Many threads, because a network's
    disk is fast only when it is asked for much at once.
    """

    def __init__(self, device: torch.device, num_chunks: int = NUM_CHUNKS) -> None:
        on_gpu = device.type == "cuda"
        memory = torch.empty(num_chunks, CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        self._chunks = [_Chunk(row, device) for row in memory]
        self._ring = cycle(self._chunks)
        # Half of the chunks are read while the others are copied.
        self._pool = ThreadPoolExecutor(-(-num_chunks // 2), "read-weights")

    def read(self, file: BinaryIO, start: int, dtype: torch.dtype, target: torch.Tensor) -> None:
        reading: deque[tuple[_Chunk, Future[None], torch.Tensor]] = deque()

        def send_first() -> None:
            chunk, filled, part = reading.popleft()
            filled.result()
            chunk.copy_to(part, dtype)

        for part in _parts(target, dtype, CHUNK_BYTES):
            if len(reading) == len(self._chunks):
                send_first()
            chunk, num_bytes = next(self._ring), part.numel() * dtype.itemsize
            reading.append((chunk, self._pool.submit(chunk.fill, file, start, num_bytes), part))
            start += num_bytes
        while reading:
            send_first()

    def wait(self) -> None:
        for chunk in self._chunks:
            chunk.wait()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Chunk:
    """Staging memory of CHUNK_BYTES."""

    def __init__(self, memory: torch.Tensor, device: torch.device) -> None:
        self._memory = memory  # [CHUNK_BYTES] uint8
        self._device = device
        # The end of the last copy out of the memory.
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fill(self, file: BinaryIO, start: int, num_bytes: int) -> None:
        """Read so many bytes of the file, on any thread, once the memory is free again."""
        self.wait()
        _fill(self._memory[:num_bytes], file, start)

    def copy_to(self, target: torch.Tensor, dtype: torch.dtype) -> None:
        """Convert what was filled in from `dtype` into target, on the current stream."""
        num_bytes = target.numel() * dtype.itemsize
        stored = self._memory[:num_bytes].view(dtype).view(target.shape)
        target.copy_(stored.to(self._device, non_blocking=True))
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Wait until the memory was copied out."""
        if self._copied is not None:
            self._copied.synchronize()


def _parts(target: torch.Tensor, dtype: torch.dtype, limit: int) -> tuple[torch.Tensor, ...]:
    """Divide target, row by row unless it is contiguous, so that each part fits so many bytes."""
    rows = target.view(-1) if target.is_contiguous() else target
    row_bytes = dtype.itemsize * math.prod(rows.shape[1:])
    assert row_bytes <= limit, f"a row of {row_bytes} bytes, not contiguous with the next"
    return torch.split(rows, limit // row_bytes)


def _fill(target: torch.Tensor, file: BinaryIO, start: int) -> None:
    """Read the bytes of a host tensor, [values] and contiguous, from byte `start` of the file."""
    view = target.view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], start + done)
        if count == 0:
            raise ModelFolderError(f"{file.name} was cut short while it was read")
        done += count
