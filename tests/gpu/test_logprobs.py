"""Log-probabilities on the GPU: kernel against reference, runner against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("cupy")

from mili.internal.v1.step_pb2 import TASK_EMBED, TASK_SCORE
from mili.kernels.logprobs import read_logprobs
from mili.kernels.reference_logprobs import LogprobColumns
from mili.kernels.reference_logprobs import read_logprobs as reference
from tests.gpu.oracle import Oracle
from tests.gpu.sampling_state import random_logits
from tests.gpu.steps import SETTINGS, sampled
from tests.model_folders import make_model_folder
from tests.step_driver import StepDriver
from tests.unit.test_worker_readings import Reader

pytestmark = pytest.mark.gpu

LENGTHS = (1, 2, 40, 300, 700)
TABLE_ROWS, MAX_LEN = 50, 64


def run(logits: torch.Tensor, own: torch.Tensor, width: int) -> tuple[LogprobColumns, torch.Tensor]:
    """Entries in another order than the logits' rows; returns what is faulted, too."""
    count = len(logits)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    rows = torch.randperm(TABLE_ROWS * MAX_LEN)[:count]
    table = torch.full((TABLE_ROWS, MAX_LEN), -1, dtype=torch.int32)
    table.view(-1)[rows] = own[order].int()
    faulted = torch.zeros(TABLE_ROWS, dtype=torch.int32, device="cuda")
    output = torch.full((3, count, width), -7, dtype=torch.int32).pin_memory()
    columns = (order, rows // MAX_LEN, rows % MAX_LEN)
    read_logprobs(
        logits.cuda(),
        *(column.to("cuda", torch.int32) for column in columns),
        table.cuda(),
        faulted,
        output,
    )
    torch.cuda.synchronize()
    back = order.argsort()
    ids, logprobs, ranks = output[:, back]
    return LogprobColumns(ids, logprobs.contiguous().view(torch.float32), ranks), faulted.cpu()


def check(logits: torch.Tensor, own: torch.Tensor, width: int, case: str) -> None:
    read, faulted = run(logits, own, width)
    expected = reference(logits, own, width)
    assert torch.equal(read.token_ids, expected.token_ids), f"{case}: ids"
    assert torch.equal(read.ranks, expected.ranks), f"{case}: ranks"
    exact = logits.double().log_softmax(dim=1).gather(1, expected.token_ids.long())
    finite = exact.isfinite()
    assert torch.equal(read.logprobs.isfinite(), finite), f"{case}: infinities"
    error = (read.logprobs.double() - exact)[finite].abs() / exact[finite].abs().clamp(min=1)
    assert error.max() < 1e-5, f"{case}: off by {error.max()}"
    assert not faulted.any(), f"{case}: faulted"


@pytest.mark.parametrize(
    ("vocab_size", "count", "width"),
    [
        pytest.param(33, 3, 5, marks=pytest.mark.sanitize),
        (10, 300, 11),
        (320, 500, 1),
        (1025, 64, 21),
        (49152, 64, 21),
        (151936, 200, 2),
        (151936, 64, 21),
    ],
)
def test_equals_the_reference(vocab_size: int, count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size + width)
    logits = random_logits(count, vocab_size, generator)
    own = torch.randint(vocab_size, (count,), generator=generator)
    own[::3] = logits.argmax(dim=1)[::3]
    check(logits, own, width, f"{count} of {vocab_size}, width {width}")


def test_of_equals_the_lower_id_is_better() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-3, 3, (100, 5000), generator=generator).float()
    logits[::2] *= -0.0  # zeros of both signs
    own = torch.randint(5000, (100,), generator=generator)
    check(logits, own, 21, "many equals")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_a_fault(bad: float) -> None:
    logits = torch.randn(3, 700)
    logits[1, slice(None) if bad == -torch.inf else 5] = bad
    _, faulted = run(logits, torch.tensor([1, 2, 3]), 3)
    assert int(faulted.sum()) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return make_model_folder(
        path,
        "qwen3",
        hidden_size=256,
        heads=4,
        kv_heads=2,
        vocab_size=5000,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module")
def driver(folder: Path) -> StepDriver:
    return StepDriver(folder, **SETTINGS)


def prompts() -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(5000, (length,), generator=generator).tolist() for length in LENGTHS]
    return dict(enumerate(drawn, start=1))


def check_reads(oracle: Oracle, reader: Reader, row: int) -> None:
    """Log-probabilities as near as bfloat16 is; ranks that its errors explain."""
    exact = oracle.logits(reader.driver.tokens[row]).log_softmax(dim=-1)
    for position, (ids, logprobs, ranks) in reader.read[row].items():
        truth = exact[position - 1]
        assert ids[0] == reader.driver.tokens[row][position]
        error = (truth[ids] - torch.tensor(logprobs, device=truth.device)).abs().max()
        assert error <= oracle.slack, f"row {row}, position {position}: off by {error}"
        own = truth[ids[0]]
        least = int((truth > own + oracle.slack).sum())
        assert least < ranks[0] <= int((truth > own - oracle.slack).sum())
        assert ranks[1:] == list(range(1, len(ids)))
        assert logprobs[1:] == sorted(logprobs[1:], reverse=True)


@pytest.mark.parametrize("chunk", [1000, 33, 1])
def test_logprobs_beside_rows_that_want_none(
    driver: StepDriver, oracle: Oracle, chunk: int
) -> None:
    """chunk 1: scored in steps in which every row has one token."""
    driver.restart()
    reader = Reader(driver)
    inputs = {row: ids[:50] if chunk == 1 else ids for row, ids in prompts().items()}
    for row, token_ids in inputs.items():
        asked = {"num_logprobs": 20, "score_from": row, "num_scored_alternatives": 3}
        driver.admit(row, token_ids, sampled(row), **(asked if row % 2 else {}))
    reader.run(list(inputs), steps=60, chunk=chunk)
    assert set(reader.read) == {1, 3, 5}
    for row in (1, 3, 5):
        positions = list(range(row, len(driver.tokens[row])))
        assert sorted(reader.read[row]) == positions
        check_reads(oracle, reader, row)


def test_what_is_asked_for_changes_no_token(driver: StepDriver) -> None:
    """Also with a batch that decodes in one graph. The prompts are computed in the same steps."""
    outputs = []
    for asked in ({}, {"num_logprobs": 5}):
        driver.restart()
        for row, token_ids in prompts().items():
            driver.admit(row, token_ids, sampled(row), **asked)
        driver.run(list(driver.tokens), output_tokens=16)
        outputs.append(dict(driver.tokens))
    assert outputs[0] == outputs[1]


def test_tasks_sample_nothing(driver: StepDriver, oracle: Oracle) -> None:
    driver.restart()
    reader = Reader(driver)
    inputs = prompts()
    for row, token_ids in inputs.items():
        if row % 2:
            driver.admit(row, token_ids, task=TASK_EMBED)
        else:
            driver.admit(row, token_ids, task=TASK_SCORE, score_from=max(1, len(token_ids) - 5))
    driver.admit(9, inputs[3])
    reader.run([*inputs, 9], steps=3, chunk=400)
    assert all(driver.tokens[row] == inputs[row] for row in inputs)
    assert len(driver.tokens[9]) > len(inputs[3])
    for row, token_ids in inputs.items():
        if row % 2:
            # The logits that a vector gives are those of the last token.
            head = torch.nn.functional.linear(
                torch.tensor(reader.vectors[row], device="cuda"), oracle.head()
            )
            assert (head - oracle.logits(token_ids)[-1]).abs().max() <= oracle.slack
        else:
            check_reads(oracle, reader, row)
            assert max(reader.read[row]) == len(token_ids) - 1


def test_a_step_that_asks_for_nothing_launches_nothing(
    driver: StepDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.restart()
    monkeypatch.setattr(driver.runner, "_reader", None)
    for row, token_ids in prompts().items():
        driver.admit(row, token_ids, sampled(row))
    driver.run(list(driver.tokens), output_tokens=4)
