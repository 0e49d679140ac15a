"""The sampling kernels against the reference on the CPU, and against exact distributions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cupy")

from mili.kernels.reference_sampling import MAX_BIASES, MAX_COUNT, exponentials
from mili.kernels.sampling import Edit, Sampler
from tests.gpu.sampling_state import (
    MAX_LEN,
    UNTOUCHED,
    Rows,
    adjusted,
    edits_of,
    make_rows,
    make_state,
    mixed_rows,
    pack_bits,
    random_logits,
    reference,
    run,
)

pytestmark = pytest.mark.gpu


def is_close_call(logits: torch.Tensor, rows: Rows, row: int, got: int) -> str:
    """Empty if rounding explains the token: its score is within 1e-5 of the best, or a filter's
    boundary within 2e-6 of it. Otherwise what is wrong. logits: [vocab], adjusted."""
    if rows.temperature[row] == 0:
        return "" if logits[got] == logits.max() else f"logit {logits[got]} of {logits.max()}"
    scores = (logits.double() - logits.max()) / rows.temperature[row].double()
    sure = scores > -torch.inf
    maybe = sure.clone()
    if 0 < (top_k := int(rows.top_k[row])) < len(scores):
        least = scores.topk(top_k).values[-1]
        maybe &= scores >= least
        sure &= (scores > least) | (int((scores >= least).sum()) == top_k)
    if 0 < (top_p := float(rows.top_p[row])) < 1:
        left = scores.masked_fill(~maybe, -torch.inf)
        order = left.argsort(descending=True)
        probabilities = left.softmax(dim=0)[order]
        before = torch.empty_like(left)
        before[order] = probabilities.cumsum(0) - probabilities
        maybe &= before < top_p + 2e-6
        sure &= before < top_p - 2e-6
    if (min_p := float(rows.min_p[row])) > 0:
        maybe &= scores.exp() >= min_p * (1 - 1e-5)
        sure &= scores.exp() >= min_p * (1 + 1e-5)
    sure[scores.argmax()] = maybe[scores.argmax()] = True
    seed, position = int(rows.seed[row]), int(rows.position[row])
    scores -= exponentials(seed, position, None, len(scores)).double().log()
    best = float(scores[sure].max())
    if not maybe[got]:
        return f"token {got} was filtered out"
    if scores[got] < best - 1e-5 * max(1.0, abs(best)):
        return f"score {float(scores[got])} of {best}"
    return ""


def check(logits: torch.Tensor, rows: Rows, case: str) -> None:
    """Tokens as the reference's, but for the closest calls, and everything else that is written."""
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(len(logits)))
    table_rows = order + 1
    state = run(logits, rows, table_rows)
    tokens = state.out_tokens.cpu().long()
    final = adjusted(logits, rows)
    expected = reference(final, rows)
    different = (tokens != expected).nonzero().flatten().tolist()
    reasons = [
        f"row {row}: {tokens[row]} for {expected[row]}, {reason}"
        for row in different
        if (reason := is_close_call(final[row], rows, row, int(tokens[row])))
    ]
    assert not reasons, f"{case}: {len(reasons)} of {len(logits)} rows are wrong: {reasons[:5]}"
    assert len(different) <= 3 + len(logits) // 500, f"{case}: {len(different)} close calls"

    wanted = logits.double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    error = (state.out_logprobs.cpu().double() - wanted).abs() / wanted.abs().clamp(min=1)
    assert error.max() < 1e-5, f"{case}: logprob of row {error.argmax()} is off by {error.max()}"
    written = torch.full((len(logits) + 1, MAX_LEN + 1), UNTOUCHED)
    written[table_rows, rows.position] = tokens
    assert torch.equal(state.token_ids.cpu().long(), written), f"{case}: token_ids"
    assert not state.faulted.any(), f"{case}: faulted"
    edits = edits_of(rows)
    penalized = (edits & Edit.REPETITION) > 0
    known = rows.known.clone()
    known[penalized, tokens[penalized]] = True
    seen = state.table.seen[table_rows.cuda()].cpu()
    assert torch.equal(seen, pack_bits(known)), f"{case}: seen"
    counted = (edits & Edit.OUTPUT) > 0
    counts = rows.counts.clone()
    counts[counted, tokens[counted]] += 1
    got = state.table.output_counts[table_rows.cuda(), : logits.shape[1]].cpu()
    assert torch.equal(got.long() & MAX_COUNT, counts), f"{case}: counts"


@pytest.mark.parametrize(
    ("vocab_size", "count"), [(10, 300), (320, 1500), (4097, 200), (49152, 250), (151936, 100)]
)
def test_same_tokens_as_the_reference(vocab_size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = random_logits(count, vocab_size, generator)
    check(logits, mixed_rows(count, vocab_size, generator), f"mixed, vocabulary {vocab_size}")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 2048},
        {"top_k": 40_000},
        {"top_p": 1e-6},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"top_p": 0.9999},
        {"min_p": 0.02},
        {"repetition_penalty": 1.2},
        {"suppress_until": MAX_LEN},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.4},
        {"biases": 1.0},
        {"limited": 1.0},
        {"temperature": 0.0, "frequency_penalty": 0.7, "biases": -3.0, "limited": 1.0},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.2, "top_k": 3000, "top_p": 0.8, "min_p": 0.01},
    ],
)
def test_each_parameter_at_a_large_vocabulary(options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = random_logits(8, 151936, generator)
    half = torch.rand(151936, generator=generator) < 0.5
    seed = torch.randint(-(2**63), 2**63 - 1, (8,), generator=generator)
    biased = torch.rand(151936, generator=generator) < 0.005
    rows = make_rows(
        8,
        151936,
        **{"temperature": 1.0, **options, "biases": biased * options.get("biases", 0.0)},
        suppressed=half,
        known=~half,
        allowed=half,
        counts=torch.arange(151936) % 5,
        seed=seed,
    )
    check(logits, rows, str(options))


@pytest.mark.sanitize
def test_nearly_equal_logits_and_many_at_minus_infinity() -> None:
    """What no list in shared memory holds."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(24, 49152, generator=generator) * 1e-3 + 5
    logits[8:16] = torch.randn(8, 49152, generator=generator) * 1000
    logits[16:, 7:] = -torch.inf
    rows = make_rows(
        24,
        49152,
        temperature=1.0,
        top_k=torch.tensor([0, 20_000, 300, 5] * 6),
        top_p=torch.tensor([0.9, 0.5, 0, 0.3] * 6),
    )
    check(logits, rows, "unusual logits")


@pytest.mark.sanitize
def test_ties() -> None:
    """Equal logits: greedy takes the lowest id; a filter keeps all that equal the last it keeps."""
    logits = torch.zeros(5, 5000)
    logits[0, 3000:] = 1
    logits[1:, 100:110] = 1
    rows = make_rows(
        5,
        5000,
        temperature=torch.tensor([0.0, 1, 1, 1, 0]),
        top_k=torch.tensor([0, 3, 0, 0, 0]),
        top_p=torch.tensor([0, 0, 1e-3, 0, 0]),
        min_p=torch.tensor([0, 0, 0, 0.9, 0]),
        suppress_until=torch.tensor([0, 0, 0, 0, MAX_LEN]),
        suppressed=torch.ones(5000, dtype=torch.bool),
    )
    tokens = run(logits, rows).out_tokens.tolist()
    assert tokens[0] == 3000 and tokens[4] == 0, tokens
    assert all(100 <= token < 110 for token in tokens[1:4]), tokens


PROBABILITIES = torch.tensor([0.05, 0.30, 0.003, 0.15, 0.10, 0.02, 0.25, 0.08, 0.007, 0.04])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"temperature": 2.0}, PROBABILITIES**0.5),
        ({"top_k": 3}, PROBABILITIES * (PROBABILITIES >= 0.15)),
        ({"top_p": 0.6}, PROBABILITIES * (PROBABILITIES >= 0.15)),
        ({"min_p": 0.3}, PROBABILITIES * (PROBABILITIES >= 0.09)),
        ({"top_k": 4, "top_p": 0.85}, PROBABILITIES * (PROBABILITIES >= 0.15)),
        # Over all together: divided, the last token that top-p keeps is another.
        ({"temperature": 0.5, "top_p": 0.65}, PROBABILITIES**2 * (PROBABILITIES >= 0.25)),
        ({"suppress_until": MAX_LEN}, PROBABILITIES * (torch.arange(10) != 1)),
        ({"repetition_penalty": 2.0}, (PROBABILITIES.log() + 10).mul(0.5).exp()),
        ({"limited": 1.0}, PROBABILITIES * (torch.arange(10) != 1)),
        ({"biases": torch.arange(10) * 0.25}, PROBABILITIES * (torch.arange(10) * 0.25).exp()),
    ],
)
def test_distribution(options: dict[str, float], expected: torch.Tensor) -> None:
    """Pearson's chi-squared over 100 positions of 1000 seeds."""
    seeds, positions = 1000, 100
    logits = PROBABILITIES.log() + 10
    rows = make_rows(
        seeds,
        10,
        **{"temperature": 1.0, **options},
        seed=torch.arange(seeds) * 0x9E3779B97F4A7C15,
        suppressed=torch.arange(10) == 1,
        known=torch.ones(10, dtype=torch.bool),
        allowed=torch.arange(10) != 1,
    )
    state = make_state(rows, torch.arange(seeds) + 1, seeds)
    sampler = Sampler(10, seeds)
    many = logits.expand(seeds, -1).contiguous().cuda()
    for position in range(positions):
        state.sample_positions.fill_(position)
        sampler.sample(many, *state)
    counts = state.token_ids[1:, :positions].flatten().cpu().bincount(minlength=10).double()
    wanted = expected.double() / expected.double().sum() * seeds * positions
    possible = wanted > 0
    assert not counts[~possible].any(), f"{options}: impossible tokens were drawn: {counts}"
    statistic = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    freedom = possible.sum().double() - 1
    chance = torch.special.gammaincc(freedom / 2, statistic / 2)
    assert chance > 1e-4, f"{options}: {counts.tolist()} for {wanted.tolist()}, p = {chance}"


def test_a_token_is_a_function_of_its_row_alone() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = random_logits(256, 151936, generator)
    rows = mixed_rows(256, 151936, generator)
    together = run(logits, rows).out_tokens.cpu()
    order = torch.randperm(256, generator=generator)
    shuffled = run(logits[order], rows.at(order), torch.randperm(256, generator=generator) + 1)
    assert torch.equal(shuffled.out_tokens.cpu(), together[order])
    for chosen in ([0], [77], [255], list(range(5, 205, 9))):
        alone = run(logits[chosen], rows.at(chosen)).out_tokens.cpu()
        assert torch.equal(alone, together[chosen]), f"rows {chosen} alone"


@pytest.mark.sanitize
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_rows_that_are_not_finite_fault_and_padding_is_untouched(options: dict[str, float]) -> None:
    vocab_size = 49152
    logits = torch.randn(10, vocab_size, generator=torch.Generator().manual_seed(7))
    logits[1, 40_000] = torch.nan
    logits[2, 5] = torch.inf
    logits[3] = -torch.inf
    logits[4] = torch.nan
    logits[5, -1] = -torch.inf
    logits[8:] = torch.nan  # padding
    rows = make_rows(10, vocab_size, repetition_penalty=1.5, **options)
    state = make_state(rows, torch.arange(10) + 1, 8)
    state.faulted[7] = 1
    seen = state.table.seen.clone()
    sampler = Sampler(vocab_size, 10)
    sampler.sample(logits.cuda(), *state)
    tokens = state.out_tokens.tolist()
    bad = [1, 2, 3, 4, 6]
    good = [0, 5, 7]
    assert [tokens[i] for i in bad] == [-1] * 5, f"{options}: {tokens}"
    assert all(0 <= tokens[i] < vocab_size for i in good), f"{options}: {tokens}"
    assert tokens[8:] == [UNTOUCHED] * 2
    assert state.out_logprobs.isfinite().nonzero().flatten().tolist() == good
    assert state.faulted.nonzero().flatten().tolist() == [i + 1 for i in bad]
    touched = [i + 1 for i in good]
    assert (state.token_ids != UNTOUCHED).any(dim=1).nonzero().flatten().tolist() == touched
    assert (state.table.seen != seen).any(dim=1).nonzero().flatten().tolist() == touched
    # Once more: the faulted stay so, although their logits are fine now.
    sampler.sample(torch.zeros_like(logits).cuda(), *state)
    assert [state.out_tokens[i].item() for i in bad] == [-1] * 5


def test_suppression_ends_and_sampled_tokens_become_known() -> None:
    """Greedy over a few steps: a token that was sampled is penalized, a suppressed one returns."""
    logits = torch.tensor([[4.0, 3.0, 2.9, -1.0]])
    rows = make_rows(
        1,
        4,
        repetition_penalty=1.5,
        suppress_until=2.0,
        suppressed=torch.tensor([True, False, False, False]),
    )
    state = make_state(rows, torch.tensor([1]), 1)
    sampler = Sampler(4, 1)
    for position in range(5):
        state.sample_positions.fill_(position)
        sampler.sample(logits.cuda(), *state)
    # 3.0 and then 2.9 while 4.0 is suppressed; then 4.0; then 4.0 / 1.5 beats 3.0 / 1.5.
    assert state.token_ids[1, :5].tolist() == [1, 2, 0, 0, 0]


@pytest.mark.sanitize
def test_what_is_drawn_counts_from_the_next_token_on() -> None:
    """Greedy, token after token, against the reference with the output so far; a count ends."""
    generator = torch.Generator().manual_seed(11)
    vocab_size, steps = 101, 60
    logits = torch.randn(4, vocab_size, generator=generator)
    counts = torch.zeros(4, vocab_size, dtype=torch.int64)
    counts[3, logits[3].topk(3).indices] = MAX_COUNT
    rows = make_rows(
        4,
        vocab_size,
        presence_penalty=torch.tensor([0.3, 0.0, -0.5, 0.3]),
        frequency_penalty=torch.tensor([0.0, 0.2, 0.1, 0.0001]),
        counts=counts,
    )
    state = make_state(rows, torch.arange(4) + 1, 4)
    sampler = Sampler(vocab_size, 4)
    for position in range(steps):
        state.sample_positions.fill_(position)
        sampler.sample(logits.cuda(), *state)
        expected = adjusted(logits, rows).argmax(dim=1)
        assert torch.equal(state.out_tokens.cpu().long(), expected), position
        rows.counts[torch.arange(4), expected] += 1
    assert len(set(state.token_ids[2, :steps].tolist())) > 5, "nothing was penalized"
    got = state.table.output_counts[1:, :vocab_size].cpu().long() & MAX_COUNT
    assert torch.equal(got, rows.counts.clamp(max=MAX_COUNT))


@pytest.mark.sanitize
def test_a_row_has_as_many_biases_as_there_is_room_for() -> None:
    generator = torch.Generator().manual_seed(12)
    vocab_size = 4097
    logits = random_logits(3, vocab_size, generator)
    biased = torch.randperm(vocab_size, generator=generator)[:MAX_BIASES]
    biases = torch.zeros(3, vocab_size)
    biases[:, biased] = torch.randn(3, MAX_BIASES, generator=generator) * 30
    biases[2, [0, vocab_size - 1]] = 0
    check(logits, make_rows(3, vocab_size, temperature=1.0, biases=biases), "many biases")


def test_a_graph_replays_with_other_inputs() -> None:
    generator = torch.Generator().manual_seed(8)
    vocab_size, bucket = 151936, 8
    sampler = Sampler(vocab_size, bucket)
    first = random_logits(bucket, vocab_size, generator).cuda()
    state = make_state(mixed_rows(bucket, vocab_size, generator), torch.arange(bucket) + 1, bucket)
    sampler.sample(first, *state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.sample(first, *state)
    for count in (8, 1, 5):
        logits = random_logits(bucket, vocab_size, generator)
        rows = mixed_rows(bucket, vocab_size, generator)
        other = make_state(rows, torch.arange(bucket) + 1, count)
        first.copy_(logits)
        for column, value in zip(state.table, other.table, strict=True):
            column.copy_(value)
        for tensor, value in zip(state[1:], other[1:], strict=True):
            tensor.copy_(value)
        graph.replay()
        expected = run(logits, rows)
        assert torch.equal(state.out_tokens[:count], expected.out_tokens[:count]), count
        assert (state.out_tokens[count:] == UNTOUCHED).all(), count
        assert (state.token_ids[count + 1 :] == UNTOUCHED).all(), count


def test_wrong_arguments_are_named() -> None:
    state = make_state(make_rows(2, 320), torch.arange(2) + 1, 2)
    sampler = Sampler(320, 2)
    with pytest.raises(ValueError, match="logits"):
        sampler.sample(torch.zeros(2, 321, device="cuda"), *state)
    with pytest.raises(ValueError, match="logits"):
        sampler.sample(torch.zeros(3, 320, device="cuda"), *state)
    wrong = state.table._replace(top_k=state.table.top_k.long())
    with pytest.raises(ValueError, match="top_k"):
        sampler.sample(torch.zeros(2, 320, device="cuda"), wrong, *state[1:])
