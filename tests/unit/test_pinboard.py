"""Pins over worker groups: where they go, when they end, and that none is left in a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from mili.router.errors import Reason, RequestError
from mili.router.introspection import Pinned
from mili.router.pinboard import Pinboard


class Cache:
    """A cache that has so many tokens of every prefix."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.pins: dict[str, int] = {}

    def pin(self, pin_id: str, namespace: bytes, token_ids: Sequence[int]) -> int:
        assert pin_id not in self.pins
        self.pins[pin_id] = min(self.num_tokens, len(token_ids))
        return self.pins[pin_id]

    def unpin(self, pin_id: str) -> None:
        del self.pins[pin_id]


@pytest.fixture
def caches() -> dict[str, Cache]:
    return {"g0": Cache(16), "g1": Cache(48), "g2": Cache(32)}


def left(caches: dict[str, Cache]) -> list[int]:
    return [len(cache.pins) for cache in caches.values()]


def test_a_prefix_is_pinned_where_most_of_it_is(caches: dict[str, Cache]) -> None:
    board = Pinboard()
    first = board.pin(caches, b"", range(100), until=5)
    assert first.num_tokens == 48
    assert left(caches) == [0, 1, 0]
    caches["g2"].num_tokens = 64
    second = board.pin(caches, b"", range(100), until=5)
    assert second.num_tokens == 64
    assert second.pin_id != first.pin_id
    assert (left(caches), len(board)) == ([0, 1, 1], 2)


def test_what_nobody_has_is_not_pinned(caches: dict[str, Cache]) -> None:
    board = Pinboard()
    for cache in caches.values():
        cache.num_tokens = 0
    assert board.pin(caches, b"", range(100), until=5) == Pinned("", 0)
    assert board.pin({}, b"", range(100), until=5) == Pinned("", 0)
    assert (left(caches), len(board), board.due) == ([0, 0, 0], 0, math.inf)


def test_unpin_once(caches: dict[str, Cache]) -> None:
    board = Pinboard()
    pin_id = board.pin(caches, b"", range(100), until=5).pin_id
    board.unpin(pin_id)
    assert left(caches) == [0, 0, 0]
    for gone in (pin_id, "", "pin-9"):
        with pytest.raises(RequestError) as caught:
            board.unpin(gone)
        assert caught.value.reason is Reason.PIN_NOT_FOUND


def test_pins_expire(caches: dict[str, Cache]) -> None:
    board = Pinboard()
    early = board.pin(caches, b"", range(100), until=5.0).pin_id
    late = board.pin(caches, b"", range(100), until=7.0).pin_id
    assert board.due == 5.0
    board.expire(4.9)
    assert len(board) == 2
    board.expire(5.0)
    assert (caches["g1"].pins.keys(), board.due) == ({late}, 7.0)
    with pytest.raises(RequestError):
        board.unpin(early)
    board.expire(100.0)
    assert (left(caches), len(board)) == ([0, 0, 0], 0)


def test_a_lost_group_takes_its_pins_with_it(caches: dict[str, Cache]) -> None:
    board = Pinboard()
    lost = board.pin(caches, b"", range(100), until=5).pin_id
    caches["g2"].num_tokens = 64
    kept = board.pin(caches, b"", range(100), until=5).pin_id
    board.forget("g1")
    new = Cache(0)  # the group again, with an empty cache
    caches["g1"] = new
    with pytest.raises(RequestError):
        board.unpin(lost)
    board.expire(5)
    assert (new.pins, len(board)) == ({}, 0)
    assert kept not in caches["g2"].pins
