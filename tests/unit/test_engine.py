"""The engine over several fake workers: placement, delivery, worker loss, cancel, time-outs."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Sequence

import pytest

from mili.internal.v1.step_pb2 import (
    GRAMMAR_KIND_REGEX,
    ROW_FAULT_KIND_GRAMMAR,
    Prepare,
    Prepared,
    RowFault,
    Sampling,
    StepCommand,
    StepResult,
)
from mili.router.engine import Engine
from mili.router.errors import Reason, RequestError
from mili.router.introspection import RequestState
from mili.router.limits import Limits
from mili.router.outcome import Finished, FinishReason, RequestOutput
from mili.router.params import Constraint, GenerationParams
from mili.router.pipeline import DEEP, SHALLOW, SHORT_STEP
from mili.router.preparation import MAX_UNUSED
from mili.router.recovery import MAX_DEATHS
from tests.fake_worker import EOS, FakeModel, FakeWorker, seed_of
from tests.scheduler_simulation import expected, sequence_id, sequences

CONTEXT_LIMIT = 40


class FakeGroup:
    """A worker group of one: executes at once, answers when told to."""

    weights_sha256 = b"w" * 32

    def __init__(self, name: str, num_blocks: int = 24, block_size: int = 2) -> None:
        self.name = name
        self.last_step_seconds = math.inf
        self.limits = Limits(
            num_blocks=num_blocks,
            block_size=block_size,
            max_rows=6,
            max_step_tokens=12,
            max_model_len=CONTEXT_LIMIT,
            vocab_size=3,
            capabilities=frozenset({"grammars"}),
        )
        self.restart()

    def restart(self) -> None:
        self.sent: deque[StepCommand] = deque()
        self.worker = FakeWorker(self.limits.num_blocks, self.limits.block_size, FakeModel())
        self.results: deque[StepResult] = deque()
        self.prepared: deque[Prepared] = deque()

    def prepare(self, prepare: Prepare) -> None:
        answer = self.worker.prepare(prepare)
        if answer is not None:
            self.prepared.append(answer)

    def send(self, command: StepCommand, samples: Sequence[bool], now: float) -> None:
        assert len(samples) == len(command.rows)
        self.sent.append(command)
        self.results.append(self.worker.execute(command))


class Harness:
    """An engine, a clock and what every request was told."""

    def __init__(self, groups: int, max_queued: int = 1000, depth: int | None = 2) -> None:
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
            told = self.outputs[sequence_id(output.request_id, output.index)]
            assert not any(earlier.finished for earlier in told), "told something after the end"
            told.append(output)

    def answer(self, group: FakeGroup) -> bool:
        if group.results:
            group.sent.popleft()
            self.engine.on_result(group, group.results.popleft())
            return True
        return False

    def prepare(self, group: FakeGroup) -> bool:
        if group.prepared:
            self.engine.on_prepared(group, group.prepared.popleft())
            return True
        return False

    def finish(self) -> None:
        while any(self.answer(group) or self.prepare(group) for group in self.groups):
            pass

    def tokens(self, request_id: str) -> list[int]:
        told = self.outputs[request_id]
        tokens = [token for output in told for token in output.token_ids]
        counted = 0
        for output in told:
            assert not output.token_ids or output.first_token_index == counted
            counted += len(output.token_ids)
        return tokens

    def check_told(self, request_id: str) -> None:
        """Everything was told once: the start before any token, and the end last."""
        told = self.outputs[request_id]
        starts = [index for index, output in enumerate(told) if output.started]
        tokens = [index for index, output in enumerate(told) if output.token_ids]
        if "\0" in request_id:
            assert not starts, "a sibling has no start of its own"
        else:
            assert len(starts) == 1 if tokens else len(starts) <= 1
            assert not tokens or starts[0] < tokens[0]
        assert [bool(output.finished) for output in told].index(True) == len(told) - 1

    def finished(self, request_id: str) -> Finished:
        finished = self.outputs[request_id][-1].finished
        assert finished is not None, f"{request_id} has not ended"
        return finished


def params(
    prompt: list[int], seed: int = 1, max_tokens: int = 10, grammar: str = ""
) -> GenerationParams:
    return GenerationParams(
        prompt_token_ids=prompt,
        sampling=Sampling(seed=seed),
        max_tokens=max_tokens,
        eos_token_ids=frozenset({EOS}),
        constraint=Constraint(GRAMMAR_KIND_REGEX, grammar) if grammar else None,
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
    assert harness.engine.weights_sha256 == FakeGroup.weights_sha256


def test_without_a_worker_a_request_is_refused_with_a_time_to_retry() -> None:
    harness = Harness(1)
    assert harness.engine.weights_sha256 == b""
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


def test_short_steps_need_one_more_in_flight() -> None:
    harness = Harness(1, depth=None)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    harness.engine.submit("a", params(LONG, max_tokens=20))
    assert len(group.sent) == SHALLOW == 2, "nothing is known of its steps yet"
    for seconds, depth in ((0.9 * SHORT_STEP, DEEP), (SHORT_STEP, SHALLOW), (1e-4, 3), (0.1, 2)):
        group.last_step_seconds = seconds
        harness.answer(group)
        harness.answer(group)
        assert len(group.sent) == depth, f"steps of {seconds} s"
    harness.finish()
    assert harness.tokens("a") == FakeModel().alone(LONG, 1, 20)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_depth_that_is_set_is_kept_however_short_the_steps(depth: int) -> None:
    harness = Harness(1, depth=depth)
    group = harness.groups[0]
    group.last_step_seconds = 1e-6
    harness.engine.on_ready(group)
    harness.engine.submit("a", params(LONG, max_tokens=20))
    assert len(group.sent) == depth
    group.last_step_seconds = 1.0
    harness.answer(group)
    assert len(group.sent) == depth


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


def die(harness: Harness, group: FakeGroup) -> None:
    group.restart()
    harness.engine.on_lost(group, "died", died=True)
    harness.engine.on_ready(group)


def computes(group: FakeGroup, prompt: list[int]) -> bool:
    """Whether the step that would be answered next computes a request with this prompt."""
    rows = group.sent[0].rows if group.sent else ()
    return any(list(group.worker.rows[row].token_ids[: len(prompt)]) == prompt for row in rows)


def test_what_kills_every_worker_is_found_and_nobody_else_suffers() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    names = [f"r{index}" for index in range(12)]
    deadly = [1, 1, 1, 1, 1, 1, 1, 1, 1]
    for name in names[:6]:
        harness.engine.submit(name, params(LONG))
    harness.engine.submit("poison", params(deadly))
    for name in names[6:]:
        harness.engine.submit(name, params(LONG))
    deaths = 0
    while group.sent:
        if computes(group, deadly):
            die(harness, group)
            deaths += 1
        else:
            harness.answer(group)
    error = harness.finished("poison").finish.error
    assert error is not None and error.reason == Reason.POISON_REQUEST
    assert deaths <= 5
    for name in names:
        assert harness.tokens(name) == FakeModel().alone(LONG, 1, 10)


def test_one_death_holds_up_nobody() -> None:
    """All go on at once: only a second death without a token between sets requests apart."""
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    for index in range(4):
        harness.engine.submit(f"r{index}", params(LONG))
    for _ in range(4):
        harness.answer(group)
    die(harness, group)
    scheduler = harness.engine.scheduler_of(group.name)
    assert scheduler is not None
    for _ in range(4):
        harness.answer(group)
    assert len(scheduler.running) == 4


def test_a_request_does_not_wear_out_workers_for_ever() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    harness.engine.submit("a", params(LONG, max_tokens=30))
    deaths = 0
    while harness.engine.num_live:
        told = len(harness.tokens("a"))
        while len(harness.tokens("a")) == told:  # a new token, and with it no suspicion
            harness.answer(group)
        if harness.engine.num_live:
            die(harness, group)
            deaths += 1
    error = harness.finished("a").finish.error
    assert error is not None and error.reason == Reason.WORKER_LOST
    assert deaths == MAX_DEATHS


def test_an_interrupted_stream_comes_before_those_that_wait() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    for index in range(3):
        harness.engine.submit(f"begun{index}", params(LONG, max_tokens=20))
    for _ in range(6):
        harness.answer(group)
    for index in range(40):
        harness.engine.submit(f"waits{index}", params(LONG))
    harness.engine.on_lost(group, "died", died=True)
    for index in range(10):
        harness.engine.cancel(f"waits{index}")  # and being without a home changes no order
    group.restart()
    harness.engine.on_ready(group)
    scheduler = harness.engine.scheduler_of(group.name)
    assert scheduler is not None
    order = [*scheduler.running, *scheduler.waiting]
    assert order[:3] == ["begun0", "begun1", "begun2"]
    assert order[3:] == [f"waits{index}" for index in range(10, 40)]


def test_a_worker_that_joins_takes_over_what_waits_elsewhere() -> None:
    harness = Harness(2)
    first, second = harness.groups
    harness.engine.on_ready(first)
    for index in range(40):
        harness.engine.submit(f"r{index}", params(LONG))
    harness.engine.on_ready(second)
    harness.finish()
    workers = [harness.finished(f"r{index}").timing.worker for index in range(40)]
    assert workers.count(second.name) >= 15
    assert harness.engine.num_live == 0


def test_a_worker_that_comes_back_smaller_still_serves_what_fits() -> None:
    harness = Harness(0)
    big, small = FakeGroup("w", num_blocks=20), FakeGroup("w", num_blocks=12)
    harness.groups = [big, small]
    harness.engine.on_ready(big)
    harness.engine.submit("a", params(LONG, max_tokens=1000))
    harness.answer(big)
    harness.engine.on_lost(big, "died", died=True)
    big.results.clear()
    harness.engine.on_ready(small)
    harness.finish()
    finish = harness.finished("a").finish
    assert finish.reason == FinishReason.CONTEXT_LENGTH
    assert harness.tokens("a") == FakeModel().alone(LONG, 1, 22 - len(LONG))


def test_requests_are_spread_over_workers_by_load() -> None:
    harness = Harness(2)
    for group in harness.groups:
        harness.engine.on_ready(group)
    for index in range(8):
        harness.engine.submit(f"r{index}", params([index >> bit & 1 for bit in range(6)]))
    harness.finish()
    workers = [harness.finished(f"r{index}").timing.worker for index in range(8)]
    assert workers.count("worker-0") == workers.count("worker-1") == 4


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


GRAMMARS = [Constraint(GRAMMAR_KIND_REGEX, source) for source in ("1", "2", "3", "13")]


def test_a_request_waits_for_its_grammar_and_holds_up_nobody() -> None:
    harness = Harness(1)
    (group,) = harness.groups
    harness.engine.on_ready(group)
    harness.engine.submit("held", params(LONG, grammar="2"))
    harness.engine.submit("free", params(LONG))
    assert harness.engine.num_queued == 1
    assert not any(command.admissions[0].grammar for command in group.sent if command.admissions)
    while harness.answer(group):
        pass
    assert harness.tokens("free") == FakeModel().alone(LONG, 1, 10)
    harness.now = 3.0
    harness.finish()
    assert harness.tokens("held") == FakeModel().alone(LONG, 1, 10, "2")
    assert harness.finished("held").timing.grammar_compile == 3.0
    assert harness.engine.num_live == harness.engine.num_queued == 0


def test_a_refused_grammar_fails_those_who_wait_for_it_and_is_asked_for_again() -> None:
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])
    for name in ("a", "b"):
        harness.engine.submit(name, params(LONG, grammar="13"))
    assert len(harness.groups[0].prepared) == 1
    harness.finish()
    for name in ("a", "b"):
        error = harness.finished(name).finish.error
        assert error is not None and error.reason == Reason.GRAMMAR_INVALID
        assert error.field == "generation.structured_output" and "no luck" in error.message
    assert not harness.groups[0].worker.refused  # a rank that has it ready would forget it
    harness.engine.submit("c", params(LONG, grammar="13"))
    assert len(harness.groups[0].prepared) == 1
    harness.finish()


def test_who_waits_for_a_grammar_can_be_cancelled_explained_and_lose_its_worker() -> None:
    harness = Harness(2)
    first, second = harness.groups
    harness.engine.on_ready(first)
    for name in ("a", "b"):
        harness.engine.submit(name, params(LONG, grammar="3"))
    explanation = harness.engine.operations.explain("b")
    assert explanation is not None and explanation.state == RequestState.QUEUED
    assert harness.engine.cancel("a")
    first.restart()
    harness.engine.on_lost(first, "killed", died=True)
    harness.engine.on_ready(second)
    harness.finish()
    assert harness.tokens("b") == FakeModel().alone(LONG, 1, 10, "3")
    assert harness.finished("a").finish.reason == FinishReason.CANCELLED
    assert harness.engine.num_live == 0


def test_grammars_that_nobody_uses_are_released() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    for number in range(14, 14 + 3 * MAX_UNUSED):
        harness.engine.submit(f"r{number}", params(LONG, grammar=str(number)))
        harness.finish()
    assert len(group.worker.grammars) <= 2 * MAX_UNUSED
    harness.engine.submit("again", params(LONG, grammar="14"))
    harness.engine.submit("recent", params(LONG, grammar=str(13 + 3 * MAX_UNUSED)))
    assert len(group.prepared) == 1
    harness.finish()


def test_a_grammar_that_fails_on_the_way_ends_the_request_alone() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)
    harness.engine.submit("a", params(LONG))
    for result in group.results:
        result.ClearField("token_ids")
        result.num_new[0] = 0
        result.faults.append(RowFault(index=0, kind=ROW_FAULT_KIND_GRAMMAR))
    harness.finish()
    error = harness.finished("a").finish.error
    assert error is not None and error.reason == Reason.GRAMMAR_TOO_COMPLEX


def test_workers_without_grammars_are_asked_for_none() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    assert not harness.engine.constrains_outputs and not harness.engine.max_running
    harness.engine.on_ready(group)
    assert harness.engine.constrains_outputs and harness.engine.max_running
    harness.engine.on_lost(group, "for the test", died=False)
    group.limits = group.limits._replace(capabilities=frozenset())
    harness.engine.on_ready(group)
    assert not harness.engine.constrains_outputs
    with pytest.raises(RequestError) as refused:
        harness.engine.submit("a", params(LONG, grammar="2"))
    assert refused.value.reason == Reason.UNSUPPORTED_FIELD
    assert refused.value.field == "generation.structured_output"


class History:
    """Random events over three groups of different and changing size, checked after each."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.block_size = self.random.choice((1, 2, 4))
        self.harness = Harness(0, max_queued=50, depth=self.random.randint(1, 4))
        self.engine = self.harness.engine
        self.harness.groups = [self.new_group(index) for index in range(3)]
        self.serving = [False] * 3
        self.asked: dict[str, tuple[GenerationParams, int]] = {}
        self.totals: Counter[str] = Counter()

    def new_group(self, index: int) -> FakeGroup:
        group = FakeGroup(f"g{index}", self.random.randint(12, 40), self.block_size)
        group.limits = group.limits._replace(
            max_rows=self.random.randint(2, 8), max_step_tokens=self.random.randint(1, 20)
        )
        return group

    def run(self, events: int) -> Counter[str]:
        actions = (
            self.submit, self.answer, self.toggle, self.cancel, self.engine.tick, self.drain,
            self.undrain, self.prepare,
        )  # fmt: skip
        for _ in range(events):
            self.harness.now += self.random.random() / 2
            self.random.choices(actions, (20, 60, 2, 1.5, 3, 1.5, 2, 15))[0]()
            self.check()
        for index in range(3):
            if not self.serving[index]:
                self.toggle(index)
            self.engine.operations.undrain(f"g{index}")
        self.harness.finish()
        self.harness.now += 1000
        self.engine.tick()
        self.check()
        assert self.engine.num_live == 0
        for name in self.asked:
            self.compare(name)
        return self.totals

    def submit(self) -> None:
        name = f"r{len(self.asked)}"
        namespace = self.random.choice((b"", b"t"))
        wanted = GenerationParams(
            prompt_token_ids=[self.random.randrange(2) for _ in range(self.random.randint(1, 12))],
            sampling=Sampling(seed=seed_of(self.random.randrange(3), namespace)),
            max_tokens=self.random.choice((3, 10, 40)),
            min_tokens=self.random.choice((0, 0, 4)),
            eos_token_ids=frozenset({EOS}),
            cache_namespace=namespace,
            num_sequences=self.random.choice((1, 1, 1, 2, 4)),
            constraint=self.random.choice((None, None, None, *GRAMMARS)),
        )
        try:
            self.engine.submit(name, wanted)
        except RequestError as error:
            self.totals[error.reason] += 1
        else:
            for index, alone in enumerate(sequences(wanted)):
                self.asked[sequence_id(name, index)] = alone, self.engine.context_limit

    def answer(self) -> None:
        self.harness.answer(self.random.choice(self.harness.groups))

    def prepare(self) -> None:
        self.harness.prepare(self.random.choice(self.harness.groups))

    def toggle(self, index: int | None = None) -> None:
        index = self.random.randrange(3) if index is None else index
        group = self.harness.groups[index]
        if self.serving[index]:
            self.harness.groups[index] = self.new_group(index)
            self.engine.on_lost(group, "toggled", died=self.random.random() < 0.5)
        else:
            self.engine.on_ready(group)
        self.serving[index] = not self.serving[index]

    def drain(self) -> None:
        index = self.random.randrange(3)
        if self.serving[index]:
            moved = self.engine.operations.drain(f"g{index}", self.random.choice((None, 0.0, 3.0)))
            self.totals["running when drained"] += moved

    def undrain(self) -> None:
        index = self.random.randrange(3)
        if self.serving[index]:
            self.engine.operations.undrain(f"g{index}")

    def cancel(self) -> None:
        if self.asked:
            self.engine.cancel(self.random.choice(list(self.asked)).split("\0")[0])

    def check(self) -> None:
        """I4: every live request is in exactly one place."""
        places: list[str] = []
        for index in range(3):
            scheduler = self.engine.scheduler_of(f"g{index}")
            assert (scheduler is not None) == self.serving[index]
            if scheduler is not None:
                scheduler.check()
                places += [*scheduler.running, *scheduler.waiting]
        assert len(set(places)) == len(places)
        assert len(places) <= self.engine.num_live
        assert self.engine.num_live <= len(places) + self.engine.num_queued

    def compare(self, name: str) -> None:
        wanted, limit = self.asked[name]
        finished, got = self.harness.finished(name), self.harness.tokens(name)
        self.harness.check_told(name)
        self.totals["siblings"] += "\0" in name
        tokens, reason = expected(FakeModel(), wanted, limit)
        end = finished.finish
        self.totals[end.reason.name] += 1
        if wanted.constraint and end.error is None:
            self.totals["held"] += 1
            self.totals["held and recovered"] += finished.timing.recoveries
            self.totals["held and preempted"] += finished.timing.preemptions
        self.totals["recoveries"] += finished.timing.recoveries
        self.totals["preemptions"] += finished.timing.preemptions
        # A worker may have come back with less room than there was.
        if end.error is not None:
            self.totals[end.error.reason] += 1
        cut = end.reason in (FinishReason.CANCELLED, FinishReason.CONTEXT_LENGTH)
        if cut or (end.error is not None and end.error.reason != Reason.NUMERIC_FAULT):
            assert got == tokens[: len(got)]
        else:
            assert (got, end.reason) == (tokens, reason)


@pytest.mark.parametrize("part", range(4))
def test_random_histories_over_three_workers(part: int) -> None:
    totals: Counter[str] = Counter()
    for seed in range(part * 15, part * 15 + 15):
        totals += History(seed).run(800)
    print(dict(totals))
    for happening in (
        "recoveries", "preemptions", "EOS", "MAX_TOKENS", "CANCELLED", "NO_WORKERS", "DRAINING",
        "running when drained", "siblings", "held", "held and recovered", "held and preempted",
        "GRAMMAR_INVALID",
    ):  # fmt: skip
        assert totals[happening] >= 20, (happening, totals)
    assert totals["EOS"] + totals["MAX_TOKENS"] > 500
