"""Random requests against the scheduling core and the prefix-remembering fake worker.

The oracle is the model alone: whatever is batched, chunked, shared, preempted, aborted, evicted or
moved to a new worker, every request gives exactly what the model gives for it alone.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import replace
from types import SimpleNamespace

from mili.internal.v1.step_pb2 import Sampling, StepResult
from mili.router.errors import Reason
from mili.router.kv_cache import CacheSettings
from mili.router.request import FinishReason, GenerationParams, Scheduling
from tests.fake_worker import EOS, FakeModel, FakeWorker, key_of, seed_of

LETTERS = "ab$"


class FakeText:
    """Tokens as letters, and the naive way to find a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.all = ""

    def push(self, token_id: int, *, may_stop: bool) -> str | None:
        self.all += LETTERS[token_id]
        ending = [stop for stop in self.stops if may_stop and self.all.endswith(stop)]
        return max(ending, key=len, default=None)

    def finish(self) -> None:
        pass

    def take(self) -> str:
        return ""


def expected(
    model: FakeModel, params: GenerationParams, context_limit: int
) -> tuple[list[int], FinishReason]:
    """What the request must give: its output tokens and how it ends."""
    room = context_limit - len(params.prompt_token_ids)
    output: list[int] = []
    text = ""
    grammar = params.constraint.source if params.constraint else ""
    for token in model.alone(params.prompt_token_ids, key_of(params.sampling), room, grammar):
        if token is None:
            return output, FinishReason.ERROR
        output.append(token)
        text += LETTERS[token]
        if len(output) > params.min_tokens:
            if token in params.eos_token_ids:
                return output, FinishReason.EOS
            if token in params.stop_token_ids:
                return output, FinishReason.STOP_TOKEN
            if any(text.endswith(stop) for stop in params.stop_sequences):
                return output, FinishReason.STOP_SEQUENCE
        if len(output) == params.max_tokens:
            return output, FinishReason.MAX_TOKENS
    return output, FinishReason.CONTEXT_LENGTH


def sequences(params: GenerationParams) -> list[GenerationParams]:
    """What each of the request's sequences is, alone: their seeds differ in the low 32 bits."""
    seeds = [params.sampling.seed ^ n * 0x9E3779B9 % 2**32 for n in range(params.num_sequences)]
    alone = [Sampling.FromString(params.sampling.SerializeToString()) for _ in seeds]
    for sampling, seed in zip(alone, seeds, strict=True):
        sampling.seed = seed
    return [replace(params, sampling=sampling, num_sequences=1) for sampling in alone]


def sequence_id(name: str, index: int) -> str:
    """What the router calls a sequence of a call."""
    return f"{name}\0{index}" if index else name


class Simulation:
    """One random history, driven by one seed. `core` holds the Scheduler, Request, ... to test."""

    def __init__(self, core: SimpleNamespace, seed: int, num_requests: int) -> None:
        self.core = core
        self.random = random.Random(seed)
        self.to_submit = num_requests
        self.block_size = self.random.choice((1, 2, 4))
        self.num_blocks = self.random.randint(7, 40)
        self.limits = core.Limits(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_rows=self.random.randint(2, 10),
            max_step_tokens=self.random.randint(2, 24),
            max_model_len=40,
            vocab_size=3,
        )
        self.depth = self.random.randint(1, 4)
        self.context_limit = min(40, (self.num_blocks - 1) * self.block_size)
        self.max_live = self.random.randint(1, 14)
        self.model = FakeModel()
        self.prefixes = [
            [self.random.randrange(2) for _ in range(self.random.randint(0, 20))] for _ in range(3)
        ]
        self.live: dict[str, object] = {}
        self.totals: Counter[str] = Counter()
        self._new_worker()

    def _new_worker(self) -> None:
        cache = CacheSettings(
            self.random.choice(("first-fit", "best-fit")),
            self.random.choice(("lru", "token-limit")),
            self.random.randrange(60),
        )
        self.scheduler = self.core.Scheduler(self.limits, cache=cache)
        self.worker = FakeWorker(self.num_blocks, self.block_size, self.model)
        self.results: deque[StepResult] = deque()

    def run(self) -> Counter[str]:
        """Raise AssertionError where anything is wrong; return what happened, counted."""
        idle = 0
        while self.to_submit or self.live:
            # Aborts and crashes would hide a request that is stuck.
            weights = (30, 50, 50, 1, 0.2) if idle < 20 else (30, 50, 50, 0, 0)
            worked = self.random.choices(
                (self._submit, self._schedule, self._deliver, self._abort, self._crash), weights
            )[0]()
            self.scheduler.check()
            idle = 0 if worked else idle + 1
            assert idle < 400, "nothing moves any more"
        while self._deliver():
            self.scheduler.check()
        assert self.scheduler.schedule() is None
        assert not self.scheduler.running and not self.scheduler.waiting
        usage = self.scheduler.kv.usage()
        assert usage.held == 0 and usage.evictable == usage.cached
        return self.totals

    def _submit(self) -> bool:
        if not self.to_submit or len(self.live) >= self.max_live:
            return False
        self.to_submit -= 1
        self.totals["requests"] += 1
        stops = ("".join(self.random.choices("ab", k=self.random.randint(2, 7))),)
        prompt = self.random.choice(self.prefixes) + [
            self.random.randrange(2) for _ in range(self.random.randint(1, 8))
        ]
        namespace = self.random.choice((b"", b"", b"b"))
        params = GenerationParams(
            prompt_token_ids=prompt[: self.context_limit - 1],
            sampling=Sampling(
                seed=seed_of(self.random.randrange(3), namespace),
                presence_penalty=self.random.choice((0, 0, 1.5)),
                allowed_token_ids=self.random.choice(([], [], [0, 1])),
            ),
            max_tokens=self.random.randint(1, 45),
            min_tokens=self.random.choice((0, 0, 0, 9)),
            eos_token_ids=frozenset({EOS} if self.random.random() < 0.7 else ()),
            stop_token_ids=frozenset({1} if self.random.random() < 0.05 else ()),
            stop_sequences=stops if self.random.random() < 0.3 else (),
            cache_namespace=namespace,
            scheduling=Scheduling(
                tenant=self.random.choice("abc"), priority=self.random.choice((0, 0, 1))
            ),
            cache_read=self.random.random() < 0.95,
            cache_write=self.random.random() < 0.95,
        )
        text = FakeText(params.stop_sequences)
        request = self.core.Request(
            f"r{self.to_submit}",
            params,
            context_limit=self.context_limit,
            text=text,
            arrival=self.totals["requests"],
        )
        self.live[request.request_id] = request
        self.scheduler.add(request)
        return True

    def _schedule(self) -> bool:
        if len(self.scheduler.in_flight) >= self.depth:
            return False
        command = self.scheduler.schedule()
        if command is None:
            return False
        assert sum(command.num_tokens) <= self.limits.max_step_tokens
        self.totals["steps"] += 1
        self.totals["chunks"] += sum(not row.samples for row in self.scheduler.in_flight[-1].rows)
        self.results.append(self.worker.execute(command))
        return True

    def _deliver(self) -> bool:
        if not self.results:
            return False
        for request, _token in self.scheduler.update(self.results.popleft()):
            if request.finish is not None:
                self._finished(request)
        return True

    def _abort(self) -> bool:
        if not self.live:
            return False
        request = self.live[self.random.choice(list(self.live))]
        request.end(self.core.Finish(self.core.FinishReason.CANCELLED))
        self.scheduler.abort(request)
        self._finished(request)
        return True

    def _crash(self) -> bool:
        requests = self.scheduler.evacuate(died=self.random.random() < 0.7)
        assert [request.request_id for request in requests] != [] or not self.live
        self._new_worker()
        self.totals["crashes"] += 1
        for request in requests:
            if request.strikes >= 2:
                request.fail(Reason.POISON_REQUEST, "")
                self._finished(request)
            else:
                self.scheduler.add(request)
        return True

    def _finished(self, request: object) -> None:
        del self.live[request.request_id]
        params, reason = request.params, request.finish.reason
        output = list(request.token_ids[len(params.prompt_token_ids) :])
        tokens, end = expected(self.model, params, self.context_limit)
        if reason == FinishReason.CANCELLED or request.strikes >= 2:
            assert output == tokens[: len(output)], "an aborted request got foreign tokens"
            self.totals["aborted"] += 1
        else:
            assert (output, reason) == (tokens, end), (output, reason, tokens, end)
            self.totals[reason.name] += 1
        usage = request.usage
        self.totals["preemptions"] += request.num_preemptions
        self.totals["recoveries"] += request.num_recoveries
        self.totals["cache hits"] += usage.cached_prompt_tokens > 0
        self.totals["recomputed"] += usage.recomputed_tokens
        self.totals["poisoned"] += request.strikes >= 2
        assert usage.cached_prompt_tokens < usage.prompt_tokens
