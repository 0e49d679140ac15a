"""A step while it is put together, and what is remembered of it while it is in flight.

Owns the columns of a command. Does not decide what is in them.
"""

from __future__ import annotations

from typing import NamedTuple

from mili.internal.v1.step_pb2 import Admission, StepCommand, StepResult
from mili.router.readings import Readings, to_embedding, to_token_logprobs
from mili.router.request import NEVER, Request
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

    def read(self, result: StepResult) -> None:
        """Give the requests what the step read of them. Must come before their counters move."""
        for message in result.logprobs:
            request = self.rows[message.index].request
            if request.finish is not None or request.is_cut:
                continue
            piece = to_token_logprobs(message)
            if piece.first_position < request.num_prompt_tokens:
                request.score(piece)
            else:
                request.read(Readings(sampled=(piece,)))
        for embedding in result.embeddings:
            request = self.rows[embedding.index].request
            request.read(Readings(embedding=to_embedding(embedding.values)))


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

    def admit(self, request: Request) -> None:
        """Have the request's row begin with all that is known of it."""
        params = request.params
        admission = Admission(
            row=request.row,
            admission=request.admission,
            token_ids=request.token_ids.tobytes(),
            num_prompt_tokens=request.num_prompt_tokens,
            task=params.task,
            sampling=params.sampling,
            num_logprobs=params.num_logprobs,
            grammar=request.grammar,
        )
        if (position := request.score_from) != NEVER:
            admission.score_from = position
            admission.num_scored_alternatives = params.num_prompt_logprobs or 0
        self.admissions.append(admission)

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
