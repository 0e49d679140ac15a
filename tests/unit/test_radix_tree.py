"""The radix tree and its eviction against brute-force models."""

from __future__ import annotations

import random
from array import array

import pytest

from mili.router.cache_memory import CacheMemory, Miss
from mili.router.eviction import LRU, Eviction, TokenLimit
from mili.router.radix_tree import TENANT_BYTES, Node, RadixTree


def key(tokens: list[int]) -> bytes:
    return array("I", tokens).tobytes()


def make_tree(block_size: int, eviction: Eviction | None = None) -> RadixTree:
    return RadixTree(block_size, eviction or LRU(), CacheMemory(4 * block_size, capacity=100))


def insert(tree: RadixTree, namespace: bytes, tokens: list[int], first_block: int) -> None:
    """Cache `tokens`, one a block, in the blocks from first_block on, and hold nothing."""
    node, cached = tree.lock(namespace, key(tokens))
    rest = tokens[len(cached) :]
    blocks = list(range(first_block, first_block + len(rest)))
    tree.unlock(tree.extend(node, key(rest), blocks).node)


def test_namespaces_share_nothing() -> None:
    tree = make_tree(2)
    node, _ = tree.lock(b"one", b"")
    tree.unlock(tree.extend(node, key([1, 2, 3, 4]), [7, 8]).node)
    assert tree.match(b"one", key([1, 2, 3, 4])) == 2
    assert tree.match(b"two", key([1, 2, 3, 4])) == 0
    node, blocks = tree.lock(b"two", key([1, 2, 3, 4]))
    assert blocks == []
    tree.unlock(node)
    tree.check()


def test_the_least_recently_used_span_goes_first_and_from_its_end() -> None:
    tree = make_tree(1)
    for first, blocks in ((1, [10, 11, 12]), (2, [20, 21, 22])):
        node, _ = tree.lock(b"", b"")
        tree.unlock(tree.extend(node, key([first, 5, 6]), blocks).node)
    node, _ = tree.lock(b"", key([1, 5, 6]))
    tree.unlock(node)  # used again: now the second is the older
    assert tree.evict(2) == [21, 22]
    assert tree.evict(2) == [20, 12]
    tree.check()


def test_a_locked_span_stays_while_its_end_may_go() -> None:
    tree = make_tree(1)
    root, _ = tree.lock(b"", b"")
    tree.unlock(tree.extend(root, key([1, 2, 3, 4]), [1, 2, 3, 4]).node)
    node, blocks = tree.lock(b"", key([1, 2, 9]))
    assert blocks == [1, 2]
    assert tree.num_evictable_blocks == 2
    assert sorted(tree.evict(10)) == [3, 4]
    tree.unlock(node)
    assert sorted(tree.evict(10)) == [1, 2]
    tree.check()
    assert tree.num_blocks == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_against_a_dictionary(seed: int) -> None:
    """The model is a dict from (namespace, whole prefix) to block, one entry a block."""
    chance = random.Random(seed)
    block_size = chance.choice((1, 2, 3))
    tree = make_tree(block_size)
    cached: dict[tuple[bytes, bytes], int] = {}
    held: list[tuple[Node, bytes, list[int], bytes]] = []
    next_block, evicted, shared = 1, 0, 0
    stride = 4 * block_size
    for _ in range(5000):
        action = chance.choice(("lock", "lock", "unlock", "extend", "extend", "evict"))
        namespace = chance.choice((b"", b"x"))
        if action == "lock" and len(held) < 12:
            span = key([chance.randrange(2) for _ in range(block_size * chance.randrange(7))])
            expected = []
            for end in range(stride, len(span) + 1, stride):
                if (namespace, span[:end]) not in cached:
                    break
                expected.append(cached[namespace, span[:end]])
            assert tree.match(namespace, span) == len(expected)
            node, blocks = tree.lock(namespace, span)
            assert blocks == expected
            shared += len(blocks)
            held.append((node, span[: len(blocks) * stride], blocks, namespace))
        elif action == "unlock" and held:
            node, *_ = held.pop(chance.randrange(len(held)))
            tree.unlock(node)
        elif action == "extend" and held:
            index = chance.randrange(len(held))
            node, span, blocks, space = held[index]
            count = chance.randrange(1, 4)
            more = key([chance.randrange(2) for _ in range(block_size * count)])
            mine = list(range(next_block, next_block + count))
            next_block += count
            node, duplicates = tree.extend(node, more, mine)
            whole = span + more
            for at, block in enumerate(mine):
                prefix = (space, whole[: len(span) + (at + 1) * stride])
                assert (block in duplicates) == (prefix in cached)
                cached.setdefault(prefix, block)
            held[index] = (node, whole, blocks, space)
        elif action == "evict":
            freed = tree.evict(chance.randrange(1, 5))
            evicted += len(freed)
            gone = {prefix for prefix, block in cached.items() if block in freed}
            assert len(gone) == len(freed)
            for space, prefix in gone:
                del cached[space, prefix]
            for _, span, _, space in held:  # nothing that is locked may go
                for end in range(stride, len(span) + 1, stride):
                    assert (space, span[:end]) in cached
        tree.check()
        assert tree.num_blocks == len(cached)
    assert evicted > 200
    assert shared > 200


def test_the_order_of_eviction_stays_small() -> None:
    """I6: a span that is used again and again is not noted again and again."""
    tree = make_tree(1)
    node, _ = tree.lock(b"", b"")
    tree.unlock(tree.extend(node, key([1, 2, 3]), [1, 2, 3]).node)
    for _ in range(2000):
        tree.unlock(tree.lock(b"", key([1, 2, 3]))[0])
    assert isinstance(tree._eviction, LRU) and len(tree._eviction._heap) < 100
    assert sorted(tree.evict(3)) == [1, 2, 3]


def test_nothing_is_lost_when_the_order_of_eviction_is_cleaned() -> None:
    tree = make_tree(1)
    for number in range(100):
        insert(tree, b"", [number], number + 1)
    chance = random.Random(3)
    order = list(range(100))
    for _ in range(5000):
        order.append(order.pop(chance.randrange(100)))
        tree.unlock(tree.lock(b"", key([order[-1]]))[0])
    assert [tree.evict(1) for _ in range(100)] == [[number + 1] for number in order]


def test_a_long_edge_is_compared_in_few_steps() -> None:
    tree = make_tree(1)
    tokens = list(range(20_000))
    node, _ = tree.lock(b"", b"")
    tree.unlock(tree.extend(node, key(tokens), list(range(1, 20_001))).node)
    for common in (0, 1, 2, 9_999, 19_998, 19_999, 20_000):
        assert tree.match(b"", key([*tokens[:common], 99_999])) == common


ANNA, BERT = b"a" * TENANT_BYTES, b"b" * TENANT_BYTES


def test_a_tenant_over_its_cap_loses_what_it_used_least_recently() -> None:
    limit = TokenLimit(99, {ANNA: 4})
    tree = make_tree(1, limit)
    insert(tree, BERT, [1, 2, 3], 10)
    insert(tree, ANNA, [1, 2, 3], 20)
    insert(tree, ANNA + b"salt", [1, 2, 3], 30)
    assert tree.trim(limit, BERT) == []
    assert tree.trim(limit, ANNA) == [21, 22]
    assert (tree.num_blocks_of(ANNA), tree.num_blocks_of(BERT)) == (4, 3)
    tree.check()


def test_the_cap_of_all_takes_from_whoever_used_it_least_recently() -> None:
    limit = TokenLimit(5, {ANNA: 4})
    tree = make_tree(1, limit)
    insert(tree, BERT, [1, 2, 3], 10)
    insert(tree, ANNA, [1, 2, 3, 4, 5, 6], 20)
    assert tree.trim(limit, ANNA) == [24, 25, 11, 12]
    assert tree.trim(limit, ANNA) == []
    tree.check()


def test_what_is_locked_stays_over_any_cap() -> None:
    limit = TokenLimit(1, {ANNA: 1})
    tree = make_tree(1, limit)
    insert(tree, ANNA, [1, 2, 3], 10)
    node, _ = tree.lock(ANNA, key([1, 2]))
    assert tree.trim(limit, ANNA) == [12]
    assert tree.trim(limit, ANNA) == []
    tree.unlock(node)
    assert tree.trim(limit, ANNA) == [11]
    tree.check()


def test_flush_frees_one_tenant_or_all_but_what_is_locked() -> None:
    tree = make_tree(1)
    insert(tree, ANNA, [1, 2, 3], 10)
    insert(tree, ANNA, [1, 2, 4, 5], 20)
    insert(tree, ANNA + b"salt", [1], 30)
    insert(tree, BERT, [1, 2], 40)
    node, _ = tree.lock(ANNA, key([1]))
    assert sorted(tree.flush(ANNA)) == [11, 12, 20, 21, 30]
    tree.check()
    assert tree.num_blocks == 3
    assert sorted(tree.flush(b"")) == [40, 41]
    tree.unlock(node)
    assert tree.flush(b"") == [10]
    tree.check()


def test_why_a_block_is_not_cached() -> None:
    memory = CacheMemory(4, capacity=2)
    tree = RadixTree(1, LRU(), memory)
    insert(tree, ANNA, [1, 2, 3, 4], 10)
    insert(tree, BERT, [1], 20)
    assert memory.why(BERT, 20, key([2])) is Miss.OTHER_TENANT
    assert memory.why(BERT, 20, key([3])) is Miss.NEVER_SEEN
    assert tree.evict(2) == [12, 13]
    assert memory.why(ANNA, 11, key([3])) is Miss.EVICTED
    assert memory.why(BERT, 20, key([3])) is Miss.NEVER_SEEN
    assert tree.evict(2) == [10, 11]  # two are remembered: 12 and 13 are forgotten
    assert memory.why(ANNA, 0, key([1])) is Miss.EVICTED
    insert(tree, ANNA, [1, 2], 30)
    assert memory.why(ANNA, 31, key([3])) is Miss.NEVER_SEEN
    tree.check()
