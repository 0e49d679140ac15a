"""Every request ends by its times, on time; and the heap of times stays small."""

from __future__ import annotations

import pytest

from mili.internal.v1.step_pb2 import Sampling
from mili.router.deadlines import FEW, Deadlines
from mili.router.errors import Reason
from mili.router.outcome import Finish, FinishReason
from mili.router.params import GenerationParams, Scheduling
from mili.router.request import Request
from tests.virtual_cluster import Call, StepCost, VirtualCluster


def make_request(name: str) -> Request:
    return Request(name, GenerationParams([1], Sampling(), max_tokens=1), context_limit=9)


def test_the_owner_hears_of_the_next_time() -> None:
    heard: list[float] = []
    deadlines = Deadlines(heard.append)
    first, second = make_request("1"), make_request("2")
    deadlines.watch(first, 5.0, float("inf"))
    deadlines.watch(second, 7.0, 3.0)
    assert heard == [5.0, 3.0]
    assert list(deadlines.due(4.0)) == [second]
    assert heard == [5.0, 3.0, 5.0]
    first.end(Finish(FinishReason.CANCELLED))
    assert list(deadlines.due(4.5)) == []
    assert deadlines.next == 7.0
    assert list(deadlines.due(8.0)) == [second]
    assert deadlines.next == float("inf")


def test_times_of_ended_requests_do_not_pile_up() -> None:
    deadlines = Deadlines(lambda due: None)
    for number in range(20 * FEW):
        request = make_request(str(number))
        deadlines.watch(request, 1e6 + number)
        request.end(Finish(FinishReason.CANCELLED))
    assert len(deadlines) <= 2 * FEW


def busy_cluster(**settings: object) -> VirtualCluster:
    """One row, taken for seconds."""
    cluster = VirtualCluster(**settings)
    group = cluster.groups[0]
    cluster.lose(group)
    group.limits = group.limits._replace(max_rows=2)
    cluster.join(group)
    cluster.call(0.0, Call([2] * 64, output_tokens=1000))
    return cluster


def test_a_time_limit_gives_what_there_is_by_then() -> None:
    cluster = VirtualCluster()
    call = cluster.call(1.0, Call([2] * 64, 1000, Scheduling(time_limit=0.5)))
    cluster.run()
    assert call.finish is FinishReason.TIME_LIMIT and call.error is None
    assert call.ended_at == 1.5
    assert 60 < len(call.token_times) < 100
    assert cluster.engine.operations.load().running_sequences == 0


def test_a_time_limit_ends_what_only_waited() -> None:
    cluster = busy_cluster()
    call = cluster.call(1.0, Call([2] * 64, 10, Scheduling(time_limit=0.5)))
    cluster.run()
    assert (call.finish, call.ended_at) == (FinishReason.TIME_LIMIT, 1.5)
    assert call.started_at == 1.5 and not call.token_times


@pytest.mark.parametrize("waits", [False, True])
def test_a_deadline_ends_a_request_on_time(waits: bool) -> None:
    cluster = busy_cluster() if waits else VirtualCluster()
    call = cluster.call(1.0, Call([2] * 64, 1000, Scheduling(deadline=1.75)))
    cluster.run()
    assert (call.error, call.ended_at) == (Reason.DEADLINE_EXCEEDED, 1.75)
    assert bool(call.token_times) is not waits


def test_a_deadline_that_has_passed_is_refused() -> None:
    cluster = VirtualCluster()
    call = cluster.call(1.0, Call([2] * 64, 10, Scheduling(deadline=1.0)))
    cluster.run()
    assert (call.error, call.ended_at) == (Reason.DEADLINE_EXCEEDED, 1.0)


def test_who_waits_too_long_is_told_on_time() -> None:
    cluster = busy_cluster(max_queue_time=2.0)
    usual = cluster.call(1.0, Call([2] * 64, 10))
    hasty = cluster.call(1.0, Call([2] * 64, 10, Scheduling(max_queue_time=0.25)))
    patient = cluster.call(1.0, Call([2] * 64, 10, Scheduling(max_queue_time=100.0)))
    cluster.run()
    assert (usual.error, usual.ended_at) == (Reason.QUEUE_TIMEOUT, 3.0)
    assert (hasty.error, hasty.ended_at) == (Reason.QUEUE_TIMEOUT, 1.25)
    assert usual.retry_after == 2.0
    assert patient.completed


def test_the_queue_time_is_over_once_a_worker_has_begun() -> None:
    cluster = VirtualCluster(max_queue_time=0.1, cost=StepCost(base=0.05))
    call = cluster.call(0.0, Call([2] * 64, 20))
    cluster.run()
    assert call.completed and call.latency > 1.0


def test_a_lost_worker_stops_no_clock() -> None:
    cluster = VirtualCluster(max_queue_time=5.0)
    limited = cluster.call(0.0, Call([2] * 64, 500, Scheduling(time_limit=2.0)))
    waits = cluster.call(0.0, Call([2] * 64, 500))
    cluster.at(1.0, lambda: cluster.lose(cluster.groups[0]))
    cluster.run()
    assert (limited.finish, limited.ended_at) == (FinishReason.TIME_LIMIT, 2.0)
    assert limited.token_times
    assert (waits.error, waits.ended_at) == (Reason.WORKER_LOST, 61.0)
