"""RadixTree: which token prefixes have their KV in which blocks.

Owns the cached spans, their locks, and what each tenant has. Does not know about requests or free
blocks. Spans are block-aligned: an edge holds whole blocks, and only whole blocks are shared.
Token spans travel as bytes, uint32 little-endian: comparing and hashing them costs no Python loop.
The method is RadixAttention's (Zheng et al., SGLang, 2023), with block-aligned edges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from mili.router.block_pool import NULL_BLOCK
from mili.router.cache_memory import CacheMemory
from mili.router.eviction import Evictable, Eviction, TokenLimit

TOKEN_BYTES = 4
# A namespace that is not empty begins with so many bytes that name its tenant.
TENANT_BYTES = 16


class Node:
    """A span of tokens below its parent's, and the blocks that hold its KV.

    locks: how many holders' paths run through this node. A node with locks == 0 may be evicted,
    leaves first; a lock on a node locks its ancestors too. last_used: when it was last unlocked,
    which for what is not locked is its last use.
    """

    __slots__ = ("blocks", "children", "key", "last_used", "locks", "namespace", "parent", "tenant")

    def __init__(
        self, parent: Node | None, key: bytes, blocks: list[int], namespace: bytes
    ) -> None:
        self.parent = parent
        self.key = key  # [len(blocks) * block_size] uint32
        self.blocks = blocks
        self.children: dict[bytes, Node] = {}  # by the first block of the child's key
        self.locks = 0
        self.last_used = 0
        self.namespace = namespace
        self.tenant = namespace[:TENANT_BYTES]

    @property
    def is_evictable(self) -> bool:
        return self.parent is not None and not self.children and self.locks == 0


class Extension(NamedTuple):
    """Where the caller's lock is now, and which of its blocks the tree did not take."""

    node: Node
    duplicates: list[int]


class RadixTree:
    """One tree per namespace (tenant, salt, adapter): nothing is shared between two of them."""

    def __init__(self, block_size: int, eviction: Eviction, memory: CacheMemory) -> None:
        self._stride = block_size * TOKEN_BYTES
        self._roots: dict[bytes, Node] = {}
        self._eviction = eviction
        self._memory = memory
        self._uses = 0
        self._tenant_blocks: dict[bytes, int] = {}
        self.num_blocks = 0
        self.num_evictable_blocks = 0

    def match(self, namespace: bytes, key: bytes) -> int:
        """How many leading blocks of `key` are cached. Changes nothing."""
        node, matched = self._roots.get(namespace), 0
        while node and (child := self._child(node, key, matched)):
            common = self._common_blocks(child, key, matched)
            matched += common
            node = child if common == len(child.blocks) else None
        return matched

    def lock(self, namespace: bytes, key: bytes) -> tuple[Node, list[int]]:
        """Lock the longest cached prefix of `key`: its last node, and the blocks of the path."""
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = Node(None, b"", [], namespace)
        blocks: list[int] = []
        self._enter(node)
        while child := self._descend(node, key, len(blocks)):
            self._enter(child)
            blocks += child.blocks
            node = child
        return node, blocks

    def extend(self, node: Node, key: bytes, blocks: list[int]) -> Extension:
        """Put `blocks`, holding the tokens `key`, below the locked `node`; move the lock down.

        Where the tree already has a span, its own blocks stay and the caller's are duplicates.
        """
        assert len(key) == len(blocks) * self._stride
        done = 0
        while child := self._descend(node, key, done):
            self._enter(child)
            done += len(child.blocks)
            node = child
        duplicates = blocks[:done]
        if rest := blocks[done:]:
            node = self._append(node, key[done * self._stride :], rest)
        return Extension(node, duplicates)

    def unlock(self, node: Node) -> None:
        """Give up the lock on `node` and its ancestors; what nobody locks may be evicted."""
        self._uses += 1
        at: Node | None = node
        while at is not None:
            assert at.locks > 0
            at.locks -= 1
            at.last_used = self._uses
            if at.locks == 0:
                self.num_evictable_blocks += len(at.blocks)
            at = at.parent
        if node.is_evictable:
            self._eviction.add(node)
        self._drop_empty_root(node)

    def evict(self, count: int) -> list[int]:
        """Forget up to `count` unlocked blocks, the end of the least recently used span first."""
        freed: list[int] = []
        while len(freed) < count and (node := self._eviction.pop()) is not None:
            freed += self._cut(node, count - len(freed))
        return freed

    def trim(self, limit: TokenLimit, tenant: bytes) -> list[int]:
        """Forget what `tenant`, and all together, have beyond `limit`, the tree's own policy."""
        freed: list[int] = []
        while found := limit.surplus(tenant, self.num_blocks_of(tenant), self.num_blocks):
            freed += self._cut(found.node, found.num_blocks)
        return freed

    def flush(self, prefix: bytes) -> list[int]:
        """Forget every unlocked block of the namespaces that begin with `prefix`."""
        freed: list[int] = []
        for root in [root for name, root in self._roots.items() if name.startswith(prefix)]:
            for node in reversed(list(_descendants(root))):  # children before their parents
                if node.is_evictable:
                    freed += self._cut(node, len(node.blocks))
        return freed

    def num_blocks_of(self, tenant: bytes) -> int:
        """Blocks that are cached for the tenant, locked ones included."""
        return self._tenant_blocks.get(tenant, 0)

    def _cut(self, node: Evictable, count: int) -> list[int]:
        """Forget the last `count` blocks of an evictable span, or all that it has."""
        assert isinstance(node, Node) and node.is_evictable
        keep = max(0, len(node.blocks) - count)
        freed = node.blocks[keep:]
        self._count(node.tenant, -len(freed))
        self.num_evictable_blocks -= len(freed)
        self._memory.evict(node.namespace, freed)
        del node.blocks[keep:]
        if keep:
            node.key = node.key[: keep * self._stride]
            self._eviction.add(node)
        else:
            self._remove(node)
        return freed

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[: self._stride]]
        node.parent = None
        if parent.is_evictable:
            self._eviction.add(parent)
        self._drop_empty_root(parent)

    def _count(self, tenant: bytes, change: int) -> None:
        self.num_blocks += change
        if count := self.num_blocks_of(tenant) + change:
            self._tenant_blocks[tenant] = count
        else:
            del self._tenant_blocks[tenant]

    def _append(self, node: Node, key: bytes, blocks: list[int]) -> Node:
        """Add a new span at the end of the caller's path; the caller's lock covers it."""
        self._count(node.tenant, len(blocks))
        self._memory.remember(node.blocks[-1] if node.blocks else NULL_BLOCK, key, blocks)
        if node.parent is not None and not node.children and node.locks == 1:
            node.key += key
            node.blocks += blocks
            return node
        child = Node(node, key, list(blocks), node.namespace)
        child.locks = 1
        node.children[key[: self._stride]] = child
        return child

    def _descend(self, node: Node, key: bytes, at: int) -> Node | None:
        """The child that holds the blocks of `key` from block `at`, cut to what is common."""
        child = self._child(node, key, at)
        if child is None:
            return None
        common = self._common_blocks(child, key, at)
        return child if common == len(child.blocks) else self._split(child, common)

    def _child(self, node: Node, key: bytes, at: int) -> Node | None:
        return node.children.get(key[at * self._stride : (at + 1) * self._stride])

    def _common_blocks(self, node: Node, key: bytes, at: int) -> int:
        start = at * self._stride
        if key.startswith(node.key, start):
            return len(node.blocks)
        low, high = 0, len(node.blocks)  # low blocks are common, high are not
        while high - low > 1:
            middle = (low + high) // 2
            end = middle * self._stride
            if key.startswith(node.key[low * self._stride : end], start + low * self._stride):
                low = middle
            else:
                high = middle
        return low

    def _split(self, node: Node, at: int) -> Node:
        """Cut `node` before its block `at`; return the new upper half.

        The lower half stays the same object: whoever holds it locks the same path as before.
        """
        parent = node.parent
        assert parent is not None and 0 < at < len(node.blocks)
        upper = Node(parent, node.key[: at * self._stride], node.blocks[:at], node.namespace)
        upper.locks = node.locks
        node.key = node.key[at * self._stride :]
        node.blocks = node.blocks[at:]
        node.parent = upper
        upper.children[node.key[: self._stride]] = node
        parent.children[upper.key[: self._stride]] = upper
        return upper

    def _enter(self, node: Node) -> None:
        if node.locks == 0:
            self.num_evictable_blocks -= len(node.blocks)
        node.locks += 1

    def _drop_empty_root(self, node: Node) -> None:
        if node.parent is None and not node.children and node.locks == 0:
            self._roots.pop(node.namespace, None)

    def check(self) -> None:
        """Assert every invariant of the tree; linear in its size, for tests."""
        blocks: list[int] = []
        evictable = 0
        by_tenant: Counter[bytes] = Counter()
        for namespace, root in self._roots.items():
            assert root.children or root.locks, "an empty namespace was kept"
            for node in _descendants(root):
                blocks += node.blocks
                by_tenant[node.tenant] += len(node.blocks)
                evictable += len(node.blocks) if node.locks == 0 else 0
                assert node.namespace == namespace and namespace.startswith(node.tenant)
                assert len(node.key) == len(node.blocks) * self._stride
                assert node.blocks or node is root
                for first, child in node.children.items():
                    assert child.parent is node and child.key[: self._stride] == first
                    assert child.locks <= node.locks
        assert len(set(blocks)) == len(blocks), "a block stands in the tree twice"
        assert len(blocks) == self.num_blocks and evictable == self.num_evictable_blocks
        assert +by_tenant == self._tenant_blocks
        self._memory.check(blocks)


def _descendants(root: Node) -> Iterator[Node]:
    """The node and all below it, parents before their children."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack += node.children.values()
