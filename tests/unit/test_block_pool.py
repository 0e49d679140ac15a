"""The block pool, and where its two strategies look for blocks."""

from __future__ import annotations

import random

import pytest

from mili.router.block_pool import Allocation, BlockPool, runs

BOTH: tuple[Allocation, ...] = ("first-fit", "best-fit")


def with_holes(allocation: Allocation) -> BlockPool:
    """Free are the runs 1-2, 5-9, 12-14 and 17-30."""
    pool = BlockPool(31, allocation)
    pool.allocate(30)
    for start, end in ((17, 31), (1, 3), (12, 15), (5, 10)):
        pool.free(range(start, end))
    pool.check()
    return pool


@pytest.mark.parametrize("allocation", BOTH)
def test_the_pool_hands_out_every_block_but_the_null_block_once(allocation: Allocation) -> None:
    pool = BlockPool(8, allocation)
    blocks = pool.allocate(7)
    assert sorted(blocks) == [1, 2, 3, 4, 5, 6, 7]
    pool.free(blocks[:3])
    assert sorted(pool.allocate(3)) == sorted(blocks[:3])
    with pytest.raises(AssertionError):
        pool.allocate(1)


@pytest.mark.parametrize("allocation", BOTH)
def test_a_block_freed_twice_is_our_bug(allocation: Allocation) -> None:
    pool = BlockPool(4, allocation)
    (block,) = pool.allocate(1)
    pool.free([block])
    with pytest.raises(AssertionError):
        pool.free([block])
    with pytest.raises(AssertionError):
        pool.free([0])


def test_a_pool_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="null block"):
        BlockPool(1)


def test_first_fit_takes_the_lowest_run_that_is_long_enough() -> None:
    pool = with_holes("first-fit")
    assert pool.allocate(3) == [5, 6, 7]
    assert pool.allocate(1) == [1]
    assert pool.allocate(3) == [12, 13, 14]
    pool.check()


def test_first_fit_takes_the_lowest_blocks_where_no_run_is_long_enough() -> None:
    pool = with_holes("first-fit")
    assert pool.allocate(18) == [1, 2, 5, 6, 7, 8, 9, 12, 13, 14, *range(17, 25)]
    pool.check()


def test_best_fit_takes_the_shortest_run_that_is_long_enough() -> None:
    pool = with_holes("best-fit")
    assert pool.allocate(3) == [12, 13, 14]
    assert pool.allocate(1) == [1]
    assert pool.allocate(5) == [5, 6, 7, 8, 9]
    pool.check()


def test_best_fit_takes_the_fewest_runs_where_none_is_long_enough() -> None:
    pool = with_holes("best-fit")
    assert pool.allocate(18) == [*range(17, 31), 5, 6, 7, 8]
    pool.check()


def test_neighbours_that_are_freed_become_one_run() -> None:
    pool = BlockPool(10, "best-fit")
    blocks = pool.allocate(9)
    for block in (2, 4, 3, 9, 1):
        pool.free([block])
        pool.check()
    assert pool.allocate(4) == [1, 2, 3, 4]
    assert blocks == list(range(1, 10))


@pytest.mark.parametrize("allocation", BOTH)
def test_random_histories_against_a_set(allocation: Allocation) -> None:
    chance = random.Random(1)
    pool = BlockPool(64, allocation)
    free, held = set(range(1, 64)), []
    for _ in range(4000):
        if chance.random() < 0.6 and free:
            blocks = pool.allocate(chance.randint(1, min(len(free), 20)))
            assert len(set(blocks)) == len(blocks) and free.issuperset(blocks)
            free.difference_update(blocks)
            held += blocks
        else:
            chance.shuffle(held)
            given = [held.pop() for _ in range(chance.randint(0, min(len(held), 30)))]
            pool.free(given)
            free.update(given)
        pool.check()
        assert pool.num_free == len(free)


def test_runs_are_spans_of_adjacent_blocks() -> None:
    assert list(runs([])) == []
    assert list(runs([3, 4, 5, 9, 8, 7, 8])) == [(3, 6), (9, 10), (8, 9), (7, 9)]
