"""The process that serves OpenAI's API: an HTTP listener in front of one MILI server.

Owns the listener and its end. Does not know where settings come from.
"""

from __future__ import annotations

import asyncio

import uvicorn

from mili.client.aio import AsyncClient
from mili.client.http.app import make_app

# Connections at once, in their place: more get 503.
_MAX_CONNECTIONS = 4096


def run(address: str, host: str, port: int, drain_timeout: float) -> int:
    """Serve until SIGTERM or SIGINT, then let running answers finish; return the exit code.

    address: the router's host:port. drain_timeout: seconds that running answers get.
    """
    return asyncio.run(_serve(address, host, port, drain_timeout))


async def _serve(address: str, host: str, port: int, drain_timeout: float) -> int:
    # A refusal goes to the caller at once, who is told when to try again.
    async with AsyncClient(address, retries=False) as client:
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(client),
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_graceful_shutdown=max(1, round(drain_timeout)),
                lifespan="off",
            )
        )
        await server.serve()
    return 0 if server.started else 1
