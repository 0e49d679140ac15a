"""Text work stays off the event loop, and what waits for it is bounded."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mili.router.api.prompt import TextThreads
from mili.router.errors import Reason, RequestError


async def test_slow_text_work_does_not_stop_the_loop() -> None:
    threads = TextThreads(max_pending=8)
    go = threading.Event()
    work = asyncio.create_task(threads.run(go.wait, 10))
    await asyncio.sleep(0)
    assert not work.done()  # and we are here
    go.set()
    assert await work
    threads.close()


async def test_waiting_text_work_is_bounded() -> None:
    threads = TextThreads(max_pending=2)
    go = threading.Event()
    first = [asyncio.create_task(threads.run(go.wait, 10)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(RequestError) as caught:
        await threads.run(go.wait)
    assert caught.value.reason is Reason.QUEUE_FULL
    first[0].cancel()
    go.set()
    assert await first[1]
    assert await threads.run(go.wait)
    threads.close()


async def test_errors_of_text_work_come_back() -> None:
    threads = TextThreads(max_pending=2)
    with pytest.raises(ValueError, match="invalid literal"):
        await threads.run(int, "x")
    threads.close()
