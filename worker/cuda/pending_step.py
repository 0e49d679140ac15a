"""A step that was launched: its result, once the device is done.

Owns the way from the device's output to a StepResult. Does not know how a step is launched.
"""

from __future__ import annotations

from typing import NamedTuple

from mili.internal.v1.step_pb2 import ROW_FAULT_KIND_NUMERIC, RowFault, StepResult
from mili.kernels.step import MAX_ROWS
from mili.worker.cuda.staging import StepRows
from mili.worker.cuda.transfer import Slot


class PendingStep(NamedTuple):
    """A step that was launched."""

    step: int
    rows: StepRows
    slot: Slot

    def result(self) -> StepResult:
        """Wait for the step's end. May be called from another thread."""
        self.slot.ended.synchronize()
        rows, output = self.rows, self.slot.output
        sampled = iter(output[: rows.num_samples].tolist())
        faulted = output[MAX_ROWS : MAX_ROWS + len(rows.order)].tolist()
        tokens: dict[int, int] = {}  # by place in the command
        for place, samples, fault in zip(rows.order, rows.samples, faulted, strict=True):
            token = next(sampled) if samples else None
            if token is not None and not fault:
                tokens[place] = token
        places = range(len(rows.order))
        return StepResult(
            step=self.step,
            num_new=[int(place in tokens) for place in places],
            token_ids=[tokens[place] for place in places if place in tokens],
            faults=[
                RowFault(index=place, kind=ROW_FAULT_KIND_NUMERIC)
                for place, fault in sorted(zip(rows.order, faulted, strict=True))
                if fault
            ],
            device_microseconds=round(self.slot.started.elapsed_time(self.slot.ended) * 1000),
        )
