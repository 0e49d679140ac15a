"""Rows to sample, the GPU's state made from them, and what the reference makes of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from mili.kernels.reference_sampling import (
    SamplingRows,
    add_biases_,
    allow_only_,
    penalize_output_,
    penalize_repetition_,
    sample,
    suppress_,
)
from mili.kernels.sampling import Edit, Sampler, SamplingTable, allocate_sampling

MAX_LEN = 300
UNTOUCHED = -77


class Rows(NamedTuple):
    """What each row is sampled with, on the CPU; from `suppressed` on columns are [rows, vocab].

    allowed: read where `limited`. counts: of the output. biases: 0 where a token has none.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    seed: torch.Tensor
    suppress_until: torch.Tensor
    limited: torch.Tensor
    position: torch.Tensor
    suppressed: torch.Tensor
    known: torch.Tensor
    allowed: torch.Tensor
    counts: torch.Tensor
    biases: torch.Tensor

    def at(self, index: torch.Tensor | list[int]) -> Rows:
        return Rows(*(column[index] for column in self))


def make_rows(count: int, vocab_size: int, **columns: float | torch.Tensor) -> Rows:
    """Rows with position = index; the parameters that are not given are off."""
    integers = ("top_k", "seed", "suppress_until", "position", "counts")
    masks = ("limited", "suppressed", "known", "allowed")
    values: dict[str, torch.Tensor] = {}
    columns = {"position": torch.arange(count) % MAX_LEN, **columns}
    for name in Rows._fields:
        wide = name in ("suppressed", "known", "allowed", "counts", "biases")
        dtype = torch.int64 if name in integers else torch.float32
        dtype = torch.bool if name in masks else dtype
        shape = (count, vocab_size) if wide else (count,)
        values[name] = torch.as_tensor(columns.get(name, 0), dtype=dtype).expand(shape).contiguous()
    return Rows(**values)


def mixed_rows(count: int, vocab_size: int, generator: torch.Generator) -> Rows:
    """Every parameter on and off, alone and together."""

    def pick(*options: float) -> torch.Tensor:
        return torch.tensor(options)[torch.randint(len(options), (count,), generator=generator)]

    def mask(share: float = 0.2, *, second: bool = False) -> torch.Tensor:
        bits = torch.rand(count, vocab_size, generator=generator) < share
        bits[:, 1] = second  # for a token that may be drawn to be left in every row
        return bits

    # Of few tokens: a row has room for so many.
    biased = mask(min(0.2, 500 / vocab_size)) & (pick(0, 0, 1) > 0)[:, None]
    counts = torch.randint(1, 9, (count, vocab_size), generator=generator) * mask()
    counts[::7, :5] *= 5000

    return make_rows(
        count,
        vocab_size,
        temperature=pick(0, 0.3, 0.7, 1, 1, 1, 1.5),
        top_k=pick(0, 0, 0, 1, 5, 50, 200, 1000, 5000, vocab_size - 1),
        top_p=pick(0, 0, 0, 0.1, 0.5, 0.9, 0.99, 1),
        min_p=pick(0, 0, 0, 0.001, 0.05, 0.5),
        repetition_penalty=pick(0, 0, 1, 1.3, 0.8),
        presence_penalty=pick(0, 0, 0, 0.7, -1.1),
        frequency_penalty=pick(0, 0, 0, 0.3, -0.01),
        seed=torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        suppress_until=pick(0, 0, 100, MAX_LEN),
        suppressed=mask(),
        known=mask(),
        position=torch.randint(MAX_LEN, (count,), generator=generator),
        limited=pick(0, 0, 1),
        allowed=mask(0.6, second=True),
        counts=counts,
        biases=torch.randn(count, vocab_size, generator=generator) * 5 * biased,
    )


def random_logits(rows: int, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """Flat ones, peaked ones, and peaked ones with much at -infinity."""
    logits = torch.randn(rows, vocab_size, generator=generator)
    logits *= torch.tensor([0.3, 1.0, 3.0, 6.0])[torch.arange(rows) % 4, None]
    logits += torch.randn(rows, 1, generator=generator) * 10
    logits[3::8, ::2] = -torch.inf
    return logits


def adjusted(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The reference's penalties, biases and masks."""
    logits = logits.clone()
    masks = pack_bits(rows.allowed)
    for row in range(len(logits)):
        own, at = logits[row : row + 1], slice(row, row + 1)
        seen = rows.known[row].nonzero().flatten()[None]
        penalize_repetition_(own, seen, torch.tensor([seen.shape[1]]), rows.repetition_penalty[at])
        output = torch.arange(rows.counts.shape[1]).repeat_interleave(rows.counts[row])[None]
        begin, end = torch.tensor([0]), torch.tensor([output.shape[1]])
        penalties = rows.presence_penalty[at], rows.frequency_penalty[at]
        penalize_output_(own, output, begin, end, *penalties)
        biased = rows.biases[row].nonzero().flatten()
        add_biases_(own, torch.zeros_like(biased), biased, rows.biases[row, biased])
        if rows.limited[row]:
            allow_only_(own, torch.tensor([0]), masks[at])
        if rows.position[row] < rows.suppress_until[row]:
            tokens = rows.suppressed[row].nonzero().flatten()
            suppress_(own, torch.zeros_like(tokens), tokens)
    return logits


def edits_of(rows: Rows) -> torch.Tensor:
    """Bits of Edit, [rows]; with biases only where there are any."""
    penalizes = (rows.repetition_penalty != 0) & (rows.repetition_penalty != 1)
    counts = (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    return (
        Edit.REPETITION * penalizes
        + Edit.OUTPUT * counts
        + Edit.BIASES * rows.biases.any(dim=1)
        + Edit.ALLOWED * rows.limited
        + Edit.SUPPRESSED * (rows.suppress_until > 0)
    )


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


def make_table(rows: Rows, table_rows: torch.Tensor) -> SamplingTable:
    """table_rows: [rows], all different, from 1 on; row 0 of the table is the null row.

    What a row does not use is not zero but anything.
    """
    table = allocate_sampling(
        int(table_rows.max()) + 1, rows.suppressed.shape[1], torch.device("cpu")
    )
    for column in (table.bias_token_ids, table.biases, table.num_biases):
        column.fill_(77)
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "suppress_until"):
        getattr(table, name)[table_rows] = getattr(rows, name).to(getattr(table, name).dtype)
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        getattr(table, name)[table_rows] = getattr(rows, name)
    table.edits[table_rows] = edits_of(rows).int()
    table.suppressed[table_rows] = pack_bits(rows.suppressed)
    table.seen[table_rows] = pack_bits(rows.known)
    table.allowed_mask[table_rows] = pack_bits(rows.allowed)
    table.biased[table_rows] = pack_bits(rows.biases != 0)
    table.output_counts[table_rows, : rows.counts.shape[1]] = rows.counts.to(torch.int16)
    for row, biases in zip(table_rows.tolist(), rows.biases, strict=True):
        biased = biases.nonzero().flatten()
        table.num_biases[row] = len(biased)
        table.bias_token_ids[row, : len(biased)] = biased
        table.biases[row, : len(biased)] = biases[biased]
    return SamplingTable(*(column.cuda() for column in table))


def make_state(rows: Rows, table_rows: torch.Tensor, num_samples: int) -> State:
    """table_rows: as make_table has them."""
    count = int(table_rows.max()) + 1

    def filled(*shape: int, value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device="cuda")

    return State(
        table=make_table(rows, table_rows),
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
