"""What crosses between host and device in a step, without a copy: kernels reach pinned memory.

Owns the pinned memory, the launches at both ends of a step, and the events that say when it is
done. Does not know what is computed between them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mili.kernels.module import Launch
from mili.kernels.step import (
    DELTAS,
    MAX_ROWS,
    OUTPUTS,
    BatchTensors,
    SequenceTensors,
    begin_step,
    end_step,
)

# Above any pipeline depth that a router may have.
_SLOTS = 32
# Bytes of deltas that have a place; more, in a step that admits a lot, are copied first.
_DELTA_BYTES = 1 << 18


class Slot(NamedTuple):
    """The host's side of one step in flight: views of pinned memory."""

    input: torch.Tensor  # [DELTAS] int32
    columns: memoryview  # [DELTAS] int32: the same
    deltas: memoryview  # bytes behind them
    output: memoryview  # [OUTPUTS] int32
    begin: Launch
    end: Launch
    started: torch.cuda.Event
    ended: torch.cuda.Event


class Transfer:
    """The device's side, and a ring of slots: as many as there may be steps in flight.

    Everything runs on the stream that is current when this is made.
    """

    def __init__(self, batch: BatchTensors, table: SequenceTensors, device: torch.device) -> None:
        self._table, self._device = table, device
        self.input = torch.zeros(DELTAS, dtype=torch.int32, device=device)
        self.sampled = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        self._ring = [self._make_slot(batch) for _ in range(_SLOTS)]
        self._next = 0

    def take(self) -> Slot:
        """The slot of the next step. Waits for the step that had it before."""
        slot = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        slot.ended.synchronize()
        return slot

    def begin(self, slot: Slot, deltas: bytes) -> None:
        """Take over the slot's columns and the deltas."""
        slot.started.record()
        if len(deltas) <= len(slot.deltas):
            slot.deltas[: len(deltas)] = deltas
            slot.begin()
        else:
            ints = torch.frombuffer(bytearray(deltas), dtype=torch.int32).to(self._device)
            begin_step(slot.input, self.input, self._table, deltas=ints)()

    def end(self, slot: Slot) -> None:
        """Hand out the results, and mark the step's end."""
        slot.end()
        slot.ended.record()

    def _make_slot(self, batch: BatchTensors) -> Slot:
        inputs = torch.zeros(DELTAS + _DELTA_BYTES // 4, dtype=torch.int32, pin_memory=True)
        output = torch.zeros(OUTPUTS, dtype=torch.int32, pin_memory=True)
        started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return Slot(
            input=inputs,
            columns=inputs[:DELTAS].numpy().data,
            deltas=inputs[DELTAS:].numpy().data.cast("B"),
            output=output.numpy().data,
            begin=begin_step(inputs, self.input, self._table),
            end=end_step(batch, self._table.faulted, self.sampled, output),
            started=started,
            ended=ended,
        )
