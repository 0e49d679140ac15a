"""A step that was launched: its result, once the device is done.

Owns the way from the device's output to a StepResult. Does not know how a step is launched.
"""

from __future__ import annotations

from typing import NamedTuple

from mili.internal.v1.step_pb2 import (
    ROW_FAULT_KIND_GRAMMAR,
    ROW_FAULT_KIND_NUMERIC,
    RowFault,
    StepResult,
)
from mili.kernels.step import MAX_ROWS
from mili.worker.cuda.reader import StepReadings
from mili.worker.cuda.staging import StepRows
from mili.worker.cuda.transfer import Slot

_NOBODY: frozenset[int] = frozenset()
# Beside the device's own 1.
_UNFIT = 2
_FAULT_KINDS = {1: ROW_FAULT_KIND_NUMERIC, _UNFIT: ROW_FAULT_KIND_GRAMMAR}


class PendingStep(NamedTuple):
    """A step that was launched."""

    step: int
    rows: StepRows
    slot: Slot
    readings: StepReadings | None = None
    # Table rows whose grammar has failed.
    unfit: frozenset[int] = _NOBODY

    def result(self) -> StepResult:
        """Wait for the step's end. May be called from another thread."""
        rows, slot = self.rows, self.slot
        # While the device works: what it will say if no row is faulted.
        result = StepResult(step=self.step, num_new=map(int, rows.samples))
        is_in_order = isinstance(rows.order, range)
        slot.ended.synchronize()
        result.device_microseconds = round(slot.started.elapsed_time(slot.ended) * 1000)
        tokens = slot.output[: rows.num_samples].tolist()
        faulted = slot.output[MAX_ROWS : MAX_ROWS + len(rows.rows)].tolist()
        readings = self.readings
        silent = readings.silent if readings else _NOBODY
        if self.unfit:
            columns = zip(rows.rows, faulted, strict=True)
            faulted = [_UNFIT if row in self.unfit else fault for row, fault in columns]
        if is_in_order and not self.unfit and 1 not in faulted and not silent:
            result.token_ids.extend(tokens)
        else:
            self._sort_into(result, tokens, faulted, silent)
        if readings:
            readings.fill(result, rows.order, faulted)
        return result

    def _sort_into(
        self, result: StepResult, tokens: list[int], faulted: list[int], silent: frozenset[int]
    ) -> None:
        """Into the command's order, without the tokens of faulted and of silent rows."""
        rows, remaining = self.rows, iter(tokens)
        by_place: dict[int, int] = {}
        columns = zip(rows.order, rows.samples, faulted, strict=True)
        for index, (place, samples, fault) in enumerate(columns):
            token = next(remaining) if samples else None
            if token is not None and not fault and index not in silent:
                by_place[place] = token
        places = range(len(rows.order))
        del result.num_new[:]
        result.num_new.extend(int(place in by_place) for place in places)
        result.token_ids.extend(by_place[place] for place in places if place in by_place)
        result.faults.extend(
            RowFault(index=place, kind=_FAULT_KINDS[fault])
            for place, fault in sorted(zip(rows.order, faulted, strict=True))
            if fault
        )
