"""Operations: what operators ask of a running engine.

Owns the questions, how busy it is and what became of a request, and the orders, where requests may
run and what stays cached. Does not know how requests come in, or what a step gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import structlog

from mili.router.dispatch import Dispatch
from mili.router.faults import OnFault, reports_faults
from mili.router.fleet import Fleet
from mili.router.introspection import Explanation, Load, Pinned
from mili.router.ledger import Ledger
from mili.router.load import load_of
from mili.router.outcome import RequestOutput

Clock = Callable[[], float]
Tell = Callable[[list[RequestOutput]], None]

log = structlog.get_logger()


class Operations:
    """Of one engine, whose parts these are. tell: takes what requests are to be told."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        dispatch: Dispatch,
        ledger: Ledger,
        tell: Tell,
        on_fault: OnFault,
        clock: Clock,
    ) -> None:
        self._fleet = fleet
        self._dispatch = dispatch
        self._ledger = ledger
        self._tell = tell
        self.on_fault = on_fault
        self._clock = clock

    def load(self) -> Load:
        """How busy all groups together are now."""
        pipelines = self._fleet.pipelines.values()
        return load_of(pipelines, self._dispatch, self._ledger.meter, self._clock())

    def explain(self, request_id: str) -> Explanation | None:
        """Tell what happened to a request; None for one that is not remembered."""
        live = self._ledger.live(request_id)
        if not live:
            return self._ledger.explain_ended(request_id)
        return self._ledger.explain(live[0], self._clock(), self._dispatch.position(live[0]))

    @reports_faults
    def drain(self, group: str, migrate_after: float | None) -> int:
        """Place nothing on a group any more, until undrain or until it is lost.

        What waits there moves at once; what runs finishes there, or moves after `migrate_after`
        seconds if another group takes requests then. Returns the running sequences. Raises
        RequestError for a group that does not serve.
        """
        after = math.inf if migrate_after is None else migrate_after
        now = self._clock()
        running = len(self._fleet.drain(group, now + after).running)
        self._tell(self._dispatch.move(group, now))
        log.info("worker drains", worker=group, running=running)
        return running

    @reports_faults
    def undrain(self, group: str) -> None:
        """Place requests on a group again. Raises RequestError for one that does not serve."""
        if self._fleet.undrain(group):
            log.info("worker takes requests again", worker=group)
            now = self._clock()
            started = self._dispatch.welcome([], now)
            self._tell(started + self._dispatch.pump(group, now))

    @reports_faults
    def pin(self, namespace: bytes, token_ids: Sequence[int], seconds: float) -> Pinned:
        """Keep what is cached of a prefix for a time, where most of it is."""
        return self._fleet.pin(namespace, token_ids, self._clock() + seconds)

    @reports_faults
    def unpin(self, pin_id: str) -> None:
        """Release a prefix. Raises RequestError (PIN_NOT_FOUND)."""
        self._fleet.unpin(pin_id)

    @reports_faults
    def flush(self, tenant_prefix: bytes | None) -> int:
        """Forget what nobody holds of a tenant's prefixes, of all for None; returns the blocks."""
        return self._fleet.flush(tenant_prefix)
