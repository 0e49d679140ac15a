"""What a request is told when another worker goes on with it."""

from __future__ import annotations

from mili.router.errors import Reason
from mili.router.outcome import Recovery
from tests.fake_worker import FakeModel
from tests.unit.test_engine import LONG, Harness, params


def begun(groups: int, *names: str) -> Harness:
    """Requests that have had a token on the first of the groups, at second 5."""
    harness = Harness(groups)
    harness.engine.on_ready(harness.groups[0])
    for name in names:
        harness.engine.submit(name, params(LONG))
    harness.now = 5.0
    while not all(harness.tokens(name) for name in names):
        assert harness.answer(harness.groups[0])
    return harness


def recoveries(harness: Harness, name: str) -> list[Recovery]:
    return [output.recovery for output in harness.outputs[name] if output.recovery]


def lose(harness: Harness, index: int = 0) -> None:
    harness.groups[index].restart()
    harness.engine.on_lost(harness.groups[index], "killed", died=True)


def test_how_long_it_stood_still_and_what_is_computed_again() -> None:
    harness = begun(1, "a")
    known = len(harness.tokens("a"))
    harness.now = 6.0
    lose(harness)
    assert recoveries(harness, "a") == []
    harness.now = 8.5
    harness.engine.on_ready(harness.groups[0])
    harness.finish()
    (recovery,) = recoveries(harness, "a")
    recomputed = harness.finished("a").usage.recomputed_tokens
    assert recovery == Recovery(Reason.WORKER_LOST, recomputed, 3.5)
    assert recomputed >= len(LONG) + known - 1
    assert harness.tokens("a") == FakeModel().alone(LONG, 1, 10)
    told = harness.outputs["a"]
    at = next(index for index, output in enumerate(told) if output.recovery)
    assert sum(len(output.token_ids) for output in told[:at]) == known == told[at].first_token_index


def test_two_losses_before_another_goes_on_are_one_notice() -> None:
    harness = begun(2, "a")
    lose(harness)
    harness.now = 7.0
    harness.engine.on_ready(harness.groups[1])
    harness.now = 8.0
    lose(harness, 1)
    harness.now = 9.0
    harness.engine.on_ready(harness.groups[1])
    harness.finish()
    first, second = recoveries(harness, "a")
    assert (first.gap, second.gap) == (2.0, 4.0), "each from the last token"
    usage = harness.finished("a").usage
    assert first.recomputed_tokens + second.recomputed_tokens == usage.recomputed_tokens


def test_one_that_an_operator_moves() -> None:
    harness = begun(2, "a")
    harness.engine.on_ready(harness.groups[1])
    harness.engine.operations.drain(harness.groups[0].name, migrate_after=1.0)
    harness.now = 7.0
    harness.engine.tick()
    harness.finish()
    (recovery,) = recoveries(harness, "a")
    assert (recovery.reason, recovery.gap >= 0) == (Reason.DRAINING, True)
    assert harness.finished("a").timing.worker == harness.groups[1].name


def test_who_had_not_begun_and_who_stays_are_told_nothing() -> None:
    names = [f"r{index}" for index in range(8)]  # more than there are rows
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])
    for name in names:
        harness.engine.submit(name, params(LONG))
    begun = {name for name in names if harness.outputs[name]}
    assert 0 < len(begun) < len(names)
    lose(harness)
    harness.engine.on_ready(harness.groups[0])
    harness.finish()
    assert {name for name in names if recoveries(harness, name)} == begun
    preempted = sum(harness.finished(name).timing.preemptions for name in names)
    assert sum(len(recoveries(harness, name)) for name in names) == len(begun), preempted
