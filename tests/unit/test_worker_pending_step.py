"""From what the device handed out to a result, in the command's order."""

from __future__ import annotations

from array import array

import pytest

pytest.importorskip("cupy")  # which the layout's module imports for its kernels

from typing import Any

import torch

from mili.internal.v1.step_pb2 import ROW_FAULT_KIND_NUMERIC
from mili.kernels.step import MAX_ROWS, OUTPUTS
from mili.worker.cuda.pending_step import PendingStep
from mili.worker.cuda.reader import Block, StepReadings
from mili.worker.cuda.staging import order_rows
from mili.worker.cuda.transfer import Slot
from mili.worker.readings import Piece


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


def test_what_was_read_stands_in_the_commands_order() -> None:
    known = [0, 5, 9, 31, 4, 7, 100]
    # Row 6's chunk is scored, rows 3 and 5 read the token they sample, row 1 gives a vector.
    rows = order_rows([6, 1, 3, 4, 5], [0, 0, 30, 3, 6], [64, 5, 1, 1, 1], known)
    places = {row: place for place, row in enumerate(rows.rows)}
    scored = [Piece(places[6], 6, range(62, 65), 61, 2)]
    samples = [Piece(places[3], 3, range(31, 32), 0, 1), Piece(places[5], 5, range(7, 8), 0, 3)]
    readings = StepReadings(
        frozenset({places[1]}), [block(samples), block(scored)], [places[1]], torch.ones(1, 4)
    )
    result = PendingStep(1, rows, slot([11, 12, 13, 14], [0, 0, 1, 0, 0]), readings).result()
    assert list(result.num_new) == [0, 0, 1, 1, 0], "row 5 is faulted, row 1 samples nothing"
    assert list(result.token_ids) == [11, 12]
    told = [(each.index, each.first_position, each.width) for each in result.logprobs]
    assert told == [(2, 31, 1), (0, 62, 2)]
    values = [array("f", each.logprobs).tolist() for each in result.logprobs]
    assert values == [[0.0], [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]]
    assert list(array("I", result.logprobs[1].token_ids)) == [0, 1, 2, 3, 4, 5]
    assert [(each.index, len(each.values)) for each in result.embeddings] == [(1, 16)]


def block(pieces: list[Piece]) -> Block:
    """Token i of the block is i, with a log-probability of -i."""
    count, width = sum(len(p.positions) for p in pieces), max(p.width for p in pieces)
    ids = torch.arange(count * width, dtype=torch.int32).view(count, width)
    return Block(pieces, torch.stack([ids, (-ids.float()).view(torch.int32), ids]))


def test_a_faulted_chunk_is_told_though_it_has_no_token() -> None:
    rows = order_rows([1, 2], [0, 4], [64, 1], [0, 100, 5])
    result = PendingStep(1, rows, slot([3], faulted=[0, 1])).result()
    assert list(result.num_new) == [0, 1]
    assert list(result.token_ids) == [3]
    assert [fault.index for fault in result.faults] == [0]
