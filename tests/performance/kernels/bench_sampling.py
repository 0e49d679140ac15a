"""Sampling at Qwen3's vocabulary: bytes are the logits, read once."""

from __future__ import annotations

import torch

from mili.kernels.sampling import Sampler
from tests.gpu.sampling_state import make_rows, make_state
from tests.performance.kernels.line import Line, line, timed

VOCAB_SIZE = 151_936
PARAMETERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "penalties": {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "all": {
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "suppress_until": 1000.0,
    },
}


def lines() -> list[Line]:
    return [
        _measure(rows, name, parameters)
        for rows in (1, 64, 256)
        for name, parameters in PARAMETERS.items()
    ]


def _measure(rows: int, name: str, parameters: dict[str, float]) -> Line:
    # As a step finds them: a few rows' logits in the L2 cache, where the projection left them.
    sets = 1 if rows == 1 else 2
    logits = torch.randn(sets, rows, VOCAB_SIZE, device="cuda") * 3
    table_rows = torch.arange(rows) + 1
    state = make_state(make_rows(rows, VOCAB_SIZE, seed=table_rows, **parameters), table_rows, rows)
    sampler = Sampler(VOCAB_SIZE, rows)
    seconds = timed([lambda x=x: sampler.sample(x, *state) for x in logits])
    return line(f"sampling, {name}", f"{rows} x {VOCAB_SIZE}", seconds, logits[0].nbytes, "GB/s")
