"""What the KV cache must do, by brute force: one dict entry a cached block, and every rule a scan.

Owns a random history of KVCacheManager's calls, each of which is predicted: which blocks a request
gets from the cache, what is evicted, why a prompt missed, and how many blocks are where.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from mili.internal.v1.step_pb2 import Sampling
from mili.router.cache_memory import Miss
from mili.router.kv_cache import CacheSettings, KVCacheManager, Usage
from mili.router.params import GenerationParams
from mili.router.radix_tree import TENANT_BYTES, Node
from mili.router.request import Request

ANNA, BERT = b"a" * TENANT_BYTES, b"b" * TENANT_BYTES
NAMESPACES = (ANNA, ANNA, ANNA + b"salt", BERT)
CONTEXT = 30  # tokens

# A prefix of whole blocks, in its namespace.
Prefix = tuple[bytes, tuple[int, ...]]


@dataclass
class Cached:
    block: int
    locks: int = 0
    last_used: int = 0


@dataclass
class Holder:
    """A request that runs, or a pin: the prefixes that it locks, and the blocks of its own."""

    request: Request | None
    path: list[Prefix]
    table: list[int] = field(default_factory=list)
    private: list[int] = field(default_factory=list)
    num_published: int = 0


class CacheHistory:
    """One random history, driven by one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.block_size = self.random.choice((1, 2, 3))
        self.num_blocks = self.random.randint(8, 70)
        longest = min(self.num_blocks - 1, -(-CONTEXT // self.block_size))
        self.max_pinned = self.num_blocks - 1 - longest
        limits: tuple[int | None, ...] = (None, self.random.randrange(self.num_blocks))
        self.cap = self.random.choice(limits)
        self.tenant_caps = {ANNA: self.random.randrange(self.num_blocks)}
        self.settings = CacheSettings(
            self.random.choice(("first-fit", "best-fit")),
            self.random.choice(("lru", "token-limit")),
            None if self.cap is None else self.cap * self.block_size,
            {tenant: cap * self.block_size for tenant, cap in self.tenant_caps.items()},
        )
        self.kv = KVCacheManager(
            self.num_blocks, self.block_size, self.settings, max_pinned_blocks=self.max_pinned
        )
        self.free = set(range(1, self.num_blocks))
        self.cached: dict[Prefix, Cached] = {}
        self.evicted: dict[Prefix, None] = {}  # the oldest first
        self.flushed: set[Prefix] = set()  # evicted in an order that only the tree knows
        self.running: list[Holder] = []
        self.pins: dict[str, Holder] = {}
        self.time = 0
        self.totals: Counter[str] = Counter()

    def run(self, num_operations: int) -> Counter[str]:
        """Raise AssertionError where prediction and manager differ; what happened, counted."""
        weights = {
            self._admit: 6, self._compute: 10, self._generate: 12, self._release: 5,
            self._pin: 0.6, self._unpin: 0.6, self._flush: 0.1,
        }  # fmt: skip
        actions = self.random.choices(list(weights), list(weights.values()), k=num_operations)
        for number, action in enumerate(actions):
            action()
            self.totals["operations"] += 1
            assert self.kv.usage() == self._usage()
            if number % 25 == 0:
                self._compare()
        self._compare()
        return self.totals

    def _admit(self) -> None:
        chance = self.random
        tokens = [chance.randrange(2) for _ in range(chance.randint(1, CONTEXT))]
        params = GenerationParams(
            tokens,
            Sampling(seed=1),
            max_tokens=CONTEXT,
            cache_namespace=chance.choice(NAMESPACES),
            cache_read=chance.random() < 0.9,
            cache_write=chance.random() < 0.9,
        )
        request = Request(str(self.totals["operations"]), params, context_limit=CONTEXT)
        prefixes = self._prefixes(params.cache_namespace, tokens)
        usable = prefixes[: (len(tokens) - 1) // self.block_size] if params.cache_read else []
        matched = self._match(usable)
        miss = self._why(params, usable[len(matched) :])
        assert self.kv.num_cached_tokens(request) == len(matched) * self.block_size
        headroom = chance.randrange(3)
        self._lock(matched)
        needed = -(-len(tokens) // self.block_size) - len(matched)
        table = self.kv.admit(request, headroom)
        if needed + headroom > len(self.free) + self._num_evictable():
            assert table is None
            self._unlock(matched)
            self.totals["refused"] += 1
            return
        assert table is not None and request.num_computed == len(matched) * self.block_size
        assert table[: len(matched)] == [self.cached[prefix].block for prefix in matched]
        assert request.cache_miss in miss, (request.cache_miss, miss)
        self.totals[request.cache_miss.value] += 1
        self.totals["hits"] += len(matched) > 0
        new = self._take(table[len(matched) :], needed)
        self.running.append(Holder(request, matched, table, new, len(matched)))

    def _compute(self) -> None:
        """Some more positions are computed, and published."""
        if not self.running:
            return
        holder = self.random.choice(self.running)
        request = holder.request
        assert request is not None
        left = len(request.token_ids) - request.num_computed
        request.num_computed += self.random.randint(0, left)
        self.kv.publish(request, request.num_computed)
        if not request.params.cache_write:
            return
        prefixes = self._prefixes(request.namespace, request.token_ids)
        end = request.num_computed // self.block_size
        for index in range(holder.num_published, end):
            prefix = prefixes[index]
            if prefix not in self.cached:
                self.cached[prefix] = Cached(holder.table[index])
                holder.private.remove(holder.table[index])
            self._lock([prefix])
            holder.path.append(prefix)
        if end > holder.num_published:
            holder.num_published = end
            self._trim(request.namespace)

    def _generate(self) -> None:
        """The next token of a request whose tokens are computed."""
        ready = [
            holder
            for holder in self.running
            if holder.request and holder.request.num_computed == len(holder.request.token_ids)
        ]
        if not ready:
            return
        holder = self.random.choice(ready)
        request = holder.request
        assert request is not None
        if len(request.token_ids) >= CONTEXT:
            return
        length = len(request.token_ids) + 1
        needed = max(0, -(-length // self.block_size) - len(holder.table))
        new = self.kv.grow(request, length)
        if needed > len(self.free) + self._num_evictable():
            assert new is None
            self.totals["not grown"] += 1
            return
        assert new is not None
        holder.private += self._take(new, needed)
        holder.table += new
        request.token_ids.append(self.random.randrange(2))

    def _release(self) -> None:
        if self.running:
            holder = self.running.pop(self.random.randrange(len(self.running)))
            assert holder.request is not None
            self.kv.release(holder.request)
            self.free.update(holder.private)
            self._unlock(holder.path)
            self._trim(holder.request.namespace)

    def _pin(self) -> None:
        tokens = [self.random.randrange(2) for _ in range(self.random.randint(1, CONTEXT))]
        namespace = self.random.choice(NAMESPACES)
        room = self.max_pinned - sum(len(pin.path) for pin in self.pins.values())
        matched = self._match(self._prefixes(namespace, tokens)[:room])
        pin_id = str(self.totals["operations"])
        assert self.kv.pin(pin_id, namespace, tokens) == len(matched) * self.block_size
        self._lock(matched)
        self.pins[pin_id] = Holder(None, matched)
        self.totals["pinned"] += len(matched) > 0

    def _unpin(self) -> None:
        if self.pins:
            pin_id = self.random.choice(list(self.pins))
            path = self.pins.pop(pin_id).path
            self.kv.unpin(pin_id)
            self._unlock(path)
            if path:
                self._trim(path[0][0])

    def _flush(self) -> None:
        tenant = self.random.choice((None, ANNA, BERT))
        gone = [
            prefix
            for prefix, cached in self.cached.items()
            if not cached.locks and prefix[0].startswith(tenant or b"")
        ]
        assert self.kv.flush(tenant) == len(gone)
        for prefix in gone:
            self._forget(prefix)
            self.flushed.add(prefix)
        self.totals["flushed"] += len(gone)

    def _prefixes(self, namespace: bytes, tokens: Iterable[int]) -> list[Prefix]:
        """The prefixes of all full blocks, the shortest first."""
        whole, size = tuple(tokens), self.block_size
        return [(namespace, whole[:end]) for end in range(size, len(whole) + 1, size)]

    def _match(self, prefixes: list[Prefix]) -> list[Prefix]:
        missing = (index for index, prefix in enumerate(prefixes) if prefix not in self.cached)
        return prefixes[: next(missing, len(prefixes))]

    def _why(self, params: GenerationParams, missed: list[Prefix]) -> set[Miss]:
        """The reasons that may be given: two where the order of a flush decides."""
        if not params.cache_read:
            return {Miss.BYPASSED}
        if not missed:
            return {Miss.NOT_FULL_BLOCK}
        tokens = missed[0][1]
        elsewhere = any(other == tokens for _, other in self.cached)
        otherwise = Miss.OTHER_TENANT if elsewhere else Miss.NEVER_SEEN
        if missed[0] in self.flushed:
            return {Miss.EVICTED, otherwise}
        return {Miss.EVICTED if missed[0] in self.evicted else otherwise}

    def _lock(self, path: list[Prefix]) -> None:
        for prefix in path:
            self.cached[prefix].locks += 1

    def _unlock(self, path: list[Prefix]) -> None:
        self.time += 1
        for prefix in path:
            self.cached[prefix].locks -= 1
            self.cached[prefix].last_used = self.time

    def _num_evictable(self) -> int:
        return sum(not cached.locks for cached in self.cached.values())

    def _take(self, blocks: list[int], count: int) -> list[int]:
        """The manager handed out `blocks`: they were free, or the least recently used."""
        while len(self.free) < count:
            assert self._evict(b"")
        assert len(blocks) == len(set(blocks)) == count and self.free.issuperset(blocks)
        self.free.difference_update(blocks)
        return list(blocks)

    def _trim(self, namespace: bytes) -> None:
        if self.settings.eviction == "lru":
            return
        tenant = namespace[:TENANT_BYTES]
        cap = self.tenant_caps.get(tenant, self.num_blocks)
        while sum(name.startswith(tenant) for name, _ in self.cached) > cap and self._evict(tenant):
            self.totals["over a tenant's limit"] += 1
        while self.cap is not None and len(self.cached) > self.cap and self._evict(b""):
            self.totals["over the limit"] += 1

    def _evict(self, tenant: bytes) -> bool:
        """Of the unlocked, the least recently used; of those used together, the longest."""
        candidates = [
            (cached.last_used, -len(prefix[1]), prefix)
            for prefix, cached in self.cached.items()
            if not cached.locks and prefix[0].startswith(tenant)
        ]
        if not candidates:
            return False
        self._forget(min(candidates)[2])
        self.totals["blocks evicted"] += 1
        return True

    def _forget(self, prefix: Prefix) -> None:
        self.free.add(self.cached.pop(prefix).block)
        self.evicted.pop(prefix, None)
        self.evicted[prefix] = None
        self.flushed.discard(prefix)
        if len(self.evicted) > self.num_blocks:
            oldest = next(iter(self.evicted))
            del self.evicted[oldest]

    def _usage(self) -> Usage:
        held = sum(len(holder.private) for holder in self.running)
        return Usage(self.num_blocks, len(self.free), len(self.cached), self._num_evictable(), held)

    def _compare(self) -> None:
        """Every cached prefix, its block and its locks, and every free block, are as predicted."""
        self.kv.check()
        found: dict[Prefix, tuple[int, bool]] = {}
        stack: list[tuple[Node, tuple[int, ...]]] = [
            (root, ()) for root in self.kv._tree._roots.values()
        ]
        while stack:
            node, tokens = stack.pop()
            words = memoryview(node.key).cast("I").tolist()
            whole = (*tokens, *words)
            ends = self._prefixes(node.namespace, whole)[len(tokens) // self.block_size :]
            for prefix, block in zip(ends, node.blocks, strict=True):
                found[prefix] = (block, node.locks > 0)
            stack += [(child, whole) for child in node.children.values()]
        expected = {
            prefix: (cached.block, cached.locks > 0) for prefix, cached in self.cached.items()
        }
        assert found == expected
        assert self.free == {
            block for block in range(self.num_blocks) if self.kv._pool._is_free[block]
        }
        assert self.kv.counters.blocks_evicted == self.totals["blocks evicted"]
