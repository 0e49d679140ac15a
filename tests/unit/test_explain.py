"""What the engine tells of a request and of itself."""

from __future__ import annotations

import random

from mili.router.engine import Engine
from mili.router.introspection import RequestState
from mili.router.journal import MAX_ENDED, MAX_EVENTS, Journal
from mili.router.outcome import Finish, FinishReason
from mili.v1 import admin_pb2
from tests.unit.test_deadlines import busy_cluster, make_request
from tests.virtual_cluster import LIMITS, Call, VirtualCluster, random_call


def state_of(engine: Engine, request_id: str) -> RequestState:
    story = engine.operations.explain(request_id)
    assert story is not None
    return story.state


def kinds(engine: Engine, request_id: str) -> list[str]:
    story = engine.operations.explain(request_id)
    assert story is not None
    return [event.kind for event in story.events]


def test_states_have_the_numbers_of_the_api() -> None:
    names = dict(admin_pb2.RequestState.items())
    for state in RequestState:
        assert names[f"REQUEST_STATE_{state.name}"] == state


def test_the_story_of_a_request() -> None:
    cluster = busy_cluster()
    cluster.call(1.0, Call([2] * 64, 5))
    cluster.call(1.0, Call([2] * 64, 5))
    cluster.run(until=2.0)
    engine = cluster.engine
    assert engine.operations.explain("unknown") is None
    assert state_of(engine, "c0") is RequestState.DECODE
    assert state_of(engine, "c2") is RequestState.QUEUED
    story = engine.operations.explain("c2")
    assert story is not None and story.queue_position == 1
    assert [(event.at, event.kind) for event in story.events] == [(1.0, "queued"), (1.0, "placed")]
    assert story.events[1].detail == "w0"
    cluster.run()
    story = engine.operations.explain("c2")
    assert story is not None and story.state is RequestState.ENDED
    assert [event.kind for event in story.events] == ["queued", "placed", "started", "ended"]
    cached = "48 of 64 prompt tokens cached; the next block: not full block"
    assert story.events[2].detail == cached
    assert story.events[3].detail == "EOS"
    assert story.usage.completion_tokens == 5 and story.timing.queue > 4.0


def test_the_story_of_an_interrupted_request() -> None:
    cluster = VirtualCluster()
    group = cluster.groups[0]
    cluster.call(0.0, Call([2] * 64, 100))
    cluster.run(until=0.5)
    cluster.lose(group)
    assert state_of(cluster.engine, "c0") is RequestState.RECOVERING
    cluster.join(group)
    cluster.run()
    assert kinds(cluster.engine, "c0") == [
        "queued", "placed", "started", "worker_lost", "placed", "ended",
    ]  # fmt: skip


def test_a_preemption_is_told() -> None:
    """Two that fit only one after the other: the less urgent one makes way, and comes back."""
    cluster = VirtualCluster(limits=LIMITS._replace(num_blocks=41, max_model_len=640))
    calls = [cluster.call(0.0, Call([2 + number] * 200, 300)) for number in range(2)]
    while "preempted" not in kinds(cluster.engine, "c1") if cluster.calls else True:
        cluster.run(until=cluster.now + 0.01)
    assert state_of(cluster.engine, "c1") is RequestState.PREEMPTED
    cluster.run()
    assert all(call.completed and len(call.token_times) == 300 for call in calls)
    assert "preempted" not in kinds(cluster.engine, "c0")


def test_stories_are_bounded() -> None:
    journal = Journal()
    for number in range(MAX_ENDED + 10):
        request = make_request(str(number))
        for at in range(2 * MAX_EVENTS):
            journal.note(request, float(at), "queued" if at == 0 else "preempted")
        request.end(Finish(FinishReason.CANCELLED))
        journal.ended(request, 99.0)
        journal.close(request, request.usage, request.timing(99.0))
    assert len(journal) == 0
    assert journal.explain_ended("9") is None
    story = journal.explain_ended("10")
    assert story is not None and len(story.events) == MAX_EVENTS
    assert (story.events[0].kind, story.events[-1].kind) == ("queued", "ended")


def test_load() -> None:
    source = random.Random(1)
    cluster = VirtualCluster(groups=2)
    idle = cluster.engine.operations.load()
    assert idle == (0, 0, 0, 0.0, 0.0, 0.0, 0.0)
    calls = [cluster.call(0.0, random_call(source)) for _ in range(400)]
    calls += [cluster.call(4.0, random_call(source)) for _ in range(1100)]
    cluster.run(until=8.0)
    load = cluster.engine.operations.load()
    waiting = [call for call in calls if call.started_at is None]
    running = [call for call in calls if call.started_at is not None and call.ended_at is None]
    assert load.queued_requests == len(waiting) == cluster.engine.num_queued
    assert load.queued_prompt_tokens == sum(len(call.prompt) for call in waiting)
    assert load.running_sequences == len(running) == 128
    held = sum(len(call.prompt) + len(call.token_times) for call in running)
    assert abs(load.kv_utilization - held / (2 * 8191 * 16)) < 0.02
    recent = sum(at > 3.0 for call in calls for at in call.token_times) / 5.0
    assert abs(load.output_tokens_per_second / recent - 1) < 0.3
    newcomer = cluster.call(8.0, random_call(source))
    cluster.run()
    assert newcomer.started_at is not None
    assert abs(load.estimated_queue_time / (newcomer.started_at - 8.0) - 1) < 0.3


def test_the_hit_ratio_is_that_of_the_last_prompts() -> None:
    cluster = VirtualCluster()
    cluster.call(0.0, Call([2] * 161, 2))
    cluster.call(1.0, Call([2] * 161, 2))
    cluster.run()
    assert 0.5 < cluster.engine.operations.load().prefix_hit_ratio < 0.6
