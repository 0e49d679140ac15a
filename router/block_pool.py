"""BlockPool: which KV blocks are free, and which of them are handed out first.

Owns the free blocks and the two ways to choose among them. Does not know what a block holds or who
holds it. Block 0 is the null block: padding, never handed out, its contents never interpreted.

A *run* is a span of adjacent block ids. Attention reads any block as well as any other; whatever
copies KV (to a host, to another worker) copies a run at a time: better few and long ones.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

NULL_BLOCK = 0

Allocation = Literal["first-fit", "best-fit"]


class Strategy(Protocol):
    """Which free blocks come next. `is_free` is the pool's, and the pool's to change."""

    def take(self, count: int) -> list[int]:
        """Choose `count` free blocks; there are that many, and count > 0."""

    def give(self, blocks: Sequence[int]) -> None:
        """Blocks are free again."""

    def check(self, is_free: bytearray) -> None:
        """Assert that strategy and pool agree; linear, for tests."""


class FirstFit:
    """The lowest run that is long enough; where none is, the lowest free blocks of all.

    A bitmap search: no state but where the free blocks begin. O(num_blocks) bytes at worst, at the
    speed of memchr.
    """

    def __init__(self, is_free: bytearray) -> None:
        self._is_free = is_free
        self._lowest = NULL_BLOCK + 1  # no block before it is free

    def take(self, count: int) -> list[int]:
        lowest = self._is_free.index(1, self._lowest)
        start = self._is_free.find(b"\1" * count, lowest)
        if start < 0:
            return self._take_scattered(lowest, count)
        self._lowest = start + count if start == lowest else lowest
        return list(range(start, start + count))

    def _take_scattered(self, lowest: int, count: int) -> list[int]:
        blocks: list[int] = []
        end = lowest
        while missing := count - len(blocks):
            start = self._is_free.index(1, end)
            end = self._is_free.find(0, start, start + missing)
            if end < 0:
                end = start + missing
            blocks += range(start, end)
        self._lowest = end
        return blocks

    def give(self, blocks: Sequence[int]) -> None:
        self._lowest = min(self._lowest, min(blocks))

    def check(self, is_free: bytearray) -> None:
        assert self._is_free is is_free and not any(is_free[: self._lowest])


class BestFit:
    """The shortest run that is long enough; where none is, the longest runs, whole.

    An index of the free runs by length, and by both ends (boundary tags, Knuth, TAOCP 1, 2.5), so
    that neighbours are joined when they are freed: O(log runs) comparisons a run, and a memmove.
    """

    def __init__(self, is_free: bytearray) -> None:
        self._ends: dict[int, int] = {}  # of each free run: first block -> behind the last
        self._starts: dict[int, int] = {}  # and back
        self._runs: list[tuple[int, int]] = []  # (length, first block), sorted
        self._add(NULL_BLOCK + 1, len(is_free))

    def take(self, count: int) -> list[int]:
        blocks: list[int] = []
        while missing := count - len(blocks):
            fitting = bisect_left(self._runs, (missing, 0))
            _, start = self._runs[min(fitting, len(self._runs) - 1)]
            end = self._remove(start)
            taken = min(end, start + missing)
            if taken < end:
                self._add(taken, end)
            blocks += range(start, taken)
        return blocks

    def give(self, blocks: Sequence[int]) -> None:
        for start, end in runs(blocks):
            if end in self._ends:
                end = self._remove(end)
            if start in self._starts:
                start = self._starts[start]
                self._remove(start)
            self._add(start, end)

    def _add(self, start: int, end: int) -> None:
        self._ends[start] = end
        self._starts[end] = start
        insort(self._runs, (end - start, start))

    def _remove(self, start: int) -> int:
        end = self._ends.pop(start)
        del self._starts[end]
        del self._runs[bisect_left(self._runs, (end - start, start))]
        return end

    def check(self, is_free: bytearray) -> None:
        free = [block for block in range(len(is_free)) if is_free[block]]
        assert dict(runs(free)) == self._ends
        assert {end: start for start, end in self._ends.items()} == self._starts
        assert sorted((end - start, start) for start, end in self._ends.items()) == self._runs


class BlockPool:
    """Hands out the block ids 1 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, allocation: Allocation = "first-fit") -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool of {num_blocks} blocks holds nothing beside the null block")
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self._is_free = bytearray(b"\0" + b"\1" * (num_blocks - 1))
        self._strategy: Strategy = _STRATEGIES[allocation](self._is_free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; there must be that many."""
        assert 0 <= count <= self.num_free, (count, self.num_free)
        if count == 0:
            return []
        blocks = self._strategy.take(count)
        for block in blocks:
            self._is_free[block] = 0
        self.num_free -= count
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back; each must have been handed out and not yet given back."""
        if not blocks:
            return
        for block in blocks:
            assert block != NULL_BLOCK and not self._is_free[block], f"block {block} freed twice"
            self._is_free[block] = 1
        self.num_free += len(blocks)
        self._strategy.give(blocks)

    def check(self) -> None:
        """Assert what holds between two calls; linear, for tests."""
        assert self.num_free == sum(self._is_free) and not self._is_free[NULL_BLOCK]
        self._strategy.check(self._is_free)


_STRATEGIES: dict[Allocation, type[FirstFit] | type[BestFit]] = {
    "first-fit": FirstFit,
    "best-fit": BestFit,
}


def runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The spans of ascending adjacent ids, in order: (first block, behind the last block)."""
    if not blocks:
        return
    start = end = blocks[0]
    for block in blocks:
        if block != end:
            yield start, end
            start = block
        end = block + 1
    yield start, end
