"""What becomes of a request, as it is told: its output step by step, its end and its account.

Owns the values that leave the core. Does not know how they come to be, or messages.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from mili.router.errors import Reason, RequestError
from mili.router.parsed_text import Text
from mili.router.readings import Readings


class FinishReason(IntEnum):
    """Equal in number to mili.v1.FinishReason (a test proves it)."""

    EOS = 1
    STOP_SEQUENCE = 2
    STOP_TOKEN = 3
    MAX_TOKENS = 4
    CONTEXT_LENGTH = 5
    TIME_LIMIT = 6
    TOOL_CALLS = 7
    CANCELLED = 8
    ERROR = 9


class Finish(NamedTuple):
    """How a request ended. `matched` is the stop sequence or stop token id, if one ended it."""

    reason: FinishReason
    matched: str | int | None = None
    error: RequestError | None = None


class RequestOutput(NamedTuple):
    """What one step gave one sequence. Immutable: the only thing that reaches the API."""

    # Of the call, whichever of its sequences this is.
    request_id: str
    token_ids: tuple[int, ...] = ()
    text: Text = ""
    # Index of the first of token_ids in the output, from 0.
    first_token_index: int = 0
    # Set once, when the first of the sequences was admitted for the first time.
    started: Started | None = None
    # Set once, in the sequence's last output.
    finished: Finished | None = None
    # Which of the call's sequences, from 0. (It hides tuple.index.)
    index: int = 0  # type: ignore[assignment]
    # Of these tokens, of the prompt before the first, or instead of any.
    readings: Readings | None = None
    # Set when another worker goes on with the sequence.
    recovery: Recovery | None = None


class Started(NamedTuple):
    prompt_tokens: int
    cached_prompt_tokens: int


class Recovery(NamedTuple):
    """The request moved to another worker, or to the same one after its restart.

    reason: WORKER_LOST or DRAINING. gap: seconds from its last token, or its first admission, until
    a worker went on with it.
    """

    reason: Reason
    recomputed_tokens: int
    gap: float


class Usage(NamedTuple):
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    recomputed_tokens: int
    # Of requests whose output is parsed.
    reasoning_tokens: int = 0


class Timing(NamedTuple):
    """Seconds, and counts."""

    queue: float
    prefill: float
    time_to_first_token: float
    decode: float
    total: float
    preemptions: int
    recoveries: int
    worker: str
    # Of `queue`: until the worker had the grammar ready.
    grammar_compile: float = 0.0


class Finished(NamedTuple):
    """How a sequence ended; what its whole call used so far, and where the time went.

    num_left: sequences of the call that have not ended; 0 in the call's last output.
    others_succeeded: one that ended earlier did so without an error.
    """

    finish: Finish
    usage: Usage
    timing: Timing
    num_left: int = 0
    others_succeeded: bool = False

    @property
    def failure(self) -> RequestError | None:
        """Why the call failed, if it ends here and no sequence of it succeeded."""
        return None if self.num_left or self.others_succeeded else self.finish.error
