"""The callers: who asks for what and when, who gives up, and what each was told.

Owns the oracle of a stream: what the model alone gives for the request, numbered, once, in order,
and one end that may be what it says it is. Does not know workers or faults.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

from mili.router.errors import Reason, RequestError
from mili.router.outcome import Finish, Finished, FinishReason, RequestOutput
from mili.router.params import GenerationParams
from mili.router.recovery import MAX_DEATHS, MAX_STRIKES
from tests.fake_worker import FakeModel
from tests.scheduler_simulation import Heard, expected, sequence_id, sequences
from tests.simulation.router_process import LETTERS, Executing, RouterProcess
from tests.simulation.timeline import Timeline
from tests.simulation.trace import Trace
from tests.simulation.wishes import Wishes
from tests.simulation.worker_process import DEADLY_TOP_K

# Reasons for which the door may be closed, whatever the request is.
REFUSALS = (
    Reason.NO_WORKERS,
    Reason.DRAINING,
    Reason.QUEUE_FULL,
    Reason.CONTEXT_TOO_LONG,
    Reason.DEADLINE_UNREACHABLE,
    Reason.DEADLINE_EXCEEDED,
    Reason.INVALID_FIELD,
)


# Two times that are the same, in seconds.
LEAST = 1e-6


class Told:
    """One sequence of an accepted request, and what its caller was told. call: all of them."""

    def __init__(
        self, params: GenerationParams, context_limit: int, now: float, call: list[Told]
    ) -> None:
        self.params = params
        self.context_limit = context_limit
        self.submitted_at = self.moved_at = now
        self.call = call
        self.is_first = not call
        self.finish: Finish | None = None
        self._started = False
        # Deaths of the worker that computed it, and those of which it is the only suspect.
        self.total_deaths = self.deaths = self.strikes = 0
        self.token_ids: list[int] = []
        self.text = ""
        self.read = Heard()

    @property
    def started(self) -> bool:
        """Whether the call has begun, which its first sequence tells."""
        return self.call[0]._started

    def hear(self, output: RequestOutput) -> None:
        """I1: the start before all else and once, tokens numbered without a hole."""
        if output.started:
            assert self.is_first, "I1: started once for each sequence"
            assert not self.started, "I1: started twice"
            assert not self.token_ids, "I1: a token before the start"
            assert output.started.prompt_tokens == len(self.params.prompt_token_ids)
            self._started = True
        if output.token_ids:
            assert self.started, "I1: a token before the start"
            assert output.first_token_index == len(self.token_ids), "I1: a hole, or a token twice"
            self.token_ids += output.token_ids
            self.deaths = self.strikes = 0
        self.text += output.text
        self.read.hear(output.readings)


class Callers:
    """Everybody who asks. `live` has the accepted sequences that have not ended, by their ids."""

    def __init__(
        self, router: RouterProcess, timeline: Timeline, trace: Trace, rng: random.Random
    ) -> None:
        self.live: dict[str, Told] = {}
        self.context_limits: set[int] = set()
        self.wishes = Wishes(rng)
        self._router = router
        self._timeline = timeline
        self._trace = trace
        self._random = rng
        self._names = deque[str](maxlen=40)
        self._model = FakeModel()
        self._count = 0

    def ask(self) -> None:
        """Somebody asks, and some do not wait for the answer."""
        name = f"r{self._count}"
        self._count += 1
        self._names.append(name)
        params = self.wishes.draw(self._timeline.now)
        self._router.do(self._submit, name, params)
        if self._random.random() < 0.1:
            patience = self._random.expovariate(2.0)
            self._timeline.after(patience, self._router.do, self._cancel, name)

    def cancel_any(self) -> None:
        """Cancel somebody, who may be through already."""
        if self._names:
            self._router.do(self._cancel, self._random.choice(self._names))

    def ask_for_sure(self) -> str:
        """Ask for what a healthy server must give."""
        name = f"sure{self._count}"
        self._count += 1
        self._submit(name, self.wishes.easy())
        assert name in self.live, "a healthy server refuses a request"
        return name

    def _submit(self, name: str, params: GenerationParams) -> None:
        totals, engine = self._trace.totals, self._router.engine
        totals["asked"] += 1
        call: list[Told] = []
        for index, alone in enumerate(sequences(params)):
            told = Told(alone, engine.context_limit, self._timeline.now, call)
            self.live[sequence_id(name, index)] = told
            call.append(told)
        self._trace.note(
            f"caller: {name} asks for {params.num_sequences} x {params.max_tokens}"
            f" after {params.prompt_token_ids}"
        )
        try:
            engine.submit(name, params)
            totals["accepted"] += 1
            totals["siblings"] += len(call) - 1
        except RequestError as error:
            assert not call[0].started, "refused after the start"
            for index in range(len(call)):
                del self.live[sequence_id(name, index)]
            totals[f"refused {error.reason}"] += 1
            self._trace.note(f"caller: {name} is refused, {error.reason}")
            self._check_refusal(params, error)

    def _check_refusal(self, params: GenerationParams, error: RequestError) -> None:
        engine = self._router.engine
        too_long = len(params.prompt_token_ids) >= engine.context_limit
        assert error.reason in REFUSALS, error
        assert (error.reason == Reason.NO_WORKERS) == (not self._router.serving), error
        assert (error.reason == Reason.DRAINING) == self._all_drain(), error
        assert error.reason != Reason.CONTEXT_TOO_LONG or too_long, error
        rows = (each.max_running for each in self._router.schedulers.values() if each.max_running)
        too_many = params.num_sequences > min(rows, default=0)
        assert error.reason != Reason.INVALID_FIELD or too_many, error
        assert error.retry_after is not None or error.reason in REFUSALS[3:], error

    def _all_drain(self) -> bool:
        serving = self._router.serving
        return bool(serving) and all(map(self._router.engine.is_draining, serving))

    def _cancel(self, name: str) -> None:
        self._trace.note(f"caller: {name} is cancelled")
        was_live = self._is_live(name)
        assert self._router.engine.cancel(name) == was_live
        assert not self._is_live(name), "I1: cancelled, and not told the end"

    def _is_live(self, name: str) -> bool:
        """Whether any sequence of a call is."""
        return any(live.split("\0")[0] == name for live in self.live)

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Outputs of one step."""
        for output in outputs:
            self._trace.note(f"told {output}")
            name = sequence_id(output.request_id, output.index)
            told = self.live.get(name)
            assert told is not None, "I1: told something after the end"
            told.hear(output)
            if output.finished:
                del self.live[name]
                self._check_end(told, output.finished)
                told.finish = output.finished.finish

    def on_lost(self, executing: Executing, died: bool) -> None:
        """A worker was lost that computed these; if it died, one of them may be the cause."""
        computed = [self.live[name] for name in executing if name in self.live]
        for told in computed:
            told.moved_at = self._timeline.now
        if not died:
            return
        suspects = [told for told in computed if told.deaths > 1]
        assert len(suspects) <= 1, "two suspects were computed together"
        for told in computed:
            told.total_deaths += 1
            told.deaths += 1
        suspects = [told for told in computed if told.deaths > 1]
        if len(suspects) == 1:
            suspects[0].strikes += 1

    def _check_end(self, told: Told, finished: Finished) -> None:
        finish, usage, timing = finished.finish, finished.usage, finished.timing
        totals, tokens = self._trace.totals, told.token_ids
        ended = finish.error.reason if finish.error else finish.reason.name
        totals[f"ended {ended}"] += 1
        if not finished.num_left:
            totals["preemptions"] += timing.preemptions
            totals["recoveries"] += timing.recoveries
            totals["cache hits"] += usage.cached_prompt_tokens > 0
            totals["recomputed"] += usage.recomputed_tokens
        self._check_punctuality(told)
        ended_before = [each.finish for each in told.call if each.finish]
        assert finished.num_left == len(told.call) - len(ended_before) - 1, "I1: who is left?"
        assert finished.others_succeeded == any(not each.error for each in ended_before)
        assert usage.prompt_tokens == len(told.params.prompt_token_ids)
        told_tokens = sum(len(each.token_ids) for each in told.call)
        # Of siblings more may be known, and told next.
        assert usage.completion_tokens >= told_tokens, "usage is of the whole call"
        assert finished.num_left or usage.completion_tokens == told_tokens, "and of nothing else"
        assert usage.cached_prompt_tokens < usage.prompt_tokens
        assert told.params.cache_read or not usage.cached_prompt_tokens, "read, and may not"
        alone, reason = expected(self._model, told.params, told.context_limit)
        assert tokens == alone[: len(tokens)], f"I2: {tokens} instead of {alone}"
        assert told.text == _text(told, finish), f"I2: {told.text!r} of {tokens}"
        totals["positions read"] += len(told.read.positions)
        totals["vectors read"] += told.read.embedding is not None
        whole = finish.reason in (FinishReason.EOS, FinishReason.MAX_TOKENS)
        # The prompt is told of once, with the first sequence.
        asked = told.params if told.is_first else replace(told.params, num_prompt_logprobs=None)
        told.read.check(asked, tokens, complete=whole)
        if self._may_end_early(told, finish):
            return
        assert (tokens, finish.reason) == (alone, reason), (
            f"I2: {finish} after {tokens}, not {alone}"
        )
        if finish.error is None:
            self.wishes.remember([*told.params.prompt_token_ids, *tokens])

    def _queue_limit(self, told: Told) -> float:
        """Seconds after which a request that has not begun ends."""
        asked = told.params.scheduling.max_queue_time
        return self._router.settings.max_queue_time if asked is None else asked

    def _check_punctuality(self, told: Told) -> None:
        """I7: ended by its deadline, as far as the router was awake then."""
        scheduling, router = told.params.scheduling, self._router
        due = min(scheduling.deadline, told.submitted_at + scheduling.time_limit)
        if not told.started:
            due = min(due, told.submitted_at + self._queue_limit(told))
        late = self._timeline.now - max(due, router.stalled_until)
        assert late <= LEAST, f"I7: ended {late:.3f} s too late"

    def _may_end_early(self, told: Told, finish: Finish) -> bool:
        """Whether the end has a reason beside what the model said; then this must be a good one."""
        scheduling = told.params.scheduling
        if any(each.finish is finish for each in told.call):
            assert not told.token_ids, "ended with a sibling that it did not wait for"
            return True
        waited = self._timeline.now - told.submitted_at + LEAST
        if finish.reason == FinishReason.TIME_LIMIT:
            assert waited >= scheduling.time_limit, f"ended by its limit after {waited} s"
            return True
        if finish.reason == FinishReason.CONTEXT_LENGTH:
            # A worker may have come back with less room than there was.
            length = len(told.params.prompt_token_ids) + len(told.token_ids)
            assert length in self.context_limits, f"{length} tokens are nobody's limit"
            return True
        if finish.error is None:
            return finish.reason == FinishReason.CANCELLED
        match finish.error.reason:
            case Reason.NUMERIC_FAULT:
                return False
            case Reason.DEADLINE_EXCEEDED:
                assert self._timeline.now + LEAST >= scheduling.deadline, (
                    "ended before its deadline"
                )
            case Reason.QUEUE_TIMEOUT:
                assert not told.started, "begun, and ended for waiting"
                assert waited >= self._queue_limit(told), f"waited only {waited} s"
            case Reason.QUEUE_FULL:
                assert not (told.started if told.is_first else told.token_ids), (
                    "begun, and displaced from the queue"
                )
            case Reason.GRAMMAR_INVALID:
                constraint = told.params.constraint
                assert constraint and constraint.source == "13", "its grammar can be used"
                assert not told.started, "begun without a grammar"
            case Reason.POISON_REQUEST:
                assert told.strikes >= MAX_STRIKES, "poison, and others were suspects too"
                deadly = told.params.sampling.top_k == DEADLY_TOP_K
                self._trace.totals["wrongly poison"] += not deadly
            case Reason.WORKER_LOST:
                alone = self._timeline.now - told.moved_at
                room = self._router.settings.recovery_timeout
                assert told.total_deaths >= MAX_DEATHS or alone + LEAST >= room, (
                    f"given up after {alone} s"
                )
            case other:
                raise AssertionError(f"nothing ends with {other}")
        return True


def _text(told: Told, finish: Finish) -> str:
    """The text of the tokens told, as its definition says."""
    params = told.params
    if not params.text and not params.stop_sequences:
        return ""
    text = "".join(LETTERS[token] for token in told.token_ids)
    if finish.reason in (FinishReason.EOS, FinishReason.STOP_TOKEN):
        return text[:-1]
    if finish.reason != FinishReason.STOP_SEQUENCE:
        return text
    matched = max((stop for stop in params.stop_sequences if text.endswith(stop)), key=len)
    assert finish.matched == matched
    return text if params.include_stop_text else text.removesuffix(matched)
