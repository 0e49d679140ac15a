"""LRU and TokenLimit: which cached span of the radix tree goes next, and when.

Owns the order of eviction and the limits of the cache. Does not know what a span holds.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import NamedTuple, Protocol


class Evictable(Protocol):
    """A node of the tree, as far as eviction is concerned."""

    last_used: int
    tenant: bytes

    @property
    def is_evictable(self) -> bool:
        """Whether it is in the tree, without children and locked by nobody."""


class Surplus(NamedTuple):
    """A span that has to go although blocks may be free, and how many blocks there are too many."""

    node: Evictable
    num_blocks: int


class Eviction(Protocol):
    """The order. Whoever gets a node from it evicts the node whole, or adds it again."""

    def add(self, node: Evictable) -> None:
        """Note that `node` became evictable."""

    def pop(self) -> Evictable | None:
        """What to evict when blocks run out, or None when nothing is evictable."""


class LRU:
    """Least recently used first, and only when blocks run out.

    A heap with lazy deletion: an entry counts only while its node is evictable and has not been
    used since. It is cleaned whenever it has doubled, so it holds at most twice the nodes.
    """

    _SLACK = 64

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Evictable]] = []
        self._pushes = 0
        self._clean_at = self._SLACK

    def add(self, node: Evictable) -> None:
        self._pushes += 1
        heapq.heappush(self._heap, (node.last_used, self._pushes, node))
        if len(self._heap) > self._clean_at:
            newest = {id(entry[2]): entry for entry in sorted(self._heap) if self._counts(entry)}
            self._heap = sorted(newest.values())
            self._clean_at = 2 * len(self._heap) + self._SLACK

    def pop(self) -> Evictable | None:
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._counts(entry):
                return entry[2]
        return None

    @staticmethod
    def _counts(entry: tuple[int, int, Evictable]) -> bool:
        last_used, _, node = entry
        return node.is_evictable and node.last_used == last_used


class TokenLimit:
    """LRU with caps: what is cached beyond them is evicted even while blocks are free.

    all_blocks: what all tenants together may have in the cache. tenant_blocks: what single tenants
    may; a tenant over its cap loses what it used least
    recently itself. What requests or pins hold counts, and stays.
    """

    def __init__(self, all_blocks: int, tenant_blocks: Mapping[bytes, int]) -> None:
        self._all_blocks = all_blocks
        self._tenant_blocks = dict(tenant_blocks)
        self._order = LRU()
        self._tenant_orders = {tenant: LRU() for tenant in tenant_blocks}

    def add(self, node: Evictable) -> None:
        self._order.add(node)
        if order := self._tenant_orders.get(node.tenant):
            order.add(node)

    def pop(self) -> Evictable | None:
        return self._order.pop()

    def surplus(self, tenant: bytes, tenant_blocks: int, all_blocks: int) -> Surplus | None:
        """What to evict because `tenant`, or all tenants together, have too much in the cache."""
        over = tenant_blocks - self._tenant_blocks.get(tenant, tenant_blocks)
        if over > 0 and (node := self._tenant_orders[tenant].pop()):
            return Surplus(node, over)
        over = all_blocks - self._all_blocks
        if over > 0 and (node := self._order.pop()):
            return Surplus(node, over)
        return None
