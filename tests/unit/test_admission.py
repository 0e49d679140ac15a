"""The door: what is refused at once, with which words, and what that does for those inside."""

from __future__ import annotations

import random

import pytest

from mili.router.admission import LEAST_RETRY, MOST_RETRY, ServiceRate, retry_after
from mili.router.errors import Reason
from mili.router.params import Scheduling
from tests.performance.bench_overload import capacity, measure, recovery
from tests.virtual_cluster import Call, VirtualCluster, poisson, random_call


def test_service_is_measured_only_while_more_waits_than_can_begin() -> None:
    rate = ServiceRate()
    rate.begins(0.0)
    for step in range(1, 101):
        rate.step_done(50.0, busy=False, now=step * 0.01)
    assert rate.per_second is None
    for step in range(101, 201):
        rate.step_done(80.0, busy=True, now=step * 0.01)
    assert rate.per_second == pytest.approx(8000.0)
    rate.begins(1000.0)
    rate.step_done(10.0, busy=True, now=1000.01)
    assert rate.per_second == pytest.approx(8000.0), "a moment says nothing"


def test_service_follows_the_last_seconds() -> None:
    rate = ServiceRate()
    rate.begins(0.0)
    for step in range(1, 3001):
        rate.step_done(100.0 if step <= 1000 else 20.0, busy=True, now=step * 0.01)
    assert rate.per_second == pytest.approx(2000.0, rel=0.2)


def test_a_time_to_retry_is_neither_now_nor_never() -> None:
    assert retry_after(0.0) == LEAST_RETRY
    assert retry_after(7.5) == 7.5
    assert retry_after(1e9) == MOST_RETRY


def overloaded(**settings: object) -> VirtualCluster:
    """Ten seconds of twice the capacity are over, and it goes on."""
    source = random.Random(3)
    cluster = VirtualCluster(**settings)
    for at in poisson(source, 90.0, 0.0, 20.0):
        cluster.call(at, random_call(source))
    cluster.run(until=10.0)
    return cluster


def test_what_would_wait_too_long_is_refused_at_once() -> None:
    cluster = overloaded(max_queue_time=2.0)
    patient = cluster.call(10.0, random_call(random.Random(1), Scheduling(max_queue_time=60.0)))
    usual = [cluster.call(10.0, random_call(random.Random(1))) for _ in range(30)][-1]
    hasty = cluster.call(10.0, random_call(random.Random(1), Scheduling(deadline=10.5)))
    cluster.run(until=10.0)
    assert (usual.error, usual.ended_at) == (Reason.QUEUE_FULL, 10.0)
    assert usual.retry_after is not None and 2.0 < usual.retry_after < 3.0
    assert (hasty.error, hasty.ended_at) == (Reason.DEADLINE_UNREACHABLE, 10.0)
    cluster.run()
    assert patient.completed


def test_the_estimate_is_about_what_they_wait() -> None:
    cluster = overloaded(max_queue_time=100.0)
    calls = [call for call in cluster.calls.values() if 5.0 < call.at < 9.0]
    told = {name: cluster.engine.operations.explain(name) for name in list(cluster.calls)}
    cluster.run()
    ratios = []
    for name, call in cluster.calls.items():
        if call in calls and (story := told[name]) is not None:
            estimate = float(story.events[0].detail.split()[2])
            assert call.started_at is not None
            ratios.append((call.started_at - call.at) / estimate)
    assert len(ratios) > 100
    ratios.sort()
    assert ratios[len(ratios) // 20] > 0.7 and ratios[-len(ratios) // 20] < 1.4, ratios


def test_a_higher_priority_waits_for_its_like_alone() -> None:
    cluster = overloaded(max_queue_time=2.0)
    urgent = cluster.call(10.0, random_call(random.Random(1), Scheduling(priority=1)))
    for _ in range(30):
        cluster.call(10.0, random_call(random.Random(1)))
    low = cluster.call(10.0, random_call(random.Random(1), Scheduling(priority=-1)))
    cluster.run(until=15.0)
    assert urgent.started_at is not None and urgent.started_at - 10.0 < 0.2
    assert low.error is Reason.QUEUE_FULL


def test_the_last_in_a_full_queue_makes_way_for_who_comes_before() -> None:
    cluster = overloaded(max_queued_requests=50)
    newcomer = cluster.call(10.0, Call([2] * 64, 50, Scheduling(tenant="other")))
    before = {name: call for name, call in cluster.calls.items() if call.ended_at is None}
    cluster.run(until=10.0)
    displaced = [call for call in before.values() if call.error is not None]
    assert [call.error for call in displaced] == [Reason.QUEUE_FULL]
    assert displaced[0].started_at is None and displaced[0].retry_after is not None
    assert displaced[0].at == max(call.at for call in before.values() if call.started_at is None)
    assert newcomer.ended_at is None
    assert cluster.engine.num_queued == 50
    cluster.run()
    assert newcomer.completed


def test_overload_costs_neither_goodput_nor_latency() -> None:
    full = capacity(6.0)
    relaxed = measure(0.8 * full.calls_per_second, 10.0, 10.0)
    for load in (2.0, 5.0):
        figures = measure(load * full.calls_per_second, relaxed.ttft_p99, 6.0)
        assert figures.goodput >= 0.95 * full.goodput, (load, figures)
        assert figures.ttft_p99 <= 2 * relaxed.ttft_p99, (load, figures)
        assert figures.refusal < 0.020, (load, figures)
    limit = relaxed.ttft_p99
    assert recovery(full.calls_per_second, 2 * limit, limit, seconds=8.0) < 5.0
