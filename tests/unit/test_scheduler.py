"""The scheduling core against the model alone, and 20 planted bugs that it must show."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mili.internal.v1.step_pb2 import Sampling, StepResult
from mili.router import scheduler
from mili.router.limits import Limits
from mili.router.params import GenerationParams
from mili.router.request import Request
from tests.scheduler_simulation import Simulation

ROUTER = Path(__file__).parents[2] / "router"
CORE = (
    "limits",
    "block_pool",
    "eviction",
    "cache_memory",
    "radix_tree",
    "fair_share",
    "readings",
    "outcome",
    "params",
    "request",
    "queue",
    "step_plan",
    "kv_cache",
    "scheduler",
)


def load_core(changes: dict[str, tuple[str, str]] | None = None) -> SimpleNamespace:
    """The core's modules, loaded anew, with `changes[module] = (text, replacement)` made."""
    changes = changes or {}
    names = [f"mili.router.{module}" for module in CORE]
    originals = {name: sys.modules.get(name) for name in names}
    try:
        for module, name in zip(CORE, names, strict=True):
            path = ROUTER / f"{module}.py"
            source = path.read_text()
            if module in changes:
                old, new = changes[module]
                assert source.count(old) == 1, f"the text to change in {module}.py: {old!r}"
                source = source.replace(old, new)
            loaded = ModuleType(name)
            sys.modules[name] = loaded
            exec(compile(source, str(path), "exec"), loaded.__dict__)
        limits, outcome, request, scheduler = (
            sys.modules[f"mili.router.{module}"]
            for module in ("limits", "outcome", "request", "scheduler")
        )
    finally:
        for name, original in originals.items():
            if original is not None:
                sys.modules[name] = original
            else:
                sys.modules.pop(name, None)
    return SimpleNamespace(
        Scheduler=scheduler.Scheduler,
        Limits=limits.Limits,
        Request=request.Request,
        Finish=outcome.Finish,
        FinishReason=outcome.FinishReason,
    )


def run_simulations(core: SimpleNamespace, seeds: range) -> Counter[str]:
    """Run 130 requests a seed; what happened, counted."""
    return sum((Simulation(core, seed, 130).run() for seed in seeds), Counter())


@pytest.mark.parametrize("part", range(4))
def test_every_request_equals_the_model_alone(part: int) -> None:
    totals = run_simulations(load_core(), range(part * 40, (part + 1) * 40))
    print(dict(totals))
    assert totals["requests"] >= 5_000
    for happening in (
        "preemptions",
        "recoveries",
        "cache hits",
        "recomputed",
        "chunks",
        "crashes",
        "edits",
    ):
        assert totals[happening] >= 50, (happening, totals)
    assert totals["scored positions"] >= 2_000 and totals["vectors"] >= 50, totals
    assert totals["poisoned"] * 50 < totals["requests"], totals
    for reason in ("EOS", "STOP_TOKEN", "STOP_SEQUENCE", "MAX_TOKENS", "CONTEXT_LENGTH", "ERROR"):
        assert totals[reason] >= 20, (reason, totals)


# Each is a mistake that someone could make: (module, the right text, the wrong text).
PLANTED = {
    "an older admission's result counts": (
        "scheduler",
        "if request.admission == row.admission and fault is None",
        "if fault is None",
    ),
    "admitted again with a token pending": (
        "scheduler",
        "if request is None or request.num_pending:",
        "if request is None:",
    ),
    "a faulty block is published": ("scheduler", " and fault is None:", ":"),
    "published before it is computed": (
        "scheduler",
        "self.kv.publish(request, row.num_computed)",
        "self.kv.publish(request, len(request.token_ids))",
    ),
    "tokens of ended rows are not skipped": (
        "scheduler",
        "            token = next(tokens) if num_new else None\n"
        "            if request.finish is not None or request.is_cut:\n                continue\n",
        "            if request.finish is not None or request.is_cut:\n                continue\n"
        "            token = next(tokens) if num_new else None\n",
    ),
    "what comes after the end counts": (
        "scheduler",
        "            if request.finish is not None or request.is_cut:\n                continue\n",
        "",
    ),
    "what was sampled beside an edit counts": ("scheduler", " or request.is_cut:", ":"),
    "an edited request goes on as it was": (
        "scheduler",
        "            self._requeue(request)\n\n    def _preempt",
        "            pass\n\n    def _preempt",
    ),
    "an edited request stays cut": ("scheduler", "request.is_cut = False", "pass"),
    "added tokens are not known": (
        "scheduler",
        "self.pace.num_known += num_new",
        "self.pace.num_known += 1",
    ),
    "the oldest is preempted": ("scheduler", "= self.running.last", "= self.running.first"),
    "pending tokens survive the worker": (
        "scheduler",
        "request.num_computed = request.num_pending = 0",
        "request.num_computed = 0",
    ),
    "who left stays in line": ("queue", "del self._requests[self.index(request)]", "pass"),
    "row 0 is handed out": (
        "scheduler",
        "range(limits.max_rows - 1, 0, -1)",
        "range(limits.max_rows)",
    ),
    "chunks sample": ("scheduler", "request.num_pending += samples", "request.num_pending += 1"),
    "new blocks are not sent": (
        "scheduler",
        "        if blocks:\n            plan.add_blocks(request.row, blocks)\n        return True",
        "        return True",
    ),
    "admissions ignore the budget": (
        "scheduler",
        "            count = min(admitted.num_schedulable, budget)",
        "            count = admitted.num_schedulable",
    ),
    "the last token comes from the cache": (
        "kv_cache",
        "(min(len(request.token_ids), request.score_from) - 1) // self",
        "min(len(request.token_ids), request.score_from) // self",
    ),
    "a block too few": ("kv_cache", "-(-num_tokens // self", "(num_tokens // self"),
    "tenants share a cache": (
        "kv_cache",
        "node, cached = self._tree.lock(request.namespace,",
        'node, cached = self._tree.lock(b"",',
    ),
    "duplicates leak": ("kv_cache", "self.duplicates + self.blocks", "self.blocks"),
    "published blocks are freed": ("kv_cache", "self.blocks[self.num_published :]", "self.blocks"),
    "a refused admission keeps its lock": (
        "kv_cache",
        "            self._tree.unlock(node)\n            return None",
        "            return None",
    ),
    "duplicates are shared": ("radix_tree", "duplicates = blocks[:done]", "duplicates = []"),
    "only the last node is unlocked": (
        "radix_tree",
        "            at = at.parent\n        if",
        "            at = None\n        if",
    ),
    "the upper half of a split is not locked": (
        "radix_tree",
        "        upper.locks = node.locks\n",
        "",
    ),
    "locked spans are evicted": (
        "radix_tree",
        "not self.children and self.locks == 0",
        "not self.children",
    ),
    "inner spans are evicted": (
        "radix_tree",
        "and not self.children and self.locks == 0",
        "and self.locks == 0",
    ),
    "a span shared by two grows in place": (
        "radix_tree",
        "not node.children and node.locks == 1",
        "not node.children",
    ),
    "an edge matches by its first block": (
        "radix_tree",
        "if key.startswith(node.key, start):",
        "if key:",
    ),
    "a block is freed twice unseen": (
        "eviction",
        "return node.is_evictable and node.last_used == last_used",
        "return True",
    ),
    "min_tokens is one short": ("request", "num_output > params.min", "num_output >= params.min"),
    "what an older admission read is not counted": (
        "scheduler",
        "        request.peak_computed = max(request.peak_computed, row.num_computed)",
        "        if request.admission == row.admission:\n"
        "            request.peak_computed = max(request.peak_computed, row.num_computed)",
    ),
    "scored positions come from the cache": (
        "kv_cache",
        "min(len(request.token_ids), request.score_from)",
        "len(request.token_ids)",
    ),
    "a task never ends": ("scheduler", "        elif row.samples:\n", "        elif False:\n"),
    "the context limit is one too far": (
        "request",
        "if num_tokens < self.max_length:\n",
        "if num_tokens <= self.max_length:\n",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str) -> None:
    module, old, new = PLANTED[name]
    core = load_core({module: (old, new)})
    with pytest.raises((AssertionError, LookupError, TypeError, ValueError)):
        run_simulations(core, range(400))


def test_one_command_admits_no_more_than_a_frame_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests whose prompts are cached cost no budget, and their tokens travel all the same."""
    monkeypatch.setattr(scheduler, "MAX_ADMITTED_TOKENS", 250)
    core = scheduler.Scheduler(
        Limits(
            num_blocks=500, block_size=4, max_rows=32, max_step_tokens=64, max_model_len=400,
            vocab_size=9,
        )
    )  # fmt: skip
    for number in range(6):
        params = GenerationParams([1] * 100, Sampling(seed=1), max_tokens=2)
        core.add(Request(str(number), params, context_limit=400))
    admitted = []
    while core.waiting:
        command = core.schedule()
        assert command is not None
        sizes = [len(admission.token_ids) // 4 for admission in command.admissions]
        assert sum(sizes) <= 250
        admitted += sizes
        rows = core.in_flight[0].rows
        core.update(
            StepResult(
                step=command.step,
                num_new=[int(row.samples) for row in rows],
                token_ids=[1] * sum(row.samples for row in rows),
            )
        )
    assert admitted == [100] * 6
