"""Tenants' counters, and what they make of the service on the virtual clock."""

from __future__ import annotations

import pytest

from mili.router.fair_share import FairShare
from mili.router.params import Scheduling
from tests.performance.bench_fairness import measure
from tests.virtual_cluster import Call, VirtualCluster


def test_tokens_count_by_weight() -> None:
    shares = FairShare()
    one, four = shares.account("one", 1.0), shares.account("four", 4.0)
    for account in (one, four):
        account.charge_prompt(100)
        account.charge_output_token()
    assert (one.served, four.served) == (102.0, 25.5)
    assert shares.account("one", 2.0) is one
    one.charge_prompt(100)
    assert one.served == 152.0


def test_a_weight_that_is_no_weight() -> None:
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="weight"):
            FairShare().account("tenant", weight)


def test_nobody_saves_up_service_by_being_away() -> None:
    shares = FairShare()
    busy, busier, away = (shares.account(name, 1.0) for name in ("busy", "busier", "away"))
    shares.enter(busy)
    shares.enter(busier)
    busy.charge_prompt(500)
    busier.charge_prompt(600)
    shares.enter(away)
    assert away.served == 500.0
    for account in (busy, busier, away):
        shares.leave(account)
    late = shares.account("late", 1.0)
    shares.enter(late)  # where nobody waits: the last that did
    assert late.served == away.served


def test_to_be_ahead_of_the_others_is_not_forgotten() -> None:
    shares = FairShare()
    one, other = shares.account("one", 1.0), shares.account("other", 1.0)
    shares.enter(other)
    one.charge_prompt(1000)
    shares.enter(one)
    assert one.served == 1000.0


def test_service_goes_by_weight_while_all_wait() -> None:
    cluster = VirtualCluster()
    for number in range(2500):
        tenant, weight = (("a", 1.0), ("b", 3.0))[number % 2]
        call = Call([2] * 100, 60, Scheduling(tenant=tenant, weight=weight))
        cluster.call(0.0, call)
    cluster.run(until=9.0)
    tokens = {"a": 0, "b": 0}
    for call in cluster.calls.values():
        # The first that came found empty rows: only what came later had to wait its turn.
        tokens[call.scheduling.tenant] += sum(at > 4.0 for at in call.token_times)
    assert 2.7 < tokens["b"] / tokens["a"] < 3.3, tokens


def test_light_tenants_hardly_notice_a_heavy_one() -> None:
    alone = measure(3.2, 15.0, heavy=False)
    together = measure(3.2, 15.0, heavy=True)
    assert together.refused == 0
    assert together.latency_p99 <= 1.5 * alone.latency_p99, (together, alone)
    # Control: without an account for each they do.
    unfair = measure(3.2, 15.0, heavy=True, fair=False)
    assert unfair.latency_p99 > 3 * alone.latency_p99
