"""Blocks of many rows in one command: each row's stay in order, behind those that it has."""

from __future__ import annotations

from array import array

import pytest

from mili.internal.v1.step_pb2 import Admission, StepCommand
from mili.worker.sequence_table import CommandError, SequenceTable

MAX_BLOCKS = 4


@pytest.fixture
def table() -> SequenceTable:
    table = SequenceTable(
        max_rows=5, max_model_len=16 * MAX_BLOCKS, block_size=16, num_blocks=20, vocab_size=10
    )
    admissions = [Admission(row=row, token_ids=array("I", [1]).tobytes()) for row in range(1, 5)]
    table.apply(StepCommand(admissions=admissions))
    return table


def append(table: SequenceTable, *blocks: tuple[int, int]) -> None:
    """Row and id of each."""
    rows, ids = zip(*blocks, strict=True)
    table.apply(StepCommand(block_rows=rows, block_ids=ids))


def blocks_of(table: SequenceTable, row: int) -> list[int]:
    ids: list[int] = table.block_table[row, : table.num_blocks[row]].tolist()
    return ids


def test_the_blocks_of_rows_that_alternate_keep_their_order(table: SequenceTable) -> None:
    append(table, (2, 15), (1, 19), (2, 4), (4, 7), (1, 8), (2, 9))
    assert [blocks_of(table, row) for row in range(1, 5)] == [[19, 8], [15, 4, 9], [], [7]]
    told = {tuple(block) for block in table.appended.tolist()}
    assert told == {(1, 0, 19), (1, 1, 8), (2, 0, 15), (2, 1, 4), (2, 2, 9), (4, 0, 7)}


def test_blocks_are_appended_behind_those_of_earlier_commands(table: SequenceTable) -> None:
    append(table, (2, 15), (1, 19), (2, 4))
    append(table, (3, 2), (2, 1), (1, 3), (3, 6), (2, 5))
    assert [blocks_of(table, row) for row in (1, 2, 3)] == [[19, 3], [15, 4, 1, 5], [2, 6]]
    told = {tuple(block) for block in table.appended.tolist()}
    assert told == {(3, 0, 2), (3, 1, 6), (2, 2, 1), (2, 3, 5), (1, 1, 3)}
    table.apply(StepCommand())
    assert table.appended.shape == (0, 3), "what was told before is told again"


def test_a_row_that_is_admitted_again_begins_without_blocks(table: SequenceTable) -> None:
    append(table, (1, 5), (1, 6))
    again = Admission(row=1, token_ids=array("I", [1]).tobytes())
    table.apply(StepCommand(admissions=[again], block_rows=[1], block_ids=[9]))
    assert blocks_of(table, 1) == [9]


def test_what_does_not_fit_is_refused_and_changes_nothing(table: SequenceTable) -> None:
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
