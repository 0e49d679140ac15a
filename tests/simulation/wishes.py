"""What callers ask for: requests drawn at random, of tenants, in conversations, good and bad.

Owns the distribution. Does not know the router, nor what becomes of a request.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from zlib import crc32

from mili.internal.v1.step_pb2 import (
    GRAMMAR_KIND_REGEX,
    TASK_EMBED,
    TASK_GENERATE,
    TASK_SCORE,
    Sampling,
)
from mili.router.params import Constraint, GenerationParams, Scheduling
from tests.fake_worker import EOS, seed_of
from tests.simulation.worker_process import DEADLY_TOP_K, MAX_MODEL_LEN

TENANT_BYTES = 16


def namespace_of(tenant: str, salt: str) -> bytes:
    """Whose cache: nobody's in particular, a tenant's, or a part of a tenant's."""
    parts = [part for part in (tenant, salt and tenant + "/" + salt) if part]
    return b"".join(blake2b(part.encode(), digest_size=TENANT_BYTES).digest() for part in parts)


class Wishes:
    """Draws requests. Prompts begin alike, so that prefixes are shared, and cached, and missed."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng
        self._tenants = rng.choice((("",), ("", "a"), ("a", "b", "c")))
        self._deadly = rng.random() < 0.3
        self._prefixes = [self._tokens(rng.randint(0, 24)) for _ in range(3)]
        self._conversations: deque[Sequence[int]] = deque(maxlen=6)

    def remember(self, tokens: Sequence[int]) -> None:
        """A conversation that may go on from here."""
        self._conversations.append(tokens)

    def draw(self, now: float) -> GenerationParams:
        """What somebody asks for at `now`, in seconds of the router's clock."""
        rng = self._random
        tenant = rng.choice(self._tenants)
        namespace = namespace_of(tenant, rng.choice(("", "", "salt")) if tenant else "")
        tag = crc32(namespace).to_bytes(4, "big") if namespace else b""
        sampling = Sampling(
            seed=seed_of(rng.randrange(3), tag), presence_penalty=rng.choice((0, 0, 1.5))
        )
        if self._deadly and rng.random() < 0.02:
            sampling.top_k = DEADLY_TOP_K
        stops = tuple("".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(2))
        params = GenerationParams(
            prompt_token_ids=self._prompt(),
            sampling=sampling,
            max_tokens=rng.choice((1, 8, 20, 30, 60)),
            min_tokens=rng.choice((0, 0, 0, 9)),
            eos_token_ids=frozenset({EOS} if rng.random() < 0.7 else ()),
            stop_token_ids=frozenset({1} if rng.random() < 0.05 else ()),
            stop_sequences=stops[: rng.randint(1, 2)] if rng.random() < 0.3 else (),
            include_stop_text=rng.random() < 0.3,
            text=rng.random() < 0.7,
            cache_namespace=namespace,
            cache_read=rng.random() < 0.9,
            cache_write=rng.random() < 0.9,
            scheduling=self._scheduling(tenant, now),
            num_sequences=rng.choice((2, 3, 5)) if rng.random() < 0.2 else 1,
            constraint=self._constraint(),
        )
        return self._with_readings(params) if rng.random() < 0.2 else params

    def _with_readings(self, params: GenerationParams) -> GenerationParams:
        """Log-probabilities of some tokens; or nothing is generated at all, and the model read."""
        rng = self._random
        asked = replace(
            params,
            num_logprobs=rng.choice((None, 0, 2)),
            num_prompt_logprobs=rng.choice((None, 0, 3)),
            score_from=rng.randint(1, len(params.prompt_token_ids)),
        )
        task = rng.choice((TASK_GENERATE, TASK_EMBED, TASK_SCORE))
        if task == TASK_GENERATE:
            return asked
        plain = replace(asked, text=False, stop_sequences=(), num_sequences=1, constraint=None)
        return replace(plain, task=task, max_tokens=1, min_tokens=0)

    def easy(self) -> GenerationParams:
        """A request that no healthy server has a reason to refuse or to end early."""
        patient = Scheduling(max_queue_time=60.0)
        return GenerationParams(self._tokens(4), Sampling(seed=1), 4, scheduling=patient)

    def _prompt(self) -> list[int]:
        rng = self._random
        if self._conversations and rng.random() < 0.3:
            begun = list(rng.choice(self._conversations))
        else:
            begun = rng.choice(self._prefixes)
        if rng.random() < 0.01:
            return self._tokens(MAX_MODEL_LEN + rng.randrange(9))  # refused at the door
        return begun[: MAX_MODEL_LEN - 12] + self._tokens(rng.randint(1, 8))

    def _constraint(self) -> Constraint | None:
        """Runs of equal tokens, of which the worker refuses those of 13."""
        if self._random.random() < 0.8:
            return None
        length = self._random.choice((1, 2, 3, 3, 3, 13))
        return Constraint(GRAMMAR_KIND_REGEX, str(length))

    def _scheduling(self, tenant: str, now: float) -> Scheduling:
        rng = self._random
        hurried = rng.random() < 0.15
        return Scheduling(
            tenant=tenant,
            weight=1.0 + len(tenant),
            priority=rng.choice((0, 0, 0, 1, 2)),
            deadline=now + rng.uniform(0.2, 8.0) if hurried else math.inf,
            max_queue_time=rng.uniform(0.1, 5.0) if rng.random() < 0.1 else None,
            time_limit=rng.uniform(0.2, 5.0) if rng.random() < 0.1 else math.inf,
            session_id=rng.choice(("", "", "s1", "s2")),
        )

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(2) for _ in range(count)]
