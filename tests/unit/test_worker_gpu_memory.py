"""What the KV cache gets of a GPU's memory, and what is said where it does not suffice."""

from __future__ import annotations

import pytest
import torch

from mili.worker.config import WorkerConfig
from mili.worker.cuda.memory import RESERVE_BYTES, check_device, count_blocks, out_of_memory
from mili.worker.models.config import DecoderConfig, read_decoder_config

GIB = 1 << 30
DEVICE = torch.device("cuda", 0)
# Keys and values of 16 tokens in 28 layers, 8 heads of 128 numbers, 2 bytes each.
BLOCK_BYTES = 2 * 16 * 28 * 8 * 128 * 2


@pytest.fixture
def decoder() -> DecoderConfig:
    return read_decoder_config(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": 1000,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        }
    )


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GiB, of which 70 are free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")


def config(**settings: object) -> WorkerConfig:
    return WorkerConfig.model_validate({"model": "m", "device": "cuda", **settings})


def test_the_cache_gets_what_is_free_of_our_share_less_a_reserve(decoder: DecoderConfig) -> None:
    room = 70 * GIB - 20 * GIB - RESERVE_BYTES  # a quarter of the card is left to others
    wanted = config(gpu_memory_utilization=0.75)
    assert count_blocks(wanted, decoder, 2, DEVICE) == room // BLOCK_BYTES
    assert count_blocks(wanted, decoder, 4, DEVICE) == room // (2 * BLOCK_BYTES)
    larger_blocks = config(gpu_memory_utilization=0.75, block_size=32)
    assert count_blocks(larger_blocks, decoder, 2, DEVICE) == room // (2 * BLOCK_BYTES)


def test_what_the_operator_says_comes_first(decoder: DecoderConfig) -> None:
    in_bytes = config(kv_cache_memory_bytes=10 * BLOCK_BYTES + 1, gpu_memory_utilization=0.01)
    assert count_blocks(in_bytes, decoder, 2, DEVICE) == 10
    in_blocks = config(num_gpu_blocks_override=7, kv_cache_memory_bytes=GIB)
    assert count_blocks(in_blocks, decoder, 2, DEVICE) == 7


@pytest.mark.parametrize("share", [0.137, 0.01])
def test_no_room_says_what_is_free_and_what_to_do(decoder: DecoderConfig, share: float) -> None:
    with pytest.raises(ValueError, match="no room for the KV cache") as caught:
        count_blocks(config(gpu_memory_utilization=share), decoder, 2, DEVICE)
    text = str(caught.value)
    assert "70.0 GiB of 80.0 GiB are free" in text
    assert f"--gpu-memory-utilization {share:g} gives it 0.0 GiB: raise that" in text


def test_a_cache_of_the_null_block_alone_is_none(decoder: DecoderConfig) -> None:
    assert count_blocks(config(kv_cache_memory_bytes=2 * BLOCK_BYTES), decoder, 2, DEVICE) == 2
    with pytest.raises(ValueError, match="no room"):
        count_blocks(config(kv_cache_memory_bytes=2 * BLOCK_BYTES - 1), decoder, 2, DEVICE)


def test_more_than_is_free_is_refused(decoder: DecoderConfig) -> None:
    wanted = config(kv_cache_memory_bytes=71 * GIB)
    with pytest.raises(
        ValueError, match=r"MILI_KV_CACHE_MEMORY_BYTES gives it 71\.0 GiB: lower that"
    ):
        count_blocks(wanted, decoder, 2, DEVICE)


def test_a_gpu_that_is_none_or_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU: look at nvidia-smi"):
        check_device(DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"a card has compute capability 7\.5: .* 8\.0 or later"):
        check_device(DEVICE)
    for enough in ((8, 0), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, e=enough: e)
        check_device(DEVICE)


def test_out_of_memory_keeps_to_one_line() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried 5 GiB.\nSee the allocator's notes")
    text = str(out_of_memory(error, DEVICE))
    assert "a card (80.0 GiB, 70.0 GiB free)" in text and "Tried 5 GiB." in text
    assert "allocator" not in text and "\n" not in text
