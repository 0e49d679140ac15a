"""Steps on the GPU: however a row is computed, its tokens are those of the model.

Where two ways round differently (another batch, another chunk), tokens are compared up to the
first near tie; where the same kernels run on the same numbers, they must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cupy")

import torch

from mili.worker.sequence_table import CommandError
from tests.gpu.oracle import Oracle
from tests.gpu.steps import GREEDY, OUTPUT_TOKENS, SETTINGS, Tokens, generate, sampled
from tests.model_folders import Family, make_model_folder
from tests.step_driver import StepDriver

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 2048
LENGTHS = (1, 2, 15, 16, 17, 31, 127, 300, 1000)
# Everything that changes logits before a token is drawn.
EDITS: dict[str, Any] = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.6,
    "bias_token_ids": [3, 11],
    "biases": [4.0, -7.5],
    "allowed_token_ids": range(2, VOCAB_SIZE - 9),
    "suppressed_token_ids": [3],
    "suppress_until_position": 45,
}


@pytest.fixture(scope="module", params=[64, 128], ids=["head_dim 64", "head_dim 128"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(
        tmp_path_factory.mktemp("model"),
        hidden_size=512,
        intermediate_size=1024,
        layers=4,
        heads=8,
        kv_heads=2,
        head_dim=request.param,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=2048,
        tie=False,
        dtype=torch.bfloat16,
    )


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[StepDriver]:
    """With the graphs recorded that a worker starts with; each test restarts it."""
    driver = StepDriver(folder, **SETTINGS)
    driver.runner.warm_up()
    yield driver
    del driver
    torch.cuda.empty_cache()


def prompts(*lengths: int, seed: int = 0) -> dict[int, list[int]]:
    """Random prompts by row, from 1 on."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths)
    return {row: draw.tolist() for row, draw in enumerate(draws, start=1)}


def check_greedy(oracle: Oracle, tokens: Tokens, inputs: Tokens, where: str) -> None:
    for row, token_ids in inputs.items():
        assert list(tokens[row][: len(token_ids)]) == list(token_ids)
        assert len(tokens[row]) > len(token_ids), f"{where}: row {row} got no token"
        oracle.check_greedy(
            tokens[row], len(token_ids), f"{where}, row {row} of {len(token_ids)} tokens"
        )


def test_greedy_tokens_are_the_oracles(driver: StepDriver, oracle: Oracle) -> None:
    inputs = prompts(*LENGTHS)
    check_greedy(oracle, generate(driver, inputs), inputs, "all at once")
    # Rows of every length decode while others are still computed chunk by chunk.
    check_greedy(oracle, generate(driver, inputs, chunk=40), inputs, "chunks of 40")


def test_graphs_and_eager_launches_give_the_same(
    driver: StepDriver, oracle: Oracle, folder: Path
) -> None:
    inputs = prompts(*LENGTHS)
    eager = StepDriver(folder, **SETTINGS, enforce_eager=True)
    recorded = generate(driver, inputs)
    oracle.check_same(recorded, generate(eager, inputs), "graphs and eager")
    recorded = generate(driver, inputs, chunk=100)
    oracle.check_same(recorded, generate(eager, inputs, chunk=100), "the same in chunks")


def test_one_row_and_64_give_the_same(driver: StepDriver, oracle: Oracle) -> None:
    lengths = torch.randint(1, 120, (64,), generator=torch.Generator().manual_seed(3)).tolist()
    inputs = prompts(*lengths)
    many = generate(driver, inputs)
    check_greedy(oracle, many, inputs, "64 rows")
    for row in range(1, 65, 8):
        alone = generate(driver, {row: inputs[row]})
        oracle.check_same(alone, many, f"row {row} alone and among 64")


@pytest.mark.parametrize("chunk", [1, 16, 50])
def test_chunks_give_what_the_whole_gives(driver: StepDriver, oracle: Oracle, chunk: int) -> None:
    inputs = prompts(16, 33, 90, 200)
    whole = generate(driver, inputs)
    oracle.check_same(whole, generate(driver, inputs, chunk=chunk), f"chunks of {chunk}")


def test_shared_blocks_give_what_own_blocks_give(driver: StepDriver, oracle: Oracle) -> None:
    (prefix, first, second, third) = prompts(160, 10, 33, 1).values()
    inputs = {1: prefix + first, 2: prefix + second, 3: prefix + third}
    own = generate(driver, inputs)
    driver.restart()
    driver.admit(1, inputs[1], GREEDY)
    driver.run([1], output_tokens=3)
    for row in (2, 3):
        driver.admit(row, inputs[row], GREEDY, shared=driver.blocks[1][:10])
        assert driver.computed[row] == len(prefix)
    driver.run([2, 1, 3], output_tokens=OUTPUT_TOKENS - 3)
    driver.run([2, 3], output_tokens=3)
    oracle.check_same(own, driver.tokens, "own and shared blocks")


def test_a_preempted_row_continues_as_it_would_have(driver: StepDriver, oracle: Oracle) -> None:
    """Admitted again with its output so far, in another row, while others decode."""
    inputs = prompts(30, 200, 7)
    calm = generate(driver, inputs)
    driver.restart()
    for row in (1, 3):
        driver.admit(row, inputs[row], GREEDY)
    driver.run([1, 3], output_tokens=4)
    driver.admit(9, calm[2][:211], GREEDY)
    driver.run([1, 9, 3], output_tokens=OUTPUT_TOKENS - 11)
    assert len(driver.tokens[9]) == len(calm[2])
    oracle.check_same(calm, {2: driver.tokens[9]}, "preempted")
    check_greedy(oracle, driver.tokens, {1: inputs[1], 3: inputs[3]}, "company of the preempted")


def test_output_is_counted_and_the_prompt_is_not_also_after_a_preemption(
    driver: StepDriver,
) -> None:
    (prompt,) = prompts(30).values()
    calm = generate(driver, {1: prompt}, {1: sampled(21, **EDITS)})[1]
    counts = driver.runner._sequences.sampling.output_counts
    expected = torch.tensor(calm[30:]).bincount(minlength=VOCAB_SIZE)
    assert torch.equal(counts[1].long().cpu(), expected)
    for known in (31, 40, 53):
        driver.restart()
        driver.admit(7, calm[:known], sampled(21, **EDITS), num_prompt_tokens=30)
        driver.run([7], output_tokens=5, depth=2)
        expected = torch.tensor(driver.tokens[7][30:]).bincount(minlength=VOCAB_SIZE)
        assert torch.equal(counts[7].long().cpu(), expected), known


def test_rows_that_join_while_others_decode(driver: StepDriver, oracle: Oracle) -> None:
    inputs = prompts(5, 40, 17, 129, 3, 64, 80, 7)
    driver.restart()
    for row, token_ids in inputs.items():
        driver.admit(row, token_ids, GREEDY)
        driver.run(list(inputs)[:row], output_tokens=2, chunk=50)
    driver.run(list(reversed(inputs)), output_tokens=10)
    check_greedy(oracle, driver.tokens, inputs, "rows that join")


def test_graphs_are_recorded_while_steps_are_in_flight(
    driver: StepDriver, oracle: Oracle, folder: Path
) -> None:
    inputs = prompts(1, 40, 17, 129, 300, 64)
    cold = StepDriver(folder, **SETTINGS)
    tokens = generate(cold, inputs, chunk=100, depth=4)
    check_greedy(oracle, tokens, inputs, "graphs recorded on the way")
    oracle.check_same(generate(driver, inputs, chunk=100), tokens, "recorded before and on the way")


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "bfloat16"), ("qwen2", "float16")])
def test_a_model_of_one_layer(family: Family, dtype: str, tmp_path: Path) -> None:
    """The first layer is the last one, too. No graph is recorded before it is needed."""
    folder = make_model_folder(
        tmp_path / "model",
        family,
        hidden_size=512,
        intermediate_size=1024,
        layers=1,
        heads=8,
        kv_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=2048,
        dtype=getattr(torch, dtype),
    )
    driver = StepDriver(folder, **SETTINGS | {"dtype": dtype})
    inputs = prompts(*LENGTHS)
    check_greedy(Oracle(folder), generate(driver, inputs, chunk=40), inputs, "one layer")


@pytest.mark.parametrize("depth", [2, 4])
def test_steps_in_flight_give_what_single_steps_give(driver: StepDriver, depth: int) -> None:
    """A sampled token reaches the next step before the host knows it: not one bit may differ."""
    inputs = prompts(1, 40, 17, 129, 300, 64)
    sampling = {
        2: sampled(5, **EDITS),
        3: sampled(6, top_k=20),
        4: sampled(8, temperature=0, frequency_penalty=0.5),
        5: sampled(7, temperature=0.7, top_p=0.9),
    }
    single = generate(driver, inputs, sampling, chunk=100)
    assert generate(driver, inputs, sampling, chunk=100, depth=depth) == single


def test_the_seed_alone_decides(driver: StepDriver) -> None:
    """Not the row, nor whether it ran before."""
    (prompt,) = prompts(30).values()
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.6, "top_k": 30}, {"top_p": 0.8}, {"min_p": 0.02},
        {"repetition_penalty": 1.3}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0},
        {"bias_token_ids": [3], "biases": [4.0]}, {"allowed_token_ids": range(50)}, EDITS,
    ]  # fmt: skip
    for kind in kinds:
        first = generate(driver, {1: prompt}, {1: sampled(11, **kind)})[1]
        again = generate(driver, {7: prompt}, {7: sampled(11, **kind)})[7]
        other = generate(driver, {1: prompt}, {1: sampled(12, **kind)})[1]
        assert first == again, kind
        assert first != other, kind


def test_restart_forgets_every_row(driver: StepDriver) -> None:
    generate(driver, prompts(20))
    driver.runner.reset()
    with pytest.raises(CommandError, match="0 known tokens"):
        driver.step({1: 1})
