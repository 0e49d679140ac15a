"""The sequences of one call: seeds, the shared prompt, who ends with whom, and the sums."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mili.internal.v1.step_pb2 import Sampling
from mili.router.errors import Reason, RequestError
from mili.router.outcome import Finished, FinishReason
from mili.router.params import GenerationParams, Scheduling
from mili.router.siblings import sequence_seed
from tests.fake_worker import EOS, FakeModel
from tests.scheduler_simulation import sequence_id, sequences
from tests.unit.test_engine import LONG, FakeGroup, Harness, params

BLOCK = 16
PROMPT_TOKENS = 4096


def asked(count: int, max_tokens: int = 10, prompt: list[int] = LONG) -> GenerationParams:
    return replace(
        params(prompt, max_tokens=max_tokens), num_sequences=count, eos_token_ids=frozenset({EOS})
    )


def roomy(name: str) -> FakeGroup:
    """A group for long prompts, whose model never faults and never says EOS."""
    group = FakeGroup(name, num_blocks=600, block_size=BLOCK)
    group.limits = group.limits._replace(max_rows=17, max_step_tokens=512, max_model_len=5000)
    group.worker.model = FakeModel(eos_every=10**9, fault_every=10**9)
    return group


def long_harness(groups: int = 1) -> Harness:
    harness = Harness(0)
    harness.groups = [roomy(f"worker-{index}") for index in range(groups)]
    for group in harness.groups:
        harness.engine.on_ready(group)  # type: ignore[arg-type]
    return harness


def names(call: str, count: int) -> list[str]:
    return [sequence_id(call, index) for index in range(count)]


def ends(harness: Harness, call: str, count: int) -> list[Finished]:
    """Of each sequence that has ended, in the order of the indices."""
    outputs = [harness.outputs[name] for name in names(call, count)]
    return [told[-1].finished for told in outputs if told and told[-1].finished]


def test_seeds_differ_and_the_first_is_the_calls_own() -> None:
    for seed in (0, 1, 2**64 - 1, 0x1234_5678_9ABC_DEF0):
        seeds = [sequence_seed(seed, index) for index in range(128)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 128
        assert all(0 <= each < 2**64 for each in seeds)
        assert seeds == [
            alone.sampling.seed
            for alone in sequences(GenerationParams([1], Sampling(seed=seed), 1, num_sequences=128))
        ]


def test_each_sequence_is_what_its_seed_gives_alone() -> None:
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])  # type: ignore[arg-type]
    harness.engine.submit("a", asked(5))
    assert harness.engine.num_live == 5
    harness.finish()
    for name, alone in zip(names("a", 5), sequences(asked(5)), strict=True):
        harness.check_told(name)
        tokens = FakeModel().alone(LONG, alone.sampling.seed, 10)
        got = harness.tokens(name)
        assert got == tokens[: len(got)]
        assert len(got) == 10 or tokens[len(got)] is None or got[-1] == EOS
    assert len({tuple(harness.tokens(name)) for name in names("a", 5)}) > 1
    assert harness.engine.num_live == harness.engine.num_queued == 0


def test_siblings_compute_one_block_each_at_most() -> None:
    harness = long_harness()
    prompt = [index * 7 // 3 % 2 for index in range(PROMPT_TOKENS)]
    harness.engine.submit("a", asked(8, 4, prompt))
    harness.finish()
    assert all(len(harness.tokens(name)) == 4 for name in names("a", 8))
    computed = harness.groups[0].worker.computed_tokens - 8 * 3  # all but the last output token
    assert PROMPT_TOKENS <= computed <= PROMPT_TOKENS + 8 * BLOCK


def test_siblings_follow_the_first_though_another_group_is_idle() -> None:
    harness = long_harness(2)
    prompt = [index % 2 for index in range(PROMPT_TOKENS)]
    harness.engine.submit("a", asked(8, 4, prompt))
    harness.finish()
    assert sorted(group.worker.computed_tokens > 0 for group in harness.groups) == [False, True]


def test_one_heir_computes_the_prompt_where_the_first_ones_group_drains() -> None:
    harness = long_harness(2)
    prompt = [index % 3 % 2 for index in range(PROMPT_TOKENS)]
    harness.engine.submit("a", asked(8, 4, prompt))
    first, other = sorted(harness.groups, key=lambda group: -group.worker.computed_tokens)
    harness.engine.operations.drain(first.name, None)
    harness.finish()
    assert all(len(harness.tokens(name)) == 4 for name in names("a", 8))
    assert first.worker.computed_tokens == PROMPT_TOKENS + 3
    assert other.worker.computed_tokens <= PROMPT_TOKENS + 6 * BLOCK + 7 * 3


@pytest.mark.parametrize("answered", [1, 9])
def test_they_go_on_elsewhere_when_the_first_ones_worker_dies(answered: int) -> None:
    """During the prompt, and while they all run."""
    harness = long_harness(2)
    prompt = [index % 5 % 2 for index in range(PROMPT_TOKENS)]
    harness.engine.submit("a", asked(8, 20, prompt))
    first, other = sorted(harness.groups, key=lambda group: -group.worker.computed_tokens)
    for _ in range(answered):
        harness.answer(first)
    harness.groups = [other]
    harness.engine.on_lost(first, "died", died=True)  # type: ignore[arg-type]
    harness.finish()
    for name in names("a", 8):
        harness.check_told(name)
        assert len(harness.tokens(name)) == 20
    last = max(ends(harness, "a", 8), key=lambda end: -end.num_left)
    assert last.timing.recoveries == (1 if answered == 1 else 8)


def test_a_first_one_without_its_row_has_published_nothing() -> None:
    """Preempted while its first token was under way: the others wait until it has come back."""
    harness = long_harness()
    group = harness.groups[0]
    prompt = [index % 3 % 2 for index in range(40)]
    harness.engine.submit("a", asked(4, 6, prompt))
    scheduler = harness.engine.schedulers[group.name]
    scheduler.preempt_all()
    harness.answer(group)
    assert len(scheduler.waiting) + len(scheduler.running) == 1
    harness.finish()
    assert all(len(harness.tokens(name)) == 6 for name in names("a", 4))
    assert group.worker.computed_tokens <= 2 * len(prompt) + 3 * BLOCK + 4 * 5


def faulting_prompt() -> list[int]:
    """One after which the first of three sequences faults at once, and the others do not."""
    for number in range(1 << 14):
        prompt = [number >> bit & 1 for bit in range(14)]
        seeds = [sequence_seed(1, index) for index in range(3)]
        first, *others = [FakeModel().alone(prompt, seed, 3) for seed in seeds]
        if first[0] is None and not any(None in each or EOS in each for each in others):
            return prompt
    raise AssertionError("no prompt faults")


def test_one_that_fails_alone_leaves_the_call_and_its_heir_computes_the_prompt() -> None:
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])  # type: ignore[arg-type]
    harness.engine.submit("a", asked(3, 3, faulting_prompt()))
    harness.finish()
    first, *others = ends(harness, "a", 3)
    assert first.finish.error is not None and first.finish.error.reason == Reason.NUMERIC_FAULT
    assert first.num_left == 2 and first.failure is None
    assert [end.finish.reason for end in others] == [FinishReason.MAX_TOKENS] * 2
    assert [end.failure for end in others] == [None] * 2
    assert harness.engine.num_live == 0


def test_all_failed_is_the_failure_of_the_call() -> None:
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])  # type: ignore[arg-type]
    harness.groups[0].worker.model = FakeModel(fault_every=1)
    harness.engine.submit("a", asked(3))
    harness.finish()
    finished = sorted(ends(harness, "a", 3), key=lambda end: -end.num_left)
    assert [end.failure is None for end in finished] == [True, True, False]


def test_cancel_ends_every_sequence_wherever_it_is() -> None:
    harness = Harness(1)
    group = harness.groups[0]
    harness.engine.on_ready(group)  # type: ignore[arg-type]
    for name, answers in (("early", 0), ("late", 4)):
        harness.engine.submit(name, asked(3, 30))
        for _ in range(answers):
            harness.answer(group)
        assert harness.engine.cancel(name)
        assert not harness.engine.cancel(name)
        reasons = [end.finish.reason for end in ends(harness, name, 3)]
        assert reasons == [FinishReason.CANCELLED] * 3
        harness.finish()
    assert harness.engine.num_live == harness.engine.num_queued == 0
    assert harness.engine.schedulers[group.name].kv.usage().held == 0


@pytest.mark.parametrize("limit", ["deadline", "time_limit", "max_queue_time"])
def test_times_hold_for_all_of_a_call(limit: str) -> None:
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])  # type: ignore[arg-type]
    for index in range(6):  # the rows are taken
        harness.engine.submit(f"other{index}", params(LONG, max_tokens=30))
    scheduling = Scheduling()._replace(**{limit: 5.0})
    harness.engine.submit("a", replace(asked(3), scheduling=scheduling))
    harness.now = 6.0
    harness.engine.tick()
    finished = ends(harness, "a", 3)
    assert len(finished) == 3
    assert len({end.finish for end in finished}) == 1 or limit == "deadline"
    harness.finish()
    assert harness.engine.num_live == 0


def test_who_has_begun_is_not_late_for_the_queue() -> None:
    """The siblings wait for the prompt longer than they might wait in the queue."""
    harness = long_harness()
    prompt = [index % 2 for index in range(PROMPT_TOKENS)]
    patient = replace(asked(3, 4, prompt), scheduling=Scheduling(max_queue_time=1.0))
    harness.engine.submit("a", patient)
    harness.now = 2.0
    harness.engine.tick()
    assert harness.engine.num_live == 3
    harness.finish()
    assert all(len(harness.tokens(name)) == 4 for name in names("a", 3))


def test_poison_takes_all_that_wait_for_its_prompt_along() -> None:
    """One prompt must not kill two workers for each of its sequences."""
    harness = Harness(1)
    group = harness.groups[0]
    deaths = 0
    harness.engine.on_ready(group)  # type: ignore[arg-type]
    harness.engine.submit("a", asked(4))
    while harness.engine.num_live:
        deaths += 1
        harness.engine.on_lost(group, "died", died=True)  # type: ignore[arg-type]
        group.restart()
        harness.engine.on_ready(group)  # type: ignore[arg-type]
    assert deaths <= 4
    reasons = {end.finish.error and end.finish.error.reason for end in ends(harness, "a", 4)}
    assert reasons == {Reason.POISON_REQUEST}


def test_usage_is_of_the_call_and_the_prompt_counts_once() -> None:
    harness = long_harness()
    prompt = [index % 2 for index in range(100)]
    harness.engine.submit("before", params(prompt, max_tokens=1))
    harness.finish()
    harness.now = 1.0
    harness.engine.submit("a", asked(3, 5, prompt))
    harness.now = 2.0
    harness.finish()
    last = next(end for end in ends(harness, "a", 3) if not end.num_left)
    assert last.usage.prompt_tokens == 100
    assert last.usage.cached_prompt_tokens == 96
    assert last.usage.completion_tokens == 15
    assert (last.timing.queue, last.timing.total) == (0.0, 1.0)
    meters = harness.engine.meters
    assert meters.generation_tokens[""] == 16 and meters.prompt_tokens[""] == 200
    assert meters.ended["", FinishReason.MAX_TOKENS] == 2, "a call is one request"


def test_more_than_run_together_are_refused() -> None:
    harness = Harness(1)
    harness.engine.on_ready(harness.groups[0])  # type: ignore[arg-type]
    harness.engine.submit("most", asked(5))
    with pytest.raises(RequestError) as refused:
        harness.engine.submit("more", asked(6))
    assert refused.value.reason == Reason.INVALID_FIELD
    assert refused.value.field == "generation.sampling.num_sequences"
    harness.finish()


def test_those_who_wait_for_a_sibling_count_as_queued_and_are_explained() -> None:
    harness = long_harness()
    prompt = [index % 2 for index in range(PROMPT_TOKENS)]
    harness.engine.submit("a", asked(4, 4, prompt))
    assert harness.engine.num_queued == harness.engine.operations.load().queued_requests == 3
    explained = harness.engine.operations.explain("a")
    assert explained is not None and explained.queue_position == 0
    harness.finish()
    explained = harness.engine.operations.explain("a")
    assert explained is not None and explained.usage.completion_tokens == 16
    assert any(event.detail.startswith("sequence 3: ") for event in explained.events)


def test_a_cache_that_may_not_be_read_is_not_read_by_siblings_either() -> None:
    harness = long_harness()
    prompt = [index % 2 for index in range(64)]
    harness.engine.submit("a", replace(asked(3, 2, prompt), cache_read=False))
    harness.finish()
    assert harness.groups[0].worker.computed_tokens == 3 * 64 + 3
