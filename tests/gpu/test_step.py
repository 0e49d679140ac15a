"""The bookkeeping kernels against the same in numpy."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

pytest.importorskip("cupy")

import torch

from mili.internal.v1.step_pb2 import Admission, Sampling, StepCommand
from mili.kernels import step
from mili.kernels.sampling import SamplingTable
from mili.worker.cuda.staging import order_rows, pack_deltas, pack_rows

pytestmark = pytest.mark.gpu

BLOCK = 16
LIMIT = 512
VOCAB = 1000
DEVICE = torch.device("cuda")


@pytest.fixture
def table() -> step.SequenceTensors:
    return step.allocate_sequences(
        table_rows=step.MAX_ROWS + 1,
        max_model_len=LIMIT,
        max_blocks=LIMIT // BLOCK,
        vocab_size=VOCAB,
        device=DEVICE,
    )


def bits(words: torch.Tensor) -> set[int]:
    unpacked = np.unpackbits(words.cpu().numpy().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(unpacked).tolist())


def pinned(size: int) -> torch.Tensor:
    return torch.full((size,), -7, dtype=torch.int32, pin_memory=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("apart", [False, True])
def test_admissions_and_blocks_land_in_their_rows(table: step.SequenceTensors, apart: bool) -> None:
    rng = np.random.default_rng(1)
    table.faulted.fill_(1)
    for column in table.sampling:
        column.fill_(-1)
    tokens = {row: rng.integers(0, VOCAB, 1 + 37 * row % LIMIT) for row in (1, 5, step.MAX_ROWS)}
    sampling = {
        1: Sampling(),
        5: Sampling(temperature=0.7, top_k=2**32 - 1, top_p=0.9, seed=2**63 + 12345),
        step.MAX_ROWS: Sampling(
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=-0.25,
            bias_token_ids=[0, 33, VOCAB - 1],
            biases=[-1.5, 2, 100],
            allowed_token_ids=[VOCAB - 1, 5, 5],
            suppressed_token_ids=[3, 31, 32, VOCAB - 1],
            suppress_until_position=17,
        ),
    }
    command = StepCommand(
        admissions=[
            Admission(
                row=row,
                token_ids=ids.astype("<u4").tobytes(),
                num_prompt_tokens=1 + len(ids) // 3,
                sampling=sampling[row],
            )
            for row, ids in tokens.items()
        ]
    )
    appended = [(int(row), int(index), int(rng.integers(1, 99))) for row in (1, 5, 700)
                for index in range(30)]  # fmt: skip
    deltas = np.frombuffer(pack_deltas(command, list(chain(*appended))), np.int32)
    rows = order_rows([5, 1], [0, 3], [9, 1], [0] * 6)
    host_input = pinned(step.DELTAS + len(deltas))
    pack_rows(rows, command, len(appended), host_input.numpy().data)
    step_input = torch.full((step.DELTAS,), -7, dtype=torch.int32, device=DEVICE)
    elsewhere = torch.from_numpy(deltas.copy()).to(DEVICE) if apart else None
    if not apart:
        host_input[step.DELTAS :] = torch.from_numpy(deltas.copy())
    step.begin_step(host_input, step_input, table, deltas=elsewhere)()
    torch.cuda.synchronize()
    got = step_input.cpu()
    assert got[step.SIZES : step.ROWS].tolist()[:5] == [10, 2, 1, len(tokens), len(appended)]
    assert got[step.ROWS : step.ROWS + 3].tolist() == [1, 5, -7]
    assert got[step.STARTS : step.STARTS + 3].tolist() == [3, 0, -7]
    assert got[step.COUNTS : step.COUNTS + 3].tolist() == [1, 9, -7]
    assert got[step.SAMPLES : step.SAMPLES + 3].tolist() == [0, 0, -7]
    for row, ids in tokens.items():
        assert table.token_ids[row, : len(ids)].tolist() == ids.tolist()
    assert torch.nonzero(table.faulted == 0).flatten().tolist() == list(tokens)
    blocks = table.block_tables.cpu().numpy()
    for row, index, block in appended:
        assert blocks[row, index] == block
    assert np.count_nonzero(blocks) == len(appended)
    columns = table.sampling
    assert columns.temperature[5].item() == pytest.approx(0.7)
    assert columns.top_k[5].item() == 2**31 - 1
    assert columns.top_p[5].item() == pytest.approx(0.9)
    assert columns.seed[5].item() & (2**64 - 1) == 2**63 + 12345
    last = SamplingTable(*(column[step.MAX_ROWS].cpu() for column in columns))
    assert (last.min_p, last.suppress_until, last.num_biases, last.edits) == (0.25, 17, 3, 31)
    penalties = (last.repetition_penalty, last.presence_penalty, last.frequency_penalty)
    assert penalties == (1.5, 0.5, -0.25)
    assert bits(last.suppressed) == {3, 31, 32, VOCAB - 1}
    assert bits(last.allowed_mask) == {5, VOCAB - 1}
    assert bits(last.biased) == {0, 33, VOCAB - 1}
    assert last.bias_token_ids[:4].tolist() == [0, 33, VOCAB - 1, -1]
    assert last.biases[:4].tolist() == [-1.5, 2, 100, -1]
    known = tokens[step.MAX_ROWS]
    assert bits(last.seen) == set(known.tolist())
    output = np.bincount(known[1 + len(known) // 3 :], minlength=len(last.output_counts))
    assert (last.output_counts.numpy() == output).all()
    # Nobody reads what a row does not use: it is left as it was.
    assert (columns.edits[5], columns.num_biases[5]) == (0, 0)
    for column in columns[columns._fields.index("suppressed") :]:
        assert (column[5] == -1).all()
    assert (columns.edits[6], columns.suppress_until[6]) == (-1, -1), "a row that was not admitted"


@pytest.mark.sanitize
def test_a_row_admitted_with_much_output_counts_all_of_it(table: step.SequenceTensors) -> None:
    """Many threads count the same tokens."""
    ids = np.arange(LIMIT) % 3
    admission = Admission(
        row=9,
        token_ids=ids.astype("<u4").tobytes(),
        num_prompt_tokens=2,
        sampling=Sampling(frequency_penalty=1),
    )
    deltas = np.frombuffer(pack_deltas(StepCommand(admissions=[admission]), []), np.int32)
    host_input = pinned(step.DELTAS + len(deltas))
    rows = order_rows([], [], [], [])
    pack_rows(rows, StepCommand(admissions=[admission]), 0, host_input.numpy().data)
    host_input[step.DELTAS :] = torch.from_numpy(deltas.copy())
    step_input = torch.zeros(step.DELTAS, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        step.begin_step(host_input, step_input, table)()
        counts = table.sampling.output_counts[9].cpu().numpy()
        assert (counts == np.bincount(ids[2:], minlength=len(counts))).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("num_rows", [0, 1, 2, 33, step.MAX_ROWS])
def test_a_batch_is_spread_over_its_tokens(table: step.SequenceTensors, num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    rows = rng.permutation(np.arange(1, step.MAX_ROWS + 1))[:num_rows]
    counts = np.where(rng.random(num_rows) < 0.5, 1, rng.integers(1, 150, num_rows))
    starts = rng.integers(0, LIMIT - 150, num_rows)
    known = np.zeros(step.MAX_ROWS + 1, np.int64)
    known[rows] = starts + counts + (rng.random(num_rows) < 0.3)
    table.token_ids.random_(0, VOCAB)
    table.block_tables.random_(1, 1000)
    ids, blocks = table.token_ids.cpu().numpy(), table.block_tables.cpu().numpy()
    packed = np.zeros(step.DELTAS, np.int32)
    commanded = order_rows(rows.tolist(), starts.tolist(), counts.tolist(), known.tolist())
    pack_rows(commanded, StepCommand(), 0, packed.data)
    order = np.array(commanded.order, np.int64)
    rows, starts, counts = rows[order], starts[order], counts[order]
    samples = np.array(commanded.samples, np.bool_)
    total = int(counts.sum())
    padded = max(total + 5, 1)
    batch = step.allocate_batch(padded, DEVICE)
    for column in batch:
        column.fill_(-7)
    step.make_batch(
        torch.from_numpy(packed).to(DEVICE), table, batch, num_padded=padded, block_size=BLOCK
    )
    got = {name: column.cpu().numpy() for name, column in batch._asdict().items()}
    decodes = commanded.num_decode_rows
    assert got["sizes"].tolist() == [total, num_rows, decodes, commanded.num_samples]
    token_rows = np.repeat(rows, counts)
    first = np.cumsum(counts) - counts
    positions = np.arange(total) + np.repeat(starts - first, counts)
    assert (got["rows"][:num_rows] == rows).all()
    assert (got["first_tokens"][:num_rows] == first).all()
    assert (got["token_rows"][:total] == token_rows).all()
    assert (got["positions"][:total] == positions).all()
    assert (got["token_ids"][:total] == ids[token_rows, positions]).all()
    slots = blocks[token_rows, positions // BLOCK] * BLOCK + positions % BLOCK
    assert (got["slots"][:total] == slots).all()
    sample_index = np.full(total, -1)
    sample_index[(first + counts - 1)[samples]] = np.arange(commanded.num_samples)
    assert (got["sample_index"][:total] == sample_index).all()
    for name, padding in (("token_rows", 0), ("positions", 0), ("slots", 0), ("sample_index", -1)):
        assert (got[name][total:] == padding).all()
    num_samples = commanded.num_samples
    assert (got["sample_rows"][:num_samples] == rows[samples]).all()
    ends = starts + counts
    assert (got["sample_positions"][:num_samples] == ends[samples]).all()
    pages = np.cumsum([0, *(starts[:decodes] // 16 + 1)])
    tiles = np.cumsum([0, *-(-counts[decodes:] // 128)])
    assert (got["page_offsets"][: decodes + 1] == pages).all()
    assert (got["tile_offsets"][: num_rows - decodes + 1] == tiles).all()


@pytest.mark.sanitize
def test_tokens_and_faults_are_handed_out_in_the_order_of_the_batch(
    table: step.SequenceTensors,
) -> None:
    batch = step.allocate_batch(8, DEVICE)
    batch.sizes.copy_(torch.tensor([9, 3, 1, 2]))
    batch.rows[:3] = torch.tensor([7, 2, 9])
    table.faulted[2] = 1
    sampled = torch.arange(100, 100 + step.MAX_ROWS, dtype=torch.int32, device=DEVICE)
    output = pinned(step.OUTPUTS)
    launch = step.end_step(batch, table.faulted, sampled, output)
    launch()
    torch.cuda.synchronize()
    assert output[:3].tolist() == [100, 101, -7]
    assert output[step.MAX_ROWS :][:4].tolist() == [0, 1, 0, -7]
    table.faulted[9] = 1
    launch()
    torch.cuda.synchronize()
    assert output[step.MAX_ROWS :][:4].tolist() == [0, 1, 1, -7], "launched again, it reads again"
