"""A step while it is put together, and what is remembered of it while it is in flight.

Owns the columns of a command. Does not decide what is in them.
"""

from __future__ import annotations

from typing import NamedTuple

from mili.internal.v1.step_pb2 import Admission, StepCommand
from mili.router.request import Request
from mili.router.step_cost import StepSize


class Scheduled(NamedTuple):
    """One row of a step in flight, as it was when the command was made."""

    request: Request
    admission: int
    # Positions that are computed once this step is done.
    num_computed: int
    samples: bool


class StepInFlight(NamedTuple):
    step: int
    rows: list[Scheduled]
    size: StepSize


class StepPlan:
    """A step while it is put together: a message's own columns are slow to append to."""

    __slots__ = (
        "admissions",
        "block_ids",
        "block_rows",
        "counts",
        "num_admitted_tokens",
        "pairs",
        "rows",
        "scheduled",
        "starts",
    )

    def __init__(self) -> None:
        self.admissions: list[Admission] = []
        self.num_admitted_tokens = 0
        self.pairs = 0.0
        self.block_rows: list[int] = []
        self.block_ids: list[int] = []
        self.rows: list[int] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.scheduled: list[Scheduled] = []

    def add_blocks(self, row: int, blocks: list[int]) -> None:
        self.block_rows += [row] * len(blocks)
        self.block_ids += blocks

    def size(self) -> StepSize:
        return StepSize(sum(self.counts), sum(self.starts), self.pairs)

    def command(self, step: int) -> StepCommand:
        return StepCommand(
            step=step,
            admissions=self.admissions,
            block_rows=self.block_rows,
            block_ids=self.block_ids,
            rows=self.rows,
            starts=self.starts,
            num_tokens=self.counts,
        )
