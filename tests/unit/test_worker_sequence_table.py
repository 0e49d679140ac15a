"""Blocks of many rows in one command: each row's stay in order, behind those that it has."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from mili.internal.v1.step_pb2 import Admission, Sampling, StepCommand
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


ADMITTED = array("I", [1]).tobytes()


def sampled(**fields: Any) -> dict[str, Any]:  # noqa: ANN401
    sampling = Sampling(**fields)
    return {"admissions": [Admission(row=1, token_ids=ADMITTED, sampling=sampling)]}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ({"block_rows": [1] * 5, "block_ids": [1, 2, 3, 4, 5]}, "too many blocks"),
        ({"block_rows": [1, 2], "block_ids": [6, 20]}, "no block 20"),
        ({"block_rows": [1], "block_ids": [0]}, "no block 0"),
        ({"block_rows": [5], "block_ids": [6]}, "no row 5"),
        ({"block_rows": [0], "block_ids": [6]}, "no row 0"),
        ({"block_rows": [1, 2], "block_ids": [3]}, "columns differ"),
        ({"admissions": [Admission(row=5, token_ids=ADMITTED)]}, "no row 5"),
        ({"admissions": [Admission(row=0, token_ids=ADMITTED)]}, "no row 0"),
        ({"admissions": [Admission(row=1)]}, "0 tokens"),
        ({"admissions": [Admission(row=1, token_ids=ADMITTED * 65)]}, "65 tokens"),
        ({"admissions": [Admission(row=1, token_ids=ADMITTED[:3])]}, "half a token"),
        ({"admissions": [Admission(row=1, token_ids=b"\n\0\0\0")]}, "out of range"),
        ({"admissions": [Admission(row=1, token_ids=ADMITTED, adapter=1)]}, "cannot do"),
        ({"admissions": [Admission(row=1, token_ids=ADMITTED, num_prompt_tokens=2)]}, "prompt"),
        (sampled(suppressed_token_ids=[10]), "suppressed or allowed id"),
        (sampled(allowed_token_ids=[3, 10]), "suppressed or allowed id"),
        (sampled(bias_token_ids=[3], biases=[1, 2]), "biases"),
        (sampled(bias_token_ids=range(1025), biases=[1] * 1025), "biases"),
        (sampled(bias_token_ids=[3, 3], biases=[1, 2]), "must rise"),
        (sampled(bias_token_ids=[3, 10], biases=[1, 2]), "end in the vocabulary"),
        ({"rows": [5], "starts": [0], "num_tokens": [1]}, "no such row"),
        ({"rows": [0], "starts": [0], "num_tokens": [1]}, "no such row"),
        ({"rows": [1], "starts": [0], "num_tokens": [1]}, "0 blocks"),
        ({"rows": [1], "starts": [0, 1], "num_tokens": [1]}, "columns differ"),
        ({"rows": [1, 1], "starts": [0, 0], "num_tokens": [1, 1]}, "named twice"),
    ],
)
def test_what_does_not_fit_is_refused(
    table: CpuSequenceTable, command: dict[str, Any], reason: str
) -> None:
    """Taken or checked, nothing of it reaches what is computed with."""
    before = table.token_ids.copy(), table.block_table.copy()
    with pytest.raises(CommandError, match=reason):
        table.apply(StepCommand(**command))
    assert (before[0] == table.token_ids).all() and (before[1] == table.block_table).all()


def test_what_was_taken_is_checked_against_what_is_held_now(table: CpuSequenceTable) -> None:
    """As it is where the step is launched in between."""
    command = StepCommand(
        admissions=[Admission(row=1, token_ids=ADMITTED * 20)],
        block_rows=[1, 1],
        block_ids=[3, 4],
        rows=[1],
        starts=[16],
        num_tokens=[4],
    )
    taken = table.take(command)
    assert taken == ([1], [16], [4], [1, 0, 3, 1, 1, 4])
    table.check(command, taken)
    table.advance([1], [20], [True])
    assert (table.num_known[1], table.num_computed[1], table.num_blocks[1]) == (21, 20, 2)
    with pytest.raises(CommandError, match="has 20 computed, 21 known tokens and 2 blocks"):
        table.check(command, taken)
