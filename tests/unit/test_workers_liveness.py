"""When a worker is lost, and when it is only slow."""

from __future__ import annotations

import pytest

from mili.internal.v1 import step_pb2 as pb
from mili.router.liveness import FIRST_STEP_SECONDS, Liveness, StepTimes, step_work

TIMEOUT = 1.0


def beat(
    finished: int = 0, phase: pb.WorkerPhase.ValueType = pb.WORKER_PHASE_STEPPING
) -> pb.Heartbeat:
    return pb.Heartbeat(finished_step=finished, phase=phase)


def test_silence_is_loss_after_the_timeout() -> None:
    liveness = Liveness(now=10.0)
    assert liveness.silent(TIMEOUT, 11.0) is None
    assert liveness.silent(TIMEOUT, 11.01) == "said nothing for 1.01 s"
    liveness.heard(11.0)
    assert liveness.silent(TIMEOUT, 12.0) is None


def test_a_step_that_does_not_move_is_loss_though_heartbeats_come() -> None:
    liveness = Liveness(now=0.0)
    liveness.heartbeat(beat(phase=pb.WORKER_PHASE_IDLE), 5.0)
    liveness.expect(1, predicted=0.1, now=5.0)
    liveness.expect(2, predicted=0.1, now=5.0)
    liveness.heartbeat(beat(), 5.9)
    liveness.finished(1, 5.9)
    assert liveness.hung(TIMEOUT, 6.9) is None, "step 2 only began at 5.9"
    liveness.heartbeat(beat(finished=1), 6.9)
    assert liveness.hung(TIMEOUT, 6.95) == "did not finish step 2 in 1.05 s"


def test_the_clock_of_a_step_runs_from_when_it_was_sent() -> None:
    liveness = Liveness(now=0.0)
    liveness.heartbeat(beat(phase=pb.WORKER_PHASE_IDLE), 60.0)
    liveness.expect(1, predicted=0.1, now=60.0)
    assert liveness.hung(TIMEOUT, 60.9) is None


def test_a_step_gets_five_times_what_was_predicted() -> None:
    liveness = Liveness(now=0.0)
    liveness.heartbeat(beat(), 0.0)
    liveness.expect(1, predicted=0.5, now=0.0)
    assert liveness.hung(TIMEOUT, 2.5) is None
    assert liveness.hung(TIMEOUT, 2.6) is not None


def test_a_worker_that_claims_to_be_idle_while_a_step_waits_is_hung() -> None:
    liveness = Liveness(now=0.0)
    liveness.expect(1, predicted=0.1, now=0.0)
    liveness.heartbeat(beat(phase=pb.WORKER_PHASE_IDLE), 0.1)
    assert liveness.hung(TIMEOUT, 1.2) is not None


@pytest.mark.parametrize(
    "phase", [pb.WORKER_PHASE_LOADING, pb.WORKER_PHASE_WARMING, pb.WORKER_PHASE_COMPILING]
)
def test_a_declared_phase_may_take_its_time(phase: pb.WorkerPhase.ValueType) -> None:
    liveness = Liveness(now=0.0)
    liveness.expect(1, predicted=0.1, now=0.0)
    liveness.heartbeat(beat(phase=phase), 0.9)
    assert liveness.hung(TIMEOUT, 60.0) is None
    liveness.heartbeat(beat(phase=phase), 60.0)
    liveness.heartbeat(beat(), 60.1)
    assert liveness.hung(TIMEOUT, 61.0) is None, "the time of the declared phase does not count"
    assert liveness.hung(TIMEOUT, 61.2) is not None


def test_a_heartbeat_is_progress_too() -> None:
    liveness = Liveness(now=0.0)
    liveness.heartbeat(beat(), 0.0)
    liveness.expect(1, predicted=0.1, now=0.0)
    liveness.heartbeat(beat(finished=1), 0.9)
    assert liveness.hung(TIMEOUT, 60.0) is None
    assert liveness.step_age(1.0) == pytest.approx(0.1)


def test_our_own_standstill_is_excused() -> None:
    liveness = Liveness(now=0.0)
    liveness.heartbeat(beat(), 0.0)
    liveness.expect(1, predicted=0.1, now=0.0)
    liveness.excuse(4.0, now=4.5)
    assert liveness.silent(TIMEOUT, 4.5) is None
    assert liveness.hung(TIMEOUT, 4.5) is None
    assert liveness.silent(TIMEOUT, 5.1) is not None
    assert liveness.hung(TIMEOUT, 5.1) is not None


def test_nothing_measured_predicts_the_default() -> None:
    assert StepTimes().predict(1) == FIRST_STEP_SECONDS


def test_prediction_is_a_decaying_maximum_of_steps_of_that_size() -> None:
    times = StepTimes()
    times.measured(1, 0.03)
    times.measured(100, 2.0)
    times.measured(100, 0.5)
    assert times.predict(1) == 0.03
    assert 0.5 < times.predict(120) < 2.0
    for _ in range(1000):
        times.measured(100, 0.5)
        times.measured(1, 0.03)
    assert times.predict(100) == 0.5


def test_an_unknown_size_is_extrapolated_upwards_only() -> None:
    times = StepTimes()
    times.measured(16, 0.5)
    assert times.predict(128) == pytest.approx(4.0)
    assert times.predict(1) == FIRST_STEP_SECONDS
    times.measured(16, 3.0)
    assert times.predict(1) == 3.0


def test_a_chunk_far_into_a_long_context_is_not_like_the_first_one() -> None:
    first = pb.StepCommand(rows=[1], starts=[0], num_tokens=[128])
    late = pb.StepCommand(rows=[1], starts=[30_000], num_tokens=[128])
    times = StepTimes()
    times.measured(step_work(late), 3.0)
    for _ in range(2000):
        times.measured(step_work(first), 0.1)
    assert times.predict(step_work(first)) == 0.1
    assert times.predict(step_work(late)) == 3.0


def test_a_beat_of_the_epoch_before_moves_nothing() -> None:
    liveness = Liveness(0.0)
    liveness.expect(1, 0.1, 0.0)
    liveness.heartbeat(beat(5000), 0.5)
    assert liveness.standstill(0.9) == pytest.approx(0.9)
    liveness.heartbeat(beat(1), 1.0)
    assert liveness.standstill(1.5) == 0.0
