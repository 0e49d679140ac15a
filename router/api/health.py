"""grpc.health.v1: Check, Watch and List, and the truth that they tell.

Owns the names: "liveness" serves while the process runs, every other name while requests can be
served. Does not know what makes that so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mili.router.api.status import Context

SERVICE_NAME = "grpc.health.v1.Health"


# What the installed grpc_health's copy of health.proto lacks.
_LIST_MESSAGES = """
message_type { name: "HealthListRequest" }
message_type {
  name: "HealthListResponse"
  field {
    name: "statuses" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".grpc.health.v1.HealthListResponse.StatusesEntry"
  }
  nested_type {
    name: "StatusesEntry"
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field {
      name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE
      type_name: ".grpc.health.v1.HealthCheckResponse"
    }
    options { map_entry: true }
  }
}
"""


def health_file() -> FileDescriptorProto:
    """Return health.proto with List."""
    file = FileDescriptorProto()
    health_pb2.DESCRIPTOR.CopyToProto(file)
    text_format.Merge(_LIST_MESSAGES, file)
    file.service[0].method.add(
        name="List",
        input_type=".grpc.health.v1.HealthListRequest",
        output_type=".grpc.health.v1.HealthListResponse",
    )
    return file


class Health(health_pb2_grpc.HealthServicer):
    """The health of one process, for any number of listeners."""

    def __init__(self, services: Iterable[str]) -> None:
        self._names = ("", "liveness", "readiness", *services)
        self._ready = False
        self._changed = asyncio.Event()
        pool = DescriptorPool()
        pool.Add(health_file())
        name = "grpc.health.v1.HealthList"
        self._list_request = GetMessageClass(pool.FindMessageTypeByName(f"{name}Request"))
        self._list_response = GetMessageClass(pool.FindMessageTypeByName(f"{name}Response"))

    def add_to(self, server: aio.Server) -> None:
        """Serve health on a listener."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)
        handler = grpc.unary_unary_rpc_method_handler(
            self.List,
            request_deserializer=self._list_request.FromString,
            response_serializer=self._list_response.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE_NAME, {"List": handler}),)
        )

    def set_ready(self, ready: bool) -> None:
        """Say whether requests can be served; watchers hear of a change."""
        if ready == self._ready:
            return
        self._ready = ready
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
                told = status
            await changed.wait()

    async def List(self, request: Message, context: Context) -> Any:  # noqa: N802, ANN401
        response: Any = self._list_response()
        for name in self._names:
            response.statuses[name].status = self._status(name)
        return response

    def _status(self, name: str) -> int:
        if name not in self._names:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._ready or name == "liveness":
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING
