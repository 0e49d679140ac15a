"""RadixTree: which token prefixes have their KV in which blocks.

Owns the cached spans, their locks and the order of eviction. Does not know about requests or free
blocks. Spans are block-aligned: an edge holds whole blocks, and only whole blocks are shared.
Token spans travel as bytes, uint32 little-endian: comparing and hashing them costs no Python loop.
The method is RadixAttention's (Zheng et al., SGLang, 2023), with block-aligned edges.
"""

from __future__ import annotations

from typing import NamedTuple

from mili.router.eviction import LRU

TOKEN_BYTES = 4
# What a namespace that is not empty begins with: a hash of the tenant's name.
TENANT_BYTES = 16


class Node:
    """A span of tokens below its parent's, and the blocks that hold its KV.

    locks: how many holders' paths run through this node. A node with locks == 0 may be evicted,
    leaves first; a lock on a node locks its ancestors too.
    """

    __slots__ = ("blocks", "children", "key", "last_used", "locks", "namespace", "parent")

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

    @property
    def is_evictable(self) -> bool:
        return self.parent is not None and not self.children and self.locks == 0


class Extension(NamedTuple):
    """Where the caller's lock is now, and which of its blocks the tree did not take."""

    node: Node
    duplicates: list[int]


class RadixTree:
    """One tree per namespace (tenant salt, adapter): nothing is shared between two of them."""

    def __init__(self, block_size: int) -> None:
        self._stride = block_size * TOKEN_BYTES
        self._roots: dict[bytes, Node] = {}
        self._eviction = LRU()
        self._uses = 0
        self._num_nodes = 0
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
            self._eviction.add(node, self._num_nodes)
        self._drop_empty_root(node)

    def evict(self, count: int) -> list[int]:
        """Forget up to `count` unlocked blocks, the end of the least recently used span first."""
        freed: list[int] = []
        while len(freed) < count and (node := self._eviction.pop()) is not None:
            assert isinstance(node, Node)
            keep = max(0, len(node.blocks) - (count - len(freed)))
            freed += node.blocks[keep:]
            self._forget(node, keep)
        self.num_blocks -= len(freed)
        self.num_evictable_blocks -= len(freed)
        return freed

    def _forget(self, node: Node, keep: int) -> None:
        del node.blocks[keep:]
        if keep:
            node.key = node.key[: keep * self._stride]
            self._eviction.add(node, self._num_nodes)
            return
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[: self._stride]]
        node.parent = None
        self._num_nodes -= 1
        if parent.is_evictable:
            self._eviction.add(parent, self._num_nodes)
        self._drop_empty_root(parent)

    def _append(self, node: Node, key: bytes, blocks: list[int]) -> Node:
        """Add a new span at the end of the caller's path; the caller's lock covers it."""
        self.num_blocks += len(blocks)
        if node.parent is not None and not node.children and node.locks == 1:
            node.key += key
            node.blocks += blocks
            return node
        child = Node(node, key, list(blocks), node.namespace)
        child.locks = 1
        child.last_used = self._uses
        node.children[key[: self._stride]] = child
        self._num_nodes += 1
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
        upper.last_used = node.last_used
        node.key = node.key[at * self._stride :]
        node.blocks = node.blocks[at:]
        node.parent = upper
        upper.children[node.key[: self._stride]] = node
        parent.children[upper.key[: self._stride]] = upper
        self._num_nodes += 1
        return upper

    def _enter(self, node: Node) -> None:
        self._uses += 1
        node.last_used = self._uses
        if node.locks == 0:
            self.num_evictable_blocks -= len(node.blocks)
        node.locks += 1

    def _drop_empty_root(self, node: Node) -> None:
        if node.parent is None and not node.children and node.locks == 0:
            self._roots.pop(node.namespace, None)

    def check(self) -> None:
        """Assert every invariant of the tree; linear in its size, for tests."""
        blocks: list[int] = []
        evictable = nodes = 0
        for namespace, root in self._roots.items():
            assert root.children or root.locks, "an empty namespace was kept"
            stack = [root]
            while stack:
                node = stack.pop()
                nodes += node.parent is not None
                blocks += node.blocks
                evictable += len(node.blocks) if node.locks == 0 else 0
                assert node.namespace == namespace
                assert len(node.key) == len(node.blocks) * self._stride
                assert node.parent is None or node.blocks
                for first, child in node.children.items():
                    assert child.parent is node and child.key[: self._stride] == first
                    assert child.locks <= node.locks
                    stack.append(child)
        assert len(set(blocks)) == len(blocks), "a block stands in the tree twice"
        assert nodes == self._num_nodes
        assert len(blocks) == self.num_blocks and evictable == self.num_evictable_blocks
