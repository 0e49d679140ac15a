"""Engine: from submitted requests to batches of outputs, over all worker groups.

Owns every live request and who is told what. Does not know sockets, protobuf of the public API, or
asyncio: it is called with events and calls back with values, so that API front ends could be
processes of their own and a test can drive the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import structlog

from mili.internal.v1.step_pb2 import StepResult
from mili.router.admission import Admission, check_capable
from mili.router.deadlines import Deadlines, end_if_over, times_of
from mili.router.fair_share import FairShare
from mili.router.faults import OnFault, reports_faults
from mili.router.introspection import Explanation, Load
from mili.router.kv_cache import DEFAULT_CACHE, CacheSettings
from mili.router.ledger import Ledger
from mili.router.load import load_of
from mili.router.meters import Meters
from mili.router.pipeline import Pipeline
from mili.router.placement import place
from mili.router.recorder import Recorder
from mili.router.recovery import Homeless, judge
from mili.router.request import (
    Finish,
    FinishReason,
    GenerationParams,
    Request,
    RequestOutput,
    TextOutput,
)
from mili.router.scheduler import Scheduler
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
    max_queue_time: seconds that a request waits which does not say.
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
        wake_at: Callable[[float], None] = lambda due: None,
        cache: CacheSettings = DEFAULT_CACHE,
        recorder: Recorder | None = None,
    ) -> None:
        self._model_context_limit = model_context_limit
        self._pipeline_depth = pipeline_depth
        self._make_text = make_text
        self._deliver = deliver
        self.on_fault = on_fault
        self._clock = clock
        self._recorder = recorder
        self.meters = Meters()
        self._shares = FairShare()
        self._admission = Admission(self._shares, max_queued_requests, max_queue_time)
        self._deadlines = Deadlines(wake_at)
        self._homeless = Homeless(recovery_timeout)
        self._ledger = Ledger(self.meters)
        self._pipelines: dict[str, Pipeline] = {}  # of the groups that serve
        self._cache = cache
        self._schedulers: dict[str, Scheduler] = {}  # by the same names

    @property
    def context_limit(self) -> int:
        """Tokens of prompt and output together that every serving group can hold."""
        limits = (scheduler.context_limit for scheduler in self._schedulers.values())
        return min(limits, default=self._model_context_limit)

    @property
    def block_size(self) -> int:
        """Tokens in a KV block; 0 while no worker serves."""
        return next((scheduler.kv.block_size for scheduler in self._schedulers.values()), 0)

    @property
    def weights_sha256(self) -> bytes:
        """The same for every worker; empty while none serves."""
        groups = (pipeline.group for pipeline in self._pipelines.values())
        return next((group.weights_sha256 for group in groups), b"")

    @property
    def is_serving(self) -> bool:
        return bool(self._pipelines)

    @property
    def num_live(self) -> int:
        return len(self._ledger)

    @property
    def num_queued(self) -> int:
        waiting = sum(len(scheduler.waiting) for scheduler in self._schedulers.values())
        return waiting + len(self._homeless)

    @property
    def schedulers(self) -> Mapping[str, Scheduler]:
        """Of the groups that serve, by name: for looking, not for changing."""
        return self._schedulers

    def scheduler_of(self, group: str) -> Scheduler | None:
        """The scheduler of a group that serves: for looking, not for changing."""
        return self._schedulers.get(group)

    def load(self) -> Load:
        """How busy all groups together are now."""
        pipelines = self._pipelines.values()
        return load_of(pipelines, self._homeless, self._ledger.meter, self._clock())

    def explain(self, request_id: str) -> Explanation | None:
        """Tell what happened to a request; None for one that is not remembered."""
        request = self._ledger.get(request_id)
        position = 0
        if request and not request.row and request not in self._homeless:
            position = self._schedulers[request.worker].waiting.position(request)
        return self._ledger.explain(request_id, self._clock(), position)

    @reports_faults
    def submit(self, request_id: str, params: GenerationParams) -> None:
        """Take a request; raise RequestError when that is impossible now, or in vain."""
        assert request_id not in self._ledger
        check_capable(params, self.context_limit, serving=self.is_serving)
        now = self._clock()
        request = Request(request_id, params, context_limit=self.context_limit, now=now)
        self._admission.receive(request)
        name = place(request, self._schedulers)
        wait = self._pipelines[name].estimated_wait(request) if name else 0.0
        self._admission.check(request, wait)
        displaced = self._make_way(request, name, wait)
        request.text = self._make_text(params)
        self._ledger.open(request)
        self._ledger.note(request, now, "queued", f"for about {wait:.2f} s")
        self._deadlines.watch(request, *times_of(request))
        self._settle(request, name, now)
        self._tell(displaced, self._pump(name) if name else [])

    @reports_faults
    def cancel(self, request_id: str) -> bool:
        """End a request with CANCELLED; False when it is not live."""
        request = self._ledger.get(request_id)
        if request is None:
            return False
        request.end(Finish(FinishReason.CANCELLED))
        self._drop([request])
        return True

    @reports_faults
    def tick(self) -> None:
        """End the requests whose time is over. Call it at the latest when wake_at says so."""
        now = self._clock()
        over: list[Request] = []
        for request in self._deadlines.due(now):
            end_if_over(request, now)
            if request in self._homeless and not request.finish:
                self._homeless.give_up(request, now)
            if request.finish:
                over.append(request)
        self._drop(over)

    @reports_faults
    def on_ready(self, group: WorkerGroup) -> None:
        """A worker group serves from now on, with an empty cache."""
        meters = self.meters.group(group.name)
        pipeline = Pipeline(group, self._shares, self._cache, self._pipeline_depth, meters)
        if self._recorder is not None:
            self._recorder.watch(group.name, pipeline.scheduler)
        self._pipelines[group.name] = pipeline
        self._schedulers[group.name] = pipeline.scheduler
        log.info(
            "worker serves",
            worker=group.name,
            kv_tokens=(group.limits.num_blocks - 1) * group.limits.block_size,
            context_limit=pipeline.scheduler.context_limit,
            max_sequences=pipeline.scheduler.max_running,
            tokens_per_step=group.limits.max_step_tokens,
        )
        # Whoever waits elsewhere may be better off here.
        waiting = [request for other in self._schedulers.values() for request in other.withdraw()]
        self._place([*waiting, *self._homeless.leave()])

    @reports_faults
    def on_result(self, group: WorkerGroup, result: StepResult) -> None:
        """A step is done: send the next before telling anyone."""
        now = self._clock()
        news = self._pipelines[group.name].take(result, now)
        started = self._pump(group.name)
        self._ledger.meter.output(len(result.token_ids), now)
        self.meters.stepped(self.meters.group(group.name), news, result.device_microseconds, now)
        outputs = [self._ledger.output(request, token, now) for request, token in news]
        for request, _token in news:
            if request.finish:
                self._admission.learn(request)
        self._deliver(outputs + started)

    @reports_faults
    def on_lost(self, group: WorkerGroup, reason: str, *, died: bool) -> None:
        """A worker group is gone, and its cache with it: its requests go on elsewhere."""
        del self._pipelines[group.name]
        requests = self._schedulers.pop(group.name).evacuate(died=died)
        log.warning("worker lost", worker=group.name, reason=reason, requests=len(requests))
        self.meters.lost(self.meters.group(group.name), len(requests))
        now = self._clock()
        for request in requests:
            request.waiting_since = now
            self._ledger.note(request, now, "worker_lost", f"{group.name}: {reason}")
            judge(request)
        self._place([request for request in requests if not request.finish])
        self._tell([request for request in requests if request.finish])

    def _make_way(self, newcomer: Request, name: str | None, wait: float) -> list[Request]:
        """If the queue is full, its last one ends; raise RequestError if that is the newcomer."""
        if self.num_queued < self._admission.max_queued:
            return []
        last = self._schedulers[name].waiting.last(newcomer) if name else newcomer
        error = self._admission.queue_full(wait)
        if last is newcomer:
            raise error
        last.end(Finish(FinishReason.ERROR, error=error))
        self._schedulers[last.worker].abort(last)
        return [last]

    def _drop(self, ended: Sequence[Request]) -> None:
        """Requests have ended from outside: use what they leave, and tell them."""
        names: dict[str, None] = {}
        for request in ended:
            if request in self._homeless:
                self._homeless.remove(request)
            else:
                self._schedulers[request.worker].abort(request)
                names[request.worker] = None
        started = [output for name in names for output in self._pump(name)]
        self._tell(ended, started)

    def _place(self, requests: Sequence[Request]) -> None:
        """Give requests to worker groups; what fits none waits for one.

        Those that were interrupted come before those that never began.
        """
        now = self._clock()
        names: dict[str, None] = {}
        for request in sorted(requests, key=lambda each: (not each.num_admissions, each.arrival)):
            name = place(request, self._schedulers)
            self._settle(request, name, now)
            if name is not None:
                names[name] = None
        self._tell([], [output for name in names for output in self._pump(name)])

    def _settle(self, request: Request, name: str | None, now: float) -> None:
        """Let a request wait where it was placed."""
        if name is None:
            self._deadlines.watch(request, self._homeless.add(request))
            return
        scheduler = self._schedulers[name]
        request.worker = name
        request.max_length = min(request.max_length, scheduler.context_limit)
        scheduler.add(request)
        self._ledger.note(request, now, "placed", name)

    def _pump(self, name: str) -> list[RequestOutput]:
        """Keep the pipeline of a group full; returns what to tell the requests that started."""
        now = self._clock()
        admitted, preempted = self._pipelines[name].fill(now)
        for request in preempted:
            self._ledger.note(request, now, "preempted", name)
        return [self._ledger.started(each, now) for each in admitted if each.admitted_at is None]

    def _tell(self, ended: Sequence[Request], started: Sequence[RequestOutput] = ()) -> None:
        """Deliver the last output of requests that have ended, and the first of others."""
        now = self._clock()
        outputs = [*(self._ledger.output(request, None, now) for request in ended), *started]
        if outputs:
            self._deliver(outputs)
