"""The worker's side of the link's protocol, rule by rule: no socket, no clock."""

from __future__ import annotations

import pytest

from mili.internal.v1 import step_pb2 as pb
from mili.worker.session import Command, Dismissed, Opened, Preparing, Session
from tests.scripted_worker import READY, make_command, make_hello, make_result

EPOCH = 77
BEAT = pb.Heartbeat(phase=pb.WORKER_PHASE_IDLE)


@pytest.fixture
def session() -> Session:
    """A session that was welcome at 0.0."""
    session = Session(make_hello(), 0.0)
    assert bodies(session) == ["hello"]
    assert isinstance(session.receive(welcome(EPOCH), 0.0), Opened)
    return session


def frame(epoch: int, sequence: int, **body: object) -> bytes:
    return pb.RouterFrame(
        epoch=epoch,
        sequence=sequence,
        **body,  # type: ignore[arg-type]
    ).SerializeToString()


def welcome(epoch: int) -> bytes:
    return frame(epoch, 1, welcome=pb.Welcome())


def step(sequence: int, number: int, epoch: int = EPOCH) -> bytes:
    return frame(epoch, sequence, step=make_command(number))


def sent(session: Session) -> list[pb.WorkerFrame]:
    frames = [pb.WorkerFrame.FromString(data) for data in session.outgoing]
    session.outgoing.clear()
    return frames


def bodies(session: Session) -> list[str | None]:
    return [frame.WhichOneof("body") for frame in sent(session)]


def test_frames_are_numbered_within_the_epoch(session: Session) -> None:
    assert not session.is_ready
    session.send(EPOCH, READY)
    session.send(EPOCH, make_result(1))
    assert session.is_ready
    assert [(frame.epoch, frame.sequence) for frame in sent(session)] == [(EPOCH, 1), (EPOCH, 2)]


def test_commands_come_out_in_order_and_once(session: Session) -> None:
    assert session.receive(step(2, 1), 0.0) == Command(EPOCH, make_command(1))
    assert session.receive(step(2, 1), 0.0) is None
    assert session.receive(step(3, 2, epoch=5), 0.0) is None
    assert session.receive(step(3, 2), 0.0) == Command(EPOCH, make_command(2))


def test_after_a_gap_nothing_is_executed_until_a_new_welcome(session: Session) -> None:
    assert session.receive(step(3, 2), 0.5) is None
    (gap,) = sent(session)
    assert gap.failure == pb.Failure(kind=pb.FAILURE_KIND_GAP, expected_sequence=2)
    assert session.receive(step(2, 1), 0.5) is None
    assert session.receive(step(4, 3), 0.5) is None
    session.send(EPOCH, make_result(1))
    assert bodies(session) == []
    assert session.receive(welcome(78), 0.6) == Opened(78, pb.Welcome())
    assert session.receive(step(2, 1, epoch=78), 0.6) == Command(78, make_command(1))


def test_a_welcome_of_the_past_changes_nothing(session: Session) -> None:
    session.receive(welcome(78), 0.0)
    assert session.receive(welcome(EPOCH), 0.0) is None
    assert session.receive(welcome(78), 0.0) is None
    assert session.epoch == 78


def test_hello_again_after_a_second_of_silence(session: Session) -> None:
    session.tick(BEAT, 0.5)
    assert bodies(session) == ["heartbeat"]
    session.receive(frame(EPOCH, 2, ping=pb.Ping()), 0.5)
    session.receive(frame(5, 3, ping=pb.Ping()), 1.0)
    session.tick(BEAT, 1.4)
    assert bodies(session) == ["heartbeat"]
    session.tick(BEAT, 1.5)
    assert bodies(session) == ["hello"]
    assert session.receive(step(3, 1), 1.5) is None, "the old epoch is over"
    session.tick(BEAT, 2.0)
    assert bodies(session) == [], "without an epoch there is nothing to report"
    session.tick(BEAT, 2.5)
    assert bodies(session) == ["hello"]


def test_an_unanswered_hello_does_not_pile_up() -> None:
    session = Session(make_hello(), 0.0)
    for second in range(1, 30):
        session.tick(BEAT, float(second))
    assert bodies(session) == ["hello"]


def test_goodbye() -> None:
    session = Session(make_hello(), 0.0)
    refusal = frame(0, 0, goodbye=pb.Goodbye(reason="another model"))
    assert session.receive(refusal, 0.0) == Dismissed("another model")
    session.receive(welcome(EPOCH), 0.0)
    assert session.receive(refusal, 0.0) is None, "of no epoch, while there is one"
    goodbye = frame(EPOCH, 2, goodbye=pb.Goodbye(reason="drain"))
    assert session.receive(goodbye, 0.0) == Dismissed("drain")


def test_garbage_changes_nothing(session: Session) -> None:
    for data in (b"", b"\xff" * 50, frame(0, 0), frame(0, 1, welcome=pb.Welcome())):
        assert session.receive(data, 0.0) is None
    assert session.receive(step(2, 1), 0.0) == Command(EPOCH, make_command(1))


def test_prepare_is_for_the_step_loop_and_answered_in_its_epoch(session: Session) -> None:
    prepare = pb.Prepare(id=3, adapter="a")
    event = session.receive(frame(EPOCH, 2, prepare=prepare), 0.0)
    assert event == Preparing(EPOCH, prepare)
    session.send(EPOCH + 1, pb.Prepared(id=2))
    session.send(EPOCH, pb.Prepared(id=3, error="none"))
    (answer,) = sent(session)
    assert answer.prepared.id == 3
    assert answer.prepared.error
