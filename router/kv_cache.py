"""KVCacheManager: who holds which KV block. The only owner of pool and tree.

Owns admission to, growth in and release of KV memory, and the publication of computed blocks.
Does not know about steps, rows or workers.
"""

from __future__ import annotations

from typing import NamedTuple

from mili.router.block_pool import BlockPool
from mili.router.radix_tree import Node, RadixTree
from mili.router.request import Request


class Usage(NamedTuple):
    """Blocks: free + cached + held + 1 (null) = total; evictable are those cached and unlocked."""

    total: int
    free: int
    cached: int
    evictable: int
    held: int


class Holding:
    """What one admitted request holds: a lock in the tree, and its block table.

    blocks[:num_published] were offered to the tree; those that it did not take are duplicates.
    """

    __slots__ = ("blocks", "duplicates", "node", "num_published")

    def __init__(self, node: Node, blocks: list[int]) -> None:
        self.node = node
        self.blocks = blocks
        self.num_published = len(blocks)
        self.duplicates: list[int] = []

    @property
    def private(self) -> list[int]:
        """The blocks that are in no tree: they go back to the pool with the request."""
        return self.duplicates + self.blocks[self.num_published :]


class KVCacheManager:
    """Blocks for requests, with prefixes shared between them."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._tree = RadixTree(block_size)
        self._holdings: dict[str, Holding] = {}

    @property
    def num_available(self) -> int:
        """Blocks that could be had at once: free, or cached and locked by nobody."""
        return self._pool.num_free + self._tree.num_evictable_blocks

    def num_cached_tokens(self, request: Request) -> int:
        """How many leading tokens of the request would come from the cache now."""
        return self._tree.match(request.namespace, self._prefix(request)) * self.block_size

    def admit(self, request: Request, headroom: int) -> list[int] | None:
        """Hold blocks for every known token of the request, and set its num_computed.

        Returns the block table, or None when fewer than `headroom` blocks would be left.
        """
        assert request.request_id not in self._holdings
        node, cached = self._tree.lock(request.namespace, self._prefix(request))
        needed = self._num_blocks(len(request.token_ids)) - len(cached)
        if needed + headroom > self.num_available:
            self._tree.unlock(node)
            return None
        request.num_computed = len(cached) * self.block_size
        holding = Holding(node, cached)
        holding.blocks += self._take(needed)
        self._holdings[request.request_id] = holding
        return holding.blocks.copy()

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Hold blocks for `num_tokens` positions: the new ones, or None if there are too few."""
        blocks = self._holdings[request.request_id].blocks
        needed = self._num_blocks(num_tokens) - len(blocks)
        if needed <= 0:
            return []
        if needed > self.num_available:
            return None
        new = self._take(needed)
        blocks += new
        return new

    def publish(self, request: Request, num_tokens: int) -> None:
        """The KV of the first `num_tokens` positions is computed: share their full blocks."""
        assert num_tokens <= request.num_computed
        holding = self._holdings[request.request_id]
        start, end = holding.num_published, num_tokens // self.block_size
        if end <= start:
            return
        key = request.token_ids[start * self.block_size : end * self.block_size].tobytes()
        holding.node, duplicates = self._tree.extend(holding.node, key, holding.blocks[start:end])
        holding.duplicates += duplicates
        holding.num_published = end

    def release(self, request: Request) -> None:
        """The request holds nothing any more; what it published stays cached."""
        holding = self._holdings.pop(request.request_id)
        self._tree.unlock(holding.node)
        self._pool.free(holding.private)

    def usage(self) -> Usage:
        total, free, cached = self._pool.num_blocks, self._pool.num_free, self._tree.num_blocks
        evictable = self._tree.num_evictable_blocks
        return Usage(total, free, cached, evictable, held=total - free - cached - 1)

    def check(self) -> None:
        """Assert I3: every block is null, free, cached or held, and in exactly one of them."""
        self._tree.check()
        held = [block for holding in self._holdings.values() for block in holding.private]
        assert len(set(held)) == len(held), "a private block has two holders"
        assert self.usage().held == len(held), (self.usage(), held)

    def _prefix(self, request: Request) -> bytes:
        """The full blocks that may come from the cache: never the last token (invariant 7)."""
        num_blocks = (len(request.token_ids) - 1) // self.block_size
        return request.token_ids[: num_blocks * self.block_size].tobytes()

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take(self, count: int) -> list[int]:
        if count > self._pool.num_free:
            self._pool.free(self._tree.evict(count - self._pool.num_free))
        return self._pool.allocate(count)
