"""Messages of as many tokens, or as much time, as the caller said."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from mili.internal.v1.step_pb2 import Sampling
from mili.router.api.stream import Stream
from mili.router.api.stream_options import Flush, StreamOptions, to_stream_options
from mili.router.api.streams import Streams
from mili.router.errors import Reason, RequestError
from mili.router.outcome import Finish, Finished, FinishReason, RequestOutput, Timing, Usage
from mili.router.params import GenerationParams
from mili.v1 import inference_pb2 as pb
from tests.fake_engine import FakeEngine

PARAMS = GenerationParams(prompt_token_ids=[1, 2], sampling=Sampling(seed=1), max_tokens=10)
NEVER = 1000.0


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def streams(engine: FakeEngine) -> Streams:
    streams = Streams(engine, max_unread_tokens=100)
    engine.deliver = streams.deliver
    return streams


def begin(
    streams: Streams, engine: FakeEngine, flush: Flush, params: GenerationParams = PARAMS
) -> Stream:
    stream = streams.open("a", whole=False, flush=flush)
    streams.submit(stream, params)
    engine.start("a")
    return stream


async def counts(stream: Stream) -> list[int]:
    """Tokens of each message until the end, which comes with the last."""
    sizes = []
    while True:
        gathered = await asyncio.wait_for(stream.take(), 5)
        if gathered.token_ids:
            sizes.append(len(gathered.token_ids))
        if gathered.finished is not None:
            return sizes


@pytest.mark.parametrize(
    ("max_tokens", "sizes"), [(1, [1] * 10), (3, [3, 3, 3, 1]), (5, [5, 5]), (11, [10])]
)
@pytest.mark.parametrize("reads_late", [False, True])
async def test_so_many_tokens(
    streams: Streams, engine: FakeEngine, max_tokens: int, sizes: list[int], reads_late: bool
) -> None:
    stream = begin(streams, engine, Flush(max_tokens, NEVER))
    reading = asyncio.create_task(counts(stream))
    for _ in range(10):
        engine.step()
        if not reads_late:
            await asyncio.sleep(0.002)
    assert await reading == sizes


async def test_the_start_is_told_at_once_and_tokens_are_not(
    streams: Streams, engine: FakeEngine
) -> None:
    stream = begin(streams, engine, Flush(4, NEVER))
    assert (await asyncio.wait_for(stream.take(), 1)).started is not None
    reading = asyncio.create_task(stream.take())
    for step in range(1, 5):
        assert not reading.done()
        engine.step()
        await asyncio.sleep(0.01)
        assert reading.done() == (step == 4)
    assert (await reading).token_ids == [0, 1, 2, 3]
    streams.close(stream)


async def test_being_woken_for_nothing_is_no_message(streams: Streams, engine: FakeEngine) -> None:
    stream = begin(streams, engine, Flush(4, NEVER))
    await stream.take()
    engine.step()
    stream.wake()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.take(), 0.01)
    streams.close(stream)


async def test_so_much_time(streams: Streams, engine: FakeEngine) -> None:
    stream = begin(streams, engine, Flush(1000, 0.05))
    await stream.take()
    loop = asyncio.get_running_loop()
    for _ in range(2):
        began = loop.time()
        reading = asyncio.create_task(stream.take())
        for _ in range(3):
            engine.step()
            await asyncio.sleep(0.005)
        assert len((await asyncio.wait_for(reading, 5)).token_ids) == 3
        assert loop.time() - began > 0.045
    streams.close(stream)


async def test_one_that_does_not_read_is_ended_here_too(
    streams: Streams, engine: FakeEngine
) -> None:
    stream = begin(streams, engine, Flush(4, NEVER), replace(PARAMS, max_tokens=10**6))
    for _ in range(105):
        engine.step()
    assert engine.cancelled.get_nowait() == "a"
    assert stream.num_unread_tokens == 0 and stream.num_unread_characters == 0
    gathered = await stream.take()
    assert gathered.finished is not None and not gathered.token_ids
    error = gathered.finished.finish.error
    assert error is not None and error.reason is Reason.SLOW_READER


async def test_what_is_read_is_not_counted(streams: Streams, engine: FakeEngine) -> None:
    stream = begin(streams, engine, Flush(3, NEVER), replace(PARAMS, max_tokens=10**6))
    await stream.take()
    for _ in range(300):
        for _ in range(3):
            engine.step()
        assert len((await asyncio.wait_for(stream.take(), 5)).token_ids) == 3
    assert stream.num_unread_tokens == 0 and stream.num_unread_characters == 0
    streams.close(stream)


def options(**fields: object) -> pb.StreamOptions:
    asked = pb.StreamOptions()
    for name, value in fields.items():
        if isinstance(value, float):
            getattr(asked, name).FromMilliseconds(round(1000 * value))
        else:
            setattr(asked, name, value)
    return asked


def test_what_may_be_asked_for() -> None:
    assert to_stream_options(pb.StreamOptions()) == StreamOptions(None, 0.0, False)
    asked = options(
        max_tokens_per_message=8,
        max_flush_interval=0.25,
        resume_window=600.0,
        include_recovery_notices=True,
    )
    assert to_stream_options(asked) == StreamOptions(Flush(8, 0.25), 600.0, True)
    assert to_stream_options(options(max_flush_interval=10.0)).flush == Flush(1024, 10.0)
    assert to_stream_options(options(max_tokens_per_message=1)).flush == Flush(1, float("inf"))
    assert to_stream_options(options(resume_window=0.0)) == StreamOptions()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens_per_message", 0),
        ("max_tokens_per_message", 1025),
        ("max_flush_interval", 0.0),
        ("max_flush_interval", 10.001),
        ("max_flush_interval", -1.0),
        ("resume_window", 600.001),
        ("resume_window", -0.001),
    ],
)
def test_what_may_not(field: str, value: float) -> None:
    with pytest.raises(RequestError) as caught:
        to_stream_options(options(**{field: value}))
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.field == f"stream_options.{field}"


async def test_each_of_several_sequences_has_messages_of_its_own(
    streams: Streams, engine: FakeEngine
) -> None:
    stream = begin(streams, engine, Flush(3, NEVER), replace(PARAMS, max_tokens=10**6))
    await stream.take()
    for token in range(5):
        for index in (1, 0):
            streams.deliver([RequestOutput("a", (token,), "x", token, index=index)])
    finish = Finish(FinishReason.EOS)
    nothing, no_time = Usage(0, 0, 0, 0), Timing(0, 0, 0, 0, 0, 0, 0, "")
    for index, num_left in ((1, 1), (0, 0)):
        finished = Finished(finish, nothing, no_time, num_left)
        streams.deliver([RequestOutput("a", (), "", 5, finished=finished, index=index)])
    messages = [await stream.take()]
    while not messages[-1].is_last:
        messages.append(await stream.take())
    told = [(each.index, each.first_token_index, each.token_ids) for each in messages]
    assert told == [(1, 0, [0, 1, 2]), (0, 0, [0, 1, 2]), (1, 3, [3, 4]), (0, 3, [3, 4])]
    assert stream.num_unread_tokens == 0 and stream.num_unread_characters == 0
    streams.close(stream)


async def test_tokens_that_come_together_fill_messages_too(
    streams: Streams, engine: FakeEngine
) -> None:
    stream = begin(streams, engine, Flush(2, NEVER))
    await stream.take()
    for first, text in ((0, "a"), (1, "bcde")):
        token_ids = tuple(range(first, first + len(text)))
        streams.deliver([RequestOutput("a", token_ids, text, first)])
    finished = Finished(
        Finish(FinishReason.EOS), Usage(2, 0, 8, 0), Timing(0, 0, 0, 0, 0, 0, 0, "")
    )
    streams.deliver([RequestOutput("a", (5, 6, 7), "fgh", 5, finished=finished)])
    messages = [await stream.take()]
    while not messages[-1].is_last:
        messages.append(await stream.take())
    told = [(each.first_token_index, each.token_ids) for each in messages]
    assert told == [(0, [0, 1]), (2, [2, 3]), (4, [4, 5]), (6, [6, 7])]
    assert "".join(str(each.text) for each in messages) == "abcdefgh"
    assert stream.num_unread_tokens == 0 and stream.num_unread_characters == 0
