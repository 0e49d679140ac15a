"""Scheduler: which tokens of which requests the next step computes, on one worker group.

Owns the waiting and running requests of the group, their rows, and the steps in flight. Pure: no
I/O, no clock, no threads; the same calls give the same commands.

What holds (each has a test):
1. Commands execute in the order sent, on one stream. An id freed now may be reused by any later
   command: finish, abort and preempt release at once, and there is no draining state.
2. A result belongs to the (request, admission) pairs captured when its command was sent. Of an
   older admission only the sampled token counts. A preempted request is admitted again only when
   none of its tokens is pending.
3. Order is data: dicts in insertion order, never sets.
4. The worker asserts `starts`: both sides cannot drift apart silently.
5. After every call: free + cached + held + null = num_blocks. Block 0 and row 0 are never assigned.
6. What is sampled is a function of the request, never of the batch.
7. At least one token of an admission is computed, so that there is a logit. A block is published
   when the result of the step that filled it is back without a fault.
8. A request fits the pool alone (the context limit sees to it), and the running request of the
   highest priority, the oldest of these, is never preempted for another: preemption ends.
"""

from __future__ import annotations

import math
from collections import deque

from mili.internal.v1.step_pb2 import TASK_GENERATE, RowFaultKind, StepCommand, StepResult
from mili.router.fair_share import FairShare
from mili.router.kv_cache import DEFAULT_CACHE, CacheSettings, KVCacheManager
from mili.router.limits import Limits
from mili.router.outcome import Finish, FinishReason
from mili.router.pace import Pace
from mili.router.queue import Key, Line, WaitingQueue
from mili.router.request import Request
from mili.router.step_cost import chunk_pairs
from mili.router.step_plan import Scheduled, StepInFlight, StepPlan
from mili.router.tape import Tape, recorded

# Known tokens of all admissions in one command, four bytes each: a frame has its limit, 16 MiB, and
# so has the time that a worker may take to read it.
MAX_ADMITTED_TOKENS = 1 << 20


class Scheduler:
    """Continuous batching over one worker group's rows and blocks.

    shares: what each tenant has had, of all worker groups together. itl_goal: seconds that a stream
    should wait for its next token at most while prompts are computed beside it.
    """

    def __init__(
        self,
        limits: Limits,
        shares: FairShare | None = None,
        cache: CacheSettings = DEFAULT_CACHE,
        itl_goal: float = math.inf,
    ) -> None:
        self.tape: Tape | None = None
        self.shares = shares if shares is not None else FairShare()
        longest = -(-limits.context_limit // limits.block_size)  # blocks; pins leave that many
        self.kv = KVCacheManager(
            limits.num_blocks,
            limits.block_size,
            cache,
            max_pinned_blocks=limits.num_blocks - 1 - longest,
        )
        self.context_limit = limits.context_limit
        self.max_step_tokens = limits.max_step_tokens
        # One token a row must always fit the budget: nobody who runs ever starves.
        self.max_running = min(limits.max_rows - 1, limits.max_step_tokens)
        self.waiting = WaitingQueue(self.shares)
        self.running = Line(_seniority)
        self.in_flight: deque[StepInFlight] = deque()
        # By the last call of schedule().
        self.preempted: list[Request] = []
        self._num_rows = limits.max_rows
        self._free_rows = list(range(limits.max_rows - 1, 0, -1))
        # Known tokens of all requests that wait.
        self.num_waiting_tokens = 0
        self.pace = Pace(itl_goal)
        self._most_running = self.max_running
        self.num_preemptions = 0
        self._steps = 0
        self._admissions = 0

    @property
    def num_uncomputed(self) -> int:
        """Known tokens, of all requests, that no step has been asked to compute."""
        return self.num_waiting_tokens + self.pace.num_known - self.pace.num_computed

    def has_room_for(self, request: Request) -> bool:
        """Whether it would run without waiting for another to end."""
        tokens = self.num_waiting_tokens + len(request.token_ids)
        rows = self.max_running - len(self.running)
        return len(self.waiting) < rows and tokens <= self.kv.num_available * self.kv.block_size

    @recorded
    def add(self, request: Request) -> None:
        """Queue a request where it belongs."""
        assert request.finish is None and not request.row
        assert request.max_length <= self.context_limit
        scheduling = request.params.scheduling
        request.account = self.shares.account(scheduling.tenant, scheduling.weight)
        self.waiting.add(request)
        self.num_waiting_tokens += len(request.token_ids)

    @recorded
    def withdraw(self, every: int = 1) -> list[Request]:
        """Give up every n-th of the waiting requests that no step in flight computes, in order."""
        busy = {row.request.request_id for step in self.in_flight for row in step.rows}
        movable = [request for request in self.waiting.values() if request.request_id not in busy]
        requests = movable[every - 1 :: every]
        for request in requests:
            self._stop_waiting(request)
        return requests

    @recorded
    def close(self) -> None:
        """Admit nobody any more; who runs goes on."""
        self.max_running = 0

    @recorded
    def reopen(self) -> None:
        """Undo close."""
        self.max_running = self._most_running

    @recorded
    def preempt_all(self) -> None:
        """Have all that run wait: they can be withdrawn when no step in flight computes them."""
        for request in reversed(list(self.running.values())):
            self._preempt(request)

    @recorded
    def abort(self, request: Request) -> None:
        """Forget a request that has ended; its row and blocks are free at once."""
        assert request.finish is not None
        if request.row:
            self._leave(request)
        else:
            self._stop_waiting(request)

    @recorded
    def schedule(self) -> StepCommand | None:
        """The next step, or None when there is nothing to compute now."""
        plan = StepPlan()
        self.preempted = []
        budget = self.max_step_tokens
        to_come = len(self.running)
        self.pace.judge(to_come)
        seconds = self.pace.prompt_seconds
        for request in self.running.values():
            # A prompt leaves a token for each of those behind it.
            to_come -= 1
            count = min(request.num_schedulable, budget - to_come)
            if count > 1:
                count, seconds = self._chunk(request, count, seconds, plan)
            if count > 0 and request.row and self._make_room(request, count, plan):
                budget -= self._compute(request, count, plan)
        while budget > 0 and seconds > 0 and (admitted := self._admit(plan)):
            count = min(admitted.num_schedulable, budget)
            count, seconds = self._chunk(admitted, count, seconds, plan)
            budget -= self._compute(admitted, count, plan)
        if not plan.rows:
            return None
        self._steps += 1
        self.in_flight.append(StepInFlight(self._steps, plan.scheduled, plan.size()))
        return plan.command(self._steps)

    @recorded
    def update(self, result: StepResult) -> list[tuple[Request, int | None]]:
        """Take the result of the oldest step in flight.

        Returns, in order, each request that has a new token (with the token), or ended without one
        (None); `request.finish` says whether it has ended.
        """
        step = self.in_flight.popleft()
        assert result.step == step.step, (result.step, step.step)
        self.pace.cost.measured(step.size, result.device_microseconds / 1e6)
        faults = {fault.index: fault.kind for fault in result.faults}
        if result.logprobs or result.embeddings:
            step.read(result)
        news: list[tuple[Request, int | None]] = []
        tokens = iter(result.token_ids)
        for index, (row, num_new) in enumerate(zip(step.rows, result.num_new, strict=True)):
            request = row.request
            if row.samples:
                request.num_pending -= 1
            token = next(tokens) if num_new else None
            if request.finish is not None or request.is_cut:
                continue
            self._take(row, token, faults.get(index))
            if token is not None or request.finish is not None:
                news.append((request, token))
        return news

    @recorded
    def evacuate(self, *, died: bool) -> list[Request]:
        """The worker group is gone: give up everything; returns what must go elsewhere, in order.

        died: it broke down, perhaps because of a request in an executing step.
        """
        if died:
            self._count_death()
        waiting = self.waiting.values()
        for request in waiting:
            self._stop_waiting(request)
        requests = [*self.running.values(), *waiting]
        for request in requests:
            request.num_recoveries += request.row > 0
            request.row = request.admission = request.num_computed = request.num_pending = 0
        return requests

    def check(self) -> None:
        """Assert what holds between two calls; linear, for tests."""
        self.kv.check()
        rows = [request.row for request in self.running.values()]
        assert sorted(rows + self._free_rows) == list(range(1, self._num_rows))
        assert len(self.running) <= self._most_running
        assert self.running.values() == sorted(self.running.values(), key=_seniority)
        for request in (*self.running.values(), *self.waiting.values()):
            assert request.finish is None and request.num_pending >= 0
        assert not any(request.row or request.admission for request in self.waiting.values())
        waiting = sum(len(request.token_ids) for request in self.waiting.values())
        assert waiting == self.num_waiting_tokens
        self.pace.check(self.running.values())

    def _chunk(
        self, request: Request, count: int, seconds: float, plan: StepPlan
    ) -> tuple[int, float]:
        """As much of a prompt as the streams in the step may wait for; and the seconds left."""
        start = request.num_computed
        count, seconds = self.pace.chunk(seconds, start, count)
        plan.pairs += chunk_pairs(start, count)
        return count, seconds

    def _make_room(self, request: Request, count: int, plan: StepPlan) -> bool:
        """Grow the request's blocks, preempting the last in line; False when it was that itself."""
        while (blocks := self.kv.grow(request, request.num_computed + count)) is None:
            victim = self.running.last
            self._preempt(victim)
            if victim is request:
                return False
        if blocks:
            plan.add_blocks(request.row, blocks)
        return True

    def _admit(self, plan: StepPlan) -> Request | None:
        """Move the next waiting request to a row, if there is room for all its known tokens."""
        if not self.waiting or len(self.running) >= self.max_running:
            return None
        request = self._next_waiting()
        if request is None or request.num_pending:
            return None
        plan.num_admitted_tokens += len(request.token_ids)
        if plan.admissions and plan.num_admitted_tokens > MAX_ADMITTED_TOKENS:
            return None
        blocks = self.kv.admit(request, headroom=len(self.running))
        if blocks is None:
            return None
        self._stop_waiting(request)
        self._admissions += 1
        request.admission = self._admissions
        self.running.add(request)
        self.pace.admitted(request)
        request.row = self._free_rows.pop()
        request.num_recomputed += max(0, request.peak_computed - request.num_computed)
        if request.num_admissions == 0:
            request.num_cached_prompt_tokens = request.num_computed
            request.account.charge_prompt(len(request.token_ids) - request.num_computed)
        request.num_admissions += 1
        request.is_cut = False
        plan.admit(request)
        plan.add_blocks(request.row, blocks)
        return request

    def _compute(self, request: Request, count: int, plan: StepPlan) -> int:
        """Put `count` tokens of the request into the step. Counters advance here, not in update."""
        start = request.num_computed
        request.num_computed = end = start + count
        samples = end == len(request.token_ids) + request.num_pending
        request.num_pending += samples
        self.pace.num_computed += count
        if not samples:
            self.pace.interrupted(request)
        plan.rows.append(request.row)
        plan.starts.append(start)
        plan.counts.append(count)
        plan.scheduled.append(Scheduled(request, request.admission, end, samples))
        return count

    def _take(
        self, row: Scheduled, token: int | None, fault: RowFaultKind.ValueType | None
    ) -> None:
        """One row's result: its token, and its computed blocks for others to share."""
        request = row.request
        if fault is not None:
            request.fault(fault)
        elif token is not None:
            assert row.samples
            request.accept(token)
            num_new = 1 + len(request.forced)
            request.account.charge_output_token()
            if request.row:
                self.pace.num_known += num_new
            else:
                self.num_waiting_tokens += num_new
        elif row.samples:
            assert request.params.task != TASK_GENERATE
            request.end(Finish(FinishReason.MAX_TOKENS))
        if request.admission == row.admission and fault is None:
            self.kv.publish(request, row.num_computed)
        request.peak_computed = max(request.peak_computed, row.num_computed)
        if request.finish is not None:
            self.pace.ended(request)
            self.abort(request)
        elif request.is_cut and request.row:
            self._requeue(request)

    def _preempt(self, request: Request) -> None:
        """Make room: the request waits until there is some again."""
        self._requeue(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.preempted.append(request)

    def _requeue(self, request: Request) -> None:
        """Take row and blocks; the request waits, and starts again from its tokens."""
        self._leave(request)
        request.row = request.admission = request.num_computed = 0
        self.add(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.pace.left(request)
        self.kv.release(request)
        self._free_rows.append(request.row)

    def _next_waiting(self) -> Request | None:
        """The next that may run: suspects are tried apart from each other, and hold up nobody."""
        request = self.waiting.first(suspects=True)
        if request and request.is_suspect and self._computes_suspect():
            return self.waiting.first(suspects=False)
        return request

    def _computes_suspect(self) -> bool:
        """Whether one runs, or is computed by a step in flight: it may have been preempted."""
        executing = (row.request for step in self.in_flight for row in step.rows)
        requests = (*self.running.values(), *executing)
        return any(request.is_suspect and not request.finish for request in requests)

    def _stop_waiting(self, request: Request) -> None:
        self.waiting.remove(request)
        self.num_waiting_tokens -= len(request.token_ids)

    def _count_death(self) -> None:
        executing = {
            row.request.request_id: row.request
            for step in self.in_flight
            for row in step.rows
            if row.request.finish is None
        }
        for request in executing.values():
            request.deaths += 1
            request.total_deaths += 1
        suspects = [request for request in executing.values() if request.is_suspect]
        if len(suspects) == 1:
            suspects[0].strikes += 1


def _seniority(request: Request) -> Key:
    return -request.params.scheduling.priority, request.admission
