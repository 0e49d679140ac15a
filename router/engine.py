"""Engine: from submitted requests to batches of outputs, over all worker groups.

Owns every live request, where it runs, and what happens to it when its worker is lost. Does not
know sockets, protobuf of the public API, or asyncio: it is called with events and calls back with
values, so that API front ends could be processes of their own and a test can drive the clock.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import update_wrapper
from typing import Concatenate, ParamSpec, TypeVar

import structlog

from mili.internal.v1.step_pb2 import StepResult
from mili.router.errors import Reason, RequestError
from mili.router.placement import Placement
from mili.router.request import (
    Finish,
    Finished,
    FinishReason,
    GenerationParams,
    Request,
    RequestOutput,
    Started,
    TextOutput,
)
from mili.router.scheduler import Scheduler
from mili.router.worker_group import WorkerGroup

# What a client should wait before it asks again when no worker serves: about a worker's restart.
RETRY_AFTER = 1.0
# Deaths of the worker under a lone suspect, without a token between, that make it the cause.
MAX_STRIKES = 2
# Deaths of its worker that one request may live through.
MAX_DEATHS = 16

# Steps in flight that hide the way from a result to the next command; more where a step is shorter
# than that way, in seconds, may be.
SHALLOW, DEEP = 2, 3
SHORT_STEP = 0.002

Deliver = Callable[[list[RequestOutput]], None]
Clock = Callable[[], float]
MakeText = Callable[[GenerationParams], TextOutput | None]
OnFault = Callable[[Exception], None]

log = structlog.get_logger()

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _event(
    method: Callable[Concatenate[Engine, _P], _T],
) -> Callable[Concatenate[Engine, _P], _T]:
    """An exception that is not for a caller leaves the engine half changed: report it as fatal."""

    def watched(self: Engine, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(self, *args, **kwargs)
        except RequestError:
            raise
        except Exception as error:
            self._on_fault(error)
            raise

    update_wrapper(watched, method)
    return watched


class Engine:
    """Implements router.workers.WorkerEvents: on_ready, on_result, on_lost.

    clock: monotonic seconds. deliver: gets the outputs of a step; exactly one output of a request
    has `finished`, and its id is free from then on. on_fault: the engine is broken and must not be
    used any more.
    """

    def __init__(
        self,
        *,
        model_context_limit: int,
        pipeline_depth: int | None,
        max_queued_requests: int,
        recovery_timeout: float,
        itl_goal: float = math.inf,
        make_text: MakeText,
        deliver: Deliver,
        on_fault: OnFault,
        clock: Clock,
    ) -> None:
        self._model_context_limit = self._context_limit = model_context_limit
        self._pipeline_depth = pipeline_depth
        self._max_queued = max_queued_requests
        self._recovery_timeout = recovery_timeout
        self._itl_goal = itl_goal
        self._make_text = make_text
        self._deliver = deliver
        self._on_fault = on_fault
        self._clock = clock
        self._groups: dict[str, WorkerGroup] = {}  # those that serve
        self._schedulers: dict[str, Scheduler] = {}  # by the same names
        self._open: dict[str, Scheduler] = {}  # of these, those that take requests
        # The others drain: when what runs there moves elsewhere, by the clock.
        self._migrate_at: dict[str, float] = {}
        self._placement = Placement()
        self._requests: dict[str, Request] = {}
        # Without a worker group, in order: their worker was lost and no other serves.
        self._homeless: OrderedDict[str, Request] = OrderedDict()

    @property
    def context_limit(self) -> int:
        """Tokens of prompt and output together that every group can hold that takes requests."""
        return self._context_limit

    @property
    def block_size(self) -> int:
        """Tokens in a KV block; 0 while no worker serves."""
        return next((group.limits.block_size for group in self._groups.values()), 0)

    @property
    def weights_sha256(self) -> bytes:
        """The same for every worker; empty while none serves."""
        return next((group.weights_sha256 for group in self._groups.values()), b"")

    @property
    def is_serving(self) -> bool:
        """Whether a group takes requests."""
        return bool(self._open)

    @property
    def num_live(self) -> int:
        return len(self._requests)

    @property
    def num_queued(self) -> int:
        waiting = sum(len(scheduler.waiting) for scheduler in self._schedulers.values())
        return waiting + len(self._homeless)

    def is_draining(self, group: str) -> bool:
        return group in self._migrate_at

    def scheduler_of(self, group: str) -> Scheduler | None:
        """The scheduler of a group that serves: for looking, not for changing."""
        return self._schedulers.get(group)

    @_event
    def submit(self, request_id: str, params: GenerationParams) -> None:
        """Take a request; raise RequestError when that is impossible now."""
        assert request_id not in self._requests
        if not self._groups:
            raise RequestError(
                Reason.NO_WORKERS, "no worker serves at the moment", retry_after=RETRY_AFTER
            )
        if not self._open:
            raise RequestError(
                Reason.DRAINING, "every worker that serves drains", retry_after=RETRY_AFTER
            )
        if self.num_queued >= self._max_queued:
            raise RequestError(
                Reason.QUEUE_FULL,
                f"{self.num_queued} requests wait already, of at most {self._max_queued}",
                retry_after=RETRY_AFTER,
            )
        if len(params.prompt_token_ids) >= self.context_limit:
            raise RequestError(
                Reason.CONTEXT_TOO_LONG,
                f"the prompt has {len(params.prompt_token_ids)} tokens; at most "
                f"{self.context_limit - 1} fit",
                field="generation.prompt",
            )
        request = Request(
            request_id,
            params,
            context_limit=self.context_limit,
            text=self._make_text(params),
            now=self._clock(),
        )
        self._requests[request_id] = request
        self._place([request])

    @_event
    def cancel(self, request_id: str) -> bool:
        """End a request with CANCELLED; False when it is not live."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        request.end(Finish(FinishReason.CANCELLED))
        if self._homeless.pop(request_id, None) is None:
            self._schedulers[request.worker].abort(request)
        started = self._pump(request.worker) if request.worker in self._groups else []
        self._deliver([self._output(request), *started])
        return True

    @_event
    def tick(self) -> None:
        """Do what is due: move requests on, or give up those that have waited for a worker for too
        long. Call it now and then.
        """
        now = self._clock()
        for name, at in self._migrate_at.items():
            if now >= at and self._open:
                self._schedulers[name].preempt_all()
                self._move(name)
        expired = [
            request
            for request in self._homeless.values()
            if now - request.waiting_since > self._recovery_timeout
        ]
        for request in expired:
            del self._homeless[request.request_id]
            waited = f"no worker took it over from its own within {self._recovery_timeout:g} s"
            request.fail(Reason.WORKER_LOST, waited, retry_after=RETRY_AFTER)
        if expired:
            self._deliver([self._output(request) for request in expired])

    @_event
    def on_ready(self, group: WorkerGroup) -> None:
        """A worker group serves from now on, with an empty cache."""
        limits = group.limits
        self._groups[group.name] = group
        scheduler = self._schedulers[group.name] = Scheduler(limits, itl_goal=self._itl_goal)
        self._take_requests(group.name, True)
        log.info(
            "worker serves",
            worker=group.name,
            kv_tokens=(limits.num_blocks - 1) * limits.block_size,
            context_limit=scheduler.context_limit,
            max_sequences=scheduler.max_running,
            tokens_per_step=limits.max_step_tokens,
        )
        # A fair part of those who wait elsewhere may be better off here.
        others = (other for name, other in self._open.items() if name != group.name)
        every = len(self._open)
        waiting = [request for other in others for request in other.withdraw(every)]
        waiting.sort(key=lambda request: request.submitted_at)
        self._place([*waiting, *self._take_homeless()])

    @_event
    def drain(self, group: str, migrate_after: float | None) -> int:
        """Place nothing on a group any more, until undrain or until it is lost.

        What waits there moves at once; what runs finishes there, or moves after `migrate_after`
        seconds if another group takes requests then. Returns the running sequences. Raises
        RequestError for a group that does not serve.
        """
        scheduler = self._served(group)
        self._take_requests(group, False)
        self._migrate_at[group] = math.inf
        if migrate_after is not None:
            self._migrate_at[group] = self._clock() + migrate_after
        self._move(group)
        log.info("worker drains", worker=group, running=len(scheduler.running))
        return len(scheduler.running)

    @_event
    def undrain(self, group: str) -> None:
        """Place requests on a group again. Raises RequestError for one that does not serve."""
        self._served(group)
        if self._migrate_at.pop(group, None) is not None:
            self._take_requests(group, True)
            log.info("worker takes requests again", worker=group)
            self._place(self._take_homeless())
            self._deliver(self._pump(group))

    @_event
    def on_result(self, group: WorkerGroup, result: StepResult) -> None:
        """A step is done: send the next before telling anyone."""
        scheduler = self._schedulers[group.name]
        news = scheduler.update(result)
        started = self._pump(group.name)
        self._deliver([*(self._output(request, token) for request, token in news), *started])
        if group.name in self._migrate_at:
            self._move(group.name)

    @_event
    def on_lost(self, group: WorkerGroup, reason: str, *, died: bool) -> None:
        """A worker group is gone, and its cache with it: its requests go on elsewhere."""
        del self._groups[group.name]
        self._take_requests(group.name, False)
        self._migrate_at.pop(group.name, None)
        requests = self._schedulers.pop(group.name).evacuate(died=died)
        log.warning("worker lost", worker=group.name, reason=reason, requests=len(requests))
        now = self._clock()
        for request in requests:
            request.waiting_since = now
            if request.strikes >= MAX_STRIKES:
                request.fail(
                    Reason.POISON_REQUEST,
                    f"{MAX_STRIKES} workers died while computing this request and no other suspect",
                )
            elif request.total_deaths >= MAX_DEATHS:
                request.fail(
                    Reason.WORKER_LOST,
                    f"{MAX_DEATHS} workers died while computing this request",
                    retry_after=RETRY_AFTER,
                )
        failed = [self._output(request) for request in requests if request.finish]
        self._place([request for request in requests if not request.finish])
        if failed:
            self._deliver(failed)

    def _served(self, group: str) -> Scheduler:
        scheduler = self._schedulers.get(group)
        if scheduler is None:
            raise RequestError(Reason.WORKER_NOT_FOUND, f"no worker group {group!r} serves")
        return scheduler

    def _take_requests(self, name: str, takes: bool) -> None:
        """Whether requests are placed on a group, from now on."""
        scheduler = self._schedulers[name]
        if takes:
            scheduler.reopen()
            self._open[name] = scheduler
        else:
            scheduler.close()
            self._open.pop(name, None)
        limits = (each.context_limit for each in self._open.values())
        self._context_limit = min(limits, default=self._model_context_limit)

    def _take_homeless(self) -> list[Request]:
        requests = list(self._homeless.values())
        self._homeless.clear()
        return requests

    def _move(self, name: str) -> None:
        """Place elsewhere what waits in a group that drains, and is in no step in flight."""
        if requests := self._schedulers[name].withdraw():
            now = self._clock()
            for request in requests:
                request.waiting_since = now
            self._place(requests)

    def _place(self, requests: Sequence[Request]) -> None:
        """Give requests to worker groups, in order; what fits none waits for one.

        Those that have started already come before those that wait.
        """
        started = [request for request in requests if request.num_admissions]
        fresh = [request for request in requests if not request.num_admissions]
        placed: dict[str, None] = {}
        homeless: dict[str, None] = {}
        for request in (*reversed(started), *fresh):
            name = self._placement.place(request, self._open)
            if name is None:
                homeless[request.request_id] = None
                continue
            scheduler = self._schedulers[name]
            request.worker = name
            request.max_length = min(request.max_length, scheduler.context_limit)
            scheduler.add(request, first=request.num_admissions > 0)
            self._placement.changed(name)
            placed[name] = None
        self._homeless |= {
            request.request_id: request for request in requests if request.request_id in homeless
        }
        outputs = [output for name in placed for output in self._pump(name)]
        if outputs:
            self._deliver(outputs)

    def _pump(self, name: str) -> list[RequestOutput]:
        """Keep the pipeline of a group full; returns what to tell the requests that started."""
        scheduler, group = self._schedulers[name], self._groups[name]
        self._placement.changed(name)
        started: list[RequestOutput] = []
        depth = self._pipeline_depth or (DEEP if group.last_step_seconds < SHORT_STEP else SHALLOW)
        while len(scheduler.in_flight) < depth:
            command = scheduler.schedule()
            if command is None:
                break
            rows = scheduler.in_flight[-1].rows
            group.send(command, [row.samples for row in rows], self._clock())
            if command.admissions:
                started += self._started(row.request for row in rows)
        return started

    def _started(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """What to tell those that were admitted for the first time."""
        outputs: list[RequestOutput] = []
        for request in requests:
            if request.admitted_at is None:
                request.admitted_at = self._clock()
                usage = request.usage
                start = Started(usage.prompt_tokens, usage.cached_prompt_tokens)
                outputs.append(RequestOutput(request.request_id, started=start))
        return outputs

    def _output(self, request: Request, token: int | None = None) -> RequestOutput:
        """What to tell a request after a step; the last output takes it off the books."""
        now = self._clock()
        token_ids = () if token is None else (token,)
        if token_ids and request.first_token_at is None:
            request.first_token_at = now
        finished = None
        if request.finish is not None:
            finished = Finished(request.finish, request.usage, request.timing(now))
            del self._requests[request.request_id]
        return RequestOutput(
            request.request_id,
            token_ids=token_ids,
            text=request.text.take() if request.text else "",
            first_token_index=request.num_output_tokens - len(token_ids),
            finished=finished,
        )
