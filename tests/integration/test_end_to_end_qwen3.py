"""A model of Qwen3-0.6B's shape is served from a folder on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mili.client import Client
from tests.model_folders import make_model_folder
from tests.serving import serving


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_folder_of_the_shape_of_qwen3_0_6b_answers(tmp_path: Path) -> None:
    model = make_model_folder(
        tmp_path / "qwen3-0.6b",
        hidden_size=1024,
        intermediate_size=3072,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1_000_000.0,
        dtype=torch.bfloat16,
    )
    assert 1.1e9 < sum(file.stat().st_size for file in model.glob("*.safetensors")) < 1.3e9
    with (
        serving(model, tmp_path / "log") as served,
        Client(served.address, timeout=300) as client,
    ):
        (description,) = client.models()
        assert description.name == "qwen3-0.6b"
        stream = client.stream("Hello", max_tokens=20, temperature=0, ignore_eos=True)
        pieces = [event.delta for event in stream.events() if event.HasField("delta")]
        assert len(pieces) > 1, "nothing was streamed"
        assert stream.finish_reason == "max_tokens"
        answer = stream.generation
        assert len(answer.token_ids) == 20
        again = client.generate("Hello", max_tokens=20, temperature=0, ignore_eos=True)
        assert again.token_ids == answer.token_ids
