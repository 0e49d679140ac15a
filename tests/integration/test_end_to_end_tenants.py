"""Tenants against real processes: `mili serve --tenants` starts, lets in, and shares no cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from structlog.testing import capture_logs

from mili.cli.errors import CommandError
from mili.cli.main import main
from mili.cli.serve import serve
from mili.cli.serve_config import ServeConfig
from mili.client import Client, NotAllowed, Overloaded
from mili.router.config import RouterConfig
from mili.router.main import USAGE, run
from tests.model_folders import make_model_folder
from tests.serving import STEADY, Served, serving

PROMPT = list(range(7, 71))  # 4 blocks


def token(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Return a token and its table of the file, made as a user makes them."""
    assert main(["token"]) == 0
    made = dict(line.split() for line in capsys.readouterr().out.splitlines())
    return made["token"], f'[tenants.{name}]\ntoken_sha256 = ["{made["sha256"]}"]\n'


class Tenanted(NamedTuple):
    """A server with the tenants `one`, and `two` of 100 tokens, and their bearer tokens."""

    served: Served
    one: str
    two: str


@pytest.fixture
def tenanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Tenanted]:
    one, first = token("one", capsys)
    two, second = token("two", capsys)
    file = tmp_path / "tenants.toml"
    file.write_text(f"{first}{second}token_quota = 100\n")
    model = make_model_folder(tmp_path / "tiny")
    with serving(model, tmp_path / "log", "--tenants", str(file), **STEADY) as served:
        yield Tenanted(served, one, two)


def cached(client: Client, *, salt: str = "") -> int:
    """Generate from the prompt; return how many of its tokens came from the cache."""
    result = client.generate(
        PROMPT,
        max_tokens=1,
        temperature=0,
        cache_salt=salt,
        session_id="s",
        max_queue_time=30,
        time_limit=30,
    )
    return result.usage.cached_prompt_tokens


def test_the_cache_ends_where_the_tenant_does(
    tenanted: Tenanted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = tenanted.served.address
    with Client(address, timeout=60) as nobody, pytest.raises(NotAllowed, match="Bearer TOKEN"):
        nobody.models()
    with (
        Client(address, timeout=60, token=tenanted.one) as one,
        Client(address, timeout=60, token=tenanted.two) as two,
    ):
        assert [cached(one), cached(one)] == [0, 48]
        assert cached(two) == 0, "what another tenant left is not seen"
        assert [cached(one, salt="a"), cached(one, salt="a"), cached(one)] == [0, 48, 48]
        with pytest.raises(Overloaded, match="35 are left"):
            two.generate(PROMPT)
    asked = ["generate", "--raw", "hello", "--max-tokens", "2", "--address", address]
    assert main(asked) == 1
    assert "set MILI_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("MILI_TOKEN", tenanted.one)
    assert main(asked) == 0
    assert capsys.readouterr().out


def test_a_bad_file_ends_serve_and_router_at_once(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("[tenants.one]\nweight = 2\n")
    model = make_model_folder(tmp_path / "tiny")
    complaint = f"{file}: tenant one: token_sha256: is missing"
    with pytest.raises(CommandError, match=re.escape(complaint)):
        serve(ServeConfig(model=str(model), tenants=file))
    with capture_logs() as logs:
        assert run(RouterConfig(model=str(model), tenants=file)) == USAGE
    assert [line["reason"] for line in logs] == [complaint]
