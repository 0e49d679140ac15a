"""KVCacheManager: who holds which KV block. The only owner of pool and tree.

Owns admission to, growth in and release of KV memory, the publication of computed blocks, and pins.
Does not know about steps, rows, workers or time.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from mili.router.block_pool import NULL_BLOCK, Allocation, BlockPool
from mili.router.cache_memory import CacheMemory, Miss
from mili.router.eviction import LRU, TokenLimit
from mili.router.radix_tree import TOKEN_BYTES, Node, RadixTree
from mili.router.request import Request
from mili.router.tape import Tape, recorded


class CacheSettings(NamedTuple):
    """How each worker group's KV cache is kept.

    The limits are in tokens, and of the eviction policy token-limit only: what all tenants together
    may have in the cache, and what single ones may, by the TENANT_BYTES of their namespaces.
    """

    allocation: Allocation = "first-fit"
    eviction: Literal["lru", "token-limit"] = "lru"
    token_limit: int | None = None
    tenant_token_limits: Mapping[bytes, int] = MappingProxyType({})


DEFAULT_CACHE = CacheSettings()


class Usage(NamedTuple):
    """Blocks: free + cached + held + 1 (null) = total; evictable are those cached and unlocked."""

    total: int
    free: int
    cached: int
    evictable: int
    held: int


class CacheCounters:
    """What happened since the worker group came. Each request counts once, when first admitted.

    tokens_asked, tokens_hit: prompt tokens, and those of them that came from the cache. misses:
    requests, by the reason for which the rest did not. blocks_evicted: for want of free blocks,
    or over a limit.
    """

    __slots__ = ("blocks_evicted", "misses", "tokens_asked", "tokens_hit")

    def __init__(self) -> None:
        self.tokens_asked = 0
        self.tokens_hit = 0
        self.blocks_evicted = 0
        self.misses = dict.fromkeys(Miss, 0)


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


class Pin(NamedTuple):
    """A cached prefix that is not evicted while it is pinned: its last span, its length."""

    node: Node
    num_blocks: int


class KVCacheManager:
    """Blocks for requests, with prefixes shared between them.

    max_pinned_blocks: what pins may hold together; whatever else is in the pool must be enough
    for the longest request (invariant 8).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        settings: CacheSettings = DEFAULT_CACHE,
        *,
        max_pinned_blocks: int = 0,
    ) -> None:
        self.tape: Tape | None = None
        self.block_size = block_size
        self.counters = CacheCounters()
        self._pool = BlockPool(num_blocks, settings.allocation)
        self._memory = CacheMemory(block_size * TOKEN_BYTES, capacity=num_blocks)
        self._limit = _limit(settings, num_blocks, block_size)
        self._tree = RadixTree(block_size, self._limit or LRU(), self._memory)
        self._holdings: dict[str, Holding] = {}
        self._pins: dict[str, Pin] = {}
        self._num_pinnable = max_pinned_blocks

    @property
    def num_available(self) -> int:
        """Blocks that could be had at once: free, or cached and locked by nobody."""
        return self._pool.num_free + self._tree.num_evictable_blocks

    def num_cached_tokens(self, request: Request) -> int:
        """How many leading tokens of the request would come from the cache now."""
        first = request.token_ids[: self.block_size].tobytes()
        if not self._tree.match(request.namespace, first):
            return 0
        return self._tree.match(request.namespace, self._prefix(request)) * self.block_size

    def num_tenant_tokens(self, tenant: bytes) -> int:
        """Tokens that are cached for the tenant, by the first bytes of its namespaces."""
        return self._tree.num_blocks_of(tenant) * self.block_size

    def admit(self, request: Request, headroom: int) -> list[int] | None:
        """Hold blocks for every known token of the request; set its num_computed and cache_miss.

        Returns the block table, or None when fewer than `headroom` blocks would be left.
        """
        assert request.request_id not in self._holdings
        prefix = self._prefix(request)
        node, cached = self._tree.lock(request.namespace, prefix)
        needed = self._num_blocks(len(request.token_ids)) - len(cached)
        if needed + headroom > self.num_available:
            self._tree.unlock(node)
            return None
        request.num_computed = len(cached) * self.block_size
        if request.num_admissions == 0:
            self._explain(request, prefix, cached)
        holding = Holding(node, cached)
        holding.blocks += self._take(needed)
        self._holdings[request.request_id] = holding
        return holding.blocks.copy()

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Hold blocks for `num_tokens` positions: the new ones, or None if there are too few."""
        blocks = self._holdings[request.request_id].blocks
        if num_tokens <= len(blocks) * self.block_size:
            return []
        needed = self._num_blocks(num_tokens) - len(blocks)
        if needed > self.num_available:
            return None
        new = self._take(needed)
        blocks += new
        return new

    def publish(self, request: Request, num_tokens: int) -> None:
        """The KV of the first `num_tokens` positions is computed: share their full blocks."""
        assert num_tokens <= request.num_computed
        holding = self._holdings[request.request_id]
        end = num_tokens // self.block_size
        if end <= holding.num_published or not request.params.cache_write:
            return
        start = holding.num_published
        key = request.token_ids[start * self.block_size : end * self.block_size].tobytes()
        holding.node, duplicates = self._tree.extend(holding.node, key, holding.blocks[start:end])
        holding.duplicates += duplicates
        holding.num_published = end
        self._trim(holding.node)

    def release(self, request: Request) -> None:
        """The request holds nothing any more; what it published stays cached."""
        holding = self._holdings.pop(request.request_id)
        self._tree.unlock(holding.node)
        self._pool.free(holding.private)
        self._trim(holding.node)

    @recorded
    def pin(self, pin_id: str, namespace: bytes, token_ids: Sequence[int]) -> int:
        """Keep what is cached of the prefix until unpin; returns the tokens that are kept.

        They are fewer than asked where not all is cached, the last block is not full, or pins
        would leave too few blocks to the longest request.
        """
        assert pin_id not in self._pins
        room = self._num_pinnable - sum(pin.num_blocks for pin in self._pins.values())
        key = array("I", token_ids[: room * self.block_size])
        full = len(key) // self.block_size * self.block_size
        node, blocks = self._tree.lock(namespace, key[:full].tobytes())
        self._pins[pin_id] = Pin(node, len(blocks))
        return len(blocks) * self.block_size

    @recorded
    def unpin(self, pin_id: str) -> None:
        """The prefix may be evicted again. Raises KeyError for a pin that is not here."""
        pin = self._pins.pop(pin_id)
        self._tree.unlock(pin.node)
        self._trim(pin.node)

    @recorded
    def flush(self, tenant: bytes | None) -> int:
        """Free every cached block that nobody holds, of one tenant or of all: how many."""
        freed = self._tree.flush(tenant or b"")
        self._pool.free(freed)
        return len(freed)

    def usage(self) -> Usage:
        total, free, cached = self._pool.num_blocks, self._pool.num_free, self._tree.num_blocks
        evictable = self._tree.num_evictable_blocks
        return Usage(total, free, cached, evictable, held=total - free - cached - 1)

    def check(self) -> None:
        """Assert I3: every block is null, free, cached or held, and in exactly one of them."""
        self._tree.check()
        self._pool.check()
        held = [block for holding in self._holdings.values() for block in holding.private]
        assert len(set(held)) == len(held), "a private block has two holders"
        assert self.usage().held == len(held), (self.usage(), held)

    def _prefix(self, request: Request) -> bytes:
        """The full blocks that may come from the cache: never the last token (invariant 7), nor
        one that is followed by a token to be scored.
        """
        if not request.params.cache_read:
            return b""
        num_blocks = (min(len(request.token_ids), request.score_from) - 1) // self.block_size
        return request.token_ids[: num_blocks * self.block_size].tobytes()

    def _explain(self, request: Request, prefix: bytes, cached: list[int]) -> None:
        """Say why the request's prompt came from the cache only so far, and count it."""
        counters = self.counters
        counters.tokens_asked += len(request.token_ids)
        counters.tokens_hit += request.num_computed
        start = len(cached) * self.block_size * TOKEN_BYTES
        if not request.params.cache_read:
            request.cache_miss = Miss.BYPASSED
        elif start == len(prefix):
            is_scored = request.score_from < len(request.token_ids)
            request.cache_miss = Miss.BYPASSED if is_scored else Miss.NOT_FULL_BLOCK
        else:
            parent = cached[-1] if cached else NULL_BLOCK
            block = prefix[start : start + self.block_size * TOKEN_BYTES]
            request.cache_miss = self._memory.why(request.namespace, parent, block)
        counters.misses[request.cache_miss] += 1

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take(self, count: int) -> list[int]:
        if count > self._pool.num_free:
            self._evicted(self._tree.evict(count - self._pool.num_free))
        return self._pool.allocate(count)

    def _trim(self, node: Node) -> None:
        if self._limit is not None:
            self._evicted(self._tree.trim(self._limit, node.tenant))

    def _evicted(self, blocks: list[int]) -> None:
        self.counters.blocks_evicted += len(blocks)
        self._pool.free(blocks)


def _limit(settings: CacheSettings, num_blocks: int, block_size: int) -> TokenLimit | None:
    if settings.eviction == "lru":
        return None
    total = settings.token_limit
    tenants = settings.tenant_token_limits.items()
    return TokenLimit(
        num_blocks if total is None else total // block_size,
        {tenant: tokens // block_size for tenant, tokens in tenants},
    )
