"""The operators: they drain workers and take them back, pin prefixes, release and flush them.

Owns what they do and when they are done with it. Does not know requests or faults.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from mili.router.errors import Reason, RequestError
from tests.simulation.router_process import RouterProcess
from tests.simulation.timeline import Timeline
from tests.simulation.trace import Trace
from tests.simulation.wishes import Wishes

MIGRATE_AFTER = (None, 0.0, 0.5)
# The longest that a worker drains or a prefix is pinned.
LONGEST = 4.0


class Operators:
    """Each of `act` is one thing that somebody does, now."""

    def __init__(
        self,
        router: RouterProcess,
        wishes: Wishes,
        timeline: Timeline,
        trace: Trace,
        rng: random.Random,
    ) -> None:
        self._router = router
        self._wishes = wishes
        self._timeline = timeline
        self._trace = trace
        self._random = rng
        self._pins: list[str] = []

    def act(self) -> None:
        """Do something, as soon as the router's thread runs."""
        deeds: tuple[Callable[[], None], ...] = (
            self._drain,
            self._drain,
            self._undrain,
            self._pin,
            self._pin,
            self._unpin,
            self._flush,
        )
        self._router.do(self._random.choice(deeds))

    def _drain(self) -> None:
        name = self._any_group()
        after = self._random.choice(MIGRATE_AFTER)
        self._note(f"drains {name}, migrating after {after}")
        running = self._ask(
            Reason.WORKER_NOT_FOUND, self._router.engine.operations.drain, name, after
        )
        if running is None:
            assert name not in self._router.serving
            return
        assert running == len(self._router.schedulers[name].running)
        self._trace.totals["drains"] += 1
        self._timeline.after(
            self._random.uniform(0.1, LONGEST), self._router.do, self._undrain_one, name
        )

    def _undrain(self) -> None:
        self._undrain_one(self._any_group())

    def _undrain_one(self, name: str) -> None:
        self._note(f"undrains {name}")
        self._ask(Reason.WORKER_NOT_FOUND, self._router.engine.operations.undrain, name)
        assert not self._router.engine.is_draining(name)

    def _pin(self) -> None:
        params = self._wishes.draw(self._timeline.now)
        seconds = self._random.uniform(0.1, LONGEST)
        tokens = params.prompt_token_ids
        pinned = self._router.engine.operations.pin(params.cache_namespace, tokens, seconds)
        assert 0 <= pinned.num_tokens <= len(tokens)
        assert bool(pinned.pin_id) == bool(pinned.num_tokens)
        self._trace.totals["pins"] += bool(pinned.pin_id)
        self._note(f"pins {pinned} for {seconds:.3f} s")
        if pinned.pin_id:
            self._pins.append(pinned.pin_id)

    def _unpin(self) -> None:
        name = self._random.choice(self._pins) if self._pins else "nothing"
        self._note(f"unpins {name}")
        self._ask(Reason.PIN_NOT_FOUND, self._router.engine.operations.unpin, name)

    def _flush(self) -> None:
        namespace = self._wishes.draw(self._timeline.now).cache_namespace
        tenant = self._random.choice((None, namespace[:16]))
        cached = sum(s.kv.usage().evictable for s in self._router.schedulers.values())
        freed = self._router.engine.operations.flush(tenant)
        assert freed == cached if tenant is None else freed <= cached
        self._trace.totals["flushes"] += 1
        self._note(f"flushes {freed} blocks")

    def _ask(self, refusal: Reason, deed: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401
        """What the engine answers; None where it refuses for this reason."""
        try:
            return deed(*args)
        except RequestError as error:
            if error.reason != refusal:
                raise
        return None

    def _any_group(self) -> str:
        return self._random.choice([*self._router.serving, "nobody"])

    def _note(self, text: str) -> None:
        self._trace.note(f"operator: {text}")
