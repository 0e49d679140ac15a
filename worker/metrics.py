"""Prometheus metrics of a worker: its steps, what it is doing, and what its process takes.

Owns names, units and the port. Does not know how a step is computed. A step is counted once, on the
thread that waits for its end; the server answers on threads of its own.
"""

from __future__ import annotations

from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from mili.internal.v1.step_pb2 import StepCommand, StepResult, WorkerPhase
from mili.worker.progress import Progress

_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
_LONG_SECONDS = (0.25, 0.5, 1.0, 2.5, 10.0)


class WorkerMetrics:
    """Answers scrapes on all addresses, as the health port does, until closed."""

    def __init__(self, port: int, worker: str, progress: Progress) -> None:
        """Raises OSError if the port is taken."""
        registry = CollectorRegistry()
        labels = ("worker",)
        self._seconds = Histogram(
            "mili_worker_step_seconds",
            "Time of a step on the device.",
            labels,
            registry=registry,
            buckets=(*_SECONDS, *_LONG_SECONDS),
        ).labels(worker)
        self._rows = Counter(
            "mili_worker_rows", "Rows of all steps.", labels, registry=registry
        ).labels(worker)
        self._computed = Counter(
            "mili_worker_computed_tokens", "Positions computed.", labels, registry=registry
        ).labels(worker)
        self._faults = Counter(
            "mili_worker_row_faults",
            "Rows in which a value was no number.",
            labels,
            registry=registry,
        ).labels(worker)
        phase = Gauge(
            "mili_worker_phase",
            "1 for what the worker is doing.",
            (*labels, "phase"),
            registry=registry,
        )
        for name, number in WorkerPhase.items()[1:]:
            told = name.removeprefix("WORKER_PHASE_").lower()
            phase.labels(worker, told).set_function(partial(_is_in, progress, number))
        ProcessCollector(registry=registry)
        self._server, _ = start_http_server(port, "0.0.0.0", registry)

    @property
    def port(self) -> int:
        return self._server.server_port

    def stepped(self, command: StepCommand, result: StepResult) -> None:
        """A step is done."""
        self._seconds.observe(result.device_microseconds / 1e6)
        self._rows.inc(len(command.rows))
        self._computed.inc(sum(command.num_tokens))
        self._faults.inc(len(result.faults))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _is_in(progress: Progress, phase: int) -> float:
    return float(progress.phase == phase)
