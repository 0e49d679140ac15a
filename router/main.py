"""The router process: the parts put together, started, drained and stopped.

Owns the process's life and its exit code. Does not know what the parts do.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from mili.hub.folder import interface_sha256, read_model_folder
from mili.router.api.admin import WorkerStatus
from mili.router.api.server import ApiServer
from mili.router.config import RouterConfig
from mili.router.engine import Engine
from mili.router.kv_cache import CacheSettings
from mili.router.metrics import RouterCollector, serve_metrics
from mili.router.outcome import RequestOutput
from mili.router.parsers.formats import read_formats
from mili.router.recorder import Recorder, Reel, write
from mili.router.tenants import Tenants
from mili.router.texts import Texts
from mili.router.tokenizer import Tokenizer
from mili.router.worker_link import WorkerLink
from mili.router.workers import Workers, WorkerState

CLEAN, CRASH, USAGE = 0, 1, 2
TICK_SECONDS = 0.1
# Hardly anything here is garbage that only a collector finds; a collection may last many steps.
GC_THRESHOLD = (50_000, 20, 50)
# Seconds. What a thread for text may keep the interpreter for while the loop has something to do.
SWITCH_INTERVAL = 0.001

log = structlog.get_logger()


def run(config: RouterConfig) -> int:
    """Serve until SIGTERM or SIGINT; config.model is a folder. Returns the exit code."""
    return asyncio.run(_run(config))


async def _run(config: RouterConfig) -> int:
    try:
        router = Router(config)
        await router.start()
    except (ValueError, OSError) as error:
        log.error("router cannot start", reason=str(error))
        return USAGE
    return await router.serve()


class Router:
    """One router process. Make it on the asyncio thread."""

    def __init__(self, config: RouterConfig) -> None:
        """Raises ValueError for a bad model folder, tenants file or setting."""
        self._config = config
        phases: list[tuple[str, float]] = []
        tenants = Tenants.read(config.tenants) if config.tenants else Tenants()
        with _phase("read model", phases):
            self._folder = read_model_folder(Path(config.model), weights=False)
            interface = interface_sha256(self._folder)
        with _phase("load tokenizer", phases):
            self._tokenizer = Tokenizer(self._folder)
            formats = read_formats(self._folder.chat_template, self._tokenizer)
        self._recorder = Recorder(config.recorded_decisions) if config.recorded_decisions else None
        self._last_words: list[Reel] = []
        self._engine = Engine(
            model_context_limit=self._folder.max_context_tokens,
            pipeline_depth=config.pipeline_depth,
            max_queued_requests=config.max_queued_requests,
            recovery_timeout=config.recovery_timeout,
            make_text=Texts(self._tokenizer, formats, self._folder.generation.eos_token_ids).make,
            deliver=self._deliver,
            on_fault=self._break,
            clock=time.monotonic,
            max_queue_time=config.max_queue_time,
            itl_goal=config.itl_goal,
            wake_at=self._wake_at,
            cache=_cache_settings(config, tenants),
            recorder=self._recorder,
        )
        self._workers = Workers(
            self._engine, interface_sha256=interface, worker_timeout=config.worker_timeout
        )
        self._link = WorkerLink(config, self._workers, self._break)
        with _phase("prepare API", phases):
            self._api = ApiServer(
                self._engine,
                self._folder,
                self._tokenizer,
                config,
                tenants=tenants,
                clock=time.monotonic,
                list_workers=self._list_workers,
                on_failure=self._engine.meters.failed,
                startup_phases=phases,
            )
        self._alarm: asyncio.TimerHandle | None = None
        self._stop = asyncio.Event()
        self._exit_code = CLEAN

    async def start(self) -> None:
        """Open both sides. Raises OSError for an address that cannot be had."""
        self._link.start()
        try:
            await self._api.start()
            if self._config.metrics_port:
                collector = RouterCollector(self._engine, self._api.model_name)
                serve_metrics(self._config.host, self._config.metrics_port, collector)
        except OSError:
            await self._api.stop()
            self._link.close()
            raise

    async def serve(self) -> int:
        """Serve until a signal or a fault of ours; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.set_exception_handler(forgive_cancelled)
        loop.add_signal_handler(signal.SIGUSR1, self._record)
        prefer_the_loop()
        ticker = asyncio.create_task(self._tick())
        await self._stop.wait()
        if self._exit_code == CLEAN:
            log.info("draining", live_requests=self._engine.num_live)
            await self._api.drain(self._config.drain_timeout)
        ticker.cancel()
        await self._api.stop()
        self._link.close()
        if self._last_words:
            self._write(self._last_words)
        log.info("router stopped", exit_code=self._exit_code)
        return self._exit_code

    async def _tick(self) -> None:
        while True:
            self._engine.tick()
            self._api.set_ready(self._engine.is_serving and not self._stop.is_set())
            await asyncio.sleep(TICK_SECONDS)

    def _wake_at(self, due: float) -> None:
        """Let the engine look at its deadlines on time, not only at the next tick."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_at(due, self._engine.tick)

    def _break(self, error: Exception) -> None:
        """Something of ours is in a state that nobody thought of: do not go on with it."""
        if self._exit_code == CLEAN:
            log.critical("the router is broken and exits", exc_info=error)
            self._exit_code = CRASH
            self._last_words = self._recorder.reels() if self._recorder else []
        self._api.set_ready(False)
        self._stop.set()

    def _record(self) -> None:
        """Write down what was decided lately, beside whatever else goes on."""
        reels = self._recorder.reels() if self._recorder else []
        log.info("recording", worker_groups=len(reels))
        threading.Thread(target=self._write, args=(reels,), name="recording").start()

    def _write(self, reels: Sequence[Reel]) -> None:
        folder = self._config.recording_folder or Path(tempfile.gettempdir())
        path = folder / f"mili-recording-{os.getpid()}-{time.time_ns() // 1_000_000}.gz"
        try:
            write(path, reels)
        except OSError as error:
            log.error("recording cannot be written", path=str(path), reason=error.strerror)
        else:
            log.info("recording is written", path=str(path), replay=f"mili replay {path}")

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        self._api.deliver(outputs)

    def _list_workers(self) -> list[WorkerStatus]:
        now = time.monotonic()
        statuses: list[WorkerStatus] = []
        for info in self._workers.info(now):
            scheduler = self._engine.scheduler_of(info.group)
            usage = scheduler.kv.usage() if scheduler else None
            draining = self._engine.is_draining(info.group)
            statuses.append(
                WorkerStatus(
                    name=info.name,
                    instance_id=info.instance,
                    state=WorkerState.DRAINING if draining else info.state,
                    last_heartbeat=time.time() - info.heard_age,
                    last_step_age=info.last_step_age,
                    kv_blocks_total=usage.total if usage else 0,
                    kv_blocks_free=usage.free if usage else 0,
                    kv_blocks_cached=usage.cached if usage else 0,
                    running_sequences=len(scheduler.running) if scheduler else 0,
                    group=info.group,
                    rank=info.rank,
                    world_size=info.world_size,
                    weights_sha256=info.weights_sha256,
                    startup_phases=info.startup,
                )
            )
        return statuses


def prefer_the_loop() -> None:
    """Let nothing else in this process keep the loop for long."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    # What lives now lives to the end: the collector need not look at it again and again.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


def forgive_cancelled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What asyncio complains about is logged, but for what gRPC leaves behind when a caller goes
    while a message is on its way to it: a cancelled future that nobody waits for any more.
    """
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


def _cache_settings(config: RouterConfig, tenants: Tenants) -> CacheSettings:
    """Raises ValueError where a tenant has a limit that nothing would keep."""
    limits = tenants.cached_tokens
    if limits and config.eviction_policy != "token-limit":
        raise ValueError(
            f"{config.tenants}: cached_tokens works with eviction_policy token-limit only, and"
            f" it is {config.eviction_policy}"
        )
    return CacheSettings(
        config.allocation, config.eviction_policy, config.cache_token_limit, limits
    )


@contextmanager
def _phase(name: str, phases: list[tuple[str, float]]) -> Iterator[None]:
    """Note how long a part of the start takes, in seconds."""
    started = time.monotonic()
    yield
    phases.append((name, time.monotonic() - started))
