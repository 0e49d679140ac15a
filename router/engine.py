"""Engine: from submitted requests to batches of outputs, over all worker groups.

Owns every live request and who is told what. Does not know sockets, protobuf of the public API, or
asyncio: it is called with events and calls back with values, so that API front ends could be
processes of their own and a test can drive the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import structlog

from mili.internal.v1.step_pb2 import Prepared, StepResult
from mili.router.admission import Admission
from mili.router.deadlines import Deadlines, end_if_over, times_of
from mili.router.dispatch import Dispatch
from mili.router.errors import Reason
from mili.router.fair_share import FairShare
from mili.router.faults import OnFault, reports_faults
from mili.router.fleet import Fleet
from mili.router.kv_cache import DEFAULT_CACHE, CacheSettings
from mili.router.ledger import Ledger
from mili.router.meters import Meters
from mili.router.operations import Operations
from mili.router.outcome import Finish, FinishReason, RequestOutput
from mili.router.params import GenerationParams
from mili.router.pipeline import Pipeline
from mili.router.recorder import Recorder
from mili.router.recovery import Homeless, judge
from mili.router.request import Request, TextOutput
from mili.router.scheduler import Scheduler
from mili.router.siblings import Siblings
from mili.router.worker_group import WorkerGroup

Deliver = Callable[[list[RequestOutput]], None]
Clock = Callable[[], float]
MakeText = Callable[[GenerationParams], TextOutput | None]

log = structlog.get_logger()


class Engine:
    """Implements router.workers.WorkerEvents: on_ready, on_result, on_lost.

    clock: monotonic seconds. deliver: gets the outputs of a step; exactly one output of a request
    has `finished`, and its id is free from then on. on_fault: the engine is broken and must not be
    used any more. wake_at: hears by when, in the clock's seconds, tick() should be called next.
    max_queue_time: seconds that a request waits which does not say. itl_goal: as Scheduler has it.
    What operators ask for stands in `operations`.
    """

    def __init__(
        self,
        *,
        model_context_limit: int,
        pipeline_depth: int | None,
        max_queued_requests: int,
        recovery_timeout: float,
        make_text: MakeText,
        deliver: Deliver,
        on_fault: OnFault,
        clock: Clock,
        max_queue_time: float = math.inf,
        itl_goal: float = math.inf,
        wake_at: Callable[[float], None] = lambda due: None,
        cache: CacheSettings = DEFAULT_CACHE,
        recorder: Recorder | None = None,
    ) -> None:
        self._pipeline_depth = pipeline_depth
        self._itl_goal = itl_goal
        self._make_text = make_text
        self._deliver = deliver
        self.on_fault = on_fault
        self._clock = clock
        self._cache = cache
        self._recorder = recorder
        self.meters = Meters()
        self._shares = FairShare()
        self._admission = Admission(self._shares, max_queued_requests, max_queue_time)
        self._deadlines = Deadlines(wake_at)
        self._homeless = Homeless(recovery_timeout)
        self._siblings = Siblings()
        self._ledger = Ledger(self.meters, self._siblings)
        self._fleet = Fleet(model_context_limit)
        self._dispatch = Dispatch(
            fleet=self._fleet,
            shares=self._shares,
            homeless=self._homeless,
            siblings=self._siblings,
            deadlines=self._deadlines,
            ledger=self._ledger,
        )
        self.operations = Operations(
            fleet=self._fleet,
            dispatch=self._dispatch,
            ledger=self._ledger,
            tell=self._tell,
            on_fault=on_fault,
            clock=clock,
        )

    @property
    def context_limit(self) -> int:
        """Tokens of prompt and output together that every group that takes requests can hold."""
        return self._fleet.context_limit

    @property
    def block_size(self) -> int:
        """Tokens in a KV block; 0 while no worker serves."""
        return next((scheduler.kv.block_size for scheduler in self._fleet.schedulers), 0)

    @property
    def weights_sha256(self) -> bytes:
        """The same for every worker; empty while none serves."""
        groups = (pipeline.group for pipeline in self._fleet.pipelines.values())
        return next((group.weights_sha256 for group in groups), b"")

    @property
    def max_running(self) -> int:
        """Sequences that run together in every group; 0 while none takes requests."""
        return self._fleet.max_running

    @property
    def constrains_outputs(self) -> bool:
        """Whether an output can be held to a grammar; False while no group takes requests."""
        return self._fleet.takes_requests and self._fleet.constrains_outputs

    @property
    def is_serving(self) -> bool:
        """Whether a group takes requests."""
        return self._fleet.takes_requests

    @property
    def num_live(self) -> int:
        return len(self._ledger)

    @property
    def num_queued(self) -> int:
        return self._dispatch.num_queued

    def is_draining(self, group: str) -> bool:
        return self._fleet.is_draining(group)

    @property
    def schedulers(self) -> Mapping[str, Scheduler]:
        """Of the groups that serve, by name: for looking, not for changing."""
        return {name: each.scheduler for name, each in self._fleet.pipelines.items()}

    def scheduler_of(self, group: str) -> Scheduler | None:
        """The scheduler of a group that serves: for looking, not for changing."""
        pipeline = self._fleet.pipelines.get(group)
        return pipeline.scheduler if pipeline else None

    @reports_faults
    def submit(self, request_id: str, params: GenerationParams) -> None:
        """Take a request; raise RequestError when that is impossible now, or in vain.

        The first of its sequences comes in as any request does, and brings the others.
        """
        assert not self._ledger.live(request_id)
        self._fleet.check_capable(params)
        now = self._clock()
        request = Request(request_id, params, context_limit=self.context_limit, now=now)
        self._admission.receive(request)
        name = self._fleet.place(request)
        wait = self._fleet.pipelines[name].estimated_wait(request) if name else 0.0
        self._admission.check(request, wait)
        displaced = self._make_way(request, name, wait)
        for sequence in self._siblings.open(request):
            sequence.text = self._make_text(params)
            self._ledger.open(sequence)
            self._deadlines.watch(sequence, *times_of(sequence))
        self._ledger.note(request, now, "queued", f"for about {wait:.2f} s")
        self._dispatch.settle(request, name, now)
        self._tell(self._dispatch.pump(name, now) if name else [], displaced)

    @reports_faults
    def cancel(self, request_id: str) -> bool:
        """End a request with CANCELLED; False when it is not live."""
        requests = self._ledger.live(request_id)
        for request in requests:
            request.end(Finish(FinishReason.CANCELLED))
        self._tell(self._dispatch.drop(requests, self._clock()), requests)
        return bool(requests)

    @reports_faults
    def tick(self) -> None:
        """Do what is due: end requests, move them, let pins go. Call it when wake_at says so, and
        ten times a second in any case.
        """
        now = self._clock()
        over: list[Request] = []
        for request in self._deadlines.due(now):
            end_if_over(request, now)
            if request in self._homeless and not request.finish:
                self._homeless.give_up(request, now)
            if request.finish:
                over.append(request)
        self._tell(self._dispatch.drop(over, now), over)
        self._fleet.expire_pins(now)
        for name in self._fleet.migrate(now):
            self._tell(self._dispatch.move(name, now))

    @reports_faults
    def on_ready(self, group: WorkerGroup) -> None:
        """A worker group serves from now on, with an empty cache."""
        meters = self.meters.group(group.name)
        scheduler = Scheduler(group.limits, self._shares, self._cache, self._itl_goal)
        if self._recorder is not None:
            self._recorder.watch(group.name, scheduler)
        log.info(
            "worker serves",
            worker=group.name,
            kv_tokens=(group.limits.num_blocks - 1) * group.limits.block_size,
            context_limit=scheduler.context_limit,
            max_sequences=scheduler.max_running,
            tokens_per_step=group.limits.max_step_tokens,
        )
        waiting = self._fleet.join(Pipeline(group, scheduler, self._pipeline_depth, meters))
        self._tell(self._dispatch.welcome(waiting, self._clock()))

    @reports_faults
    def on_result(self, group: WorkerGroup, result: StepResult) -> None:
        """A step is done: send the next before telling anyone."""
        now = self._clock()
        news = self._fleet.pipelines[group.name].take(result, now)
        started: list[RequestOutput] = []
        if self._siblings.num_waiting:
            started = self._dispatch.release(news, now)
        started += self._dispatch.pump(group.name, now)
        self._ledger.meter.output(len(result.token_ids), now)
        self.meters.stepped(self.meters.group(group.name), news, result.device_microseconds, now)
        outputs = [self._ledger.output(request, token, now) for request, token in news]
        for request, _token in news:
            if request.finish:
                self._admission.learn(request)
        self._deliver(outputs + started)
        if self._fleet.is_draining(group.name):
            self._tell(self._dispatch.move(group.name, now))

    @reports_faults
    def on_prepared(self, group: WorkerGroup, prepared: Prepared) -> None:
        """A worker group has a grammar ready, or refuses it."""
        now = self._clock()
        failed = self._fleet.pipelines[group.name].prepared(prepared, now)
        self._tell(self._dispatch.pump(group.name, now), failed)

    @reports_faults
    def on_lost(self, group: WorkerGroup, reason: str, *, died: bool) -> None:
        """A worker group is gone, and its cache with it: its requests go on elsewhere."""
        requests = self._fleet.lose(group.name, died=died)
        log.warning("worker lost", worker=group.name, reason=reason, requests=len(requests))
        self.meters.lost(self.meters.group(group.name), len(requests))
        now = self._clock()
        for request in requests:
            request.waiting_since = now
            self._ledger.note(request, now, "worker_lost", f"{group.name}: {reason}")
            request.leave_worker(Reason.WORKER_LOST)
            judge(request)
        over = [request for request in requests if request.finish]
        going_on = [request for request in requests if not request.finish]
        self._tell(self._dispatch.place(going_on, now), over)

    def _make_way(self, newcomer: Request, name: str | None, wait: float) -> list[Request]:
        """If the queue is full, its last one ends; raise RequestError if that is the newcomer."""
        if self.num_queued < self._admission.max_queued:
            return []
        last = self._fleet.scheduler(name).waiting.last(newcomer) if name else newcomer
        error = self._admission.queue_full(wait)
        if last is newcomer:
            raise error
        last.end(Finish(FinishReason.ERROR, error=error))
        self._fleet.scheduler(last.worker).abort(last)
        return [last]

    def _tell(self, started: Sequence[RequestOutput], ended: Sequence[Request] = ()) -> None:
        """Deliver the first output of some requests, and before it the last of those that ended."""
        now = self._clock()
        ended = [*ended, *self._siblings.bereave(ended)]
        outputs = [*(self._ledger.output(request, None, now) for request in ended), *started]
        if outputs:
            self._deliver(outputs)
