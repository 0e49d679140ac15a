"""Not-a-number on the GPU: it stays in its row, and what is never read may hold it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("cupy")

import torch
from safetensors.torch import load_file, save_file

from mili.internal.v1.step_pb2 import ROW_FAULT_KIND_NUMERIC, StepResult
from tests.gpu.steps import GREEDY, SETTINGS, sampled
from tests.model_folders import make_model_folder
from tests.step_driver import StepDriver

pytestmark = pytest.mark.gpu

POISON = 77  # its embedding is NaN


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StepDriver]:
    path = make_model_folder(
        tmp_path_factory.mktemp("model"),
        "llama",
        hidden_size=256,
        intermediate_size=512,
        layers=3,
        heads=4,
        kv_heads=1,
        max_position_embeddings=2048,
        tie=False,
        dtype=torch.bfloat16,
    )
    weights = load_file(path / "model.safetensors")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[POISON] = torch.nan
    # Never sampled greedily: other logits are above 0.
    head[POISON] = 0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    driver = StepDriver(path, **SETTINGS)
    driver.runner.warm_up()
    yield driver
    del driver
    torch.cuda.empty_cache()


def healthy(length: int, start: int = 0) -> list[int]:
    return [start + i % 60 for i in range(length)]


def faults(result: StepResult) -> list[int]:
    """Indexes into the command's rows."""
    assert all(fault.kind == ROW_FAULT_KIND_NUMERIC for fault in result.faults)
    return [fault.index for fault in result.faults]


@contextmanager
def infinite_logit(driver: StepDriver, token_id: int = 5) -> Iterator[None]:
    """Meanwhile the head's row of one token is infinite."""
    with infinite(driver.runner._decoder.weights.head[token_id]):
        yield


@contextmanager
def infinite(weight: torch.Tensor) -> Iterator[None]:
    with torch.inference_mode():
        before = weight.clone()
        weight.fill_(torch.inf)
        torch.cuda.synchronize()
        yield
        weight.copy_(before)
        torch.cuda.synchronize()


@torch.inference_mode()
def poison(driver: StepDriver, blocks: slice) -> None:
    """Fill blocks of every layer's cache with NaN, and let the null row begin with POISON."""
    runner = driver.runner
    runner.cache[:, blocks] = torch.nan
    runner._sequences.token_ids[0] = POISON
    torch.cuda.synchronize()


def test_a_fault_stays_in_its_row(driver: StepDriver) -> None:
    """Its neighbours' tokens are, bit for bit, what they are beside a healthy row."""
    seen = []
    for middle in (healthy(40, 9), [*healthy(30), POISON, *healthy(9)]):
        driver.restart()
        driver.admit(1, healthy(20), GREEDY)
        driver.admit(2, middle, GREEDY)
        driver.admit(3, healthy(40, 100), sampled(4))
        poisoned = POISON in middle
        result = driver.step({1: 20, 2: 33, 3: 30})
        assert faults(result) == ([1] if poisoned else [])
        assert list(result.num_new) == [1, 0, 0]
        # The router may have sent this before it could know: the fault again, and no token.
        result = driver.step({2: 7, 1: 1, 3: 10})
        assert faults(result) == ([0] if poisoned else [])
        assert list(result.num_new) == [0 if poisoned else 1, 1, 1]
        # Its blocks are used again, by others and by its successor.
        driver.free += driver.blocks[2]
        driver.admit(2, healthy(70, 5), GREEDY)
        driver.run([2, 1, 3], output_tokens=20)
        seen.append(driver.tokens)
    assert seen[0] == seen[1]


def test_a_fault_while_later_steps_are_in_flight(driver: StepDriver) -> None:
    """They compute the token that was never sampled: no drift, and no token either."""
    driver.restart()
    driver.admit(1, [*healthy(9), POISON], GREEDY)
    driver.admit(2, healthy(9), GREEDY)
    for counts in ({1: 9, 2: 9}, {1: 1, 2: 1}, {2: 1, 1: 1}, {1: 1, 2: 1}):
        driver.send(counts)
    results = [driver.receive() for _ in range(4)]
    assert [faults(result) for result in results] == [[], [0], [1], [0]]
    assert [list(result.num_new) for result in results] == [[0, 1], [0, 1], [1, 0], [0, 1]]


def test_a_fault_among_64_rows(driver: StepDriver) -> None:
    driver.restart()
    bad = {5, 33, 64}
    for row in range(1, 65):
        driver.admit(row, [*healthy(3 + row % 7, row), POISON if row in bad else 1], GREEDY)
    result = driver.step({row: len(driver.tokens[row]) for row in range(1, 65)})
    assert {index + 1 for index in faults(result)} == bad
    result = driver.step(dict.fromkeys(range(64, 0, -1), 1))
    assert {64 - index for index in faults(result)} == bad
    assert list(result.num_new) == [int(row not in bad) for row in range(64, 0, -1)]


def test_logits_that_are_not_finite_are_a_fault(driver: StepDriver) -> None:
    """Only of a row that is to give a token."""
    driver.restart()
    with infinite_logit(driver):
        driver.admit(1, healthy(5), GREEDY)
        driver.admit(2, healthy(5), GREEDY)
        result = driver.step({1: 5, 2: 4})
        assert faults(result) == [0]
        assert list(result.num_new) == [0, 0]


@pytest.mark.parametrize("decode_too", [False, True])
def test_a_fault_of_the_last_mlp_is_one_of_the_rows_that_sample(
    driver: StepDriver, decode_too: bool
) -> None:
    """What no token of a chunk needs is not computed, and cannot fault."""
    driver.restart()
    driver.admit(1, healthy(5), GREEDY)
    driver.admit(2, healthy(40), GREEDY)
    driver.step({1: 4})
    layers = driver.runner._decoder.weights.layers
    with infinite(layers[-1].down[3]):
        result = driver.step({2: 30, 1: 1} if decode_too else {2: 30})
        assert faults(result) == ([1] if decode_too else [])
        result = driver.step({2: 10})
        assert faults(result) == [0]
        assert list(result.num_new) == [0]
    # Any earlier layer's is one of keys and values: every token has to know.
    driver.admit(3, healthy(40), GREEDY)
    with infinite(layers[-2].down[3]):
        assert faults(driver.step({3: 30})) == [0]


def test_what_a_step_left_behind_faults_no_later_one(driver: StepDriver) -> None:
    """Samples are padded with those of earlier steps, which were not finite here."""
    seen = []
    for first in (1, POISON):
        driver.restart()
        for row in range(1, 8):
            driver.admit(row, [first, *healthy(9)], GREEDY)
        result = driver.step(dict.fromkeys(range(1, 8), 10))
        assert faults(result) == ([*range(7)] if first == POISON else [])
        for row in range(11, 16):
            driver.admit(row, healthy(10, row), GREEDY)
        result = driver.step(dict.fromkeys(range(11, 16), 10))
        assert faults(result) == []
        seen.append(list(result.token_ids))
    assert seen[0] == seen[1] and len(seen[0]) == 5


def test_null_block_and_null_row_are_never_read(driver: StepDriver) -> None:
    """Nor any part of the cache that nobody wrote."""
    seen: list[dict[int, list[int]]] = []
    for poisoned in (False, True):
        driver.restart()
        if poisoned:
            poison(driver, slice(None))
        for row, length in ((1, 3), (2, 50), (3, 17)):
            driver.admit(row, healthy(length, row), GREEDY if row < 3 else sampled(1))
        for _ in range(10):
            driver.run([1, 2, 3], output_tokens=1)
            driver.run([2], output_tokens=1)
            if poisoned:
                poison(driver, slice(1))
        seen.append(driver.tokens)
    assert seen[0] == seen[1]
