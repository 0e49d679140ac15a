"""The worker link's protocol, rule by rule: no socket, no clock."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mili.internal.v1 import step_pb2 as pb
from mili.router.limits import Limits
from mili.router.workers import MAX_FRAME_BYTES, WorkerState
from mili.v1 import admin_pb2
from tests.scripted_worker import READY, Link, ScriptedWorker, make_command, make_hello, make_result


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def worker(link: Link) -> ScriptedWorker:
    """A worker that serves."""
    worker = ScriptedWorker(link).join()
    assert link.events.take() == [("ready", "w")]
    return worker


def bodies(frames: list[pb.RouterFrame]) -> list[str | None]:
    return [frame.WhichOneof("body") for frame in frames]


def state(link: Link) -> WorkerState:
    return link.workers.groups[0].state


def test_states_have_the_numbers_of_the_api() -> None:
    for value in WorkerState:
        assert admin_pb2.WorkerState.Value(f"WORKER_STATE_{value.name}") == value


def test_handshake(link: Link) -> None:
    worker = ScriptedWorker(link)
    welcome = worker.say_hello()
    assert (welcome.WhichOneof("body"), welcome.sequence) == ("welcome", 1)
    assert state(link) == WorkerState.LOADING
    worker.beat(phase=pb.WORKER_PHASE_WARMING)
    assert bodies(worker.received()) == ["ping"]
    assert state(link) == WorkerState.WARMING
    worker.send(ready=READY)
    assert link.events.take() == [("ready", "w")]
    assert state(link) == WorkerState.SERVING
    assert link.workers.groups[0].limits == Limits(100, 16, 8, 64, 512, 99, frozenset())


def test_every_epoch_is_another(link: Link) -> None:
    epochs = {ScriptedWorker(link).say_hello().epoch for _ in range(50)}
    assert len(epochs) == 50
    assert 0 not in epochs


def test_steps_and_results(link: Link, worker: ScriptedWorker) -> None:
    group = link.workers.groups[0]
    group.send(make_command(1), [True], link.now)
    group.send(make_command(2), [True], link.now)
    assert [(frame.sequence, frame.step.step) for frame in worker.received()] == [(2, 1), (3, 2)]
    worker.send(result=make_result(1))
    worker.send(result=make_result(2))
    assert link.events.take() == [("result", "w", "1"), ("result", "w", "2")]
    assert group.num_in_flight == 0


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("interface_sha256", b"x" * 32, "another model"),
        ("protocol_min", 2, "protocol"),
        ("protocol_max", 0, "protocol"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused(
    link: Link, worker: ScriptedWorker, field: str, value: object, reason: str
) -> None:
    other = ScriptedWorker(link, make_hello("other", **{field: value}))
    answer = other.say_hello()
    assert answer.epoch == 0
    assert reason in answer.goodbye.reason
    assert link.events.take() == []
    assert [info.name for info in link.workers.info(link.now)] == ["w"]


def test_other_weights_are_refused_for_good_once_one_group_served(link: Link) -> None:
    first = ScriptedWorker(link, make_hello("first"))
    late = ScriptedWorker(link, make_hello("late", weights_sha256=b"x" * 32))
    first.say_hello()
    late.say_hello()  # nobody serves yet: not known which weights are the right ones
    first.send(ready=READY)
    late.send(ready=READY)
    assert "weights differ" in late.received()[-1].goodbye.reason
    assert "weights differ" in late.say_hello().goodbye.reason
    assert link.events.take() == [("ready", "first")]
    link.tick(0.4)
    first.send(failure=pb.Failure(kind=pb.FAILURE_KIND_INTERNAL))
    assert "weights differ" in late.say_hello().goodbye.reason, "a request could change weights"


def test_a_newer_instance_fences_the_older(link: Link, worker: ScriptedWorker) -> None:
    newer = ScriptedWorker(link, make_hello(instance="2"))
    newer.say_hello()
    goodbye = worker.received()[-1]
    assert goodbye.epoch == worker.epoch
    assert "taken over" in goodbye.goodbye.reason
    assert [event[0] for event in link.events.take()] == ["died"]
    worker.beat()
    worker.send(result=make_result(1))
    assert worker.received() == [], "the old epoch is over"
    newer.send(ready=READY)
    assert link.events.take() == [("ready", "w")]
    assert "taken over" in worker.say_hello().goodbye.reason, "never the other way round"
    assert link.events.take() == []
    assert [info.instance for info in link.workers.info(link.now)] == ["2"]


def test_hello_again_opens_a_new_epoch(link: Link, worker: ScriptedWorker) -> None:
    old_epoch = worker.epoch
    worker.say_hello()
    assert worker.epoch != old_epoch
    assert [event[0] for event in link.events.take()] == ["lost"]
    worker.send(epoch=old_epoch, sequence=2, ready=READY)
    assert link.events.take() == []
    worker.send(ready=READY)
    assert link.events.take() == [("ready", "w")]


def test_old_epochs_duplicates_and_strangers_change_nothing(
    link: Link, worker: ScriptedWorker
) -> None:
    link.workers.groups[0].send(make_command(1), [True], link.now)
    worker.received()
    result = make_result(1)
    worker.send(epoch=worker.epoch ^ 1, sequence=2, result=result)
    worker.send(sequence=1, result=result)
    ScriptedWorker(link, routing_id=b"nobody").send(epoch=0, sequence=1, result=result)
    assert link.workers.ignored_frames == 3
    assert link.events.take() == []
    worker.send(result=result)
    worker.send(sequence=worker.sequence, result=result)
    assert link.events.take() == [("result", "w", "1")]
    assert worker.received() == []


def test_a_gap_ends_the_epoch_and_opens_another(link: Link, worker: ScriptedWorker) -> None:
    link.workers.groups[0].send(make_command(1), [True], link.now)
    worker.received()
    worker.send(sequence=worker.sequence + 2, result=make_result(1))
    assert link.events.take() == [("lost", "w", "1 frames of worker w are missing")]
    worker.enter(worker.received()[-1])
    worker.send(ready=READY)
    assert link.events.take() == [("ready", "w")]


def test_a_gap_that_the_worker_saw_does_so_too(link: Link, worker: ScriptedWorker) -> None:
    worker.send(failure=pb.Failure(kind=pb.FAILURE_KIND_GAP, expected_sequence=5))
    assert link.events.take() == [("lost", "w", "frames to worker w were lost")]
    assert bodies(worker.received()) == ["welcome"]


def test_a_failed_worker_is_lost_and_not_welcome(link: Link, worker: ScriptedWorker) -> None:
    worker.send(failure=pb.Failure(kind=pb.FAILURE_KIND_INTERNAL, message="KeyError in step 3"))
    assert link.events.take() == [("died", "w", "worker w failed: KeyError in step 3")]
    assert worker.received() == []
    assert state(link) == WorkerState.LOST


def test_silent_death_is_noticed_within_the_timeout(link: Link, worker: ScriptedWorker) -> None:
    for _ in range(10):
        link.tick()
    assert link.events.take() == []
    link.tick()
    assert link.events.take() == [("died", "w", "worker w said nothing for 1.10 s")]
    worker.beat()
    assert worker.received() == [], "so it will say Hello again"


def test_a_hung_step_is_noticed_and_the_next_one_gets_more_time(
    link: Link, worker: ScriptedWorker
) -> None:
    link.workers.groups[0].send(make_command(1), [True], link.now)
    for _ in range(101):
        worker.beat(phase=pb.WORKER_PHASE_STEPPING)
        link.tick()
    ((event, _, reason),) = link.events.take()
    assert event == "died"
    assert "did not finish step 1 in 10.10 s" in reason, "5 times the 2 s of a first step"
    worker.join()
    link.events.take()
    link.workers.groups[0].send(make_command(1), [True], link.now)
    for _ in range(200):
        worker.beat(phase=pb.WORKER_PHASE_STEPPING)
        link.tick()
    assert link.events.take() == [], "the machine may only be slow"


def test_a_stalled_router_raises_no_false_alarm(link: Link, worker: ScriptedWorker) -> None:
    link.workers.groups[0].send(make_command(1), [True], link.now)
    link.tick()
    link.tick(seconds=30.0)
    link.tick()
    assert link.events.take() == [], "the worker's frames may be on their way"
    worker.beat(phase=pb.WORKER_PHASE_STEPPING)
    worker.send(result=make_result(1))
    assert link.events.take() == [("result", "w", "1")]
    for _ in range(12):
        link.tick()
    assert [event[0] for event in link.events.take()] == ["died"]


def test_a_full_socket_delays_and_drops_nothing(link: Link, worker: ScriptedWorker) -> None:
    group = link.workers.groups[0]
    worker.received()
    link.full.add(worker.routing_id)
    group.send(make_command(1), [True], link.now)
    group.send(make_command(2), [True], link.now)
    worker.beat()
    assert worker.received() == []
    link.full.clear()
    link.tick()
    assert [(frame.sequence, frame.step.step) for frame in worker.received()] == [(2, 1), (3, 2)]


def test_what_waits_is_void_with_its_epoch(link: Link, worker: ScriptedWorker) -> None:
    worker.received()
    link.full.add(worker.routing_id)
    link.workers.groups[0].send(make_command(1), [True], link.now)
    worker.send(failure=pb.Failure(kind=pb.FAILURE_KIND_GAP))
    link.full.clear()
    link.tick()
    assert bodies(worker.received()) == ["welcome"]


def test_a_worker_that_reconnects_keeps_its_epoch(link: Link, worker: ScriptedWorker) -> None:
    link.full.add(worker.routing_id)
    link.workers.groups[0].send(make_command(1), [True], link.now)
    worker.received()
    worker.routing_id = b"another connection"
    worker.beat()
    assert bodies(worker.received()) == ["step", "ping"]
    assert link.events.take() == []


BAD_RESULTS = [
    make_result(2),
    make_result(1, num_rows=2),
    pb.StepResult(step=1, num_new=[2], token_ids=[7]),
    pb.StepResult(step=1, num_new=[1], token_ids=[99]),
    pb.StepResult(step=1, num_new=[0], faults=[pb.RowFault(index=1)]),
]


@pytest.mark.parametrize("result", BAD_RESULTS)
def test_a_result_that_cannot_be_right_ends_the_epoch(
    link: Link, worker: ScriptedWorker, result: pb.StepResult
) -> None:
    link.workers.groups[0].send(make_command(1), [True], link.now)
    worker.received()
    worker.send(result=result)
    assert [event[0] for event in link.events.take()] == ["lost"]
    assert bodies(worker.received()) == ["welcome"]


@pytest.mark.parametrize("field", [field.name for field in READY.DESCRIPTOR.fields[:6]])
def test_a_ready_without_room_is_refused(link: Link, field: str) -> None:
    worker = ScriptedWorker(link)
    worker.say_hello()
    ready = pb.Ready()
    ready.CopyFrom(READY)
    ready.ClearField(field)  # type: ignore[arg-type]
    worker.send(ready=ready)
    assert field in worker.received()[-1].goodbye.reason
    assert link.events.take() == []


def ready_after(*phases: tuple[str, float]) -> pb.Ready:
    ready = pb.Ready(startup=[pb.StartupPhase(name=name, seconds=s) for name, s in phases])
    ready.MergeFrom(READY)
    return ready


def test_how_a_worker_started_is_known_after_its_loss_too(link: Link) -> None:
    worker = ScriptedWorker(link)
    worker.say_hello()
    assert link.workers.info(link.now)[0].startup == ()
    phases = [("load weights", 12.5), ("record graphs", 0.0)]
    worker.send(ready=ready_after(*phases))
    assert link.events.take() == [("ready", "w")]
    assert link.workers.info(link.now)[0].startup == phases
    assert link.workers.groups[0].weights_sha256 == worker.hello.weights_sha256
    worker.send(failure=pb.Failure(kind=pb.FAILURE_KIND_INTERNAL))
    (info,) = link.workers.info(link.now)
    assert (info.state, info.startup) == (WorkerState.LOST, phases)
    assert info.weights_sha256 == worker.hello.weights_sha256


@pytest.mark.parametrize(
    ("phases", "problem"),
    [
        ([("load", math.nan)], "phase of nan seconds"),
        ([("load", math.inf)], "phase of inf seconds"),
        ([("load", -1.0)], "phase of -1.0 seconds"),
        ([("n" * 200, 1.0)], "name is too long"),
        ([("load", 1.0)] * 100, "100 start-up phases"),
    ],
)
def test_a_start_that_nobody_can_have_had_is_refused(
    link: Link, phases: list[tuple[str, float]], problem: str
) -> None:
    worker = ScriptedWorker(link)
    worker.say_hello()
    worker.send(ready=ready_after(*phases))
    assert problem in worker.received()[-1].goodbye.reason
    assert link.events.take() == []


def test_garbage_changes_nothing(link: Link, worker: ScriptedWorker) -> None:
    before = worker.sequence
    malformed: list[Any] = [
        make_hello(""),
        make_hello("n" * 1000),
        make_hello("\x1b[31mred"),
        make_hello(instance=""),
        make_hello(world_size=0),
        make_hello(rank=1),
        make_hello(interface_sha256=b""),
        make_hello(weights_sha256=b"short"),
    ]
    frames = [pb.WorkerFrame(hello=hello).SerializeToString() for hello in malformed]
    for frame in [*frames, b"\xff" * 100, b"", b"\x00" * (MAX_FRAME_BYTES + 1)]:
        link.workers.receive(worker.routing_id, frame, link.now)
        link.workers.receive(b"stranger", frame, link.now)
    assert link.events.take() == []
    assert link.sent_to(b"stranger") == []
    assert [info.name for info in link.workers.info(link.now)] == ["w"]
    worker.beat()
    assert worker.sequence == before + 1
    assert bodies(worker.received()) == ["ping"]


def test_the_number_of_workers_is_bounded_and_lost_ones_are_forgotten(link: Link) -> None:
    for number in range(1024):
        ScriptedWorker(link, make_hello(f"w{number}")).say_hello()
    late = ScriptedWorker(link, make_hello("late"))
    assert "1024 workers" in late.say_hello().goodbye.reason
    for _ in range(99):
        link.tick()
    assert {info.state for info in link.workers.info(link.now)} == {WorkerState.LOADING}
    for _ in range(3):
        link.tick()
    assert {info.state for info in link.workers.info(link.now)} == {WorkerState.LOST}
    link.tick(seconds=601.0)
    assert link.workers.info(link.now) == []
    assert link.workers.groups == ()
    assert late.say_hello().HasField("welcome")


def test_info(link: Link, worker: ScriptedWorker) -> None:
    link.workers.groups[0].send(make_command(1), [True], link.now)
    worker.send(result=make_result(1))
    (info,) = link.workers.info(link.now + 0.25)
    weights = worker.hello.weights_sha256
    assert info == ("w", "1", WorkerState.SERVING, 0.25, 0.25, "w", 0, 1, weights, [])


def test_a_group_serves_when_all_ranks_are_ready_and_is_lost_with_one(link: Link) -> None:
    ranks = [
        ScriptedWorker(link, make_hello(name, group="g", rank=rank, world_size=2))
        for rank, name in enumerate("ab")
    ]
    ranks[1].say_hello()
    assert state(link) == WorkerState.LOADING
    ranks[0].say_hello()
    ranks[1].send(ready=READY)
    assert link.events.take() == []
    small = pb.Ready()
    small.CopyFrom(READY)
    small.num_blocks = 50
    ranks[0].send(ready=small)
    assert link.events.take() == [("ready", "g")]
    (group,) = link.workers.groups
    assert group.limits.num_blocks == 50
    group.send(make_command(1), [True], link.now)
    assert [rank.received()[-1].step.step for rank in ranks] == [1, 1]
    ranks[1].send(result=make_result(1))
    assert link.events.take() == [], "rank 0's result counts"
    ranks[0].send(result=make_result(1))
    assert link.events.take() == [("result", "g", "1")]
    for _ in range(11):
        ranks[0].beat(finished=1)
        link.tick()
    assert [event[0] for event in link.events.take()] == ["died"]
    assert group.state == WorkerState.LOADING, "rank 0 is welcome again and waits for rank 1"
    ranks[0].enter(ranks[0].received()[-1])
    ranks[0].send(ready=READY)
    ranks[1].join()
    assert link.events.take() == [("ready", "g")]


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (make_hello("x", group="g", rank=0, world_size=2), "rank 0 of its group is already"),
        (make_hello("x", group="g", rank=2, world_size=3), "2 ranks, not 3"),
    ],
)
def test_a_place_in_a_group_is_taken_once(link: Link, hello: pb.Hello, reason: str) -> None:
    ScriptedWorker(link, make_hello("a", group="g", rank=0, world_size=2)).say_hello()
    assert reason in ScriptedWorker(link, hello).say_hello().goodbye.reason


def test_what_is_prepared_is_ready_when_every_rank_has_it_and_an_answer_counts_once(
    link: Link,
) -> None:
    """A command that names it goes to all of them."""
    hellos = [make_hello(f"w{rank}", group="g", rank=rank, world_size=2) for rank in range(2)]
    first, second = [ScriptedWorker(link, hello).join() for hello in hellos]
    (group,) = link.workers.groups
    link.events.take()
    for number in (1, 2):
        group.prepare(pb.Prepare(id=number, grammar=pb.Grammar(source="a")))
    first.send(prepared=pb.Prepared(id=1))
    first.send(prepared=pb.Prepared(id=1))
    assert link.events.take() == []
    second.send(prepared=pb.Prepared(id=1))
    assert link.events.take() == [("prepared", "g", "1")]
    second.send(prepared=pb.Prepared(id=1, error="late"))
    second.send(prepared=pb.Prepared(id=9, error="nobody asked"))
    assert link.events.take() == []
    second.send(prepared=pb.Prepared(id=2, error="no"))
    first.send(prepared=pb.Prepared(id=2))
    assert link.events.take() == [("prepared", "g", "2 no")]
