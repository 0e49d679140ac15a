"""Rows to sample, the GPU's state made from them, and what the reference makes of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from mili.kernels.reference_sampling import (
    SamplingRows,
    penalize_repetition_,
    sample,
    suppress_,
)
from mili.kernels.sampling import Sampler, SamplingTable

MAX_LEN = 300
UNTOUCHED = -77


class Rows(NamedTuple):
    """What each row is sampled with, on the CPU; `known` and `suppressed` are [rows, vocab]."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor
    seed: torch.Tensor
    suppress_until: torch.Tensor
    suppressed: torch.Tensor
    known: torch.Tensor
    position: torch.Tensor

    def at(self, index: torch.Tensor | list[int]) -> Rows:
        return Rows(*(column[index] for column in self))


def make_rows(count: int, vocab_size: int, **columns: float | torch.Tensor) -> Rows:
    """Rows with position = index; the parameters that are not given are off."""
    dtypes = {
        "top_k": torch.int64,
        "seed": torch.int64,
        "suppress_until": torch.int64,
        "position": torch.int64,
    }
    values: dict[str, torch.Tensor] = {}
    columns = {"position": torch.arange(count) % MAX_LEN, **columns}
    for name in Rows._fields:
        is_mask = name in ("suppressed", "known")
        dtype = torch.bool if is_mask else dtypes.get(name, torch.float32)
        shape = (count, vocab_size) if is_mask else (count,)
        values[name] = torch.as_tensor(columns.get(name, 0), dtype=dtype).expand(shape).contiguous()
    return Rows(**values)


def mixed_rows(count: int, vocab_size: int, generator: torch.Generator) -> Rows:
    """Every parameter on and off, alone and together."""

    def pick(*options: float) -> torch.Tensor:
        return torch.tensor(options)[torch.randint(len(options), (count,), generator=generator)]

    def mask() -> torch.Tensor:
        return torch.rand(count, vocab_size, generator=generator) < 0.2

    return make_rows(
        count,
        vocab_size,
        temperature=pick(0, 0.3, 0.7, 1, 1, 1, 1.5),
        top_k=pick(0, 0, 0, 1, 5, 50, 200, 1000, 5000, vocab_size - 1),
        top_p=pick(0, 0, 0, 0.1, 0.5, 0.9, 0.99, 1),
        min_p=pick(0, 0, 0, 0.001, 0.05, 0.5),
        repetition_penalty=pick(0, 0, 1, 1.3, 0.8),
        seed=torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        suppress_until=pick(0, 0, 100, MAX_LEN),
        suppressed=mask(),
        known=mask(),
        position=torch.randint(MAX_LEN, (count,), generator=generator),
    )


def random_logits(rows: int, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """Flat ones, peaked ones, and peaked ones with much at -infinity."""
    logits = torch.randn(rows, vocab_size, generator=generator)
    logits *= torch.tensor([0.3, 1.0, 3.0, 6.0])[torch.arange(rows) % 4, None]
    logits += torch.randn(rows, 1, generator=generator) * 10
    logits[3::8, ::2] = -torch.inf
    return logits


def adjusted(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The reference's penalties and suppressed tokens."""
    logits = logits.clone()
    for row in range(len(logits)):
        seen = rows.known[row].nonzero().flatten()[None]
        length = torch.tensor([seen.shape[1]])
        penalty = rows.repetition_penalty[row : row + 1]
        penalize_repetition_(logits[row : row + 1], seen, length, penalty)
        if rows.position[row] < rows.suppress_until[row]:
            tokens = rows.suppressed[row].nonzero().flatten()
            suppress_(logits, torch.full_like(tokens, row), tokens)
    return logits


def reference(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Tokens [rows] from adjusted logits."""

    def one(row: int) -> torch.Tensor:
        columns = (getattr(rows, name)[row : row + 1] for name in SamplingRows._fields)
        return sample(logits[row : row + 1], SamplingRows(*columns))

    with ThreadPoolExecutor(8) as pool:
        return torch.cat(list(pool.map(one, range(len(logits)))))


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """[rows, vocab] bool to [rows, words] int32."""
    padded = np.pad(mask.numpy(), ((0, 0), (0, -mask.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


class State(NamedTuple):
    """What the kernels read and write, on the GPU; sample i is of table row rows[i]."""

    table: SamplingTable
    sample_rows: torch.Tensor
    sample_positions: torch.Tensor
    sizes: torch.Tensor
    token_ids: torch.Tensor
    faulted: torch.Tensor
    out_tokens: torch.Tensor
    out_logprobs: torch.Tensor


def make_state(rows: Rows, table_rows: torch.Tensor, num_samples: int) -> State:
    """table_rows: [rows], all different, from 1 on; row 0 of the table is the null row."""
    count = int(table_rows.max()) + 1

    def column(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        table = torch.zeros(count, *values.shape[1:], dtype=dtype)
        table[table_rows] = values.to(dtype)
        return table.cuda()

    def filled(*shape: int, value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device="cuda")

    return State(
        table=SamplingTable(
            temperature=column(rows.temperature, torch.float32),
            top_k=column(rows.top_k, torch.int32),
            top_p=column(rows.top_p, torch.float32),
            min_p=column(rows.min_p, torch.float32),
            repetition_penalty=column(rows.repetition_penalty, torch.float32),
            seed=column(rows.seed, torch.int64),
            suppress_until=column(rows.suppress_until, torch.int32),
            suppressed=column(pack_bits(rows.suppressed), torch.int32),
            seen=column(pack_bits(rows.known), torch.int32),
        ),
        sample_rows=table_rows.to("cuda", torch.int32),
        sample_positions=rows.position.to("cuda", torch.int32),
        sizes=torch.tensor([0, 0, 0, num_samples], dtype=torch.int32, device="cuda"),
        token_ids=filled(count, MAX_LEN + 1, value=UNTOUCHED),
        faulted=filled(count, value=0),
        out_tokens=filled(len(table_rows), value=UNTOUCHED),
        out_logprobs=filled(len(table_rows), value=torch.nan, dtype=torch.float32),
    )


def run(logits: torch.Tensor, rows: Rows, table_rows: torch.Tensor | None = None) -> State:
    """Sample every row of logits, [rows, vocab] on the CPU."""
    if table_rows is None:
        table_rows = torch.arange(len(logits)) + 1
    state = make_state(rows, table_rows, len(logits))
    Sampler(logits.shape[1], len(logits)).sample(logits.cuda(), *state)
    return state
