"""The gRPC servers of a router: the public listener and the operators' one.

Owns ports, server options, which service listens where, and start and stop. Does not know what the
services do.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

import structlog
from google.protobuf.descriptor import FileDescriptor
from grpc import aio

from mili.hub.folder import ModelFolder
from mili.router.api.admin import AdminService, ServerInfo, WorkerStatus
from mili.router.api.embedding import EmbeddingService
from mili.router.api.engine import Engine
from mili.router.api.generation import read_defaults
from mili.router.api.guard import Guard
from mili.router.api.health import Health
from mili.router.api.identity import Identity
from mili.router.api.inference import InferenceService
from mili.router.api.kept import KeptGenerations
from mili.router.api.model import ModelService, ServedModel
from mili.router.api.passes import Passes
from mili.router.api.pins import Pins
from mili.router.api.prompt import PromptReader, TextThreads
from mili.router.api.reflection import add_reflection
from mili.router.api.status import duration
from mili.router.api.streams import Streams
from mili.router.api.structured import StructuredOutputs
from mili.router.api.tokenizer_service import TokenizerService
from mili.router.chat_template import ChatTemplate
from mili.router.config import RouterConfig
from mili.router.errors import Reason
from mili.router.outcome import RequestOutput
from mili.router.quotas import Quotas
from mili.router.tenants import Tenants
from mili.router.tokenizer import Tokenizer
from mili.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_PUBLIC_FILES = (inference_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR, embedding_pb2.DESCRIPTOR)
_ADMIN_FILES = (admin_pb2.DESCRIPTOR,)

# Who reaches the admin listener may use it: its address is what protects it.
_OPERATORS = Tenants()

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A port in use is an error, not a second server on it.
    ("grpc.so_reuseport", 0),
    # A caller whose machine vanished is noticed, and its requests are cancelled.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Callers may ping as they like, also between calls.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)

_log = structlog.get_logger()


class ApiServer:
    """Both listeners. Make and use it on the asyncio thread. clock: the engine's, in seconds."""

    def __init__(
        self,
        engine: Engine,
        folder: ModelFolder,
        tokenizer: Tokenizer,
        config: RouterConfig,
        *,
        tenants: Tenants,
        clock: Callable[[], float],
        list_workers: Callable[[], Sequence[WorkerStatus]],
        on_failure: Callable[[Reason], None] = lambda reason: None,
        startup_phases: Sequence[tuple[str, float]] = (),
    ) -> None:
        self.instance_id = uuid.uuid4().hex
        self.public_port = 0
        self.admin_port = 0
        self._config = config
        self._on_failure = on_failure
        self._servers: list[aio.Server] = []
        self._tenants = tenants
        self._streams = Streams(engine, config.max_unread_tokens)
        self._threads = TextThreads(config.max_queued_requests)
        template = ChatTemplate(folder)
        model = ServedModel.read(folder, config.served_model_name, tokenizer, template)
        self.model_name = model.name
        prompts = PromptReader(tokenizer, template)
        defaults = read_defaults(folder)._replace(formats=model.formats)
        quotas = Quotas(clock)
        self._health = Health(_service_names(_PUBLIC_FILES + _ADMIN_FILES))
        self._structured = StructuredOutputs(folder, tokenizer, model.formats)
        self._inference = InferenceService(
            engine=engine,
            streams=self._streams,
            kept=KeptGenerations(self._streams, self.instance_id, config.max_unread_tokens),
            model=model,
            tokenizer=tokenizer,
            defaults=defaults,
            prompts=prompts,
            threads=self._threads,
            structured=self._structured,
            quotas=quotas,
            instance_id=self.instance_id,
            clock=clock,
        )
        self._embedding = EmbeddingService(
            engine=engine,
            passes=Passes(self._streams),
            model=model,
            prompts=prompts,
            threads=self._threads,
            quotas=quotas,
            clock=clock,
        )
        self._model = ModelService(engine, model)
        self._tokenizer = TokenizerService(model, tokenizer, prompts, self._threads)
        self._admin = AdminService(
            engine=engine,
            model=model,
            pins=Pins(engine, self._streams, defaults, prompts, self._threads),
            tenants=tenants,
            list_workers=list_workers,
            info=ServerInfo(self.instance_id, datetime.now(UTC), startup_phases, _limits(config)),
            clock=clock,
        )

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def start(self) -> None:
        """Listen on both ports; raise OSError where that is impossible."""
        config = self._config
        self.public_port = await self._listen(
            config.host, config.port, self._add_public, _PUBLIC_FILES, self._tenants
        )
        try:
            self.admin_port = await self._listen(
                config.admin_host, config.admin_port, self._add_admin, _ADMIN_FILES, _OPERATORS
            )
        except OSError:
            await self.stop()
            raise
        _log.info("router listens", port=self.public_port, admin_port=self.admin_port)

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Take the engine's outputs of one step."""
        self._streams.deliver(outputs)

    def set_ready(self, ready: bool) -> None:
        """Say in health whether a worker serves."""
        self._health.set_ready(ready)

    async def drain(self, grace: float) -> None:
        """Take no new requests; let the live ones end, by force after `grace` seconds."""
        self._health.set_ready(False)
        await self._streams.drain(grace)

    async def stop(self) -> None:
        """Close both listeners. Calls that are still open get a moment to send their last words."""
        await asyncio.gather(*(server.stop(grace=1.0) for server in self._servers))
        self._servers.clear()
        self._threads.close()
        await self._structured.close()

    async def _listen(
        self,
        host: str,
        port: int,
        add_services: Callable[[aio.Server], None],
        files: Sequence[FileDescriptor],
        tenants: Tenants,
    ) -> int:
        server = aio.server(
            interceptors=[
                Guard(Identity(tenants), self._config.max_concurrent_rpcs, self._on_failure)
            ],
            options=_OPTIONS,
        )
        add_services(server)
        self._health.add_to(server)
        add_reflection(server, files)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = server.add_insecure_port(address)
        except RuntimeError:
            raise OSError(
                f"cannot listen on {address}: the port is in use, or the address is not this"
                " machine's"
            ) from None
        await server.start()
        self._servers.append(server)
        return bound

    def _add_public(self, server: aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._inference, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self._model, server)
        model_pb2_grpc.add_TokenizerServiceServicer_to_server(self._tokenizer, server)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(self._embedding, server)

    def _add_admin(self, server: aio.Server) -> None:
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._admin, server)


def _service_names(files: Iterable[FileDescriptor]) -> list[str]:
    return [service.full_name for file in files for service in file.services_by_name.values()]


def _limits(config: RouterConfig) -> admin_pb2.ServerLimits:
    return admin_pb2.ServerLimits(
        max_queued_requests=config.max_queued_requests,
        max_queue_time=duration(config.max_queue_time),
        max_unread_tokens=config.max_unread_tokens,
        max_concurrent_rpcs=config.max_concurrent_rpcs,
        max_message_bytes=MAX_MESSAGE_BYTES,
    )
