"""AdminService: what this server is and does, for operators, and what they may tell it to do.

Owns nothing: it asks and tells the engine. Does not know how workers are watched or drained.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from mili.router.api.durations import to_positive_seconds, to_seconds
from mili.router.api.engine import Engine
from mili.router.api.events import to_timing, to_usage
from mili.router.api.model import ServedModel, revision
from mili.router.api.pins import Pins
from mili.router.api.status import Context, NotFoundError, clip, duration
from mili.router.api.supported import check_supported
from mili.router.errors import Reason, RequestError
from mili.router.tenants import Tenant, Tenants
from mili.router.worker_group import WorkerState
from mili.v1 import admin_pb2 as pb
from mili.v1 import admin_pb2_grpc

# Seconds.
_CHANGE_INTERVAL = 1.0
_SHORTEST_INTERVAL = 0.1
_LONGEST_INTERVAL = 3600.0


class WorkerStatus(NamedTuple):
    """One worker process. The KV counts and the running sequences are its group's.

    startup_phases: name and seconds, in order.
    """

    name: str
    instance_id: str
    state: WorkerState
    last_heartbeat: float  # seconds since 1970
    last_step_age: float | None  # seconds; None before the first step
    kv_blocks_total: int
    kv_blocks_free: int
    kv_blocks_cached: int
    running_sequences: int
    group: str
    rank: int
    world_size: int
    weights_sha256: bytes
    startup_phases: Sequence[tuple[str, float]]


class ServerInfo(NamedTuple):
    """What a process says of itself. startup_phases: name and seconds, in order.

    limits: those that it was started with.
    """

    instance_id: str
    start_time: datetime
    startup_phases: Sequence[tuple[str, float]]
    limits: pb.ServerLimits


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Looks into one router, and steers it. clock: the engine's."""

    def __init__(
        self,
        *,
        engine: Engine,
        model: ServedModel,
        pins: Pins,
        tenants: Tenants,
        list_workers: Callable[[], Sequence[WorkerStatus]],
        info: ServerInfo,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._operations = engine.operations
        self._model = model
        self._pins = pins
        self._tenants = tenants
        self._list_workers = list_workers
        self._info = info
        self._clock = clock

    async def GetServer(  # noqa: N802
        self, request: pb.GetServerRequest, context: Context
    ) -> pb.GetServerResponse:
        limits = pb.ServerLimits(
            max_context_tokens=self._engine.context_limit,
            max_running_sequences=self._engine.max_running,
        )
        limits.MergeFrom(self._info.limits)
        return pb.GetServerResponse(
            limits=limits,
            version=version("mili"),
            instance_id=self._info.instance_id,
            start_time=_timestamp(self._info.start_time),
            startup_phases=_phases(self._info.startup_phases),
            workers=self._describe_workers(),
        )

    async def ListWorkers(  # noqa: N802
        self, request: pb.ListWorkersRequest, context: Context
    ) -> pb.ListWorkersResponse:
        return pb.ListWorkersResponse(workers=self._describe_workers())

    async def WatchLoad(  # noqa: N802
        self, request: pb.WatchLoadRequest, context: Context
    ) -> AsyncIterator[pb.WatchLoadResponse]:
        """At every interval; without one whenever something has changed within a second."""
        check_supported(request)
        asked = request.HasField("interval")
        interval = _CHANGE_INTERVAL
        if asked:
            interval = to_positive_seconds(request.interval, "interval")
            if not _SHORTEST_INTERVAL <= interval <= _LONGEST_INTERVAL:
                limits = f"from {_SHORTEST_INTERVAL:g} to {_LONGEST_INTERVAL:g} seconds"
                raise _invalid(f"interval must be {limits}", "interval")
        told = None
        while True:
            load = self._describe_load()
            response = pb.WatchLoadResponse(load=load, workers=self._describe_workers())
            if asked or response != told:
                yield response
                told = response
            await asyncio.sleep(interval)

    async def DrainWorker(  # noqa: N802
        self, request: pb.DrainWorkerRequest, context: Context
    ) -> pb.DrainWorkerResponse:
        check_supported(request)
        migrate_after = None
        if request.HasField("migrate_after"):
            migrate_after = to_seconds(request.migrate_after, "migrate_after")
        running = self._operations.drain(self._group_of(request.name), migrate_after)
        return pb.DrainWorkerResponse(running_sequences=running)

    async def UndrainWorker(  # noqa: N802
        self, request: pb.UndrainWorkerRequest, context: Context
    ) -> pb.UndrainWorkerResponse:
        check_supported(request)
        self._operations.undrain(self._group_of(request.name))
        return pb.UndrainWorkerResponse()

    async def ExplainRequest(  # noqa: N802
        self, request: pb.ExplainRequestRequest, context: Context
    ) -> pb.ExplainRequestResponse:
        check_supported(request)
        told = self._operations.explain(request.request_id)
        if told is None:
            name = request.request_id
            raise NotFoundError(Reason.REQUEST_NOT_FOUND, "request", name, field="request_id")
        # The engine's clock is not the calendar's.
        offset = time.time() - self._clock()
        return pb.ExplainRequestResponse(
            state=pb.RequestState.ValueType(told.state),
            queue_position=told.queue_position,
            timing=to_timing(told.timing),
            usage=to_usage(told.usage),
            events=[
                pb.RequestEvent(
                    time=_timestamp(datetime.fromtimestamp(event.at + offset, UTC)),
                    kind=event.kind,
                    detail=event.detail,
                )
                for event in told.events
            ],
        )

    async def PinPrefix(  # noqa: N802
        self, request: pb.PinPrefixRequest, context: Context
    ) -> pb.PinPrefixResponse:
        check_supported(request)
        self._model.check_name(request.model, "model")
        pinned = await self._pins.pin(request, self._tenant(request.tenant))
        return pb.PinPrefixResponse(pin_id=pinned.pin_id, pinned_tokens=pinned.num_tokens)

    async def UnpinPrefix(  # noqa: N802
        self, request: pb.UnpinPrefixRequest, context: Context
    ) -> pb.UnpinPrefixResponse:
        check_supported(request)
        self._operations.unpin(request.pin_id)
        return pb.UnpinPrefixResponse()

    async def FlushCache(  # noqa: N802
        self, request: pb.FlushCacheRequest, context: Context
    ) -> pb.FlushCacheResponse:
        check_supported(request)
        prefix = self._tenant(request.tenant).cache_prefix if request.tenant else None
        return pb.FlushCacheResponse(freed_blocks=self._operations.flush(prefix))

    def _tenant(self, name: str) -> Tenant:
        tenant = self._tenants.named(name)
        if tenant is None:
            raise _invalid(f"there is no tenant {clip(name, 128)!r}", "tenant")
        return tenant

    def _group_of(self, worker: str) -> str:
        """Return the group of a worker: what is drained, for its ranks compute together."""
        for status in self._list_workers():
            if status.name == worker:
                return status.group
        raise NotFoundError(Reason.WORKER_NOT_FOUND, "Worker", worker, field="name")

    def _describe_load(self) -> pb.Load:
        fields: dict[str, Any] = self._operations.load()._asdict()
        fields["estimated_queue_time"] = duration(fields["estimated_queue_time"])
        return pb.Load(**fields)

    def _describe_workers(self) -> list[pb.Worker]:
        return [self._describe(worker) for worker in self._list_workers()]

    def _describe(self, worker: WorkerStatus) -> pb.Worker:
        fields = worker._asdict()
        fields["model_revision"] = revision(fields.pop("weights_sha256"))
        fields["startup_phases"] = _phases(worker.startup_phases)
        fields["state"] = pb.WorkerState.ValueType(worker.state)
        fields["last_heartbeat"] = _timestamp(datetime.fromtimestamp(worker.last_heartbeat, UTC))
        age = worker.last_step_age
        fields["last_step_age"] = None if age is None else duration(age)
        return pb.Worker(model=self._model.name, **fields)


def _phases(phases: Sequence[tuple[str, float]]) -> list[pb.StartupPhase]:
    return [pb.StartupPhase(name=name, duration=duration(seconds)) for name, seconds in phases]


def _timestamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def _invalid(message: str, field: str) -> RequestError:
    return RequestError(Reason.INVALID_FIELD, message, field=field)
