"""Random requests against the scheduling core and the prefix-remembering fake worker.

The oracle is the model alone: whatever is batched, chunked, shared, preempted, aborted, evicted or
moved to a new worker, every request gives exactly what the model gives for it alone.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from mili.internal.v1.step_pb2 import (
    GRAMMAR_KIND_REGEX,
    TASK_EMBED,
    TASK_GENERATE,
    TASK_SCORE,
    Sampling,
    StepResult,
)
from mili.router.errors import Reason
from mili.router.kv_cache import CacheSettings
from mili.router.outcome import Finish, FinishReason
from mili.router.params import Constraint, GenerationParams, Scheduling
from mili.router.readings import Readings
from mili.router.request import Forced
from tests.fake_worker import (
    EOS,
    FakeModel,
    FakeWorker,
    extend_hash,
    first_hash,
    held,
    key_of,
    read_token,
    read_vector,
    seed_of,
)

LETTERS = "ab$"
# What follows when a budget is spent.
FORCED = Forced((1, 0, 0))
# Those that every worker has ready, by number: how long their runs are.
GRAMMARS = (1, 2, 3)


class FakeText:
    """Tokens as letters, and the naive way to find a stop string."""

    num_reasoning_tokens = 0

    def __init__(self, stops: tuple[str, ...], budget: int | None) -> None:
        self.stops = stops
        self.budget = budget
        self.all = ""

    def push(self, token_id: int, *, may_stop: bool) -> str | Forced | None:
        self.all += LETTERS[token_id]
        ending = [stop for stop in self.stops if may_stop and self.all.endswith(stop)]
        if not ending and len(self.all) == self.budget:
            return FORCED
        return max(ending, key=len, default=None)

    def finish(self, finish: Finish) -> Finish:
        return finish

    def take(self) -> str:
        return ""


def expected(
    model: FakeModel, params: GenerationParams, context_limit: int
) -> tuple[list[int], FinishReason]:
    """What the request must give: its output tokens and how it ends."""
    if params.task != TASK_GENERATE:
        (token,) = model.alone(params.prompt_token_ids, key_of(params.sampling), 1)
        return [], FinishReason.ERROR if token is None else FinishReason.MAX_TOKENS
    room = context_limit - len(params.prompt_token_ids)
    output: list[int] = []
    text = ""
    forced: list[int] = []
    key, num_prompt_tokens = key_of(params.sampling), len(params.prompt_token_ids)
    prefix = first_hash(key)
    for token in params.prompt_token_ids:
        prefix = extend_hash(prefix, token)
    while len(output) < room:
        token = model.sample(prefix, num_prompt_tokens, key)
        if params.constraint:
            token = held(token, len(output), params.constraint.source)
        token = forced.pop(0) if forced else token
        if token is None:
            return output, FinishReason.ERROR
        output.append(token)
        prefix = extend_hash(prefix, token)
        if len(output) == params.max_reasoning_tokens:
            forced = list(FORCED.token_ids)
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


class Heard:
    """What one request was told of its log-probabilities and its vector, in order."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.columns: list[tuple[list[int], list[float], list[int]]] = []
        self.embedding: list[float] | None = None

    def hear(self, readings: Readings | None) -> None:
        """Everything comes once: a piece of positions, and none of them again."""
        for piece in (*readings.scored, *readings.sampled) if readings else ():
            for index in range(piece.num_positions):
                one = piece.part(index, 1)
                self.positions.append(one.first_position)
                self.columns.append(tuple(map(list, one[2:])))
        if readings and readings.embedding:
            assert self.embedding is None, "a second vector"
            self.embedding = list(readings.embedding)

    def check(self, params: GenerationParams, output: list[int], *, complete: bool) -> None:
        """Of each wanted position what the model alone says, in order; `complete`: of all."""
        tokens = [*params.prompt_token_ids, *output]
        prefixes = [first_hash(key_of(params.sampling))]
        for token in tokens:
            prefixes.append(extend_hash(prefixes[-1], token))
        prompt = len(params.prompt_token_ids)
        scored = range(params.score_from, prompt) if params.num_prompt_logprobs is not None else ()
        sampled = range(prompt, len(tokens)) if params.num_logprobs is not None else ()
        wanted = [*scored, *sampled]
        if not complete:
            wanted = wanted[: len(self.positions)]
        assert self.positions == wanted, "positions are missing, doubled or out of order"
        for position, columns in zip(wanted, self.columns, strict=True):
            count = params.num_prompt_logprobs if position < prompt else params.num_logprobs
            expected = read_token(prefixes[position], tokens[position], 1 + (count or 0))
            assert columns == expected, f"position {position}"
        if complete and params.task == TASK_EMBED:
            assert self.embedding == read_vector(prefixes[prompt])


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
        self.heard: dict[str, Heard] = {}
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
        self.worker.grammars.update((length, str(length)) for length in GRAMMARS)
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
            max_reasoning_tokens=self.random.choice((None, None, self.random.randint(1, 20))),
            scheduling=Scheduling(
                tenant=self.random.choice("abc"), priority=self.random.choice((0, 0, 1))
            ),
            constraint=self._constraint(),
            cache_read=self.random.random() < 0.95,
            cache_write=self.random.random() < 0.95,
            **self._wanted_readings(min(len(prompt), self.context_limit - 1)),
        )
        if params.task != TASK_GENERATE:
            params = replace(params, max_tokens=1, min_tokens=0, constraint=None)
        if params.num_logprobs is not None:
            # Nothing is read of a token that is put in: the API refuses the two together.
            params = replace(params, max_reasoning_tokens=None)
        text = FakeText(params.stop_sequences, params.max_reasoning_tokens)
        request = self.core.Request(
            f"r{self.to_submit}",
            params,
            context_limit=self.context_limit,
            text=text,
            arrival=self.totals["requests"],
        )
        if params.constraint:
            request.grammar = int(params.constraint.source)
            self.totals["held"] += 1
        self.live[request.request_id] = request
        self.heard[request.request_id] = Heard()
        self.scheduler.add(request)
        return True

    def _constraint(self) -> Constraint | None:
        """Runs of equal tokens: every worker has those ready."""
        if self.random.random() < 0.7:
            return None
        return Constraint(GRAMMAR_KIND_REGEX, str(self.random.choice(GRAMMARS)))

    def _wanted_readings(self, num_prompt_tokens: int) -> dict[str, Any]:
        """Which log-probabilities are asked for, and whether only the model is read."""
        if self.random.random() < 0.7:
            return {}
        return {
            "num_logprobs": self.random.choice((None, 0, 2)),
            "num_prompt_logprobs": self.random.choice((None, 0, 3)),
            "score_from": self.random.randint(1, num_prompt_tokens),
            "task": self.random.choice((TASK_GENERATE, TASK_GENERATE, TASK_EMBED, TASK_SCORE)),
        }

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
            self.totals["edits"] += bool(request.forced)
            request.forced = ()  # they are told
            self._hear(request)
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

    def _hear(self, request: object) -> None:
        """As the ledger does."""
        self.heard[request.request_id].hear(request.readings)
        request.readings = None

    def _finished(self, request: object) -> None:
        del self.live[request.request_id]
        self._hear(request)
        heard = self.heard.pop(request.request_id)
        params, reason = request.params, request.finish.reason
        output = list(request.token_ids[len(params.prompt_token_ids) :])
        tokens, end = expected(self.model, params, self.context_limit)
        if reason == FinishReason.CANCELLED or request.strikes >= 2:
            assert output == tokens[: len(output)], "an aborted request got foreign tokens"
            self.totals["aborted"] += 1
        else:
            assert (output, reason) == (tokens, end), (output, reason, tokens, end)
            self.totals[reason.name] += 1
        complete = reason not in (FinishReason.CANCELLED, FinishReason.ERROR)
        heard.check(params, output, complete=complete)
        self.totals["scored positions"] += len(heard.positions)
        self.totals["vectors"] += heard.embedding is not None
        usage = request.usage
        self.totals["preemptions"] += request.num_preemptions
        self.totals["recoveries"] += request.num_recoveries
        self.totals["cache hits"] += usage.cached_prompt_tokens > 0
        self.totals["recomputed"] += usage.recomputed_tokens
        self.totals["poisoned"] += request.strikes >= 2
        assert usage.cached_prompt_tokens < usage.prompt_tokens
