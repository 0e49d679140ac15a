"""How fast a worker group gets on, and how much of prompts its next step may compute.

Owns the counts of running tokens, the model of a step's cost, and the latency goal of the streams.
Does not know blocks, rows, who waits, or a clock: seconds come with the results.

The time that a step takes is the gap between two tokens of every stream in it. So prompts get what
the goal leaves when the streams have had theirs (Sarathi-Serve's chunks, Agrawal et al., 2024, with
a size that follows from the measured cost): as much as they like while nobody streams.
"""

from __future__ import annotations

import math

from mili.router.request import Request
from mili.router.step_cost import StepCost, StepSize

# However long the streams themselves take, prompts get so much of the goal, and each chunk so many
# tokens: who waits for its first token does not starve.
LEAST_PROMPT_SHARE = 0.25
LEAST_CHUNK = 16
# Output tokens of an ordinary request until some have ended, and the weight of one more of these.
FIRST_OUTPUT_TOKENS = 128.0
OUTPUT_TOKENS_WEIGHT = 0.05


class Pace:
    """The running requests of one worker group, as numbers.

    itl_goal: seconds that a stream should wait for its next token at most; math.inf for steps as
    large as they can be. num_known, num_computed: tokens of all that run, the former without those
    that a step in flight will sample. stream_seconds: of a step of the streams alone.
    prompt_seconds: what prompts may add to it. prompt_token_seconds: for a token of a prompt, the
    streams' part of its steps included.
    """

    def __init__(self, itl_goal: float) -> None:
        self.cost = StepCost()
        self.num_known = 0
        self.num_computed = 0
        self.stream_seconds = 0.0
        self.prompt_seconds = math.inf
        self.prompt_token_seconds = self.cost.token_seconds
        self.mean_output_tokens = FIRST_OUTPUT_TOKENS
        self._itl_goal = itl_goal
        # Those that ran when their prompts were not computed to the end.
        self._prompts: dict[str, Request] = {}

    def admitted(self, request: Request) -> None:
        self.num_known += len(request.token_ids)
        self.num_computed += request.num_computed

    def left(self, request: Request) -> None:
        """A request is about to lose its row: it has ended, or is preempted."""
        self.num_known -= len(request.token_ids)
        self.num_computed -= request.num_computed

    def interrupted(self, request: Request) -> None:
        """A step computes only a part of the prompt."""
        self._prompts[request.request_id] = request

    def ended(self, request: Request) -> None:
        """Learn from a request that ran to its end."""
        more = request.num_output_tokens - self.mean_output_tokens
        self.mean_output_tokens += OUTPUT_TOKENS_WEIGHT * more

    def judge(self, num_running: int) -> None:
        """Before a step: how long the streams take, and how long prompts may take beside them."""
        still = self._prompts.items()
        self._prompts = {
            name: each for name, each in still if each.row and each.num_schedulable > 1
        }
        num_streams = num_running - len(self._prompts)
        if num_streams == 0:
            self.stream_seconds, self.prompt_seconds = 0.0, math.inf
            self.prompt_token_seconds = self.cost.token_seconds
            return
        context = self.num_computed - sum(each.num_computed for each in self._prompts.values())
        self.stream_seconds = self.cost.predict(StepSize(num_streams, context, 0.0))
        spare = self._itl_goal / self.cost.margin - self.stream_seconds
        self.prompt_seconds = max(spare, LEAST_PROMPT_SHARE * self._itl_goal)
        streams_part = self.stream_seconds / self.prompt_seconds
        self.prompt_token_seconds = self.cost.token_seconds * (1.0 + streams_part)

    def chunk(self, seconds: float, start: int, most: int) -> tuple[int, float]:
        """How many tokens of a prompt fit the seconds left for prompts, and what is left then.

        Nothing is left after a chunk that was cut.
        """
        if seconds <= 0:
            return 0, seconds
        count = self.cost.chunk_within(seconds, start, most)
        if count < most:
            return min(most, max(count, LEAST_CHUNK)), 0.0
        return most, seconds - self.cost.chunk_seconds(start, most)

    def check(self, running: list[Request]) -> None:
        """Assert that the counts are right; for tests."""
        assert self.num_known == sum(len(request.token_ids) for request in running)
        assert self.num_computed == sum(request.num_computed for request in running)
