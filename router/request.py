"""A request: what was asked, how far it is, and how it ended.

Owns the counters that the scheduler schedules by. Does not know about blocks being shared, time,
sockets or gRPC.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from mili.internal.v1.step_pb2 import Sampling
from mili.router.errors import Reason, RequestError


class FinishReason(IntEnum):
    """Equal in number to mili.v1.FinishReason (a test proves it)."""

    EOS = 1
    STOP_SEQUENCE = 2
    STOP_TOKEN = 3
    MAX_TOKENS = 4
    CONTEXT_LENGTH = 5
    CANCELLED = 8
    ERROR = 9


class Finish(NamedTuple):
    """How a request ended. `matched` is the stop sequence or stop token id, if one ended it."""

    reason: FinishReason
    matched: str | int | None = None
    error: RequestError | None = None


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """What the caller asked for, checked and with every default filled in.

    max_tokens counts output tokens; the context limit may end the request earlier.
    sampling.seed is always set. eos_token_ids is empty with ignore_eos.
    cache_namespace: prefixes are shared only inside one.
    """

    prompt_token_ids: Sequence[int]
    sampling: Sampling
    max_tokens: int
    min_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    stop_sequences: tuple[str, ...] = ()
    include_stop_text: bool = False
    text: bool = True
    skip_special_tokens: bool = True
    cache_namespace: bytes = b""


class TextOutput(Protocol):
    """Tokens in, text out: detokenizing and stop sequences of one request."""

    def push(self, token_id: int, *, may_stop: bool) -> str | None:
        """Take the next token; return the stop sequence that it completed, if it did."""

    def finish(self) -> None:
        """No more tokens come: release the text that was held back."""

    def take(self) -> str:
        """Return the text that became certain since the last call."""


class RequestOutput(NamedTuple):
    """What one step gave one request. Immutable: the only thing that reaches the API."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    # Index of the first of token_ids in the output, from 0.
    first_token_index: int = 0
    # Set once, when the request was admitted for the first time.
    started: Started | None = None
    # Set once, in the request's last output.
    finished: Finished | None = None


class Started(NamedTuple):
    prompt_tokens: int
    cached_prompt_tokens: int


class Usage(NamedTuple):
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    recomputed_tokens: int


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


class Finished(NamedTuple):
    finish: Finish
    usage: Usage
    timing: Timing


class Request:
    """One generation: its tokens, and how far each of them is.

    The scheduler compares `num_computed` with `num_tokens`; chunked prefill, prefix hits, resumed
    preemptions and decodes are all the same subtraction. Times are the engine's, in its clock.
    """

    __slots__ = (
        "admission",
        "admitted_at",
        "deaths",
        "finish",
        "first_token_at",
        "max_length",
        "namespace",
        "num_admissions",
        "num_cached_prompt_tokens",
        "num_computed",
        "num_pending",
        "num_preemptions",
        "num_prompt_tokens",
        "num_recomputed",
        "num_recoveries",
        "params",
        "peak_computed",
        "request_id",
        "row",
        "strikes",
        "submitted_at",
        "text",
        "token_ids",
        "total_deaths",
        "waiting_since",
        "worker",
    )

    def __init__(
        self,
        request_id: str,
        params: GenerationParams,
        *,
        context_limit: int,
        text: TextOutput | None = None,
        now: float = 0.0,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.text = text
        self.namespace = params.cache_namespace
        self.token_ids = array("I", params.prompt_token_ids)  # every known token, prompt first
        self.num_prompt_tokens = len(self.token_ids)
        self.max_length = min(self.num_prompt_tokens + params.max_tokens, context_limit)
        # Sampled by a step in flight and not yet known.
        self.num_pending = 0
        # Positions whose KV is computed by the steps scheduled so far, of the present admission.
        self.num_computed = 0
        # The most positions that were ever computed: beyond the cache, the rest is done again.
        self.peak_computed = 0
        self.num_recomputed = 0
        self.num_cached_prompt_tokens = 0
        # Row and admission number while running; 0 while waiting.
        self.row = 0
        self.admission = 0
        self.num_admissions = 0
        self.num_preemptions = 0
        self.num_recoveries = 0
        # Workers that died while a step of theirs computed this request: ever, and since its last
        # new token. A strike is such a death in which it was the only suspect.
        self.total_deaths = 0
        self.deaths = 0
        self.strikes = 0
        self.finish: Finish | None = None
        self.submitted_at = self.waiting_since = now
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.worker = ""

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_schedulable(self) -> int:
        """Tokens that a step could compute now: none once the last token is sampled."""
        num_tokens = len(self.token_ids) + self.num_pending
        return num_tokens - self.num_computed if num_tokens < self.max_length else 0

    @property
    def is_suspect(self) -> bool:
        """One death can happen beside anyone; a second one without a token between is a sign."""
        return self.deaths >= 2

    @property
    def usage(self) -> Usage:
        return Usage(
            self.num_prompt_tokens,
            self.num_cached_prompt_tokens,
            self.num_output_tokens,
            self.num_recomputed,
        )

    def timing(self, now: float) -> Timing:
        """Where the time went until now; what has not begun took none."""
        admitted_at = self.admitted_at if self.admitted_at is not None else now
        first_token_at = self.first_token_at if self.first_token_at is not None else now
        return Timing(
            queue=admitted_at - self.submitted_at,
            prefill=first_token_at - admitted_at,
            time_to_first_token=first_token_at - self.submitted_at,
            decode=now - first_token_at,
            total=now - self.submitted_at,
            preemptions=self.num_preemptions,
            recoveries=self.num_recoveries,
            worker=self.worker,
        )

    def accept(self, token_id: int) -> None:
        """The next token is known: append it, and set `finish` if it ends the request."""
        params = self.params
        self.token_ids.append(token_id)
        self.deaths = self.strikes = 0
        num_output = self.num_output_tokens
        may_stop = num_output > params.min_tokens
        if may_stop and token_id in params.eos_token_ids:
            return self.end(Finish(FinishReason.EOS))
        if may_stop and token_id in params.stop_token_ids:
            return self.end(Finish(FinishReason.STOP_TOKEN, token_id))
        matched = self.text.push(token_id, may_stop=may_stop) if self.text else None
        if matched is not None:
            return self.end(Finish(FinishReason.STOP_SEQUENCE, matched))
        if num_output >= params.max_tokens:
            return self.end(Finish(FinishReason.MAX_TOKENS))
        if len(self.token_ids) >= self.max_length:
            return self.end(Finish(FinishReason.CONTEXT_LENGTH))
        return None

    def end(self, finish: Finish) -> None:
        """Nothing more is generated; the text that was held back is released."""
        assert self.finish is None
        self.finish = finish
        if self.text:
            self.text.finish()

    def fail(self, reason: Reason, message: str, retry_after: float | None = None) -> None:
        error = RequestError(reason, message, retry_after=retry_after)
        self.end(Finish(FinishReason.ERROR, error=error))
