"""What crosses between host and device in a step: one copy in, one copy out.

Owns the pinned memory and the events that say when a step is done. Does not know what is copied.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]


class Slot(NamedTuple):
    """The host's side of one step in flight. Arrays are views of pinned memory."""

    input: torch.Tensor  # [capacity] int32
    input_array: Int32Array
    output: torch.Tensor  # [outputs] int32
    output_array: Int32Array
    started: torch.cuda.Event
    ended: torch.cuda.Event


class Transfer:
    """The device's side, and a ring of slots: as many as there may be steps in flight."""

    def __init__(self, *, capacity: int, outputs: int, slots: int, device: torch.device) -> None:
        self.input = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.output = torch.zeros(outputs, dtype=torch.int32, device=device)
        self._ring = [_make_slot(capacity, outputs) for _ in range(slots)]
        self._next = 0

    @property
    def capacity(self) -> int:
        return len(self.input)

    def take(self) -> Slot:
        """The slot of the next step. Waits for the step that had it before."""
        slot = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        slot.ended.synchronize()
        return slot

    def begin(self, slot: Slot, size: int) -> None:
        """Copy the first `size` integers of the slot's input, on the current stream."""
        slot.started.record()
        self.input[:size].copy_(slot.input[:size], non_blocking=True)

    def end(self, slot: Slot) -> None:
        """Copy the output back, and mark the step's end."""
        slot.output.copy_(self.output, non_blocking=True)
        slot.ended.record()


def _make_slot(capacity: int, outputs: int) -> Slot:
    inputs = torch.zeros(capacity, dtype=torch.int32, pin_memory=True)
    output = torch.zeros(outputs, dtype=torch.int32, pin_memory=True)
    started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return Slot(inputs, inputs.numpy(), output, output.numpy(), started, ended)
