"""The engine over several fake workers: placement, delivery, worker loss, cancel, time-outs."""

from __future__ import annotations

import random
from collections import defaultdict, deque

import pytest

from mili.internal.v1.step_pb2 import Sampling, StepCommand, StepResult
from mili.router.engine import Engine
from mili.router.errors import Reason, RequestError
from mili.router.request import Finished, FinishReason, GenerationParams, RequestOutput
from mili.router.worker_group import WorkerLimits
from tests.fake_worker import EOS, FakeModel, FakeWorker
from tests.scheduler_simulation import expected

CONTEXT_LIMIT = 40


class FakeGroup:
    """A worker group of one: executes at once, answers when told to."""

    def __init__(self, name: str, num_blocks: int = 24, block_size: int = 2) -> None:
        self.name = name
        self.limits = WorkerLimits(
            num_blocks=num_blocks,
            block_size=block_size,
            max_rows=6,
            max_step_tokens=12,
            max_model_len=CONTEXT_LIMIT,
            vocab_size=3,
            capabilities=frozenset(),
        )
        self.restart()

    def restart(self) -> None:
        self.worker = FakeWorker(self.limits.num_blocks, self.limits.block_size, FakeModel())
        self.results: deque[StepResult] = deque()

    def send(self, command: StepCommand, now: float) -> None:
        self.results.append(self.worker.execute(command))


class Harness:
    """An engine, a clock and what every request was told."""

    def __init__(self, groups: int, max_queued: int = 1000, depth: int = 2) -> None:
        self.now = 0.0
        self.faults: list[Exception] = []
        self.outputs: dict[str, list[RequestOutput]] = defaultdict(list)
        self.groups = [FakeGroup(f"worker-{index}") for index in range(groups)]
        self.engine = Engine(
            model_context_limit=CONTEXT_LIMIT,
            pipeline_depth=depth,
            max_queued_requests=max_queued,
            recovery_timeout=60.0,
            make_text=lambda params: None,
            deliver=self.deliver,
            on_fault=self.faults.append,
            clock=lambda: self.now,
        )

    def deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            told = self.outputs[output.request_id]
            assert not any(earlier.finished for earlier in told), "told something after the end"
            told.append(output)

    def answer(self, group: FakeGroup) -> bool:
        if group.results:
            self.engine.on_result(group, group.results.popleft())
            return True
        return False

    def finish(self) -> None:
        while any(self.answer(group) for group in self.groups):
            pass

    def tokens(self, request_id: str) -> list[int]:
        told = self.outputs[request_id]
        tokens = [token for output in told for token in output.token_ids]
        counted = 0
        for output in told:
            assert not output.token_ids or output.first_token_index == counted
            counted += len(output.token_ids)
        return tokens

    def finished(self, request_id: str) -> Finished:
        finished = self.outputs[request_id][-1].finished
        assert finished is not None, f"{request_id} has not ended"
        return finished


def params(prompt: list[int], seed: int = 1, max_tokens: int = 10) -> GenerationParams:
    return GenerationParams(
        prompt_token_ids=prompt,
        sampling=Sampling(seed=seed),
        max_tokens=max_tokens,
        eos_token_ids=frozenset({EOS}),
    )


# A prompt from which the fake model generates 30 tokens of 0 and 1.
LONG = next(
    prompt
    for prompt in ([n >> bit & 1 for bit in range(6)] for n in range(64))
    if not {None, EOS} & set(FakeModel().alone(prompt, 1, 30))
)


def test_a_request_is_told_its_start_its_tokens_and_its_end() -> None:
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])
    harness.engine.submit("a", params(LONG))
    harness.now = 2.0
    harness.finish()
    told = harness.outputs["a"]
    assert told[0].started is not None and told[0].started.prompt_tokens == len(LONG)
    assert harness.tokens("a") == FakeModel().alone(LONG, 1, 10)
    finished = harness.finished("a")
    assert finished.finish.reason == FinishReason.MAX_TOKENS
    assert finished.usage.completion_tokens == 10
    assert (finished.timing.queue, finished.timing.total) == (0.0, 2.0)
    assert harness.engine.num_live == 0


def test_without_a_worker_a_request_is_refused_with_a_time_to_retry() -> None:
    harness = Harness(1)
    with pytest.raises(RequestError) as refused:
        harness.engine.submit("a", params(LONG))
    assert refused.value.reason == Reason.NO_WORKERS
    assert refused.value.retry_after is not None
    assert harness.engine.num_live == 0


def test_a_full_queue_refuses() -> None:
    harness = Harness(1, max_queued=2)
    harness.engine.on_ready(harness.groups[0])
    for index in range(3):  # the first alone fills the pipeline
        harness.engine.submit(f"r{index}", params(LONG))
    with pytest.raises(RequestError) as refused:
        harness.engine.submit("r3", params(LONG))
    assert refused.value.reason == Reason.QUEUE_FULL
    assert harness.engine.num_queued == 2
    harness.finish()
    assert harness.engine.num_live == 0


def test_a_prompt_beyond_the_limit_is_refused_here_too() -> None:
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])
    with pytest.raises(RequestError) as refused:
        harness.engine.submit("a", params([0] * CONTEXT_LIMIT))
    assert refused.value.reason == Reason.CONTEXT_TOO_LONG


def test_an_impossible_result_is_a_fault_of_ours() -> None:
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])
    harness.engine.submit("a", params(LONG))
    assert harness.faults == []
    with pytest.raises(AssertionError):
        harness.engine.on_result(harness.groups[0], StepResult(step=7))
    assert len(harness.faults) == 1


def test_a_lost_worker_moves_its_requests_to_another() -> None:
    harness = Harness(2)
    for group in harness.groups:
        harness.engine.on_ready(group)
    for index in range(4):
        harness.engine.submit(f"r{index}", params(LONG))
    for _ in range(3):
        harness.answer(harness.groups[0])
    harness.groups[0].restart()
    harness.engine.on_lost(harness.groups[0], "killed", died=True)
    harness.finish()
    for index in range(4):
        assert harness.tokens(f"r{index}") == FakeModel().alone(LONG, 1, 10)
    recovered = [harness.finished(f"r{index}").timing.recoveries for index in range(4)]
    assert sum(recovered) >= 1


def test_requests_wait_for_the_only_worker_to_come_back() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    harness.engine.submit("a", params(LONG))
    harness.answer(group)
    group.restart()
    harness.engine.on_lost(group, "killed", died=True)
    assert not harness.engine.is_serving
    harness.now = 59.0
    harness.engine.tick()
    harness.engine.on_ready(group)
    harness.finish()
    assert harness.tokens("a") == FakeModel().alone(LONG, 1, 10)


def test_requests_do_not_wait_for_ever() -> None:
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])
    harness.engine.submit("a", params(LONG))
    harness.engine.on_lost(harness.groups[0], "killed", died=True)
    harness.now = 61.0
    harness.engine.tick()
    error = harness.finished("a").finish.error
    assert error is not None and error.reason == Reason.WORKER_LOST
    assert harness.engine.num_live == 0


def test_the_lone_suspect_of_two_deaths_is_poison_and_the_others_go_on() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    for name in ("poison", "b", "c"):
        harness.engine.submit(name, params(LONG))
    for _ in range(3):
        group.restart()
        harness.engine.on_lost(group, "died", died=True)
        harness.engine.on_ready(group)
    error = harness.finished("poison").finish.error
    assert error is not None and error.reason == Reason.POISON_REQUEST
    harness.finish()
    for name in ("b", "c"):
        assert harness.tokens(name) == FakeModel().alone(LONG, 1, 10)


def test_a_worker_that_did_not_die_leaves_no_suspect() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    harness.engine.submit("a", params(LONG))
    for _ in range(5):
        group.restart()
        harness.engine.on_lost(group, "frames were lost", died=False)
        harness.engine.on_ready(group)
    harness.finish()
    assert harness.tokens("a") == FakeModel().alone(LONG, 1, 10)
    assert harness.finished("a").timing.recoveries == 5


def test_cancel_ends_a_request_wherever_it_is() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    for index in range(9):
        harness.engine.submit(f"r{index}", params(LONG))
    assert harness.engine.cancel("r0")  # running
    assert harness.engine.cancel("r8")  # waiting
    assert not harness.engine.cancel("r0")
    harness.engine.on_lost(group, "killed", died=True)
    assert harness.engine.cancel("r1")  # without a worker
    group.restart()
    harness.engine.on_ready(group)
    harness.finish()
    reasons = [harness.finished(f"r{index}").finish.reason for index in range(9)]
    cancelled = [index for index, reason in enumerate(reasons) if reason == FinishReason.CANCELLED]
    assert cancelled == [0, 1, 8]
    assert harness.engine.num_live == 0


def test_a_request_goes_where_its_prefix_is_cached() -> None:
    harness = Harness(2)
    for group in harness.groups:
        harness.engine.on_ready(group)
    busy, cached = harness.groups[1], harness.groups[0]
    harness.engine.submit("first", params(LONG))
    harness.finish()
    assert harness.finished("first").timing.worker == cached.name
    for index in range(3):
        harness.engine.submit(f"again{index}", params(LONG))
        harness.finish()
        assert harness.finished(f"again{index}").timing.worker == cached.name
        assert harness.finished(f"again{index}").usage.cached_prompt_tokens == 4
    assert busy.worker.step == 0


@pytest.mark.parametrize("seed", range(12))
def test_random_histories_over_three_workers(seed: int) -> None:
    chance = random.Random(seed)
    harness = Harness(3, depth=chance.randint(1, 4))
    serving = dict.fromkeys(harness.groups, False)
    asked: dict[str, GenerationParams] = {}
    for index in range(1500):
        group = chance.choice(harness.groups)
        action = chance.choices(("submit", "answer", "toggle", "cancel"), (20, 60, 1.5, 1))[0]
        if action == "submit" and harness.engine.is_serving:
            prompt = [chance.randrange(2) for _ in range(chance.randint(1, 12))]
            asked[f"r{index}"] = params(prompt, chance.randrange(4), chance.randint(1, 20))
            harness.engine.submit(f"r{index}", asked[f"r{index}"])
        elif action == "answer" and serving[group]:
            harness.answer(group)
        elif action == "toggle":
            group.restart()
            if serving[group]:
                harness.engine.on_lost(group, "toggled", died=True)
            else:
                harness.engine.on_ready(group)
            serving[group] = not serving[group]
        elif action == "cancel" and asked:
            harness.engine.cancel(chance.choice(list(asked)))
    for group in harness.groups:
        if not serving[group]:
            group.restart()
            harness.engine.on_ready(group)
    harness.finish()
    assert len(asked) > 100 and harness.engine.num_live == 0
    for name, wanted in asked.items():
        tokens, reason = expected(FakeModel(), wanted, CONTEXT_LIMIT)
        finish = harness.finished(name).finish
        if finish.reason == FinishReason.CANCELLED or (
            finish.error and finish.error.reason == Reason.POISON_REQUEST
        ):
            assert harness.tokens(name) == tokens[: len(harness.tokens(name))]
        else:
            assert (harness.tokens(name), finish.reason) == (tokens, reason)
