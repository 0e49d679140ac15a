"""One simulated history: router, workers, network, callers and faults, all driven by one seed.

Owns how they are put together, the storm, the calm after it, and what must hold at the end. The
method is FoundationDB's (Zhou et al., SIGMOD 2021): the real code on a virtual clock, and nothing
random but the seed.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import NamedTuple

from mili.router.kv_cache import CacheSettings
from mili.router.workers import WorkerGroup
from tests.simulation.callers import Callers
from tests.simulation.faults import Faults
from tests.simulation.fleet import Fleet
from tests.simulation.network import Network
from tests.simulation.operators import LONGEST, Operators
from tests.simulation.router_process import Executing, RouterProcess, RouterSettings
from tests.simulation.timeline import Timeline
from tests.simulation.trace import Trace

NUM_REQUESTS = 200
STORM_SECONDS = 12.0
CACHES = (
    CacheSettings(),
    CacheSettings("best-fit"),
    CacheSettings("first-fit", "token-limit", 16),
    CacheSettings("best-fit", "token-limit", 32),
)
# Time in which everything must have come to an end once nothing more goes wrong.
PATIENCE = 240.0


class Report(NamedTuple):
    """What happened: the trace's digest, counts by name, and which kinds of fault met."""

    digest: str
    totals: Counter[str]
    pairs: Counter[tuple[str, str]]


class Simulation:
    """Everything that the seed decides."""

    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        def stream(name: str) -> random.Random:
            return random.Random(f"{seed} {name}")

        self._random = stream("simulation")
        self._timeline = Timeline()
        self._trace = Trace(self._timeline, verbose=verbose)
        self._epochs: list[int] = []
        self._router = RouterProcess(
            self._draw_settings(),
            self._timeline,
            self._trace,
            self._new_epoch,
            deliver=lambda outputs: self._callers.deliver(outputs),
            on_ready=lambda group: self._fleet.on_ready(group),
            on_lost=self._on_lost,
        )
        network = Network(self._timeline, stream("network"), self._router.receive)
        self._router.connect(network)
        self._fleet = Fleet(self._router, network, self._timeline, self._trace, stream("fleet"))
        self._callers = Callers(self._router, self._timeline, self._trace, stream("callers"))
        self._callers.context_limits = self._fleet.context_limits
        self._operators = Operators(
            self._router, self._callers.wishes, self._timeline, self._trace, stream("operators")
        )
        self._faults = Faults(
            self._fleet,
            self._router,
            self._epochs,
            self._timeline,
            self._trace,
            stream("faults"),
        )

    def run(self) -> Report:
        """Raise AssertionError, or what the router raised, where anything is wrong."""
        for index in range(self._random.randint(1, 5)):
            self._fleet.add_group(f"w{index}", 2 if self._random.random() < 0.1 else 1)
        self._plan_storm()
        self._timeline.run(1.0 + STORM_SECONDS)
        self._settle()
        self._check_health()
        self._trace.totals["virtual seconds"] = round(self._timeline.now)
        return Report(self._trace.digest, self._trace.totals, self._faults.pairs)

    def _draw_settings(self) -> RouterSettings:
        rng = self._random
        return RouterSettings(
            pipeline_depth=rng.choice((None, 1, 2, 4)),
            max_queued_requests=rng.choice((20, 1000)),
            worker_timeout=rng.choice((0.5, 1.0)),
            recovery_timeout=rng.choice((5.0, 60.0)),
            max_queue_time=rng.choice((1.0, 10.0)),
            cache=rng.choice(CACHES),
            itl_goal=rng.choice((math.inf, 0.05, 0.002)),
        )

    def _new_epoch(self) -> int:
        self._epochs.append(1 + self._random.randrange((1 << 64) - 1))
        return self._epochs[-1]

    def _on_lost(self, group: WorkerGroup, executing: Executing, died: bool) -> None:
        self._fleet.on_lost(group, died)
        self._callers.on_lost(executing, died)

    def _plan_storm(self) -> None:
        """Requests come in bursts, faults at any time."""
        rng, asked = self._random, 0
        while asked < NUM_REQUESTS:
            burst = min(rng.choice((1, 1, 4, 24)), NUM_REQUESTS - asked)
            when = 1.0 + rng.uniform(0.0, STORM_SECONDS)
            for _ in range(burst):
                self._timeline.at(when, self._callers.ask)
                when += rng.expovariate(100.0)
            asked += burst
        for _ in range(rng.choice((8, 40, 72))):
            self._timeline.at(1.0 + rng.uniform(0.0, STORM_SECONDS), self._faults.strike)
        for _ in range(4):
            self._timeline.at(1.0 + rng.uniform(0.0, STORM_SECONDS), self._callers.cancel_any)
        for _ in range(rng.choice((0, 4, 16))):
            self._timeline.at(1.0 + rng.uniform(0.0, STORM_SECONDS), self._operators.act)

    def _settle(self) -> None:
        """Nothing more goes wrong: everything ends, what lasts for a while first."""
        self._timeline.run(LONGEST + 1.0)
        until = self._timeline.now + PATIENCE
        while self._callers.live or not self._all_serve() or not self._fleet.ranks_agree:
            self._timeline.run(1.0)
            assert self._timeline.now < until, f"no end of {[*self._callers.live]}"
        self._timeline.run(2.0)

    def _all_serve(self) -> bool:
        """Every group does, and nothing that befell its processes lasts any longer: neither does
        a step that is as slow as those before it, so that nobody may call it hung.
        """
        if any(process.hung_until > self._timeline.now for process in self._fleet.alive):
            return False
        if any(scheduler.in_flight for scheduler in self._router.schedulers.values()):
            return False
        groups = {process.group for process in self._fleet.processes.values()}
        return groups == set(self._router.serving)

    def _check_health(self) -> None:
        """What is left over is a server as good as new."""
        assert self._router.engine.num_live == 0
        for name, scheduler in self._router.schedulers.items():
            usage = scheduler.kv.usage()
            assert usage.held == 0 and usage.evictable == usage.cached, f"I3: {name}: {usage}"
            assert not scheduler.in_flight, f"I4: steps in flight at {name}, and nobody asks"
        for _ in range(4):
            self._callers.ask_for_sure()
        for _ in range(10):
            self._timeline.run(1.0)
            if not self._callers.live:
                break
        assert not self._callers.live, "a healthy server does not answer"
        self._timeline.run(1.0)
        assert self._fleet.ranks_agree, "a rank was left behind"
        self._router.check()
