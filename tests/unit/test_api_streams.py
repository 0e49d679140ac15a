"""Live requests: ids, gathering, who does not read, cancels at every moment, and draining."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from mili.internal.v1.step_pb2 import Sampling
from mili.router.api.stream import Stream
from mili.router.api.streams import Streams
from mili.router.errors import Reason, RequestError
from mili.router.outcome import FinishReason, RequestOutput
from mili.router.params import GenerationParams
from tests.fake_engine import FakeEngine

PARAMS = GenerationParams(prompt_token_ids=[1, 2], sampling=Sampling(seed=1), max_tokens=4)
MAX_UNREAD = 100
ENDLESS = replace(PARAMS, max_tokens=10**6)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def streams(engine: FakeEngine) -> Streams:
    streams = Streams(engine, max_unread_tokens=MAX_UNREAD)
    engine.deliver = streams.deliver
    return streams


async def test_outputs_gather_until_they_are_taken(streams: Streams, engine: FakeEngine) -> None:
    stream = streams.open("a", whole=False)
    streams.submit(stream, PARAMS)
    engine.step()
    first = await stream.take()
    assert (first.text, first.token_ids, first.first_token_index) == ("a", [0], 0)
    assert first.started is not None
    engine.step()
    engine.step()
    engine.step()
    rest = await stream.take()
    assert (rest.text, rest.token_ids, rest.first_token_index) == ("bcd", [1, 2, 3], 1)
    assert rest.started is None
    assert rest.finished is not None
    assert len(streams) == 0


async def test_with_many_streams_a_reader_is_woken_less_often(
    streams: Streams, engine: FakeEngine
) -> None:
    many = [streams.open(str(number), whole=False) for number in range(400)]
    stream = many[0]
    streams.submit(stream, PARAMS)
    engine.step()
    first = await asyncio.wait_for(stream.take(), 1)
    assert first.token_ids == [0]  # at once, and so is what follows the start
    reader = asyncio.create_task(stream.take())
    engine.step()
    engine.step()
    await asyncio.sleep(0)
    assert not reader.done()
    assert (await asyncio.wait_for(reader, 1)).token_ids == [1, 2]  # nobody has to come for it
    engine.step()
    assert (await asyncio.wait_for(stream.take(), 1)).finished is not None


async def test_a_reader_of_the_whole_sleeps_to_the_end(
    streams: Streams, engine: FakeEngine
) -> None:
    stream = streams.open("a", whole=True)
    streams.submit(stream, PARAMS)
    reader = asyncio.create_task(stream.take())
    for _ in range(3):
        engine.step()
        await asyncio.sleep(0)
        assert not reader.done()
    engine.step()
    assert (await reader).text == "abcd"


def reason_of_end(stream: Stream) -> Reason | None:
    assert stream.finished is not None
    error = stream.finished.finish.error
    return error.reason if error else None


async def test_who_does_not_read_loses_that_stream_alone(
    streams: Streams, engine: FakeEngine
) -> None:
    idle, busy, whole = (streams.open(name, whole=name == "whole") for name in ("a", "b", "whole"))
    for stream in (idle, busy, whole):
        streams.submit(stream, ENDLESS)
    read = 0
    for step in range(1, MAX_UNREAD + 2):
        engine.step()
        read += len((await busy.take()).token_ids)
        assert (idle.finished is None) == (step <= MAX_UNREAD)
    assert engine.cancelled.get_nowait() == "a"
    assert reason_of_end(idle) is Reason.SLOW_READER
    rest = await idle.take()
    assert not rest.token_ids and not rest.text
    assert (read, busy.finished, whole.finished) == (MAX_UNREAD + 1, None, None)
    for stream in (idle, busy, whole):
        streams.close(stream)
    assert len(streams) == 0


async def test_unread_text_counts_too_and_what_is_read_does_not(
    streams: Streams, engine: FakeEngine
) -> None:
    stream = streams.open("a", whole=False)
    streams.submit(stream, ENDLESS)
    for index in range(20):
        engine.deliver([RequestOutput("a", (index,), "x" * 1000, index)])
        assert stream.finished is None
        assert len((await stream.take()).text) == 1000
    stream.wake()
    engine.deliver([RequestOutput("a", (20,), "x" * 1601, 20)])
    assert reason_of_end(stream) is Reason.SLOW_READER
    streams.close(stream)


async def test_a_live_id_is_taken_and_an_ended_one_is_free(
    streams: Streams, engine: FakeEngine
) -> None:
    stream = streams.open("a", whole=False)
    with pytest.raises(RequestError) as caught:
        streams.open("a", whole=False)
    assert caught.value.reason is Reason.REQUEST_ID_CONFLICT
    streams.submit(stream, PARAMS)
    streams.close(stream)
    assert engine.cancelled.get_nowait() == "a"
    streams.open("a", whole=False)


async def test_cancel_before_during_and_after(streams: Streams, engine: FakeEngine) -> None:
    with pytest.raises(KeyError):
        streams.cancel("a")
    stream = streams.open("a", whole=False)
    assert streams.cancel("a")  # while the prompt is still text
    streams.submit(stream, PARAMS)
    assert not engine.lengths
    taken = await stream.take()
    assert taken.finished is not None
    assert taken.finished.finish.reason is FinishReason.CANCELLED
    assert not streams.cancel("a")
    again = streams.open("a", whole=False)
    streams.submit(again, PARAMS)
    assert streams.cancel("a")
    assert again.finished is not None
    assert not streams.cancel("a")


async def test_a_failed_submit_leaves_nothing(streams: Streams, engine: FakeEngine) -> None:
    engine.refusal = RequestError(Reason.QUEUE_FULL, "full")
    stream = streams.open("a", whole=False)
    with pytest.raises(RequestError):
        streams.submit(stream, PARAMS)
    streams.close(stream)
    assert len(streams) == 0


async def test_late_outputs_of_a_closed_stream_reach_nobody(
    streams: Streams, engine: FakeEngine
) -> None:
    old = streams.open("a", whole=False)
    streams.submit(old, PARAMS)
    streams.close(old)
    new = streams.open("a", whole=False)
    streams.submit(new, PARAMS)
    streams.close(old)  # a second close must not touch the new one
    assert len(streams) == 1
    engine.step()
    assert (await new.take()).text == "a"


async def test_ended_ids_are_not_remembered_for_ever(streams: Streams) -> None:
    for number in range(5000):
        streams.close(streams.open(str(number), whole=False))
    assert not streams.cancel("4999")
    with pytest.raises(KeyError):
        streams.cancel("0")


async def test_drain_waits_for_the_last(streams: Streams, engine: FakeEngine) -> None:
    stream = streams.open("a", whole=False)
    streams.submit(stream, PARAMS)
    drained = asyncio.create_task(streams.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(RequestError) as caught:
        streams.open("b", whole=False)
    assert caught.value.reason is Reason.DRAINING
    assert not drained.done()
    await engine.run()
    await drained


async def test_drain_ends_what_takes_too_long(streams: Streams, engine: FakeEngine) -> None:
    stream = streams.open("a", whole=False)
    streams.submit(stream, PARAMS)
    await streams.drain(0.01)
    finished = (await stream.take()).finished
    assert finished is not None
    assert finished.finish.error is not None
    assert finished.finish.error.reason is Reason.DRAINING
    assert not engine.lengths
    assert len(streams) == 0
