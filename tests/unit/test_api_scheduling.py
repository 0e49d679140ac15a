"""SchedulingHints, CacheOptions and time limits: their values, and which contradict each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from mili.router.api.scheduling import to_cache_namespace, to_scheduling
from mili.router.errors import Reason, RequestError
from mili.router.params import Scheduling
from mili.router.tenants import EVERYONE, Tenant
from mili.v1 import inference_pb2 as pb

SEARCH = Tenant(name="search", token_sha256=("0" * 64,), weight=2.5, max_priority=10)
BATCH = Tenant(name="batch", token_sha256=("1" * 64,), max_priority=-20)


def generation(time_limit: Duration | None = None, **hints: Any) -> pb.Generation:  # noqa: ANN401
    return pb.Generation(
        scheduling=pb.SchedulingHints(**hints), stopping=pb.StopConditions(time_limit=time_limit)
    )


def test_nothing_asked_for() -> None:
    assert to_scheduling(pb.Generation(), EVERYONE, math.inf) == Scheduling()
    assert to_scheduling(generation(), SEARCH, 5.5) == Scheduling(
        tenant="search", weight=2.5, deadline=5.5
    )


def test_everything_asked_for() -> None:
    asked = generation(
        Duration(seconds=3, nanos=500_000_000),
        priority=7,
        max_queue_time=Duration(nanos=250_000_000),
        session_id="chat 1",
    )
    assert to_scheduling(asked, SEARCH, 9.0) == Scheduling(
        "search", 2.5, 7, 9.0, 0.25, 3.5, "search/chat 1"
    )


def test_the_priority_is_bounded_by_the_tenant() -> None:
    assert to_scheduling(generation(priority=10), SEARCH, 1).priority == 10
    assert to_scheduling(generation(priority=-100), SEARCH, 1).priority == -100
    assert to_scheduling(generation(priority=100), EVERYONE, 1).priority == 100
    assert to_scheduling(generation(), BATCH, 1).priority == -20, "who asks for nothing gets that"
    for tenant, priority in ((SEARCH, 11), (BATCH, -19), (BATCH, 1)):
        with pytest.raises(RequestError, match=f"at most {tenant.max_priority}") as caught:
            to_scheduling(generation(priority=priority), tenant, 1)
        assert caught.value.reason is Reason.PERMISSION_DENIED
        assert caught.value.field == "generation.scheduling.priority"


@pytest.mark.parametrize("priority", [101, -101, 2**31 - 1, -(2**31)])
def test_priorities_out_of_range(priority: int) -> None:
    with pytest.raises(RequestError, match="from -100 to 100") as caught:
        to_scheduling(generation(priority=priority), EVERYONE, 1)
    assert caught.value.reason is Reason.INVALID_FIELD


BAD_DURATIONS = [
    Duration(),
    Duration(seconds=-1),
    Duration(nanos=-1),
    Duration(seconds=1, nanos=-1),
    Duration(seconds=1, nanos=1_000_000_000),
    Duration(seconds=315_576_000_001),
    Duration(seconds=2**63 - 1),
]


@pytest.mark.parametrize("bad", BAD_DURATIONS, ids=str)
def test_durations_that_are_none(bad: Duration) -> None:
    for asked, field in (
        (generation(max_queue_time=bad), "generation.scheduling.max_queue_time"),
        (generation(bad), "generation.stopping.time_limit"),
    ):
        with pytest.raises(RequestError) as caught:
            to_scheduling(asked, EVERYONE, math.inf)
        assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, field)


def test_a_request_cannot_wait_longer_than_it_may_take() -> None:
    second = Duration(seconds=1)
    to_scheduling(generation(second, max_queue_time=second), EVERYONE, math.inf)
    longer = Duration(seconds=1, nanos=1)
    with pytest.raises(RequestError, match=r"longer than stopping\.time_limit") as caught:
        to_scheduling(generation(second, max_queue_time=longer), EVERYONE, math.inf)
    assert caught.value.field == "generation.scheduling.max_queue_time"


def test_sizes() -> None:
    to_scheduling(generation(session_id="x" * 128), EVERYONE, 1)
    to_cache_namespace(pb.CacheOptions(salt="x" * 256), EVERYONE)
    with pytest.raises(RequestError, match="128 bytes") as caught:
        to_scheduling(generation(session_id="ä" * 65), EVERYONE, 1)
    assert caught.value.field == "generation.scheduling.session_id"
    with pytest.raises(RequestError, match="256 bytes") as caught:
        to_cache_namespace(pb.CacheOptions(salt="x" * 2**20), EVERYONE)
    assert caught.value.field == "generation.cache.salt"


def test_a_salt_for_a_cache_that_is_not_used() -> None:
    for read, write in ((True, False), (False, True)):
        cache = pb.CacheOptions(salt="x", bypass_read=read, bypass_write=write)
        assert to_cache_namespace(cache, SEARCH) == SEARCH.cache_namespace("x")
    cache = pb.CacheOptions(salt="x", bypass_read=True, bypass_write=True)
    with pytest.raises(RequestError, match="do not use") as caught:
        to_cache_namespace(cache, SEARCH)
    assert caught.value.field == "generation.cache.salt"
    cache.salt = ""
    assert to_cache_namespace(cache, SEARCH) == SEARCH.cache_prefix
