"""LRU: which cached span of the radix tree goes first when blocks run out.

Owns the order of eviction. Does not know about blocks or tokens.
"""

from __future__ import annotations

import heapq
from typing import Protocol


class Evictable(Protocol):
    """A node of the tree, as far as eviction is concerned."""

    last_used: int

    @property
    def is_evictable(self) -> bool:
        """Whether it is in the tree, without children and locked by nobody."""


class LRU:
    """Least recently used first.

    A heap with lazy deletion: an entry counts only while its node is evictable and has not been
    used since. Rebuilt when most entries are stale, so its size stays below twice the nodes'.
    """

    _SLACK = 64

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Evictable]] = []
        self._pushes = 0

    def add(self, node: Evictable, num_nodes: int) -> None:
        """Note that `node` became evictable; `num_nodes` is the size of the tree now."""
        self._pushes += 1
        heapq.heappush(self._heap, (node.last_used, self._pushes, node))
        if len(self._heap) > 2 * num_nodes + self._SLACK:
            newest = {id(entry[2]): entry for entry in sorted(self._heap) if self._counts(entry)}
            self._heap = sorted(newest.values())

    def pop(self) -> Evictable | None:
        """The node to evict from next, or None. The caller evicts it whole or adds it again."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._counts(entry):
                return entry[2]
        return None

    @staticmethod
    def _counts(entry: tuple[int, int, Evictable]) -> bool:
        last_used, _, node = entry
        return node.is_evictable and node.last_used == last_used
