"""CacheMemory: why a prompt's next block is not in the cache.

Owns a fingerprint of every cached block and of as many evicted ones. Does not know the tree. The
fingerprint of a block is the CRC-32 of all tokens up to its end: chained, so that it costs one
short CRC a block, and the same in every process. Two prefixes in 4 billion share one, which makes
a reason wrong and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum
from zlib import crc32

from mili.router.block_pool import NULL_BLOCK


class Miss(Enum):
    """Why a prompt came from the cache only so far. For operators: the second tells of others."""

    NEVER_SEEN = "never seen"
    OTHER_TENANT = "other tenant"  # or the same under another salt
    EVICTED = "evicted"
    NOT_FULL_BLOCK = "not full block"  # all full blocks before the last token were there
    BYPASSED = "bypassed"  # the request does not read the cache, or wants what is not in it


class CacheMemory:
    """Fingerprints of what is cached, and of the last `capacity` blocks that were evicted."""

    def __init__(self, block_bytes: int, capacity: int) -> None:
        self._block_bytes = block_bytes
        self._capacity = capacity
        # Of each cached block. A prefix of no blocks ends in the null block.
        self._fingerprints = {NULL_BLOCK: 0}
        self._num_cached: dict[int, int] = {}  # blocks, of all namespaces, by fingerprint
        self._evicted: OrderedDict[int, None] = OrderedDict()  # the oldest first

    def remember(self, parent: int, key: bytes, blocks: Sequence[int]) -> None:
        """`blocks`, with the tokens `key`, are cached from now on, behind the block `parent`."""
        size, fingerprints, num_cached = self._block_bytes, self._fingerprints, self._num_cached
        fingerprint = fingerprints[parent]
        for index, block in enumerate(blocks):
            fingerprint = crc32(key[index * size : (index + 1) * size], fingerprint)
            fingerprints[block] = fingerprint
            num_cached[fingerprint] = num_cached.get(fingerprint, 0) + 1

    def evict(self, namespace: bytes, blocks: Sequence[int]) -> None:
        """`blocks`, of one prefix and in its order, are no longer cached.

        The last is noted first, and forgotten first: a prompt misses the first of them first.
        """
        owner = crc32(namespace) << 32
        for block in reversed(blocks):
            fingerprint = self._fingerprints.pop(block)
            self._num_cached[fingerprint] -= 1
            if not self._num_cached[fingerprint]:
                del self._num_cached[fingerprint]
            self._evicted[owner | fingerprint] = None
            self._evicted.move_to_end(owner | fingerprint)
        while len(self._evicted) > self._capacity:
            self._evicted.popitem(last=False)

    def why(self, namespace: bytes, parent: int, key: bytes) -> Miss:
        """Why the block of the tokens `key`, behind the cached `parent`, is not in `namespace`."""
        fingerprint = crc32(key, self._fingerprints[parent])
        if crc32(namespace) << 32 | fingerprint in self._evicted:
            return Miss.EVICTED
        return Miss.OTHER_TENANT if fingerprint in self._num_cached else Miss.NEVER_SEEN

    def check(self, cached: Sequence[int]) -> None:
        """Assert that exactly the blocks `cached` are remembered as such; for tests."""
        assert self._fingerprints.keys() == {NULL_BLOCK, *cached}
        assert sum(self._num_cached.values()) == len(cached)
        assert len(self._evicted) <= self._capacity
