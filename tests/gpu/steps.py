"""How the tests of this folder drive the GPU's runner: settings, sampling, and whole generations.

Owns nothing that is tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mili.internal.v1.step_pb2 import Sampling
from tests.step_driver import StepDriver

SETTINGS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "max_num_seqs": 64,
    "max_model_len": 2048,
    "num_gpu_blocks_override": 1200,
}
OUTPUT_TOKENS = 24
# As the router sends them: its defaults are not protobuf's.
GREEDY = Sampling(top_p=1.0, repetition_penalty=1.0)

# What is known of each row, prompt and output.
Tokens = Mapping[int, Sequence[int]]


def sampled(seed: int, **settings: Any) -> Sampling:  # noqa: ANN401
    return Sampling(
        **{"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": seed} | settings
    )


def generate(
    driver: StepDriver,
    inputs: Tokens,
    sampling: Mapping[int, Sampling] | None = None,
    *,
    output_tokens: int = OUTPUT_TOKENS,
    chunk: int = 1000,
    depth: int = 1,
) -> Tokens:
    """All rows together, in an epoch of their own."""
    driver.restart()
    for row, token_ids in inputs.items():
        driver.admit(row, token_ids, (sampling or {}).get(row, GREEDY))
    driver.run(list(inputs), output_tokens, chunk, depth)
    return driver.tokens
