"""Where requests go: prefixes, load, sessions; groups that join, drain and leave."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import pytest

from mili.router import placement
from mili.router.errors import Reason, RequestError
from mili.router.placement import LOYALTY, Placement
from tests.performance.virtual_groups import QWEN3_8B, VirtualCluster

SYSTEM_PROMPT = [7] * 2000


def cluster_of(groups: int, **settings: int) -> VirtualCluster:
    cluster = VirtualCluster()
    for number in range(groups):
        cluster.join(f"g{number}", **settings)
    return cluster


def running(cluster: VirtualCluster, group: str) -> int:
    scheduler = cluster.engine.scheduler_of(group)
    assert scheduler is not None
    scheduler.check()
    return len(scheduler.running)


def warm(cluster: VirtualCluster) -> None:
    """Cache the system prompt in the second group, and learn what steps cost."""
    cluster.submit("other", [1] * 4000, 50)
    cluster.submit("warm", SYSTEM_PROMPT, 50)
    cluster.run()
    cluster.ended.clear()


def test_a_prefix_draws_requests_to_where_it_is_cached() -> None:
    cluster = cluster_of(4)
    warm(cluster)
    for number in range(5):
        cluster.submit(f"r{number}", [*SYSTEM_PROMPT, number], 20)
        cluster.run()
    assert {told.worker for told in cluster.ended} == {"g1"}
    assert all(told.cached_tokens == len(SYSTEM_PROMPT) for told in cluster.ended)


def test_a_hot_prefix_is_replicated_instead_of_queueing_behind_one_group() -> None:
    """Four times what one group has rows for, all with one prefix: all four groups get it."""
    cluster = cluster_of(4, rows=33)
    warm(cluster)
    for number in range(128):
        cluster.submit(f"r{number}", [*SYSTEM_PROMPT, number], 200)
        cluster.run(0.01)
    cluster.run()
    counts = Counter(told.worker for told in cluster.ended)
    assert len(counts) == 4 and min(counts.values()) >= 16, counts
    computed = [told for told in cluster.ended if not told.cached_tokens]
    assert len(computed) <= 12, "and it is computed about once in each"
    waits = [told.first_token_at - told.submitted_at for told in cluster.ended]
    assert max(waits) < 0.5, max(waits)


def test_a_slow_group_gets_less() -> None:
    cluster = VirtualCluster()
    cluster.join("fast", QWEN3_8B)
    cluster.join("slow", QWEN3_8B._replace(step=20e-3, token=80e-6))
    for number in range(600):
        cluster.submit(f"r{number}", [number % 251] * 500, 100)
        cluster.run(0.02)
    cluster.run()
    counts = Counter(told.worker for told in cluster.ended)
    assert counts["fast"] > 2 * counts["slow"], counts


def test_a_session_stays_where_it_was_unless_that_takes_too_long() -> None:
    cluster = cluster_of(4, rows=17)
    for number in range(4):
        cluster.submit(f"first{number}", [number] * (10 + number), 5, session_id=f"s{number}")
    cluster.run()
    homes = {told.num_prompt_tokens - 10: told.worker for told in cluster.ended}
    assert sorted(homes.values()) == ["g0", "g1", "g2", "g3"]
    # Nothing of the prompt is cached anywhere, and the others have nothing to do.
    for number in range(4):
        cluster.ended.clear()
        cluster.submit("busy", [50 + number] * 400, 100, session_id=f"s{number}")
        cluster.submit("again", [100 + number] * 10, 5, session_id=f"s{number}")
        cluster.run()
        assert {told.worker for told in cluster.ended} == {homes[number]}
    # Nobody stands in a queue of many times LOYALTY for the sake of the session.
    cluster.ended.clear()
    for number in range(40):
        cluster.submit(f"r{number}", [200 + number] * 10, 2000, session_id="s0")
    cluster.run()
    assert len({told.worker for told in cluster.ended}) > 1
    waits = [told.first_token_at - told.submitted_at for told in cluster.ended]
    assert max(waits) < 2 * LOYALTY, max(waits)


def test_sessions_are_remembered_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "MAX_SESSIONS", 10)
    cluster = cluster_of(2)
    for number in range(50):
        cluster.submit(f"r{number}", [number], 1, session_id=f"s{number}")
    chosen: Placement = cluster.engine._fleet._placement
    assert len(chosen._groups) == 10


def test_drain_moves_who_waits_and_lets_finish_who_runs() -> None:
    cluster = cluster_of(2, rows=9)
    for number in range(40):
        cluster.submit(f"r{number}", [number] * 20, 50)
    cluster.run(0.05)
    before = running(cluster, "g0")
    assert cluster.engine.operations.drain("g0", None) == before == 8
    scheduler = cluster.engine.scheduler_of("g0")
    assert scheduler is not None and not scheduler.waiting
    cluster.submit("late", [99], 5)
    cluster.run()
    counts = Counter(told.worker for told in cluster.ended)
    assert counts == {"g0": 8, "g1": 33}
    assert cluster.engine.num_live == 0


def test_drain_moves_who_runs_after_a_while() -> None:
    cluster = cluster_of(2)
    for number in range(10):
        cluster.submit(f"r{number}", [number] * 20, 300)
    cluster.run(0.1)
    assert cluster.engine.operations.drain("g0", 0.5) == 5
    cluster.run(0.4)
    cluster.engine.tick()
    assert running(cluster, "g0") == 5, "not before its time"
    cluster.run(0.11)
    cluster.engine.tick()
    cluster.run(0.1)
    assert running(cluster, "g0") == 0 and running(cluster, "g1") == 10
    cluster.run()
    assert [told.num_tokens for told in cluster.ended] == [300] * 10
    assert {told.worker for told in cluster.ended} == {"g1"}


def test_nobody_moves_where_no_other_group_takes_requests() -> None:
    cluster = cluster_of(1)
    cluster.submit("a", [1, 2, 3], 100)
    cluster.run(0.1)
    assert cluster.engine.operations.drain("g0", 0.0) == 1
    assert not cluster.engine.is_serving
    with pytest.raises(RequestError) as refused:
        cluster.submit("b", [1, 2, 3], 100)
    assert refused.value.reason == Reason.DRAINING
    cluster.engine.tick()
    cluster.run()
    assert [told.num_tokens for told in cluster.ended] == [100]


def test_undrain_takes_requests_again_also_those_that_found_no_group() -> None:
    cluster = cluster_of(1, rows=2)
    for number in range(3):
        cluster.submit(f"r{number}", [number], 10)
    cluster.engine.operations.drain("g0", None)
    cluster.run()
    assert len(cluster.ended) == 1 and cluster.engine.num_queued == 2
    cluster.engine.operations.undrain("g0")
    cluster.run()
    assert len(cluster.ended) == 3


def test_a_drained_group_that_comes_back_anew_takes_requests() -> None:
    cluster = cluster_of(2)
    cluster.engine.operations.drain("g0", None)
    assert cluster.engine.is_draining("g0")
    cluster.engine.on_lost(cluster.engine._fleet.pipelines["g0"].group, "left", died=False)
    cluster.join("g0")
    assert not cluster.engine.is_draining("g0")
    cluster.submit("a", [1], 5)
    cluster.run()
    assert cluster.ended[0].num_tokens == 5


@pytest.mark.parametrize("change", ["drain", "undrain"])
def test_an_unknown_group_is_told_apart(change: str) -> None:
    engine = cluster_of(1).engine
    with pytest.raises(RequestError) as refused:
        engine.operations.drain("g7", None) if change == "drain" else engine.operations.undrain(
            "g7"
        )
    assert refused.value.reason == Reason.WORKER_NOT_FOUND


def test_a_group_that_joins_takes_its_part_in_order() -> None:
    cluster = cluster_of(3, rows=9)
    for number in range(324):
        cluster.submit(f"r{number:03}", [number % 97] * 30, 1000)
        cluster.run(0.001)
    cluster.join("g3", rows=9)
    loads = []
    for name in ("g0", "g1", "g2", "g3"):
        scheduler = cluster.engine.scheduler_of(name)
        assert scheduler is not None
        loads.append(len(scheduler.waiting) + len(scheduler.running))
    assert max(loads) - min(loads) <= 12, loads
    assert len(scheduler.running) == 8
    order = [*scheduler.running, *scheduler.waiting]
    assert order == sorted(order)
    cluster.run()
    assert len(cluster.ended) == 324


def test_work_per_token_does_not_grow_with_groups_or_with_who_waits() -> None:
    """Function calls, since the time of a test says little on a busy machine."""
    calls = {(groups, live): _calls(groups, live) for groups, live in ((1, 8), (1, 800), (16, 128))}
    few = calls[1, 8]
    assert calls[1, 800] < 1.3 * few + 5, calls
    assert calls[16, 128] < 1.5 * few + 5, calls


def _calls(groups: int, live: int) -> float:
    """Python calls in the engine for each generated token."""
    cluster = cluster_of(groups, rows=9)
    submitted = 0

    def submit() -> None:
        nonlocal submitted
        submitted += 1
        cluster.submit(f"r{submitted}", [submitted % 997] * 20, 60)

    cluster.on_end = lambda name: submit()
    for _ in range(live):
        submit()
    cluster.run(1.0)
    tokens = cluster.num_tokens
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    engine_call = cluster.call

    def counted(action: Callable[[], None]) -> None:
        sys.setprofile(profile)
        try:
            engine_call(action)
        finally:
            sys.setprofile(None)

    cluster.call = counted
    cluster.run(1.0)
    return count / (cluster.num_tokens - tokens)
