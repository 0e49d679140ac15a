"""`mili serve --http-port` with tenants, and how it ends under a stream."""

from __future__ import annotations

import signal
from pathlib import Path

import openai
import pytest

from mili.cli.tokens import make_token
from tests.model_folders import make_model_folder
from tests.serving import STEADY, free_port, serving

TOKENS = 600


def test_tenants_and_a_drain(tmp_path: Path) -> None:
    secret, digest = make_token()
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[tenants.one]\ntoken_sha256 = ["{digest}"]\n')
    model = make_model_folder(tmp_path / "tiny")
    flags = ("--http-port", str(free_port()), "--tenants", str(tenants))
    with serving(model, tmp_path / "log", *flags, **STEADY) as served:
        stranger = openai.OpenAI(
            base_url=f"http://{served.http}/v1", api_key="wrong", timeout=30, max_retries=0
        )
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "UNAUTHENTICATED"
        client = stranger.with_options(api_key=secret)
        pieces = client.completions.create(
            model="tiny", prompt="a", max_tokens=TOKENS, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        next(pieces)
        served.process.send_signal(signal.SIGTERM)
        *_, last = pieces
        assert last.usage is not None
        assert last.usage.completion_tokens == TOKENS
        assert served.process.wait(30) == 0, served.log.read_text()
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    assert "Traceback" not in served.log.read_text()
