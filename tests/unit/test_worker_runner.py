"""The runner against transformers, and against itself in other batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mili.internal.v1.step_pb2 import Sampling
from tests.model_folders import make_model_folder
from tests.step_driver import StepDriver

# Two logits nearer than this may come out in the other order.
TIE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: list[dict[str, Any]] = [
    {"family": "qwen3", "heads": 2, "kv_heads": 2, "head_dim": 64, "tie": True},
    {"family": "qwen3", "heads": 5, "kv_heads": 1, "head_dim": 128, "tie": False},
    {"family": "qwen2", "heads": 6, "kv_heads": 2, "head_dim": 64, "tie": True},
    {"family": "qwen2", "heads": 8, "kv_heads": 1, "head_dim": 128, "tie": False},
    {"family": "llama", "heads": 3, "kv_heads": 1, "head_dim": 64, "tie": True},
    {"family": "llama", "heads": 8, "kv_heads": 1, "head_dim": 64, "rope_scaling": LLAMA3},
    {
        "family": "llama",
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 128,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
]


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(
        tmp_path_factory.mktemp("model"), "qwen3", hidden_size=128, heads=6, kv_heads=2
    )


def assert_greedy(model: Any, tokens: list[int], num_prompt_tokens: int) -> None:  # noqa: ANN401
    """Every output token must be the oracle's best, or tie with it."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, num_prompt_tokens - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens[num_prompt_tokens:])[:, None])[:, 0]
    behind = logits.max(dim=1).values - chosen
    assert (behind < TIE).all(), behind.tolist()


@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"{s['family']}-{s['heads']}-{s['head_dim']}"
)
@pytest.mark.parametrize("chunk", [1000, 37])
def test_greedy_equals_transformers(tmp_path: Path, shape: dict[str, Any], chunk: int) -> None:
    make_model_folder(tmp_path, hidden_size=96, intermediate_size=160, **shape)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    driver = StepDriver(tmp_path)
    inputs = dict(enumerate(prompts(1, 2, 15, 16, 17, 100, 300), start=1))
    for row, token_ids in inputs.items():
        driver.admit(row, token_ids)
    driver.run(list(inputs), output_tokens=24, chunk=chunk)
    for row, token_ids in inputs.items():
        assert driver.tokens[row][: len(token_ids)] == token_ids
        assert len(driver.tokens[row]) == len(token_ids) + 24
        assert_greedy(model, driver.tokens[row], len(token_ids))


def test_bfloat16_is_near_transformers(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    driver = StepDriver(folder, dtype="bfloat16")
    inputs = dict(enumerate(prompts(20, 50, 90), start=1))
    for row, token_ids in inputs.items():
        driver.admit(row, token_ids)
    driver.run(list(inputs), output_tokens=30)
    for row, token_ids in inputs.items():
        with torch.inference_mode():
            logits = model(torch.tensor([driver.tokens[row]])).logits[0, len(token_ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(driver.tokens[row][len(token_ids) :])[:, None])
        assert (logits.max(dim=1).values - chosen[:, 0]).max() < 0.1 * logits.std()


def test_shared_blocks_give_what_own_blocks_give(folder: Path) -> None:
    (prefix, first, second) = prompts(64, 10, 33)
    alone, shared = StepDriver(folder), StepDriver(folder)
    for row, tail in ((1, first), (2, second)):
        alone.admit(row, prefix + tail)
        alone.run([row], output_tokens=20)
    shared.admit(1, prefix + first)
    shared.run([1], output_tokens=1)
    shared.admit(2, prefix + second, shared=shared.blocks[1][:4])
    assert shared.computed[2] == 64
    shared.run([2], output_tokens=20)
    shared.run([1], output_tokens=19)
    assert shared.tokens == alone.tokens


def test_output_does_not_depend_on_company_or_order(folder: Path) -> None:
    """Also sampled, and with rows admitted while others decode."""
    inputs = dict(enumerate(prompts(5, 40, 17, 129, 3, 64, 80, 7), start=1))
    settings = [Sampling(), Sampling(temperature=0.8, top_p=0.95, seed=2**63 + 11)]
    settings += [
        Sampling(temperature=1.0, seed=3, frequency_penalty=2, bias_token_ids=[9], biases=[6]),
        Sampling(temperature=1.2, top_k=20, seed=4, allowed_token_ids=range(0, 320, 3)),
    ]
    many = StepDriver(folder)
    for row, token_ids in inputs.items():
        many.admit(row, token_ids, settings[row % 4])
        many.run(list(inputs)[:row], output_tokens=2, chunk=50)
    many.run(list(reversed(inputs)), output_tokens=10)
    for row, token_ids in inputs.items():
        alone = StepDriver(folder)
        alone.admit(row, token_ids, settings[row % 4])
        alone.run([row], output_tokens=len(many.tokens[row]) - len(token_ids))
        assert alone.tokens[row] == many.tokens[row]


def test_a_recovered_row_continues_as_it_would_have(folder: Path) -> None:
    """Admitted again elsewhere with its output so far: seed, position and history decide."""
    sampling = Sampling(
        temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=99, presence_penalty=0.5,
        frequency_penalty=1.5, bias_token_ids=[3, 200], biases=[4, 4],
        allowed_token_ids=range(3, 250), suppressed_token_ids=[3], suppress_until_position=60,
    )  # fmt: skip
    (prompt,) = prompts(30)
    first, second = StepDriver(folder), StepDriver(folder)
    first.admit(1, prompt, sampling)
    first.run([1], output_tokens=40)
    second.admit(5, first.tokens[1][:50], sampling, num_prompt_tokens=30)
    second.run([5], output_tokens=20)
    assert second.tokens[5] == first.tokens[1]
    second.admit(5, first.tokens[1][:50], sampling)
    second.run([5], output_tokens=20)
    assert second.tokens[5] != first.tokens[1], "what is output and what is prompt matters"


def test_results_are_parallel_to_the_rows_of_the_command(folder: Path) -> None:
    driver = StepDriver(folder)
    inputs = dict(zip((3, 1, 2), prompts(40, 8, 8), strict=True))
    for row, token_ids in inputs.items():
        driver.admit(row, token_ids)
    result = driver.step({3: 20, 2: 8, 1: 3})
    assert list(result.num_new) == [0, 1, 0]
    assert result.step == 1
    result = driver.step({1: 5, 3: 19, 2: 1})
    assert list(result.num_new) == [1, 0, 1]
    assert list(driver.step({3: 1}).num_new) == [1]


def test_suppressed_tokens_and_repetition_penalty_as_transformers(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (prompt,) = prompts(12)
    plain = model.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None,
        repetition_penalty=1.3, suppress_tokens=[5, 17, 99],
    )  # fmt: skip
    driver = StepDriver(folder)
    sampling = Sampling(
        repetition_penalty=1.3, suppressed_token_ids=[5, 17, 99], suppress_until_position=10_000
    )
    driver.admit(1, prompt, sampling)
    driver.run([1], output_tokens=30)
    assert driver.tokens[1] == plain[0].tolist()


def test_penalties_and_biases_as_a_loop_of_transformers_would(folder: Path) -> None:
    """Greedy, each token from the oracle's own logits, edited by OpenAI's formula."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = list(prompts(12)[0])
    counts, bias = torch.zeros(320), torch.zeros(320)
    bias[[7, 8]] = torch.tensor([1.5, -100.0])
    sampling = Sampling(
        presence_penalty=0.3, frequency_penalty=0.2, bias_token_ids=[7, 8], biases=[1.5, -100.0]
    )
    driver = StepDriver(folder)
    driver.admit(1, tokens, sampling)
    driver.run([1], output_tokens=40)
    for token in driver.tokens[1][12:]:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        logits = logits - 0.2 * counts - 0.3 * (counts > 0) + bias
        assert logits.max() - logits[token] < TIE
        counts[token] += 1
        tokens.append(token)
    assert counts.max() > 1, "no token came twice: nothing was tested"


def test_suppression_ends_at_its_position(folder: Path) -> None:
    (prompt,) = prompts(12)
    driver = StepDriver(folder)
    driver.admit(1, prompt)
    driver.run([1], output_tokens=4)
    banned = driver.tokens[1][12]
    for until, expected in ((13, False), (12, True)):
        sampling = Sampling(suppressed_token_ids=[banned], suppress_until_position=until)
        driver.admit(2, prompt, sampling)
        driver.run([2], output_tokens=1)
        assert (driver.tokens[2][12] == banned) is expected


def test_ready_and_warm_up(folder: Path) -> None:
    driver = StepDriver(
        folder, max_num_seqs=5, max_model_len=100, block_size=8, max_num_batched_tokens=64
    )
    driver.runner.warm_up()
    ready = driver.runner.ready()
    assert (ready.num_blocks, ready.block_size, ready.max_rows) == (400, 8, 6)
    assert (ready.max_step_tokens, ready.max_model_len, ready.vocab_size) == (64, 100, 320)
    driver.admit(5, prompts(99)[0])
    driver.run([5], output_tokens=1)  # the limit counts the last token too


def test_context_beyond_the_models_own_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--max-model-len 2000 is more than .* 1024 tokens"):
        StepDriver(folder, max_model_len=2000)
