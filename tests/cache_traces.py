"""Traces of prompts as users send them, and what a perfect LRU of the same size would hit.

Owns the traces and both ways to run them: through the KVCacheManager, and through an OrderedDict of
blocks that is never wrong about what was used last, and has neither locks nor spans.
"""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

from mili.internal.v1.step_pb2 import Sampling
from mili.router.kv_cache import KVCacheManager
from mili.router.params import GenerationParams
from mili.router.request import Request

BLOCK_SIZE = 16


class Call(NamedTuple):
    prompt: list[int]
    output: list[int]


def multi_turn(num_calls: int, seed: int = 0) -> list[Call]:
    """Conversations of up to 12 turns: each prompt is all that was said before, and a message.

    60 are open at a time; who has just got an answer is likelier to be the next to write.
    """
    chance = random.Random(seed)
    calls = []
    open_now: list[list[int]] = [[] for _ in range(60)]
    turns = [0] * 60
    recent = list(range(60))
    for _ in range(num_calls):
        who = recent.pop(min(int(chance.expovariate(1 / 15)), 59))
        recent.insert(0, who)
        if turns[who] == chance.randint(6, 12):
            open_now[who], turns[who] = [], 0
        prompt = open_now[who] + _tokens(chance, chance.randint(10, 200))
        output = _tokens(chance, chance.randint(20, 300))
        calls.append(Call(prompt, output))
        open_now[who] = prompt + output
        turns[who] += 1
    return calls


def shared_system_prompt(num_calls: int, seed: int = 0) -> list[Call]:
    """40 applications with a system prompt of 200 to 2,000 tokens, some asked far more than others,
    each call with a question of its own.
    """
    chance = random.Random(seed)
    systems = [_tokens(chance, chance.randint(200, 2000)) for _ in range(40)]
    popularity = [1 / (rank + 1) for rank in range(40)]
    return [
        Call(
            system + _tokens(chance, chance.randint(10, 200)),
            _tokens(chance, chance.randint(20, 200)),
        )
        for system in chance.choices(systems, popularity, k=num_calls)
    ]


def working_set(calls: Sequence[Call]) -> int:
    """Blocks of a cache that would never evict anything."""
    return len({key for call in calls for key in _keys(call)})


def hit_ratio(kv: KVCacheManager, calls: Sequence[Call], concurrency: int = 1) -> float:
    """Prompt tokens from the cache, of all prompt tokens. `concurrency` calls run at a time."""
    running: deque[tuple[Request, Call]] = deque()
    for number, call in enumerate(calls):
        while len(running) >= concurrency:
            _finish(kv, *running.popleft())
        params = GenerationParams(call.prompt, Sampling(seed=1), max_tokens=len(call.output))
        request = Request(str(number), params, context_limit=1 << 20)
        while kv.admit(request, headroom=0) is None:
            _finish(kv, *running.popleft())
        request.num_computed = len(request.token_ids)
        kv.publish(request, request.num_computed)
        request.token_ids.extend(call.output)
        while kv.grow(request, len(request.token_ids)) is None:
            _finish(kv, *running.popleft())
        running.append((request, call))
    for each in running:
        _finish(kv, *each)
    kv.check()
    return kv.counters.tokens_hit / kv.counters.tokens_asked


def perfect_hit_ratio(calls: Sequence[Call], num_blocks: int) -> float:
    """The same for `num_blocks` blocks of a perfect LRU, one call after the other."""
    cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first
    asked = hit = 0
    for call in calls:
        keys = _keys(call)
        usable = keys[: (len(call.prompt) - 1) // BLOCK_SIZE]
        matched = sum(1 for _ in itertools.takewhile(cached.__contains__, usable))
        asked += len(call.prompt)
        hit += matched * BLOCK_SIZE
        for key in reversed(keys):  # of what is used together, the end goes first
            cached[key] = None
            cached.move_to_end(key)
        while len(cached) > num_blocks:
            cached.popitem(last=False)
    return hit / asked


def _finish(kv: KVCacheManager, request: Request, call: Call) -> None:
    """All is computed but the last token, which was only sampled."""
    request.num_computed = len(request.token_ids) - 1
    kv.publish(request, request.num_computed)
    kv.release(request)


def _keys(call: Call) -> list[int]:
    """One number for each prefix of full, computed blocks."""
    tokens = tuple(call.prompt + call.output)[:-1]
    keys, key = [], 0
    for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE):
        key = hash((key, tokens[end - BLOCK_SIZE : end]))
        keys.append(key)
    return keys


def _tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(32_000) for _ in range(count)]
