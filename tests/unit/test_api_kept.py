"""Generations that outlive their calls: who may follow, what is replayed, and when it is over."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest

from mili.internal.v1.step_pb2 import Sampling
from mili.router.api import kept as kept_module
from mili.router.api.event_log import Render
from mili.router.api.events import check_success
from mili.router.api.kept import Kept, KeptGenerations
from mili.router.api.stream import Gathered
from mili.router.api.stream_options import Flush
from mili.router.api.streams import Streams
from mili.router.errors import Reason, RequestError
from mili.router.outcome import Finish, FinishReason, RequestOutput
from mili.router.params import GenerationParams
from mili.v1 import inference_pb2 as pb
from tests.fake_engine import FakeEngine, letter, refuse_with

PARAMS = GenerationParams(prompt_token_ids=[1, 2], sampling=Sampling(seed=1), max_tokens=6)
ENDLESS = replace(PARAMS, max_tokens=10**6)
MAX_UNREAD = 100
INSTANCE = "0123456789abcdef" * 2


class Clock:
    """The loop's time, which a test can move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._skipped = 0.0
        monkeypatch.setattr(self._loop, "time", lambda: self._time() + self._skipped)

    async def move(self, seconds: float) -> None:
        self._skipped += seconds
        for _ in range(3):
            await asyncio.sleep(0)


def render(gathered: Sequence[Gathered], sequence: int) -> Iterator[pb.StreamEvent]:
    """A delta, and the end: numbered, so that a test can look for holes."""
    (one,) = gathered
    if one.token_ids:
        delta = pb.Delta(text=one.text, first_token_index=one.first_token_index)
        yield pb.StreamEvent(sequence=sequence, delta=delta)
        sequence += 1
    if one.finished is not None:
        check_success(one.finished)
        yield pb.StreamEvent(sequence=sequence, finished=pb.Finished())


class House:
    """Streams over a fake engine, and the generations that are kept of them."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.streams = Streams(self.engine, max_unread_tokens=MAX_UNREAD)
        self.engine.deliver = self.streams.deliver
        self.kept = KeptGenerations(self.streams, INSTANCE, MAX_UNREAD)
        self.tokens: list[str] = []

    def begin(
        self,
        name: str = "a",
        *,
        window: float = 0.0,
        params: GenerationParams = PARAMS,
        whole: bool = False,
        flush: Flush | None = None,
    ) -> Kept:
        stream = self.streams.open(name, whole=whole, flush=flush)

        async def start(token: str) -> Render:
            self.tokens.append(token)
            self.streams.submit(stream, params)
            return render

        return self.kept.begin(stream, start, tenant="t", digest=b"d", window=window)

    async def read(self, kept: Kept, after: int = 0, *, most: int = 10**9) -> list[pb.StreamEvent]:
        """Follow a generation to its end, or for so many events."""
        events: list[pb.StreamEvent] = []
        with self.kept.followed(kept) as log:
            while len(events) < most and (more := await log.read(after)):
                after += len(more)
                events += (pb.StreamEvent.FromString(event) for event in more)
        return events[:most]

    async def run(self) -> None:
        await asyncio.sleep(0.001)
        await self.engine.run()


@pytest.fixture
async def house() -> House:
    return House()


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def text_of(events: Sequence[pb.StreamEvent]) -> str:
    return "".join(event.delta.text for event in events)


async def reason_of(reading: asyncio.Task[list[pb.StreamEvent]]) -> Reason:
    with pytest.raises(RequestError) as caught:
        await reading
    return caught.value.reason


async def test_several_calls_see_the_same_events(house: House) -> None:
    kept = house.begin()
    readings = [asyncio.create_task(house.read(kept)) for _ in range(3)]
    await asyncio.sleep(0.001)
    house.engine.step()
    await asyncio.sleep(0.01)
    late = asyncio.create_task(house.read(kept))
    await house.run()
    first, *others = [await reading for reading in (*readings, late)]
    assert text_of(first) == "abcdef"
    assert [event.sequence for event in first] == list(range(1, len(first) + 1))
    assert all(other == first for other in others)


async def test_one_call_that_leaves_takes_nothing_from_the_others(house: House) -> None:
    kept = house.begin()
    leaving, staying = (asyncio.create_task(house.read(kept)) for _ in range(2))
    await asyncio.sleep(0.001)
    house.engine.step()
    leaving.cancel()  # it holds the turn, and may have been woken
    await asyncio.sleep(0.001)
    assert house.engine.cancelled.empty()
    await house.run()
    assert text_of(await staying) == "abcdef"


async def test_the_last_call_that_leaves_ends_it_unless_it_may_come_back(
    house: House, clock: Clock
) -> None:
    for window in (0.0, 5.0):
        kept = house.begin(window=window, params=ENDLESS)
        reading = asyncio.create_task(house.read(kept))
        await asyncio.sleep(0.001)
        reading.cancel()
        await asyncio.sleep(0.001)
        if window:
            assert house.engine.cancelled.empty()
            await clock.move(window + 1)
        assert house.engine.cancelled.get_nowait() == "a"
        assert house.kept.find("a", b"d") is None
    with pytest.raises(RequestError) as caught:
        house.kept.attach(house.tokens[1], "t", 0)
    assert caught.value.reason is Reason.REQUEST_NOT_FOUND


async def test_who_comes_back_in_time_stops_the_clock(house: House, clock: Clock) -> None:
    kept = house.begin(window=5.0, params=ENDLESS)
    assert house.tokens == []
    reading = asyncio.create_task(house.read(kept))
    await asyncio.sleep(0.001)
    reading.cancel()
    await clock.move(4)
    again = asyncio.create_task(house.read(house.kept.attach(house.tokens[0], "t", 0)))
    await clock.move(100)
    assert kept.expiry is not None and kept.expiry.cancelled()
    assert house.engine.cancelled.empty()
    house.engine.finish("a", Finish(FinishReason.EOS))
    assert (await again)[-1].HasField("finished")


@pytest.mark.parametrize("seed", range(20))
async def test_cut_anywhere_nothing_is_lost_or_doubled(house: House, seed: int) -> None:
    chance = random.Random(seed)
    length = 60
    params = replace(PARAMS, max_tokens=length)
    flush = Flush(chance.randint(1, 5), 0.002) if seed % 2 else None
    kept = house.begin(window=60.0, params=params, flush=flush)
    running = asyncio.create_task(house.run())
    events: list[pb.StreamEvent] = []
    while not events or not events[-1].HasField("finished"):
        reading = asyncio.create_task(house.read(kept, len(events), most=chance.randint(1, 9)))
        with suppress(TimeoutError):
            got = await asyncio.wait_for(asyncio.shield(reading), chance.choice([0.001, 1.0]))
            # Of what was sent the client has only a part when the connection breaks.
            events += got[: chance.randint(0, len(got))]
        reading.cancel()
        await asyncio.sleep(0)
        kept = house.kept.attach(house.tokens[0], "t", len(events))
    await running
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert text_of(events) == "".join(letter(index) for index in range(length))


async def test_the_token_is_for_its_tenant_and_its_router(house: House) -> None:
    kept = house.begin(window=5.0)
    await asyncio.sleep(0.001)
    (token,) = house.tokens
    assert token.startswith(INSTANCE)
    assert house.kept.attach(token, "t", 0) is kept
    elsewhere = "f" * 32 + token[32:]
    for wrong, tenant, reason in (
        (token, "other", Reason.REQUEST_NOT_FOUND),
        (token[:-1] + "!", "t", Reason.REQUEST_NOT_FOUND),
        (token[:-4] + "AAAA", "t", Reason.REQUEST_NOT_FOUND),
        ("", "t", Reason.REQUEST_NOT_FOUND),
        (elsewhere, "t", Reason.OTHER_INSTANCE),
    ):
        with pytest.raises(RequestError) as caught:
            house.kept.attach(wrong, tenant, 0)
        assert caught.value.reason is reason
    assert "f" * 32 in caught.value.message
    with pytest.raises(RequestError) as caught:
        house.kept.attach(token, "t", 1)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "after_sequence")
    await house.run()


async def test_an_id_without_a_window_has_no_token(house: House) -> None:
    kept = house.begin()
    reading = asyncio.create_task(house.read(kept))
    await house.run()
    await reading
    assert house.tokens == [""]
    with pytest.raises(RequestError):
        house.kept.attach(f"{INSTANCE}.{kept.secret}", "t", 0)


async def test_the_answer_can_be_had_again_for_a_while(house: House, clock: Clock) -> None:
    kept = house.begin()
    reading = asyncio.create_task(house.read(kept))
    await house.run()
    events = await reading
    await clock.move(kept_module.ANSWER_SECONDS - 1)
    again = house.kept.find("a", b"d")
    assert again is not None
    assert await house.read(again) == events
    with pytest.raises(RequestError) as caught:
        house.kept.find("a", b"other")
    assert caught.value.reason is Reason.REQUEST_ID_CONFLICT
    await clock.move(2)
    assert house.kept.find("a", b"other") is None


async def test_the_whole_of_it_is_asked_for_again_too(house: House) -> None:
    kept = house.begin(whole=True)
    first, second = (asyncio.create_task(house.read(kept)) for _ in range(2))
    await house.run()
    assert text_of(await first) == text_of(await second) == "abcdef"


async def test_what_failed_is_told_to_all_and_may_be_tried_again(house: House) -> None:
    kept = house.begin(window=60.0)
    readings = [asyncio.create_task(house.read(kept)) for _ in range(2)]
    await asyncio.sleep(0.001)
    house.engine.step()
    house.engine.finish("a", Finish(FinishReason.ERROR, error=refuse_with(Reason.WORKER_LOST)))
    for reading in readings:
        assert await reason_of(reading) is Reason.WORKER_LOST
    assert house.kept.find("a", b"d") is None
    # By its token it is still there, with what came before the end.
    attached = house.kept.attach(house.tokens[0], "t", 0)
    with house.kept.followed(attached) as log:
        assert pb.StreamEvent.FromString((await log.read(0))[0]).delta.text == "a"
        with pytest.raises(RequestError):
            await log.read(1)


async def test_what_cannot_start_is_told_to_all_and_forgotten(house: House) -> None:
    house.engine.refusal = refuse_with(Reason.QUEUE_FULL)
    kept = house.begin(window=60.0)
    readings = [asyncio.create_task(house.read(kept)) for _ in range(2)]
    for reading in readings:
        assert await reason_of(reading) is Reason.QUEUE_FULL
    assert house.kept.find("a", b"d") is None
    assert len(house.streams) == 0


async def test_who_leaves_before_the_start_leaves_nothing(house: House) -> None:
    stream = house.streams.open("a", whole=False)
    never = asyncio.Event()

    async def start(token: str) -> Render:
        await never.wait()
        return render

    kept = house.kept.begin(stream, start, tenant="t", digest=b"d", window=0.0)
    reading = asyncio.create_task(house.read(kept))
    await asyncio.sleep(0.001)
    reading.cancel()
    await asyncio.sleep(0.001)
    assert kept.start.cancelled()
    assert len(house.streams) == 0
    assert house.kept.find("a", b"d") is None


async def test_what_nobody_reads_is_bounded_and_not_lost(house: House) -> None:
    kept = house.begin(window=60.0, params=ENDLESS)
    reading = asyncio.create_task(house.read(kept, most=1))
    await asyncio.sleep(0.001)
    house.engine.step()
    assert len(await reading) == 1
    for _ in range(MAX_UNREAD + 1):
        house.engine.step()
    assert house.engine.cancelled.get_nowait() == "a"
    attached = house.kept.attach(house.tokens[0], "t", 1)
    with house.kept.followed(attached) as log:
        events = [pb.StreamEvent.FromString(event) for event in await log.read(1)]
        assert len(text_of(events)) == MAX_UNREAD + 1
        with pytest.raises(RequestError) as caught:
            await log.read(1 + len(events))
    assert caught.value.reason is Reason.SLOW_READER


async def test_a_long_log_forgets_its_oldest_events(house: House) -> None:
    kept = house.begin(window=60.0, params=replace(PARAMS, max_tokens=1000))
    slow = house.kept.followed(kept)
    log = slow.__enter__()
    quick = asyncio.create_task(house.read(kept))
    await asyncio.sleep(0.001)
    while house.engine.lengths:
        house.engine.step()
        await asyncio.sleep(0.0001)
    assert len(text_of(await quick)) == 1000
    assert log.num_bytes <= MAX_UNREAD * kept_module.BYTES_PER_TOKEN
    with pytest.raises(RequestError) as caught:
        await log.read(0)
    assert caught.value.reason is Reason.SLOW_READER
    for ask in (
        lambda: house.kept.attach(house.tokens[0], "t", 0),
        lambda: house.kept.find("a", b"d"),
    ):
        with pytest.raises(RequestError) as caught:
            ask()
        assert caught.value.reason is Reason.EVENTS_DROPPED
    slow.__exit__(None, None, None)


async def test_one_event_may_be_larger_than_a_log(house: House) -> None:
    kept = house.begin(window=60.0)
    reading = asyncio.create_task(house.read(kept))
    await asyncio.sleep(0.001)
    text = "x" * (2 * MAX_UNREAD * kept_module.BYTES_PER_TOKEN)
    house.streams.deliver([RequestOutput("a", (0,), text)])
    house.engine.finish("a", Finish(FinishReason.EOS))
    assert text_of(await reading) == text


async def test_who_has_all_of_it_ends_it(house: House) -> None:
    kept = house.begin(window=60.0)
    reading = asyncio.create_task(house.read(kept))
    await house.run()
    last = len(await reading)
    assert await house.read(house.kept.attach(house.tokens[0], "t", last), last) == []
    with pytest.raises(RequestError):
        house.kept.attach(house.tokens[0], "t", last)
    assert house.kept.find("a", b"d") is None


async def test_all_that_has_ended_together_is_bounded(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_module, "MAX_ENDED_BYTES", 1000)
    for number in range(50):
        kept = house.begin(str(number))
        reading = asyncio.create_task(house.read(kept))
        await house.run()
        await reading
    remembered = [number for number in range(50) if house.kept.find(str(number), b"d")]
    assert remembered == list(range(remembered[0], 50)) and 1 <= len(remembered) < 20
