"""Penalties, biases and masks: the reference against the formulas, written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mili.internal.v1.step_pb2 import Admission, Sampling, StepCommand
from mili.kernels.reference_sampling import (
    MAX_COUNT,
    add_biases_,
    allow_only_,
    pack_mask,
    penalize_output_,
    suppress_,
)
from mili.worker.cpu.sampler import sample_rows
from mili.worker.cpu.sequence_table import CpuSequenceTable
from tests.chi_squared import assert_distributed

VOCAB = 9
TOKENS = st.integers(0, VOCAB - 1)
LISTS = st.lists(TOKENS, max_size=4)
# Numbers of few bits: then no operation rounds, and the formula below is exact.
EIGHTHS = st.integers(-16, 16).map(lambda n: n / 8)
LOGITS = st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=VOCAB, max_size=VOCAB)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[float], list[int], int, Sampling]:
    """Logits, known tokens, how many of them are the prompt, and how the row is sampled."""
    known = draw(st.lists(TOKENS, min_size=1, max_size=12))
    biased = draw(st.dictionaries(TOKENS, EIGHTHS, max_size=4))
    sampling = Sampling(
        repetition_penalty=draw(st.sampled_from((0, 1, 2, 0.5))),
        presence_penalty=draw(EIGHTHS),
        frequency_penalty=draw(EIGHTHS),
        bias_token_ids=sorted(biased),
        biases=[biased[token] for token in sorted(biased)],
        allowed_token_ids=draw(st.one_of(st.just([]), st.lists(TOKENS, min_size=1))),
        suppressed_token_ids=draw(LISTS),
        suppress_until_position=draw(st.integers(0, 14)),
    )
    return draw(LOGITS), known, draw(st.integers(1, len(known))), sampling


def admission(row: int, known: list[int], num_prompt: int, sampling: Sampling) -> Admission:
    token_ids = np.array(known, "<u4").tobytes()
    return Admission(row=row, token_ids=token_ids, num_prompt_tokens=num_prompt, sampling=sampling)


def edited(logits: list[float], known: list[int], num_prompt: int, s: Sampling) -> list[float]:
    """What the documents promise, for one token after the other."""
    biases = dict(zip(s.bias_token_ids, s.biases, strict=True))
    values = []
    for token, value in enumerate(logits):
        if token in known and s.repetition_penalty:
            factor = s.repetition_penalty
            value = value / factor if value > 0 else value * factor
        count = known[num_prompt:].count(token)
        value -= s.frequency_penalty * count + s.presence_penalty * (count > 0)
        value += biases.get(token, 0)
        if s.allowed_token_ids and token not in s.allowed_token_ids:
            value = -math.inf
        if token in s.suppressed_token_ids and len(known) < s.suppress_until_position:
            value = -math.inf
        values.append(value)
    return values


@settings(max_examples=300, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=4))
def test_every_edit_is_as_the_formulas_say(
    cases: list[tuple[list[float], list[int], int, Sampling]],
) -> None:
    """Greedy, so that the best token shows, and the logits are left as they were edited."""
    table = CpuSequenceTable(
        max_rows=5, max_model_len=32, block_size=16, num_blocks=20, vocab_size=VOCAB
    )
    admissions = [
        admission(row, known, num_prompt, sampling)
        for row, (_, known, num_prompt, sampling) in enumerate(cases, start=1)
    ]
    table.apply(StepCommand(admissions=admissions))
    logits = torch.tensor([case[0] for case in cases])
    tokens = sample_rows(logits, table, np.arange(1, len(cases) + 1))
    expected = [edited(*case) for case in cases]
    assert logits.tolist() == expected
    assert tokens.tolist() == [values.index(max(values)) for values in expected]


def test_a_row_that_is_admitted_again_keeps_no_edit() -> None:
    table = CpuSequenceTable(
        max_rows=2, max_model_len=32, block_size=16, num_blocks=20, vocab_size=VOCAB
    )
    limited = Sampling(allowed_token_ids=[3], bias_token_ids=[2], biases=[9])
    for sampling, expected in ((limited, 3), (Sampling(), 1), (Sampling(min_p=1), 1)):
        table.apply(StepCommand(admissions=[admission(1, [4, 5], 1, sampling)]))
        logits = torch.arange(VOCAB, 0, -1)[None].float().roll(1)
        assert sample_rows(logits, table, np.array([1])).tolist() == [expected]


def test_counts_end() -> None:
    logits = torch.zeros(1, 3)
    history = torch.ones(1, MAX_COUNT + 9, dtype=torch.int64)
    lengths, none = torch.tensor([MAX_COUNT + 9]), torch.tensor([0])
    penalize_output_(logits, history, none, lengths, torch.tensor([0.0]), torch.tensor([1.0]))
    assert logits.tolist() == [[0, -MAX_COUNT, 0]]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 4097])
def test_a_mask_has_a_bit_for_each_token(vocab_size: int) -> None:
    chosen = sorted({0, vocab_size // 2, vocab_size - 1})
    mask = pack_mask(chosen, vocab_size)
    assert (mask.dtype, len(mask)) == (torch.int32, -(-vocab_size // 32))
    words = [word % 2**32 for word in mask.tolist()]
    assert [t for t in range(vocab_size) if words[t // 32] >> t % 32 & 1] == chosen
    logits = torch.zeros(3, vocab_size)
    allow_only_(logits, torch.tensor([1]), mask[None])
    assert (logits[1] == 0).nonzero().flatten().tolist() == chosen
    assert (logits[[0, 2]] == 0).all()


PROBABILITIES = torch.tensor([0.05, 0.30, 0.003, 0.15, 0.10, 0.02, 0.25, 0.08, 0.017, 0.03])
LN2 = math.log(2)
TWICE = torch.ones(10).index_fill_(0, torch.tensor([1, 6]), 2)


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        # Generated: token 1 three times, token 6 once; in the prompt: token 3.
        ({"presence_penalty": LN2}, 1 / TWICE),
        ({"presence_penalty": -LN2}, TWICE),
        ({"frequency_penalty": LN2}, torch.tensor([1, 1 / 8, 1, 1, 1, 1, 1 / 2, 1, 1, 1])),
        ({"bias_token_ids": [1, 6], "biases": [LN2, LN2]}, TWICE),
        ({"bias_token_ids": [1, 6], "biases": [-100, -100]}, TWICE == 1),
        ({"allowed_token_ids": [1, 6]}, TWICE == 2),
        ({"presence_penalty": LN2, "bias_token_ids": [1, 6], "biases": [LN2, LN2]}, torch.ones(10)),
        # An edit comes before the temperature: at 0.5 it weighs twice.
        ({"temperature": 0.5, "presence_penalty": LN2}, PROBABILITIES / TWICE**2),
        # And before the filters: penalized, token 1 is the third.
        ({"top_k": 2, "frequency_penalty": LN2}, torch.tensor([0, 0, 0, 1, 0, 0, 0.5, 0, 0, 0])),
    ],
)
def test_distribution(fields: dict[str, object], weights: torch.Tensor) -> None:
    """Pearson's chi-squared: the seed differs from row to row."""
    draws = 2000
    known = [3, 3, 1, 1, 6, 1]
    table = CpuSequenceTable(
        max_rows=draws + 1, max_model_len=8, block_size=4, num_blocks=9, vocab_size=10
    )
    command = StepCommand()
    for row in range(1, draws + 1):
        seed = row * 0x9E3779B97F4A7C15 % 2**64
        sampling = Sampling(**{"temperature": 1, **fields}, seed=seed)  # type: ignore[arg-type]
        command.admissions.append(admission(row, known, 2, sampling))
    table.apply(command)
    logits = (PROBABILITIES.log() + 3).repeat(draws, 1)
    tokens = sample_rows(logits, table, np.arange(1, draws + 1))
    expected = PROBABILITIES * weights
    assert_distributed(tokens, expected / expected.sum())


def test_wrong_shapes_are_refused() -> None:
    doubles, one = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0])
    for edit in (
        lambda: add_biases_(doubles, one, one, torch.ones(1)),
        lambda: allow_only_(doubles, one, pack_mask([1], 3)[None]),
        lambda: suppress_(doubles, one, one),
    ):
        with pytest.raises(ValueError, match="float32"):
            edit()
    with pytest.raises(ValueError, match="one value for each of 2 rows"):
        penalize_output_(torch.zeros(2, 3), one, one, one, torch.ones(1), torch.ones(1))
