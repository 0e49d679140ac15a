"""From what the device handed out to a result, in the command's order."""

from __future__ import annotations

from array import array

import pytest

pytest.importorskip("cupy")  # which the layout's module imports for its kernels

from typing import Any

from mili.internal.v1.step_pb2 import ROW_FAULT_KIND_NUMERIC
from mili.kernels.step import MAX_ROWS, OUTPUTS
from mili.worker.cuda.pending_step import PendingStep
from mili.worker.cuda.staging import order_rows
from mili.worker.cuda.transfer import Slot


class Event:
    waited = False

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, other: Event) -> float:
        assert other.waited
        return 1.25


def slot(tokens: list[int], faulted: list[int]) -> Slot:
    output = array("i", [-7]) * OUTPUTS
    output[: len(tokens)] = array("i", tokens)
    output[MAX_ROWS : MAX_ROWS + len(faulted)] = array("i", faulted)
    nothing: Any = None
    event: Any = Event
    return Slot(
        input=nothing,
        columns=nothing,
        deltas=nothing,
        output=memoryview(output),
        begin=nothing,
        end=nothing,
        started=event(),
        ended=event(),
    )


def test_tokens_and_faults_stand_in_the_commands_order() -> None:
    known = [0, 5, 9, 31, 4, 7, 100]
    # A chunk that gives no token, a prompt, and three that decode.
    rows = order_rows([6, 1, 3, 4, 5], [0, 0, 30, 3, 6], [64, 5, 1, 1, 1], known)
    assert list(rows.order) == [2, 3, 4, 0, 1]
    pending = PendingStep(8, rows, slot([11, 12, 13, 14], faulted=[0, 1, 0, 0, 0]))
    result = pending.result()
    assert result.step == 8 and result.device_microseconds == 1250
    assert list(result.num_new) == [0, 1, 1, 0, 1]
    assert list(result.token_ids) == [14, 11, 13], "the faulted row's token is dropped"
    assert [(fault.index, fault.kind) for fault in result.faults] == [(3, ROW_FAULT_KIND_NUMERIC)]


@pytest.mark.parametrize("faulted", [False, True])
def test_rows_that_stand_in_order_already(faulted: bool) -> None:
    rows = order_rows([3, 1, 2], [4, 6, 8], [1, 1, 1], [0, 7, 10, 5])
    result = PendingStep(2, rows, slot([21, 22], faulted=[0, 0, int(faulted)])).result()
    assert list(result.num_new) == [1, 1, 0], "row 2 has a token more than it computes"
    assert list(result.token_ids) == [21, 22]
    assert [fault.index for fault in result.faults] == [2] * faulted
    result = PendingStep(2, rows, slot([21, 22], faulted=[int(faulted), 0, 0])).result()
    assert list(result.num_new) == [int(not faulted), 1, 0]
    assert list(result.token_ids) == [21, 22][faulted:]


def test_a_faulted_chunk_is_told_though_it_has_no_token() -> None:
    rows = order_rows([1, 2], [0, 4], [64, 1], [0, 100, 5])
    result = PendingStep(1, rows, slot([3], faulted=[0, 1])).result()
    assert list(result.num_new) == [0, 1]
    assert list(result.token_ids) == [3]
    assert [fault.index for fault in result.faults] == [0]
