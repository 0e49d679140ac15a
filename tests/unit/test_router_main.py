"""What the router's event loop complains about, and what it keeps to itself."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from mili.router.main import forgive_cancelled


@pytest.mark.parametrize(
    ("error", "logged"), [(asyncio.CancelledError(), False), (ValueError("lost"), True)]
)
async def test_only_a_cancelled_future_may_be_left_behind(
    error: BaseException, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(forgive_cancelled)
    with caplog.at_level(logging.ERROR, "asyncio"):
        loop.create_future().set_exception(error)
        gc.collect()
        await asyncio.sleep(0)
    assert any("never retrieved" in record.message for record in caplog.records) == logged
