"""The worker process: say Hello, load the model, execute steps in order until told to stop.

Owns the order of a worker's life and its exit code. Does not know sockets (connection.py), nor
how a step is computed (runner.py): any Runner will do.
"""

from __future__ import annotations

import gc
import secrets
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import structlog

from mili.hub.folder import (
    ModelFolder,
    interface_sha256,
    random_weights_sha256,
    read_model_folder,
    weights_sha256,
)
from mili.hub.resolve import resolve
from mili.internal.v1.step_pb2 import (
    FAILURE_KIND_INTERNAL,
    FAILURE_KIND_REFUSED,
    WORKER_PHASE_IDLE,
    WORKER_PHASE_LOADING,
    WORKER_PHASE_WARMING,
    Failure,
    FailureKind,
    Hello,
    Prepare,
    Prepared,
    Ready,
    StepCommand,
    StepResult,
    Welcome,
)
from mili.worker.completion import Completion, OnStep, PendingStep, StepError, report_failure
from mili.worker.config import WorkerConfig
from mili.worker.connection import Connection
from mili.worker.dtype import choose_dtype
from mili.worker.health import HealthServer
from mili.worker.progress import Progress
from mili.worker.session import PROTOCOL, Command, Dismissed, Event, Opened, Preparing
from mili.worker.startup import Startup
from mili.worker.trace import write_trace
from mili.worker.worker_keys import read_worker_keys

if TYPE_CHECKING:
    from mili.worker.metrics import WorkerMetrics

log = structlog.get_logger()

EXIT_CLEAN = 0
EXIT_FAILED = 1
# EX_CONFIG of sysexits.h: the router refused this worker, and would again.
EXIT_REFUSED = 78
# The one reason in a Goodbye that is not a refusal.
DRAIN = "drain"

# Hardly anything here is garbage that only a collector finds; a collection may last many steps.
GC_THRESHOLD = (50_000, 20, 50)
_NO_TRACE = nullcontext()


class Runner(Protocol):
    """What the step loop needs of a model."""

    def ready(self) -> Ready:
        """What this worker can do."""

    def warm_up(self) -> None:
        """Run what a first step would otherwise wait for."""

    def reset(self) -> None:
        """Empty the table: a new epoch begins."""

    def prepare(self, prepare: Prepare, reply: Callable[[Prepared], None]) -> None:
        """Have something ready for later admissions, off the step loop; or release it."""

    def start(self, command: StepCommand) -> PendingStep:
        """Start one step, after those that were started before."""


class Stopped(BaseException):
    """A signal came while the model was loading. No error: nothing on the way may catch it."""


def run(config: WorkerConfig) -> int:
    """Run a worker until it is told to stop; returns the exit code.

    Raises ValueError or OSError for a model, key or port that is not there or not right.
    """
    folder = read_model_folder(resolve(config.model), weights=config.load_format != "random")
    keys = read_worker_keys(config.worker_keys) if config.worker_keys else None
    if config.profile:
        config.profile.mkdir(parents=True, exist_ok=True)
    health = HealthServer(config.health_port) if config.health_port else None
    progress = Progress()
    metrics = _serve_metrics(config, progress) if config.metrics_port else None
    connection = Connection(
        config.router,
        make_hello(config, folder),
        progress,
        keys=keys,
        on_serving=health.set_ready if health else lambda serving: None,
    )
    stop_on_signals(connection, progress)

    def load(welcome: Welcome) -> Runner:
        blocks = {"num_gpu_blocks_override": welcome.num_blocks} if welcome.num_blocks else {}
        return load_runner(folder, config.model_copy(update=blocks))

    trace = write_trace(config.profile) if config.profile else _NO_TRACE
    try:
        on_step = metrics.stepped if metrics else _ignore
        return serve(connection, progress, load, trace, on_step)
    finally:
        connection.close()
        if health:
            health.close()
        if metrics:
            metrics.close()
        # The process ends: taking the model apart piece by piece would only cost time.
        gc.freeze()


def _serve_metrics(config: WorkerConfig, progress: Progress) -> WorkerMetrics:
    from mili.worker.metrics import WorkerMetrics

    return WorkerMetrics(config.metrics_port, config.name or socket.gethostname(), progress)


def _ignore(command: StepCommand, result: StepResult) -> None:
    """Nobody counts steps."""


def load_runner(folder: ModelFolder, config: WorkerConfig) -> Runner:
    """Either runner takes seconds to import, which the router need not wait for."""
    startup = Startup()
    if config.device == "cuda":
        try:
            with startup.phase("import"):
                from mili.worker.cuda.runner import CudaRunner
        except ImportError as error:
            raise ValueError(
                f"--device cuda needs what is not installed ({error}): pip install "
                "'mili[worker,cuda13]'"
            ) from error
        return CudaRunner(folder, config, startup)
    with startup.phase("import"):
        from mili.worker.cpu.runner import CpuRunner
    return CpuRunner(folder, config, startup)


def make_hello(config: WorkerConfig, folder: ModelFolder) -> Hello:
    dtype = choose_dtype(config.dtype, config.device)
    if config.load_format == "random":
        weights = random_weights_sha256(folder.config, config.device)
    else:
        weights = weights_sha256(folder)
    return Hello(
        protocol_min=PROTOCOL,
        protocol_max=PROTOCOL,
        worker=config.name or socket.gethostname(),
        instance=secrets.token_hex(8),
        world_size=1,
        interface_sha256=interface_sha256(folder),
        weights_sha256=weights,
        dtype=dtype,
        kv_dtype=dtype,
    )


def stop_on_signals(connection: Connection, progress: Progress) -> None:
    """SIGTERM and SIGINT: finish the steps that wait; while loading, leave at once.

    Python drops an exception that is raised inside a finalizer: the message is sent in any case.
    """
    interrupted = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        connection.stop(DRAIN)
        if progress.phase in (WORKER_PHASE_LOADING, WORKER_PHASE_WARMING) and not interrupted:
            interrupted = True
            raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def serve(
    connection: Connection,
    progress: Progress,
    load: Callable[[Welcome], Runner],
    trace: AbstractContextManager[None] = _NO_TRACE,
    on_step: OnStep = _ignore,
) -> int:
    """Wait for the router, load the model, execute steps within `trace`; returns the exit code."""
    try:
        event = connection.receive()
        if isinstance(event, Opened):
            runner = _load(connection, progress, load, event.welcome)
            with trace:
                event = _step(event, connection, progress, runner, on_step)
                # Before the trace is written, which takes longer than the router waits.
                if event.reason == DRAIN:
                    _say_farewell(connection)
                    return EXIT_CLEAN
    except Stopped:
        event = Dismissed(DRAIN)
    except StepError:
        return EXIT_FAILED
    assert isinstance(event, Dismissed), event
    if event.reason != DRAIN:
        log.error("the router refused this worker", reason=event.reason)
        return EXIT_REFUSED
    _say_farewell(connection)
    return EXIT_CLEAN


def _load(
    connection: Connection,
    progress: Progress,
    load: Callable[[Welcome], Runner],
    welcome: Welcome,
) -> Runner:
    log.info("model is loading")
    try:
        runner = load(welcome)
        progress.enter(WORKER_PHASE_WARMING)
        runner.warm_up()
        # What lives now lives to the end: the collector would stop the steps to look at it.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
    except ValueError as error:
        _fail(connection, FAILURE_KIND_REFUSED, str(error))
        raise
    except Exception as error:
        _fail(connection, FAILURE_KIND_INTERNAL, f"{type(error).__name__} while loading")
        raise
    return runner


def _step(
    event: Event,
    connection: Connection,
    progress: Progress,
    runner: Runner,
    on_step: OnStep,
) -> Dismissed:
    """Start steps as they come, until the router or a signal ends it. Raises StepError."""
    completion = Completion(connection, progress, on_step)
    try:
        while not isinstance(event, Dismissed):
            match event:
                case Opened(epoch):
                    completion.wait()
                    runner.reset()
                    progress.restart()
                    connection.send(epoch, runner.ready())
                    progress.enter(WORKER_PHASE_IDLE)
                case Preparing(epoch, prepare):
                    runner.prepare(prepare, partial(connection.send, epoch))
                case Command(epoch, command):
                    progress.start(command.step)
                    try:
                        pending = runner.start(command)
                    except Exception as error:
                        raise report_failure(connection, command, error) from error
                    completion.put(epoch, command, pending)
            event = connection.receive()
    finally:
        completion.close()
    return event


def _say_farewell(connection: Connection) -> None:
    _fail(connection, FAILURE_KIND_REFUSED, "it was told to stop")


def _fail(connection: Connection, kind: FailureKind.ValueType, message: str) -> None:
    """Tell the router, which would otherwise have to notice the silence."""
    failure = Failure(kind=kind, message=message)
    connection.send(connection.epoch, failure)
