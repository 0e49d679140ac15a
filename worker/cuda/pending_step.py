"""A step that was launched: its result, once the device is done.

Owns the way from the device's output to a StepResult. Does not know how a step is launched.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

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
        order, samples = self.rows.order, self.rows.samples
        num_rows = len(order)
        faulted = np.empty(num_rows, np.bool_)  # in the command's order, like all below
        faulted[order] = self.slot.output_array[MAX_ROWS : MAX_ROWS + num_rows] != 0
        tokens = np.full(num_rows, -1, np.int64)
        tokens[order[samples]] = self.slot.output_array[: np.count_nonzero(samples)]
        sampled = (tokens >= 0) & ~faulted
        return StepResult(
            step=self.step,
            num_new=sampled.astype(int).tolist(),
            token_ids=tokens[sampled].tolist(),
            faults=[
                RowFault(index=index, kind=ROW_FAULT_KIND_NUMERIC)
                for index in np.flatnonzero(faulted).tolist()
            ],
            device_microseconds=round(self.slot.started.elapsed_time(self.slot.ended) * 1000),
        )
