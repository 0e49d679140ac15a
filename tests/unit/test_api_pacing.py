"""Readers are woken in turns, a few at a time, and none twice before all others had a turn."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from mili.router.api.pacing import INTERVAL_PER_STREAM, LONGEST_INTERVAL, SLICE, Pacer


class Clock:
    """The running loop's time; it stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)

    async def move(self, seconds: float) -> None:
        """And let the loop do what is due then: it looks at timers one round late."""
        self.now += seconds
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Reader:
    """Says in `woken` that it was woken."""

    def __init__(self, name: str, woken: list[str]) -> None:
        self.due = 0.0
        self.name = name
        self._woken = woken
        self.then: Callable[[], None] = lambda: None

    def wake(self) -> None:
        self._woken.append(self.name)
        self.then()


def make_readers(count: int) -> tuple[list[Reader], list[str]]:
    woken: list[str] = []
    return [Reader(str(index), woken) for index in range(count)], woken


async def test_a_slice_is_woken_between_two_looks_at_the_sockets(clock: Clock) -> None:
    pacer = Pacer()
    readers, woken = make_readers(2 * SLICE + 3)
    for reader in readers:
        pacer.add(reader, urgent=False)
    pacer.wake_due(len(readers))
    for so_far in (SLICE, 2 * SLICE, len(readers), len(readers)):
        assert woken == [reader.name for reader in readers[:so_far]]
        await asyncio.sleep(0)


async def test_the_urgent_come_first_and_once(clock: Clock) -> None:
    pacer = Pacer()
    (early, late, first_token, ended), woken = make_readers(4)
    pacer.add(early, urgent=False)
    pacer.add(late, urgent=False)
    pacer.add(first_token, urgent=True)
    pacer.add(late, urgent=True)
    ended.due = clock.now + 1000  # it was woken a moment ago: for the urgent that does not matter
    pacer.add(ended, urgent=True)
    pacer.wake_due(4)
    await clock.move(1)
    assert woken == [reader.name for reader in (first_token, late, ended, early)]


async def test_a_reader_that_gets_more_to_read_keeps_its_turn(clock: Clock) -> None:
    pacer = Pacer()
    (first, second), woken = make_readers(2)
    pacer.add(first, urgent=False)
    pacer.add(second, urgent=False)
    pacer.add(first, urgent=False)
    pacer.wake_due(2)
    await clock.move(0)
    assert woken == [first.name, second.name]


async def test_many_urgent_are_sliced_too(clock: Clock) -> None:
    pacer = Pacer()
    readers, woken = make_readers(SLICE + 1)
    for reader in readers:
        pacer.add(reader, urgent=True)
    pacer.wake_due(1)
    assert len(woken) == SLICE
    await asyncio.sleep(0)
    assert len(woken) == SLICE + 1


@pytest.mark.parametrize(
    ("streams", "interval"), [(50, 50 * INTERVAL_PER_STREAM), (10_000, LONGEST_INTERVAL)]
)
async def test_a_reader_is_woken_again_by_itself_after_its_interval(
    clock: Clock, streams: int, interval: float
) -> None:
    pacer = Pacer()
    (reader,), woken = make_readers(1)
    pacer.add(reader, urgent=False)
    pacer.wake_due(streams)
    assert len(woken) == 1
    pacer.add(reader, urgent=False)
    pacer.add(reader, urgent=False)
    pacer.wake_due(streams)
    await clock.move(0.9 * interval)
    assert len(woken) == 1
    await clock.move(0.11 * interval)
    assert len(woken) == 2
    await clock.move(10 * interval)
    assert len(woken) == 2, "it has nothing to read"


async def test_all_that_have_something_to_read_get_as_many_turns(clock: Clock) -> None:
    pacer = Pacer()
    readers, woken = make_readers(100)
    for reader in readers:
        reader.then = lambda reader=reader: pacer.add(reader, urgent=False)  # type: ignore[misc]
        pacer.add(reader, urgent=False)
    pacer.wake_due(len(readers))
    interval = len(readers) * INTERVAL_PER_STREAM
    for step in range(400):
        if step % 7 == 0:
            pacer.wake_due(len(readers))
        await clock.move(interval / 40)
    turns = Counter(woken)
    assert len(turns) == len(readers)
    assert max(turns.values()) - min(turns.values()) <= 1
    # Ten intervals have passed, and nobody was woken more often than once in each.
    assert min(turns.values()) >= 8 and max(turns.values()) <= 11
