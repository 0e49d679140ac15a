"""The router process in virtual time: the real engine and the real protocol, as main.py joins them.

Owns the process's one thread: what comes while it stands still waits, in order. Does not know what
callers want, nor what faults there are. Hears everything that the engine hears, on the way there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from mili.internal.v1.step_pb2 import Prepared, StepResult, WorkerFrame
from mili.router.engine import Deliver, Engine
from mili.router.kv_cache import CacheSettings
from mili.router.output import DetokenizedOutput
from mili.router.params import GenerationParams
from mili.router.request import TextOutput
from mili.router.scheduler import Scheduler
from mili.router.workers import WorkerGroup, Workers
from tests.simulation.network import Network
from tests.simulation.timeline import Action, Timeline
from tests.simulation.trace import Trace
from tests.simulation.worker_process import MAX_MODEL_LEN

INTERFACE = b"i" * 32
TICK_SECONDS = 0.1
LETTERS = "ab$"


class Letters:
    """The tokenizer, as far as the text of an output is concerned: a token is a letter."""

    def detokenizer(self, *, skip_special_tokens: bool, shown: frozenset[str]) -> Letters:
        return self

    def push(self, token_id: int) -> str:
        return LETTERS[token_id]

    def flush(self) -> str:
        return ""


# The requests of the steps in flight, in order, by id.
Executing = list[str]


class RouterSettings(NamedTuple):
    """What RouterConfig says of the parts that are simulated."""

    pipeline_depth: int | None
    max_queued_requests: int
    worker_timeout: float
    recovery_timeout: float
    max_queue_time: float
    cache: CacheSettings
    itl_goal: float


class RouterProcess:
    """Engine and Workers on one thread. `serving` is by group: the instances that serve."""

    def __init__(
        self,
        settings: RouterSettings,
        timeline: Timeline,
        trace: Trace,
        new_epoch: Callable[[], int],
        deliver: Deliver,
        on_ready: Callable[[WorkerGroup], None],
        on_lost: Callable[[WorkerGroup, Executing, bool], None],
    ) -> None:
        self.settings = settings
        self.stalled_until = 0.0
        self.serving: dict[str, tuple[str, ...]] = {}
        self._timeline = timeline
        self._trace = trace
        self._on_ready, self._on_lost = on_ready, on_lost
        self._faults: list[Exception] = []
        self._waiting: list[tuple[Action, tuple[object, ...]]] = []
        self.engine = Engine(
            model_context_limit=MAX_MODEL_LEN,
            pipeline_depth=settings.pipeline_depth,
            max_queued_requests=settings.max_queued_requests,
            recovery_timeout=settings.recovery_timeout,
            make_text=_make_text,
            deliver=deliver,
            on_fault=self._faults.append,
            clock=lambda: timeline.now,
            max_queue_time=settings.max_queue_time,
            wake_at=self._wake_at,
            cache=settings.cache,
            itl_goal=settings.itl_goal,
        )
        self.workers = Workers(
            self,
            interface_sha256=INTERFACE,
            worker_timeout=settings.worker_timeout,
            new_epoch=new_epoch,
        )
        timeline.after(TICK_SECONDS, self._tick)

    @property
    def schedulers(self) -> Mapping[str, Scheduler]:
        """Those of the groups that serve."""
        found = {name: self.engine.scheduler_of(name) for name in self.serving}
        return {name: scheduler for name, scheduler in found.items() if scheduler is not None}

    def connect(self, network: Network) -> None:
        self.workers.connect(network.send_to_worker)

    def do(self, action: Action, *args: object) -> None:
        """Run something on the router's thread, as soon as that runs."""
        if self._timeline.now < self.stalled_until:
            self._waiting.append((action, args))
        else:
            action(*args)

    def receive(self, routing_id: bytes, frame: bytes) -> None:
        """A frame came through the socket."""
        self.do(self._receive, routing_id, frame)

    def stall(self, seconds: float) -> None:
        """The process stands still."""
        self.stalled_until = max(self.stalled_until, self._timeline.now + seconds)
        self._timeline.at(self.stalled_until, self._resume)

    def on_ready(self, group: WorkerGroup) -> None:
        assert group.name not in self.serving, "a group that serves became ready"
        self.serving[group.name] = tuple(peer.instance for peer in group.ranks.values())
        self._trace.note(f"router: {group.name} serves by {self.serving[group.name]}")
        self._on_ready(group)
        self.engine.on_ready(group)

    def on_result(self, group: WorkerGroup, result: StepResult) -> None:
        assert group.name in self.serving, "a group that does not serve gave a result"
        self.engine.on_result(group, result)
        self.schedulers[group.name].check()

    def on_prepared(self, group: WorkerGroup, prepared: Prepared) -> None:
        self.engine.on_prepared(group, prepared)

    def on_lost(self, group: WorkerGroup, reason: str, *, died: bool) -> None:
        self._trace.note(f"router: {group.name} is lost, {died=}: {reason}")
        steps = self.schedulers[group.name].in_flight
        executing = [row.request.request_id for step in steps for row in step.rows]
        self._on_lost(group, list(dict.fromkeys(executing)), died)
        del self.serving[group.name]
        self.engine.on_lost(group, reason, died=died)

    def _receive(self, routing_id: bytes, frame: bytes) -> None:
        self._trace.frame(f"router gets from {routing_id.hex()}", WorkerFrame, frame)
        self.workers.receive(routing_id, frame, self._timeline.now)

    def _resume(self) -> None:
        if self._timeline.now < self.stalled_until:
            return
        waiting, self._waiting = self._waiting, []
        for action, args in waiting:
            action(*args)

    def _tick(self) -> None:
        """Both ticks of the process, after the socket was drained, and what holds then."""
        now = self._timeline.now
        self._timeline.at(max(now + TICK_SECONDS, self.stalled_until), self._tick)
        if now < self.stalled_until:
            return
        self.workers.tick(now)
        self.engine.tick()
        self.check()

    def _wake_at(self, due: float) -> None:
        """As main.py does: the engine is asked once more when something is due."""
        self._timeline.at(due, self.do, self.engine.tick)

    def check(self) -> None:
        """I3 in every group, and I4: each live request runs, or waits, and in one place."""
        assert not self._faults, self._faults
        running = 0
        for name, scheduler in self.schedulers.items():
            scheduler.check()
            running += len(scheduler.running)
            depth = self.settings.pipeline_depth or 3
            assert len(scheduler.in_flight) <= depth, f"I6: too many steps in flight at {name}"
            if self.engine.is_draining(name) and self.engine.is_serving:
                busy = {row.request.request_id for step in scheduler.in_flight for row in step.rows}
                assert busy.issuperset(scheduler.waiting), f"somebody waits where {name} drains"
        assert len(self.schedulers) == len(self.serving)
        assert running + self.engine.num_queued == self.engine.num_live, "I4: somebody is nowhere"


def _make_text(params: GenerationParams) -> TextOutput | None:
    if not params.text and not params.stop_sequences:
        return None
    return DetokenizedOutput(
        Letters(),  # type: ignore[arg-type]
        skip_special_tokens=params.skip_special_tokens,
        stop_sequences=params.stop_sequences,
        include_stop_text=params.include_stop_text,
    )
