"""How the start of a worker spends its time: named phases, in order.

Owns the clock and the log lines. Does not know what a phase does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog

from mili.internal.v1.step_pb2 import StartupPhase

log = structlog.get_logger()


class Startup:
    """The phases of one start. They follow each other: none is inside another."""

    def __init__(self) -> None:
        self._phases: list[StartupPhase] = []

    @property
    def phases(self) -> Sequence[StartupPhase]:
        """The phases that ended, as Ready tells them."""
        return self._phases

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens within and log it; a phase that fails is not one that ended."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._phases.append(StartupPhase(name=name, seconds=seconds))
        log.info("start-up phase is done", phase=name, seconds=round(seconds, 2))
