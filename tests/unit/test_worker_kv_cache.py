"""How many blocks there are, and that they cost nothing before they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mili.worker.config import WorkerConfig
from mili.worker.cpu import kv_cache
from mili.worker.cpu.kv_cache import KVCache, count_blocks
from mili.worker.models.config import DecoderConfig
from mili.worker.models.rope import Rope

SHAPE = DecoderConfig(
    "LlamaForCausalLM", 320, 64, 128, 3, 4, 2, 64, 1e-5, 1024, True, Rope(1e4, None)
)
BLOCK_BYTES = 3 * 2 * 2 * 16 * 64 * 4


def count(**settings: Any) -> int:  # noqa: ANN401
    return count_blocks(WorkerConfig(model="m", **settings), SHAPE, 4, 1000)


def test_the_override_comes_first() -> None:
    assert count(num_gpu_blocks_override=17, kv_cache_memory_bytes=1) == 17


def test_memory_in_bytes() -> None:
    assert count(kv_cache_memory_bytes=10 * BLOCK_BYTES - 1) == 9


def test_by_default_a_quarter_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "available_memory", lambda: 400 * BLOCK_BYTES)
    assert count() == 100
    assert count(kv_cache_memory_fraction=0.125) == 50, "two workers on one machine"


def test_by_default_no_more_than_is_useful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "available_memory", lambda: 10**15)
    assert count(max_num_seqs=3) == 1 + 3 * 63
    assert count(max_num_seqs=3, kv_cache_memory_fraction=0.01) == 1 + 3 * 63


def test_too_little_memory_says_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"room for 1 blocks .*raise MILI_KV_CACHE_MEMORY_BYTES"):
        count(kv_cache_memory_bytes=2 * BLOCK_BYTES - 1)


def make_cache(num_blocks: int) -> KVCache:
    return KVCache(
        SHAPE, num_blocks=num_blocks, block_size=16, max_blocks_per_row=64, dtype=torch.float32
    )


def test_memory_is_taken_when_it_is_touched() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    cache = make_cache(num_blocks=(8 << 30) // BLOCK_BYTES)
    assert sum(layer.nbytes for layer in cache.layers) > 7 << 30
    assert process.memory_info().rss - before < 100 << 20


def test_clear_touches_its_slots_only() -> None:
    cache = make_cache(num_blocks=4)
    for layer in cache.layers:
        layer.fill_(torch.nan)
    cache.clear(torch.tensor([17, 63]))
    for layer in cache.layers:
        zero = (layer == 0).all(dim=3)  # [2 * kv_heads, num_blocks, block_size]
        assert zero.nonzero()[:, 1:].unique(dim=0).tolist() == [[1, 1], [3, 15]]
        assert zero.sum() == 2 * layer.shape[0]


def test_available_memory_respects_the_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(kv_cache, "_CGROUP", tmp_path)
    assert kv_cache.available_memory() == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert kv_cache.available_memory() > 2_000_000
    monkeypatch.setattr(kv_cache, "_CGROUP", tmp_path / "missing")
    assert kv_cache.available_memory() > 2_000_000
