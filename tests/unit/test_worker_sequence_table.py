"""Blocks of many rows in one command: each row's stay in order, behind those that it has."""

from __future__ import annotations

from array import array

import pytest

from mili.internal.v1.step_pb2 import Admission, StepCommand
from mili.worker.cpu.sequence_table import CpuSequenceTable
from mili.worker.sequence_table import CommandError

MAX_BLOCKS = 4


@pytest.fixture
def table() -> CpuSequenceTable:
    table = CpuSequenceTable(
        max_rows=5, max_model_len=16 * MAX_BLOCKS, block_size=16, num_blocks=20, vocab_size=10
    )
    admissions = [Admission(row=row, token_ids=array("I", [1]).tobytes()) for row in range(1, 5)]
    table.apply(StepCommand(admissions=admissions))
    return table


def append(table: CpuSequenceTable, *blocks: tuple[int, int]) -> list[tuple[int, ...]]:
    """Row and id of each; returns row, index and id of each, as the device will be told."""
    rows, ids = zip(*blocks, strict=True)
    told = table.apply(StepCommand(block_rows=rows, block_ids=ids)).appended
    return list(zip(*[iter(told)] * 3, strict=True))


def blocks_of(table: CpuSequenceTable, row: int) -> list[int]:
    ids: list[int] = table.block_table[row, : table.num_blocks[row]].tolist()
    return ids


def test_the_blocks_of_rows_that_alternate_keep_their_order(table: CpuSequenceTable) -> None:
    told = append(table, (2, 15), (1, 19), (2, 4), (4, 7), (1, 8), (2, 9))
    assert [blocks_of(table, row) for row in range(1, 5)] == [[19, 8], [15, 4, 9], [], [7]]
    assert set(told) == {(1, 0, 19), (1, 1, 8), (2, 0, 15), (2, 1, 4), (2, 2, 9), (4, 0, 7)}


def test_blocks_are_appended_behind_those_of_earlier_commands(table: CpuSequenceTable) -> None:
    append(table, (2, 15), (1, 19), (2, 4))
    told = append(table, (3, 2), (2, 1), (1, 3), (3, 6), (2, 5))
    assert [blocks_of(table, row) for row in (1, 2, 3)] == [[19, 3], [15, 4, 1, 5], [2, 6]]
    assert set(told) == {(3, 0, 2), (3, 1, 6), (2, 2, 1), (2, 3, 5), (1, 1, 3)}
    assert table.apply(StepCommand()).appended == [], "what was told before is told again"


def test_a_row_that_is_admitted_again_begins_without_blocks(table: CpuSequenceTable) -> None:
    append(table, (1, 5), (1, 6))
    again = Admission(row=1, token_ids=array("I", [1]).tobytes())
    table.apply(StepCommand(admissions=[again], block_rows=[1], block_ids=[9]))
    assert blocks_of(table, 1) == [9]


def test_what_does_not_fit_is_refused_and_changes_nothing(table: CpuSequenceTable) -> None:
    append(table, (1, 5))
    with pytest.raises(CommandError, match="too many blocks"):
        append(table, *((1, block) for block in range(1, MAX_BLOCKS + 1)))
    with pytest.raises(CommandError, match="no block 20"):
        append(table, (1, 6), (2, 20))
    with pytest.raises(CommandError, match="no block 0"):
        append(table, (1, 0))
    with pytest.raises(CommandError, match="no row 5"):
        append(table, (5, 6))
    with pytest.raises(CommandError, match="columns differ"):
        table.apply(StepCommand(block_rows=[1, 2], block_ids=[3]))
    assert [blocks_of(table, row) for row in (1, 2)] == [[5], []]
