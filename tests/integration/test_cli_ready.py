"""The line that `mili serve` prints when the API answers."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from mili.cli.serve import _announce, free_port
from mili.router.config import RouterConfig
from mili.v1 import admin_pb2, admin_pb2_grpc

STATUS = health_pb2.HealthCheckResponse


class Operators(admin_pb2_grpc.AdminServiceServicer):
    def ListWorkers(  # noqa: N802
        self, request: admin_pb2.ListWorkersRequest, context: grpc.ServicerContext
    ) -> admin_pb2.ListWorkersResponse:
        return admin_pb2.ListWorkersResponse(workers=[admin_pb2.Worker(model="tiny")])


def start_router(port: int, admin_port: int, health: HealthServicer) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    add_HealthServicer_to_server(health, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Operators(), server)
    for each in (port, admin_port):
        server.add_insecure_port(f"127.0.0.1:{each}")
    server.start()
    return server


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_ready_is_said_once_the_router_says_it(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not while nothing listens, nor while the router waits for a worker, nor over a restart."""
    port = free_port("port", "127.0.0.1")
    admin_port = free_port("admin_port", "127.0.0.1")
    router = RouterConfig(model="/m", host=host, port=port, admin_port=admin_port)
    announcement = asyncio.create_task(_announce(router, 2, lambda: True))
    await asyncio.sleep(0.1)
    health = HealthServicer()
    health.set("readiness", STATUS.NOT_SERVING)
    server = start_router(port, admin_port, health)
    await asyncio.sleep(0.3)
    assert not announcement.done()
    server.stop(None).wait()
    server = start_router(port, admin_port, health)
    health.set("readiness", STATUS.SERVING)
    await asyncio.wait_for(announcement, 5)
    server.stop(None).wait()
    assert capsys.readouterr().out == f"ready: grpc on {host}:{port}, model tiny, 2 workers\n"
