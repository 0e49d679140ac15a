"""AdminService: what this server is and which workers it has, for operators.

Owns nothing: it reads. Does not know how workers are watched.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from mili.router.api.model import ServedModel, revision
from mili.router.api.status import Context, duration, unsupported_method
from mili.router.worker_group import WorkerState
from mili.v1 import admin_pb2 as pb
from mili.v1 import admin_pb2_grpc


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
    """What a process says of itself. startup_phases: name and seconds, in order."""

    instance_id: str
    start_time: datetime
    startup_phases: Sequence[tuple[str, float]]


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Answers GetServer and ListWorkers."""

    def __init__(
        self,
        model: ServedModel,
        list_workers: Callable[[], Sequence[WorkerStatus]],
        info: ServerInfo,
    ) -> None:
        self._model = model
        self._list_workers = list_workers
        self._info = info

    async def GetServer(  # noqa: N802
        self, request: pb.GetServerRequest, context: Context
    ) -> pb.GetServerResponse:
        return pb.GetServerResponse(
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

    def WatchLoad(  # noqa: N802
        self, request: pb.WatchLoadRequest, context: Context
    ) -> AsyncIterator[pb.WatchLoadResponse]:
        raise unsupported_method("AdminService.WatchLoad")

    async def DrainWorker(  # noqa: N802
        self, request: pb.DrainWorkerRequest, context: Context
    ) -> pb.DrainWorkerResponse:
        raise unsupported_method("AdminService.DrainWorker")

    async def UndrainWorker(  # noqa: N802
        self, request: pb.UndrainWorkerRequest, context: Context
    ) -> pb.UndrainWorkerResponse:
        raise unsupported_method("AdminService.UndrainWorker")

    async def ExplainRequest(  # noqa: N802
        self, request: pb.ExplainRequestRequest, context: Context
    ) -> pb.ExplainRequestResponse:
        raise unsupported_method("AdminService.ExplainRequest")

    async def PinPrefix(  # noqa: N802
        self, request: pb.PinPrefixRequest, context: Context
    ) -> pb.PinPrefixResponse:
        raise unsupported_method("AdminService.PinPrefix")

    async def UnpinPrefix(  # noqa: N802
        self, request: pb.UnpinPrefixRequest, context: Context
    ) -> pb.UnpinPrefixResponse:
        raise unsupported_method("AdminService.UnpinPrefix")

    async def FlushCache(  # noqa: N802
        self, request: pb.FlushCacheRequest, context: Context
    ) -> pb.FlushCacheResponse:
        raise unsupported_method("AdminService.FlushCache")

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
