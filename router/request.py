"""A request: how far it is, and how it ended.

Owns the counters that the scheduler schedules by. Does not know about blocks being shared, time,
sockets or gRPC.
"""

from __future__ import annotations

import math
from array import array
from typing import NamedTuple, Protocol

from mili.internal.v1.step_pb2 import (
    ROW_FAULT_KIND_GRAMMAR,
    RowFaultKind,
)
from mili.router.cache_memory import Miss
from mili.router.errors import Reason, RequestError
from mili.router.fair_share import OUTPUT_TOKEN_COST, Account
from mili.router.outcome import Finish, FinishReason, Recovery, Timing, Usage
from mili.router.params import GenerationParams
from mili.router.parsed_text import Text
from mili.router.readings import NOTHING_READ, Readings, TokenLogprobs

# A position that no request reaches.
NEVER = 1 << 62


class Forced(NamedTuple):
    """What an output goes on with, whatever the model would have sampled."""

    token_ids: tuple[int, ...]


NOTHING = Forced(())


class TextOutput(Protocol):
    """Tokens in, text out: detokenizing, stop sequences and parsing of one request."""

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens so far that found the reasoning block open; 0 where nobody looks for it."""

    def push(self, token_id: int, *, may_stop: bool) -> str | Forced | None:
        """Take the next token; return the stop sequence that it completed, or what must follow."""

    def finish(self, finish: Finish) -> Finish:
        """No more tokens come: release the text that was held back; return how it ended."""

    def take(self) -> Text:
        """Return the text that became certain since the last call."""


class Request:
    """One sequence of a call: its tokens, and how far each of them is.

    The scheduler compares `num_computed` with `num_tokens`; chunked prefill, prefix hits, resumed
    preemptions and decodes are all the same subtraction. Times are the engine's, in its clock.
    call_id: the request id that its caller knows; index: which of the call's sequences it is.
    """

    __slots__ = (
        "account",
        "admission",
        "admitted_at",
        "arrival",
        "cache_miss",
        "call_id",
        "deaths",
        "expected_cost",
        "finish",
        "first_token_at",
        "forced",
        "grammar",
        "grammar_seconds",
        "index",
        "is_cut",
        "last_token_at",
        "max_length",
        "moved",
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
        "queued_until",
        "readings",
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

    # Of its tenant, in the accounts of the schedulers that it is given to.
    account: Account

    def __init__(
        self,
        request_id: str,
        params: GenerationParams,
        *,
        context_limit: int,
        text: TextOutput | None = None,
        arrival: int = 0,
        now: float = 0.0,
        index: int = 0,
    ) -> None:
        self.call_id = request_id
        self.index = index
        # The first sequence has the call's own id; no id that a caller may choose has a NUL in it.
        self.request_id = f"{request_id}\0{index}" if index else request_id
        self.arrival = arrival
        self.params = params
        self.text = text
        self.namespace = params.cache_namespace
        self.token_ids = array("I", params.prompt_token_ids)  # every known token, prompt first
        self.num_prompt_tokens = len(self.token_ids)
        self.max_length = min(self.num_prompt_tokens + params.max_tokens, context_limit)
        # In token costs (fair_share.py): at first as if it used all its room.
        self.expected_cost = (
            self.num_prompt_tokens + (self.max_length - self.num_prompt_tokens) * OUTPUT_TOKEN_COST
        )
        # Sampled by a step in flight and not yet known.
        self.num_pending = 0
        # Positions whose KV is computed by the steps scheduled so far, of the present admission.
        self.num_computed = 0
        # Tokens were put behind a sampled one: what steps in flight sample is dropped.
        self.is_cut = False
        # Those tokens, until they are told.
        self.forced: tuple[int, ...] = ()
        # The most positions that were ever computed: beyond the cache, the rest is done again.
        self.peak_computed = 0
        self.num_recomputed = 0
        self.num_cached_prompt_tokens = 0
        # Why not more of the prompt came from the cache; None until it is first admitted.
        self.cache_miss: Miss | None = None
        # Row and admission number while running; 0 while waiting.
        self.row = 0
        self.admission = 0
        self.num_admissions = 0
        self.num_preemptions = 0
        self.num_recoveries = 0
        # Why it left the worker that had begun it, and num_recomputed then, until another goes on.
        self.moved: tuple[Reason, int] | None = None
        # Workers that died while a step of theirs computed this request: ever, and since its last
        # new token. A strike is such a death in which it was the only suspect.
        self.total_deaths = 0
        self.deaths = 0
        self.strikes = 0
        # What steps read of it, until it is told.
        self.readings: Readings | None = None
        self.finish: Finish | None = None
        self.submitted_at = self.waiting_since = now
        # A worker must have begun by then.
        self.queued_until = math.inf
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        # The worker's number for its constraint, 0 without one; and how long that took to prepare.
        self.grammar = 0
        self.grammar_seconds = 0.0
        self.last_token_at: float | None = None
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
    def score_from(self) -> int:
        """The first position whose log-probability is wanted and not told; NEVER without one.

        It is read where the token before it is computed: nothing from there on may come from the
        cache.
        """
        params = self.params
        position = max(params.score_from, self.peak_computed + 1)
        is_wanted = params.num_prompt_logprobs is not None and position < self.num_prompt_tokens
        # The prompt of several sequences is told of once, with the first.
        return position if is_wanted and not self.index else NEVER

    @property
    def usage(self) -> Usage:
        return Usage(
            self.num_prompt_tokens,
            self.num_cached_prompt_tokens,
            self.num_output_tokens,
            self.num_recomputed,
            self.text.num_reasoning_tokens if self.text else 0,
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
            grammar_compile=self.grammar_seconds,
        )

    def leave_worker(self, reason: Reason) -> None:
        """Its worker cannot go on with it: if that had begun, the caller hears of the next."""
        if self.num_admissions:
            self.moved = reason, self.num_recomputed

    def recovered(self, now: float) -> Recovery:
        """A worker goes on with it."""
        assert self.moved is not None and self.admitted_at is not None
        (reason, num_recomputed), self.moved = self.moved, None
        since = self.admitted_at if self.last_token_at is None else self.last_token_at
        return Recovery(reason, self.num_recomputed - num_recomputed, now - since)

    def accept(self, token_id: int) -> None:
        """The next token is known: append it, and set `finish` if it ends the request."""
        params = self.params
        self.token_ids.append(token_id)
        self.deaths = self.strikes = 0
        num_tokens = len(self.token_ids)
        num_output = num_tokens - self.num_prompt_tokens
        may_stop = num_output > params.min_tokens
        if may_stop and token_id in params.eos_token_ids:
            return self.end(Finish(FinishReason.EOS))
        if may_stop and token_id in params.stop_token_ids:
            return self.end(Finish(FinishReason.STOP_TOKEN, token_id))
        matched = self.text.push(token_id, may_stop=may_stop) if self.text else None
        if matched is not None and isinstance(matched, str):
            return self.end(Finish(FinishReason.STOP_SEQUENCE, matched))
        if num_tokens < self.max_length:
            return self._force(matched.token_ids) if matched else None
        spent = num_output >= params.max_tokens
        return self.end(Finish(FinishReason.MAX_TOKENS if spent else FinishReason.CONTEXT_LENGTH))

    def _force(self, token_ids: tuple[int, ...]) -> None:
        """Append tokens that were not sampled; any of them may end the request."""
        self.is_cut = True
        for token_id in token_ids:
            if self.finish is None:
                self.forced += (token_id,)
                self.accept(token_id)

    def score(self, piece: TokenLogprobs) -> None:
        """A step read the log-probabilities of prompt tokens: take those not taken before."""
        told = self.score_from - piece.first_position
        assert told >= 0, "log-probabilities are missing"
        if told < piece.num_positions:
            new = piece.part(told, piece.num_positions) if told else piece
            self.read(Readings(scored=(new,)))

    def read(self, more: Readings) -> None:
        """A step read something of the request: keep it until it is told."""
        so_far = self.readings or NOTHING_READ
        self.readings = Readings(
            so_far.sampled + more.sampled,
            so_far.scored + more.scored,
            more.embedding or so_far.embedding,
        )

    def end(self, finish: Finish) -> None:
        """Nothing more is generated; the text that was held back is released."""
        assert self.finish is None
        self.finish = self.text.finish(finish) if self.text else finish

    def fault(self, kind: RowFaultKind.ValueType) -> None:
        """A worker could not compute it any further."""
        if kind == ROW_FAULT_KIND_GRAMMAR:
            cause = "the grammar leads to where nothing fits, or takes too much work"
            self.fail(Reason.GRAMMAR_TOO_COMPLEX, cause)
        else:
            self.fail(Reason.NUMERIC_FAULT, "the model computed a value that is no number")

    def fail(self, reason: Reason, message: str, retry_after: float | None = None) -> None:
        error = RequestError(reason, message, retry_after=retry_after)
        self.end(Finish(FinishReason.ERROR, error=error))
