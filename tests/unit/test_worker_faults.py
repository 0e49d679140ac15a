"""Not-a-number stays in its row; a command that does not fit ends the worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mili.internal.v1.step_pb2 import (
    ROW_FAULT_KIND_NUMERIC,
    Admission,
    BlockCopy,
    Sampling,
    StepCommand,
)
from mili.worker.sequence_table import CommandError
from tests.model_folders import make_model_folder
from tests.step_driver import StepDriver

POISON = 77  # its embedding is NaN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model_folder(tmp_path_factory.mktemp("model"), "llama", tie=False)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def healthy(length: int, start: int = 0) -> list[int]:
    return [start + i % 60 for i in range(length)]


def test_a_fault_stays_in_its_row(folder: Path) -> None:
    """The faulty row is neighbour of others, and its blocks are used again afterwards."""
    calm, driver = StepDriver(folder), StepDriver(folder)
    for one in (calm, driver):
        one.admit(1, healthy(20))
        one.admit(3, healthy(40, 100))
    driver.admit(2, [*healthy(30), POISON, *healthy(9)])
    calm.step({1: 20, 3: 30})
    result = driver.step({1: 20, 2: 33, 3: 30})
    assert [(fault.index, fault.kind) for fault in result.faults] == [(1, ROW_FAULT_KIND_NUMERIC)]
    assert list(result.num_new) == [1, 0, 0]
    # The router may have sent this before it could know: no drift, the fault again, no token.
    calm.step({1: 1, 3: 10})
    result = driver.step({2: 7, 1: 1, 3: 10})
    assert [fault.index for fault in result.faults] == [0]
    assert list(result.num_new) == [0, 1, 1]
    # The null block does not matter, and the blocks of the faulty row are clean.
    driver.free += driver.blocks[2]
    driver.admit(2, healthy(70, 5))
    calm.admit(2, healthy(70, 5))
    for one in (calm, driver):
        one.run([2, 1, 3], output_tokens=20)
    assert driver.tokens == calm.tokens


def test_a_fault_where_a_token_was_expected(folder: Path) -> None:
    """The command in flight computes the token that was never sampled: no drift either."""
    driver = StepDriver(folder)
    driver.admit(1, [*healthy(9), POISON])
    for count in (9, 1, 1, 1):
        result = driver.step({1: count})
        assert [fault.index for fault in result.faults] == ([] if count == 9 else [0])
        assert list(result.num_new) == [0]


def test_logits_that_are_not_finite_are_a_fault(tmp_path: Path) -> None:
    path = make_model_folder(tmp_path, "llama", tie=False)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][5] = torch.inf
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    driver = StepDriver(path)
    driver.admit(1, healthy(5))
    driver.admit(2, healthy(5))
    result = driver.step({1: 5, 2: 4})
    assert [fault.index for fault in result.faults] == [0]
    assert list(result.num_new) == [0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_null_block_and_null_row_are_never_read(folder: Path, dtype: str) -> None:
    calm, driver = StepDriver(folder, dtype=dtype), StepDriver(folder, dtype=dtype)
    for one in (calm, driver):
        for row, length in ((1, 3), (2, 50), (3, 17)):
            one.admit(row, healthy(length, row))
    for _ in range(10):
        for layer in driver.runner._cache.layers:
            layer[:, 0] = torch.nan
        driver.runner._table.token_ids[0] = POISON
        for one in (calm, driver):
            one.run([1, 2, 3], output_tokens=1)
            one.run([2], output_tokens=1)
    assert driver.tokens == calm.tokens


def test_reset_forgets_every_row(folder: Path) -> None:
    driver = StepDriver(folder)
    driver.admit(1, healthy(5))
    driver.run([1], output_tokens=2)
    driver.runner.reset()
    with pytest.raises(CommandError, match="0 known tokens"):
        driver.step({1: 1})


def admission(**fields: object) -> StepCommand:
    values = {"row": 1, "token_ids": b"\1\0\0\0"} | fields
    return StepCommand(admissions=[Admission(**values)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (StepCommand(rows=[1], starts=[19], num_tokens=[1]), "19 to 20, but has 20 computed"),
        (StepCommand(rows=[1], starts=[20], num_tokens=[2]), "21 known tokens"),
        (StepCommand(rows=[1], starts=[20], num_tokens=[0]), "20 to 20"),
        (StepCommand(rows=[2], starts=[0], num_tokens=[17]), "1 blocks"),
        (StepCommand(rows=[1, 1], starts=[20, 21], num_tokens=[1, 1]), "named twice"),
        (StepCommand(rows=[0], starts=[0], num_tokens=[1]), "no such row"),
        (StepCommand(rows=[999], starts=[0], num_tokens=[1]), "no such row"),
        (StepCommand(rows=[1], starts=[], num_tokens=[1]), "row columns differ"),
        (StepCommand(block_rows=[1], block_ids=[]), "block columns differ"),
        (StepCommand(block_rows=[1], block_ids=[0]), "no block 0"),
        (StepCommand(block_rows=[1], block_ids=[400]), "no block 400"),
        (StepCommand(block_rows=[0], block_ids=[1]), "no row 0"),
        (StepCommand(block_rows=[1] * 64, block_ids=[9] * 64), "too many blocks"),
        (StepCommand(copies=[BlockCopy(source=1, target=2)]), "copies"),
        (admission(row=0), "no row 0"),
        (admission(token_ids=b""), "0 tokens"),
        (admission(token_ids=b"\1\0\0\0" * 1025), "1025 tokens"),
        (admission(token_ids=b"\x40\1\0\0"), "out of range"),
        (admission(adapter=1), "cannot do"),
        (admission(num_logprobs=21), "too many alternatives"),
        (admission(score_from=0), "score_from 0"),
        (admission(sampling=Sampling(suppressed_token_ids=[320])), "suppressed or allowed id"),
        (admission(sampling=Sampling(allowed_token_ids=[320])), "suppressed or allowed id"),
    ],
)
def test_a_command_that_does_not_fit_is_an_error(
    folder: Path, command: StepCommand, message: str
) -> None:
    driver = StepDriver(folder)
    driver.admit(1, healthy(20))
    driver.admit(2, healthy(20))
    driver.step({1: 20, 2: 5})
    driver.computed[2] = 0
    with pytest.raises(CommandError, match=message):
        driver.runner.execute(command)
