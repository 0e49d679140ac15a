"""Every kernel compiles for the cards it is meant for, without warnings, and no register spills.

On a machine without a GPU, with the constants of the models that we measure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("cupy")

import torch

from mili.kernels import gemv
from mili.kernels.module import SOURCES, Constant, architecture, compile_options
from mili.worker.cuda.loading import kernels_of
from mili.worker.models.config import DecoderConfig, read_decoder_config


class Card(NamedTuple):
    capability: tuple[int, int]
    multiprocessors: int


CARDS = {"A100": Card((8, 0), 108), "H100": Card((9, 0), 132)}
# vocabulary, hidden, intermediate, heads, KV heads, head_dim
SHAPES = {
    "Qwen3-0.6B": (151_936, 1024, 3072, 16, 8, 128),
    "Qwen3-8B": (151_936, 4096, 12288, 32, 8, 128),
    "SmolLM2-135M": (49_152, 576, 1536, 9, 3, 64),
}
SMALLEST = "SmolLM2-135M"
FUNCTION = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads"
)
OF_HOPPER_ALONE = "prefill_attention_sm90"

Source = tuple[str, tuple[tuple[str, Constant], ...]]


def nvcc() -> Path:
    """Of `make .venv/.dev`, whose version is pinned; else of an installed CUDA toolkit."""
    pinned = Path(sys.prefix) / "nvcc/nvidia/cu13/bin"
    for folder in (str(pinned), None, "/usr/local/cuda/bin"):
        if found := shutil.which("nvcc", path=folder):
            return Path(found)
    pytest.fail("no nvcc: make .venv/.dev installs one")


def decoder(name: str) -> DecoderConfig:
    vocab_size, hidden, intermediate, heads, kv_heads, head_dim = SHAPES[name]
    return read_decoder_config(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        }
    )


def sources() -> Iterator[Source]:
    """What the models compile on the current device; of many alike, gemv, those of most rows."""
    for name, dtype in [*((name, torch.bfloat16) for name in SHAPES), (SMALLEST, torch.float16)]:
        for source, constants in kernels_of(decoder(name), dtype, 16):
            if source != "gemv" or constants["ROWS"] == gemv.VECTOR_ROWS or name == SMALLEST:
                yield source, tuple(constants.items())


@pytest.fixture(params=CARDS)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Card:
    """The current device, as far as the choice of constants goes."""
    card = CARDS[request.param]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card.capability)
    monkeypatch.setattr(gemv, "_multiprocessors", lambda device: card.multiprocessors)
    return card


def failures(source: Source, arch: str) -> list[str]:
    """What is wrong with a source's kernels, each named."""
    name, constants = source
    compiled = subprocess.run(
        [
            nvcc(),
            *compile_options(arch, constants),
            *("-cubin", "-o", os.devnull, "-Xptxas", "-v", "-Werror", "all-warnings"),
            SOURCES / f"{name}.cu",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = compiled.stdout + compiled.stderr
    case = f"{name} for {arch}, {dict(constants)}"
    if compiled.returncode:
        return [f"{case}:\n{said}"]
    functions = FUNCTION.findall(said)
    assert functions, f"{case}: ptxas reports no kernel:\n{said}"
    return [
        f"{case}: {kernel} spills {stores} bytes and loads {loads}"
        for kernel, _, stores, loads in functions
        if (stores, loads) != ("0", "0")
    ]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="nvcc needs a host compiler")
def test_every_kernel_compiles_without_spills(card: Card) -> None:
    wanted = dict.fromkeys(sources())
    assert {name for name, _ in wanted} == {path.stem for path in SOURCES.glob("*.cu")} - {
        "prefill_attention" if card.capability == (9, 0) else OF_HOPPER_ALONE
    }
    arch = architecture(card.capability)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda source: failures(source, arch), wanted))
    wrong = [failure for of_source in found for failure in of_source]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="nvcc needs a host compiler")
def test_a_spill_and_an_error_would_be_seen() -> None:
    heads = {"HEADS": 16, "KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_SIZE": 16, "MAX_ROWS": 64}
    constants = {"SCALAR": "__half", **heads, "BLOCKS_PER_SM": 8}  # 64 registers a thread
    (spills,) = failures(("decode_attention", tuple(constants.items())), "sm_80")
    assert "decode_attention spills" in spills
    (error,) = failures(("norm", (("SCALAR", "__half"),)), "sm_80")
    assert "SIZE" in error
