"""The waiting queue against a plain sort, and what it says of who goes before whom."""

from __future__ import annotations

import random

import pytest

from mili.internal.v1.step_pb2 import Sampling
from mili.router.fair_share import FairShare
from mili.router.params import GenerationParams, Scheduling
from mili.router.queue import WaitingQueue
from mili.router.request import Request


class Hall:
    """A queue, its accounts, and requests that arrive one after another."""

    def __init__(self) -> None:
        self.shares = FairShare()
        self.queue = WaitingQueue(self.shares)
        self.arrivals = 0

    def make(
        self,
        tenant: str = "",
        priority: int = 0,
        *,
        begun: bool = False,
        cost: float = 10.0,
        weight: float = 1.0,
    ) -> Request:
        self.arrivals += 1
        scheduling = Scheduling(tenant=tenant, priority=priority, weight=weight)
        params = GenerationParams([1], Sampling(), max_tokens=1, scheduling=scheduling)
        name = f"r{self.arrivals}"
        request = Request(name, params, context_limit=9, arrival=self.arrivals)
        request.account = self.shares.account(tenant, weight)
        request.num_admissions = int(begun)
        request.expected_cost = cost
        return request

    def add(self, *arguments: object, **named: object) -> Request:
        request = self.make(*arguments, **named)  # type: ignore[arg-type]
        self.queue.add(request)
        return request

    def take(self) -> Request:
        request = self.queue.first(suspects=True)
        assert request is not None
        self.queue.remove(request)
        return request


def test_the_order_is_priority_then_begun_then_share_then_arrival() -> None:
    hall = Hall()
    late = hall.add("rich")
    poor = hall.add("poor")
    begun = hall.add("rich", begun=True)
    urgent = hall.add("rich", 1)
    low = hall.add("poor", -1, begun=True)
    poorer = hall.add("poor")
    late.account.served = 100.0
    assert [hall.take() for _ in range(6)] == [urgent, begun, poor, poorer, late, low]
    assert hall.queue.first(suspects=True) is None


def test_whoever_comes_back_stands_where_he_arrived() -> None:
    hall = Hall()
    first, second, third = hall.add(), hall.add(), hall.add()
    hall.queue.remove(first)
    hall.queue.add(first)
    assert list(hall.queue) == [first.request_id, second.request_id, third.request_id]


def test_suspects_are_passed_over_when_one_runs() -> None:
    hall = Hall()
    suspect = hall.make()
    suspect.deaths = 2
    hall.queue.add(suspect)
    other = hall.add()
    assert hall.queue.first(suspects=True) is suspect
    assert hall.queue.first(suspects=False) is other


@pytest.mark.parametrize("seed", range(10))
def test_random_operations_against_a_plain_sort(seed: int) -> None:
    source = random.Random(seed)
    hall = Hall()
    waiting: list[Request] = []

    def order(request: Request) -> tuple[object, ...]:
        priority, begun = request.params.scheduling.priority, request.num_admissions > 0
        return -priority, not begun, request.account.served, request.arrival

    for _ in range(2000):
        action = source.random()
        if action < 0.4:
            tenant, priority = source.choice("abcd"), source.choice((0, 0, 2))
            waiting.append(hall.add(tenant, priority, begun=source.random() < 0.2))
        elif action < 0.6 and waiting:
            request = waiting.pop(source.randrange(len(waiting)))
            hall.queue.remove(request)
        elif action < 0.8 and waiting:
            assert hall.take() is min(waiting, key=order)
            waiting.remove(min(waiting, key=order))
        else:
            hall.shares.account(source.choice("abcd"), 1.0).charge_prompt(source.randrange(9))
        assert len(hall.queue) == len(waiting)
        assert hall.queue.values() == sorted(waiting, key=order)
        assert hall.queue.cost == pytest.approx(sum(request.expected_cost for request in waiting))
    for tenant in "abcd":
        mine = sum(request.params.scheduling.tenant == tenant for request in waiting)
        assert hall.shares.account(tenant, 1.0).num_waiting == mine


def test_a_single_tenants_position_is_exact() -> None:
    hall = Hall()
    requests = [hall.add() for _ in range(7)]
    assert [hall.queue.position(request) for request in requests] == list(range(7))


def test_a_light_tenant_has_little_ahead_of_it() -> None:
    hall = Hall()
    for _ in range(100):
        hall.add("heavy")
    light = hall.make("light")
    # One of the heavy tenant's goes first or at the same time, and no more.
    assert hall.queue.cost_ahead(light) == 10.0
    assert hall.queue.cost_ahead(hall.make("heavy")) == 1000.0
    hall.queue.add(light)
    assert hall.queue.position(light) <= 1
    assert hall.queue.cost_ahead(hall.make("heavy")) == 1010.0


def test_weight_and_priority_count_in_what_is_ahead() -> None:
    hall = Hall()
    for _ in range(100):
        hall.add("heavy", weight=4.0)
    assert hall.queue.cost_ahead(hall.make("light")) == 40.0
    assert hall.queue.cost_ahead(hall.make("light", 1)) == 0.0
    assert hall.queue.cost_ahead(hall.make("light", -1)) == 1000.0


def test_the_last_is_of_the_tenant_with_the_longest_queue() -> None:
    hall = Hall()
    heavy = [hall.add("heavy") for _ in range(5)]
    hall.add("light")
    assert hall.queue.last(hall.make("light")) is heavy[-1]
    newcomer = hall.make("heavy")
    assert hall.queue.last(newcomer) is newcomer
    assert hall.queue.last(hall.make("heavy", 1)) is heavy[-1]
    low = hall.add("light", -1)
    assert hall.queue.last(hall.make("heavy")) is low


def test_what_has_begun_is_never_the_last() -> None:
    hall = Hall()
    hall.add("heavy", begun=True, cost=1000.0)
    newcomer = hall.make("light")
    assert hall.queue.last(newcomer) is newcomer
