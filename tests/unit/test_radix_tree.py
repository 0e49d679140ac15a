"""The radix tree, block pool and eviction against brute-force models."""

from __future__ import annotations

import random
from array import array

import pytest

from mili.router.block_pool import BlockPool
from mili.router.radix_tree import Node, RadixTree


def key(tokens: list[int]) -> bytes:
    return array("I", tokens).tobytes()


def test_the_pool_hands_out_every_block_but_the_null_block_once() -> None:
    pool = BlockPool(8)
    blocks = pool.allocate(7)
    assert sorted(blocks) == [1, 2, 3, 4, 5, 6, 7]
    pool.free(blocks[:3])
    assert sorted(pool.allocate(3)) == sorted(blocks[:3])
    with pytest.raises(AssertionError):
        pool.allocate(1)


def test_a_block_freed_twice_is_our_bug() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.free([block])
    with pytest.raises(AssertionError):
        pool.free([block])
    with pytest.raises(AssertionError):
        pool.free([0])


def test_a_pool_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="null block"):
        BlockPool(1)


def test_namespaces_share_nothing() -> None:
    tree = RadixTree(2)
    node, _ = tree.lock(b"one", b"")
    tree.unlock(tree.extend(node, key([1, 2, 3, 4]), [7, 8]).node)
    assert tree.match(b"one", key([1, 2, 3, 4])) == 2
    assert tree.match(b"two", key([1, 2, 3, 4])) == 0
    node, blocks = tree.lock(b"two", key([1, 2, 3, 4]))
    assert blocks == []
    tree.unlock(node)
    tree.check()


def test_the_least_recently_used_span_goes_first_and_from_its_end() -> None:
    tree = RadixTree(1)
    for first, blocks in ((1, [10, 11, 12]), (2, [20, 21, 22])):
        node, _ = tree.lock(b"", b"")
        tree.unlock(tree.extend(node, key([first, 5, 6]), blocks).node)
    node, _ = tree.lock(b"", key([1, 5, 6]))
    tree.unlock(node)  # used again: now the second is the older
    assert tree.evict(2) == [21, 22]
    assert tree.evict(2) == [20, 12]
    tree.check()


def test_a_locked_span_stays_while_its_end_may_go() -> None:
    tree = RadixTree(1)
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
    tree = RadixTree(block_size)
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
    tree = RadixTree(1)
    node, _ = tree.lock(b"", b"")
    tree.unlock(tree.extend(node, key([1, 2, 3]), [1, 2, 3]).node)
    for _ in range(2000):
        tree.unlock(tree.lock(b"", key([1, 2, 3]))[0])
    assert len(tree._eviction._heap) < 100
    assert sorted(tree.evict(3)) == [1, 2, 3]


def test_a_long_edge_is_compared_in_few_steps() -> None:
    tree = RadixTree(1)
    tokens = list(range(20_000))
    node, _ = tree.lock(b"", b"")
    tree.unlock(tree.extend(node, key(tokens), list(range(1, 20_001))).node)
    for common in (0, 1, 2, 9_999, 19_998, 19_999, 20_000):
        assert tree.match(b"", key([*tokens[:common], 99_999])) == common
