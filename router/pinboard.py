"""Pinboard: which prefixes are kept in which worker group's cache, and until when.

Owns the pins' ids and their expiry. Does not know how a cache keeps a prefix, nor clocks: it is
given the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from mili.router.errors import Reason, RequestError
from mili.router.introspection import Pinned


class PrefixCache(Protocol):
    """What KVCacheManager offers."""

    def pin(self, pin_id: str, namespace: bytes, token_ids: Sequence[int]) -> int:
        """Keep what is cached of a prefix; return its tokens."""

    def unpin(self, pin_id: str) -> None:
        """Let a prefix be evicted again."""


class _Pin(NamedTuple):
    group: str
    cache: PrefixCache
    until: float


class Pinboard:
    """The pins of all worker groups. Times are in seconds of the engine's clock."""

    def __init__(self) -> None:
        self._pins: dict[str, _Pin] = {}
        self._num_made = 0

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def due(self) -> float:
        """When the next pin expires; infinite without any."""
        return min((pin.until for pin in self._pins.values()), default=math.inf)

    def pin(
        self,
        caches: Mapping[str, PrefixCache],
        namespace: bytes,
        token_ids: Sequence[int],
        until: float,
    ) -> Pinned:
        """Keep a prefix in the group that has most of it; one that none has gets no id.

        caches: of the groups that serve, by name.
        """
        self._num_made += 1
        pin_id = f"pin-{self._num_made}"
        # Kept everywhere at first, which tells where most of it is.
        kept = {group: cache.pin(pin_id, namespace, token_ids) for group, cache in caches.items()}
        best = max(kept, key=lambda group: kept[group], default="")
        for group, cache in caches.items():
            if group != best or not kept[group]:
                cache.unpin(pin_id)
        if not kept.get(best):
            return Pinned("", 0)
        self._pins[pin_id] = _Pin(best, caches[best], until)
        return Pinned(pin_id, kept[best])

    def unpin(self, pin_id: str) -> None:
        """Release a prefix; raise RequestError (PIN_NOT_FOUND), also for one that has expired."""
        pin = self._pins.pop(pin_id, None)
        if pin is None:
            raise RequestError(Reason.PIN_NOT_FOUND, "there is no such pin", field="pin_id")
        pin.cache.unpin(pin_id)

    def expire(self, now: float) -> None:
        """Release the prefixes whose time is over."""
        for pin_id in [pin_id for pin_id, pin in self._pins.items() if pin.until <= now]:
            self.unpin(pin_id)

    def forget(self, group: str) -> None:
        """A group is lost, and what was pinned in its cache with it."""
        self._pins = {pin_id: pin for pin_id, pin in self._pins.items() if pin.group != group}
