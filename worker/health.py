"""The worker's gRPC health port, for probes.

Owns the answers to grpc.health.v1: `liveness` as long as the process runs, `readiness` and "" when
the router can use it. The only file that imports grpc here.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING


class HealthServer:
    """Listens on all addresses: probes come from outside. port 0 picks one."""

    def __init__(self, port: int) -> None:
        """Raises OSError if the port is in use."""
        self._health = health.HealthServicer()
        self._health.set("liveness", SERVING)
        self.set_ready(False)
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=4, thread_name_prefix="health"),
            options=[("grpc.so_reuseport", 0)],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            self.port = self._server.add_insecure_port(f"0.0.0.0:{port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on health port {port}: is it in use?") from error
        self._server.start()

    def set_ready(self, ready: bool) -> None:
        for name in ("readiness", ""):
            self._health.set(name, SERVING if ready else NOT_SERVING)

    def close(self) -> None:
        self._server.stop(grace=None).wait()
