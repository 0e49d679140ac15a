"""What the CPU runner reads beside tokens, against transformers: log-probabilities and vectors."""

from __future__ import annotations

from array import array
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from mili.internal.v1.step_pb2 import TASK_EMBED, TASK_SCORE, Sampling, StepResult
from mili.worker.readings import Piece, portions
from tests.model_folders import make_model_folder
from tests.step_driver import StepDriver

WARM = Sampling(temperature=0.7, top_k=5, repetition_penalty=1.3, seed=5)
LENGTHS = (1, 2, 17, 40, 90)


class Read(NamedTuple):
    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class Reader:
    """Drives a runner, and gathers what it reads by row and position."""

    def __init__(self, driver: StepDriver) -> None:
        self.driver = driver
        self.read: dict[int, dict[int, Read]] = defaultdict(dict)
        self.vectors: dict[int, list[float]] = {}

    def run(self, rows: list[int], steps: int, chunk: int) -> None:
        """Compute up to `chunk` tokens of each row, so many times."""
        driver = self.driver
        for _ in range(steps):
            counts = {
                row: min(len(driver.tokens[row]) - driver.computed[row], chunk) for row in rows
            }
            counts = {row: count for row, count in counts.items() if count}
            if counts:
                self.take(driver.step(counts), list(counts))

    def take(self, result: StepResult, rows: list[int]) -> None:
        for message in result.logprobs:
            ids, ranks = array("I", message.token_ids), array("I", message.ranks)
            logprobs, width = array("f", message.logprobs), message.width
            for index in range(len(ids) // width):
                here = slice(index * width, (index + 1) * width)
                columns = (list(column[here]) for column in (ids, logprobs, ranks))
                position = message.first_position + index
                assert position not in self.read[rows[message.index]], "told twice"
                self.read[rows[message.index]][position] = Read(*columns)
        for embedding in result.embeddings:
            assert rows[embedding.index] not in self.vectors, "told twice"
            self.vectors[rows[embedding.index]] = list(array("f", embedding.values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return make_model_folder(path, "qwen3", hidden_size=128, heads=6, kv_heads=2)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), max_size=5), st.integers(1, 8))
def test_portions_are_the_same_positions(sizes: list[tuple[int, int]], room: int) -> None:
    pieces = [
        Piece(place, place + 1, range(offset + 1, offset + 1 + count), offset, 2)
        for place, (offset, count) in enumerate(sizes)
    ]
    parts = portions(pieces, room)
    counts = [sum(len(piece.positions) for piece in part) for part in parts]
    assert all(count == room for count in counts[:-1]) and all(0 < n <= room for n in counts)
    flat = [
        (p.row, at, p.offset + i)
        for part in parts
        for p in part
        for i, at in enumerate(p.positions)
    ]
    assert flat == [(p.row, at, p.offset + i) for p in pieces for i, at in enumerate(p.positions)]


def prompts() -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(256, (length,), generator=generator).tolist() for length in LENGTHS]
    return dict(enumerate(drawn, start=1))


@torch.inference_mode()
def check(oracle: transformers.PreTrainedModel, tokens: list[int], read: dict[int, Read]) -> None:
    """Log-probabilities to 1e-3; ranks and the order of alternatives but for near-ties."""
    exact = oracle(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)
    for position, (ids, logprobs, ranks) in read.items():
        row = exact[position - 1]
        assert ids[0] == tokens[position]
        assert (row[ids] - torch.tensor(logprobs).double()).abs().max() < 1e-3
        own = row[ids[0]]
        least, most = int((row > own + 1e-4).sum()), int((row > own - 1e-4).sum())
        assert least < ranks[0] <= most
        assert ranks[1:] == list(range(1, len(ids)))
        best = row.topk(len(ids) - 1).values
        assert torch.allclose(row[ids[1:]], best, atol=1e-4)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_logprobs_equal_transformers(
    folder: Path, oracle: transformers.PreTrainedModel, chunk: int
) -> None:
    """Sampled tokens' are of the raw logits, whatever the sampling; beside rows that want none."""
    reader = Reader(StepDriver(folder))
    inputs = prompts()
    for row, token_ids in inputs.items():
        asked = {"num_logprobs": 20, "score_from": row, "num_scored_alternatives": 3}
        reader.driver.admit(row, token_ids, WARM, **(asked if row % 2 else {}))
    reader.run(list(inputs), steps=20, chunk=chunk)
    assert set(reader.read) == {1, 3, 5}
    for row in (1, 3, 5):
        tokens, num_prompt = reader.driver.tokens[row], LENGTHS[row - 1]
        assert len(tokens) > num_prompt
        assert sorted(reader.read[row]) == list(range(row, len(tokens)))
        widths = {position: len(read.ranks) for position, read in reader.read[row].items()}
        assert all(widths[at] == (4 if at < num_prompt else 21) for at in widths)
        check(oracle, tokens, reader.read[row])


def test_what_is_asked_for_changes_no_token(folder: Path) -> None:
    asking, silent = StepDriver(folder), StepDriver(folder)
    for row, token_ids in prompts().items():
        asking.admit(row, token_ids, WARM, num_logprobs=5, score_from=1)
        silent.admit(row, token_ids, WARM)
    for driver in (asking, silent):
        driver.run(list(driver.tokens), output_tokens=12, chunk=30)
    assert asking.tokens == silent.tokens


@pytest.mark.parametrize("chunk", [1000, 7])
def test_tasks_sample_nothing(
    folder: Path, oracle: transformers.PreTrainedModel, chunk: int
) -> None:
    reader = Reader(StepDriver(folder))
    inputs = prompts()
    for row, token_ids in inputs.items():
        if row % 2:
            reader.driver.admit(row, token_ids, task=TASK_EMBED)
        else:
            reader.driver.admit(row, token_ids, task=TASK_SCORE, score_from=len(token_ids) - 1)
    reader.driver.admit(9, inputs[3])  # one that generates beside them
    reader.run([*inputs, 9], steps=14, chunk=chunk)
    assert all(reader.driver.tokens[row] == inputs[row] for row in inputs)
    assert len(reader.driver.tokens[9]) > len(inputs[3])
    for row, token_ids in inputs.items():
        if row % 2:
            with torch.inference_mode():
                states = oracle.model(torch.tensor([token_ids])).last_hidden_state[0, -1]
            assert (states - torch.tensor(reader.vectors[row])).abs().max() < 1e-3
        else:
            assert list(reader.read[row]) == [len(token_ids) - 1]
            check(oracle, token_ids, reader.read[row])
    assert set(reader.vectors) == {1, 3, 5}
