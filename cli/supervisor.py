"""The children of `mili serve`: start, report and restart them, drain, leave no orphan.

Owns the processes and the order in which they end. Does not know what they do or how they are set;
a child ties itself to this process (lifeline.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from mili.cli.errors import ExitCode
from mili.cli.lifeline import tied_environment

log = structlog.get_logger()

# Exit codes that would only repeat themselves.
_FINAL = (ExitCode.USAGE, ExitCode.REFUSED)


@dataclass(frozen=True)
class Patience:
    """Seconds: how soon a dead child is started again, and how long a dying one may take."""

    first_delay: float = 0.1
    longest_delay: float = 10.0
    # A child that ran this long starts at first_delay again.
    healthy_after: float = 30.0
    # What the router's streams get to finish.
    drain: float = 30.0
    # What a process gets beyond that, before SIGKILL.
    grace: float = 5.0


class Child:
    """One process: how it is started, and what it is now."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.exit_code: int | None = None
        self._command = command
        self._environment = environment
        self._process: Process | None = None

    async def start(self) -> None:
        self.exit_code = None
        # A session of its own: Ctrl-C in the terminal is for the supervisor alone to hear.
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env={**self._environment, **tied_environment()},
            stdin=DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
        )

    async def wait(self) -> int:
        assert self._process is not None
        self.exit_code = await self._process.wait()
        return self.exit_code

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process is alive."""
        if self._process is not None and self.alive:
            self._process.send_signal(number)


class Supervisor:
    """Keeps one router and its workers running until a signal, or until there is no point.

    fronts: processes that take requests for the router. They end together with it.
    """

    def __init__(
        self,
        router: Child,
        workers: Sequence[Child],
        patience: Patience,
        fronts: Sequence[Child] = (),
    ) -> None:
        self._router = router
        self._workers = workers
        self._fronts = fronts
        self._patience = patience
        self._stopping = asyncio.Event()
        # The exit code of `mili serve` when it ends without having been asked to.
        self._failure: int = ExitCode.CLEAN
        self._keepers: dict[Child, asyncio.Task[None]] = {}

    async def run(self) -> int:
        """Return the exit code, when every child is gone."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        # Asks for a recording: the router's to write.
        loop.add_signal_handler(signal.SIGUSR1, self._router.send, signal.SIGUSR1)
        async with asyncio.TaskGroup() as tasks:
            for child in self._children:
                self._keepers[child] = tasks.create_task(self._keep(child))
            await self._stopping.wait()
            clean = await self._end(
                [*self._fronts, self._router], self._patience.drain + self._patience.grace
            )
            clean &= await self._end(self._workers, self._patience.grace)
        return self._failure or (ExitCode.CLEAN if clean else ExitCode.CRASH)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stopping.is_set():
            log.info("draining; once more kills at once", signal=number.name)
            self._stopping.set()
            return
        log.warning("killing every process", signal=number.name)
        for child in self._children:
            child.send(signal.SIGKILL)

    @property
    def _children(self) -> Sequence[Child]:
        return (self._router, *self._fronts, *self._workers)

    async def _keep(self, child: Child) -> None:
        """Keep one child running, until its end is final."""
        delay = self._patience.first_delay
        while not self._stopping.is_set():
            started = time.monotonic()
            await child.start()
            if self._stopping.is_set():
                child.send(signal.SIGTERM)
            exit_code = await child.wait()
            if self._stopping.is_set():
                return
            if exit_code in _FINAL:
                log.error("process ended for good", child=child.name, exit_code=exit_code)
                self._give_up_on(child, exit_code)
                return
            if time.monotonic() - started >= self._patience.healthy_after:
                delay = self._patience.first_delay
            log.warning(
                "process died", child=child.name, **_cause(exit_code), restart_in_seconds=delay
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(2 * delay, self._patience.longest_delay)

    def _give_up_on(self, child: Child, exit_code: int) -> None:
        """Stop everything when what is left cannot serve."""
        others = [w for w in self._workers if w is not child and w.exit_code not in _FINAL]
        if child not in self._workers or not others:
            self._failure = exit_code
            self._stopping.set()

    async def _end(self, children: Sequence[Child], patience: float) -> bool:
        """Ask the children to end, wait, kill those that do not; return whether all obeyed."""
        asked = [child for child in children if child.alive]
        for child in asked:
            child.send(signal.SIGTERM)
        keepers = [self._keepers[child] for child in children]
        _, late = await asyncio.wait(keepers, timeout=patience)
        for child in children:
            if self._keepers[child] in late:
                log.error("process did not end in time: killing it", child=child.name)
                child.send(signal.SIGKILL)
        await asyncio.gather(*keepers)
        # A process that is still starting ends without a drain: there is nothing to drain.
        clean = (ExitCode.CLEAN, ExitCode.TERMINATED, -signal.SIGTERM)
        return all(child.exit_code in clean for child in asked)


def _cause(exit_code: int) -> dict[str, int | str]:
    if exit_code >= 0:
        return {"exit_code": exit_code}
    return {"signal": signal.Signals(-exit_code).name}
