"""The tenants file: what it may say, what a bad one is told, and whose token and cache is whose."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from mili.cli.main import main
from mili.router.radix_tree import TENANT_BYTES
from mili.router.tenants import EVERYONE, Tenants

DIGEST = sha256(b"one").hexdigest()
OTHER = sha256(b"two").hexdigest()
WHOLE = f"""
[tenants.search]
token_sha256 = ["{DIGEST}", "{OTHER}"]
weight = 2
max_priority = 10
requests_per_second = 50
burst = 100
tokens_per_minute = 600_000
token_quota = 5_000_000
quota_period = "day"
cached_tokens = 200_000

[tenants."batch-2.eu"]
token_sha256 = ["{sha256(b"three").hexdigest()}"]
"""


def read(tmp_path: Path, content: str | bytes) -> Tenants:
    path = tmp_path / "tenants.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Tenants.read(path)


def test_a_whole_file(tmp_path: Path) -> None:
    tenants = read(tmp_path, WHOLE)
    search, batch = tenants.named("search"), tenants.named("batch-2.eu")
    assert search is not None
    assert batch is not None
    assert (search.weight, search.max_priority, search.burst) == (2.0, 10, 100)
    assert (search.requests_per_second, search.tokens_per_minute) == (50.0, 600_000)
    assert (search.token_quota, search.quota_period) == (5_000_000, "day")
    assert (batch.weight, batch.max_priority, batch.token_quota) == (1.0, 0, None)
    assert tenants.cached_tokens == {search.cache_prefix: 200_000}
    assert tenants.of_token("one") is tenants.of_token("two") is search
    assert tenants.of_token("three") is batch
    for stranger in ("", "four", "one ", DIGEST, "ö", "x" * 100_000):
        assert tenants.of_token(stranger) is None
    assert (tenants.is_open, tenants.named(""), tenants.named("nobody")) == (False, None, None)


def test_a_server_without_tenants_is_everyones() -> None:
    tenants = Tenants()
    assert tenants.is_open
    assert tenants.named("") is EVERYONE
    assert tenants.named("search") is None
    assert tenants.cached_tokens == {}
    assert EVERYONE.scoped("id") == "id"
    assert EVERYONE.cache_namespace("") == b""


def test_caches_and_ids_are_apart(tmp_path: Path) -> None:
    tenants = read(tmp_path, WHOLE)
    search, batch = tenants.named("search"), tenants.named("batch-2.eu")
    assert search is not None
    assert batch is not None
    spaces = [t.cache_namespace(salt) for t in (EVERYONE, search, batch) for salt in ("", "a", "b")]
    assert len(set(spaces)) == len(spaces)
    for tenant in (search, batch):
        assert len(tenant.cache_prefix) == TENANT_BYTES
        assert tenant.cache_namespace("") == tenant.cache_prefix
        assert tenant.cache_namespace("a").startswith(tenant.cache_prefix)
        assert len(tenant.cache_namespace("a")) == TENANT_BYTES + 16
    assert search.scoped("id") != batch.scoped("id")


def table(line: str, name: str = "a") -> str:
    return f'[tenants.{name}]\ntoken_sha256 = ["{DIGEST}"]\n{line}'


BAD = {
    "not TOML": ("tenants =", "tenants.toml is not TOML: "),
    "not UTF-8": (b"\xff", "tenants.toml is not TOML: "),
    "empty": ("", "names no tenant"),
    "no table": ("tenants = 3", "names no tenant"),
    "nobody": ("[tenants]", "names no tenant"),
    "another key": (f"{table('')}\n[tenant.b]", r"unknown key tenant: .*\[tenants.NAME\]"),
    "flat": ("[tenants]\na = 3", "tenant a: is not a table"),
    "a name": (table("", '"a/b"'), "tenant 'a/b': a name has"),
    "an empty name": (table("", '""'), "tenant '': a name has"),
    "a long name": (table("", "a" * 65), "a name has from 1 to 64"),
    "a second name": (table('name = "b"'), "tenant a: name: unknown key"),
    "a misspelt key": (table("wieght = 2"), "tenant a: wieght: unknown key"),
    "no token": ("[tenants.a]\nweight = 2", "tenant a: token_sha256: is missing"),
    "tokens of none": ("[tenants.a]\ntoken_sha256 = []", "tenant a: token_sha256: .*at least 1"),
    "weight 0": (table("weight = 0"), "tenant a: weight: should be greater than or equal to 0.001"),
    "weight nan": (table("weight = nan"), "tenant a: weight: "),
    "weight true": (table("weight = true"), "tenant a: weight: should be a valid number"),
    "weight as text": (table('weight = "2"'), "tenant a: weight: should be a valid number"),
    "priority": (table("max_priority = 101"), "tenant a: max_priority: should be less than"),
    "rate 0": (table("requests_per_second = 0"), "tenant a: requests_per_second: "),
    "burst 0": (table("burst = 0"), "tenant a: burst: "),
    "quota": (table("token_quota = -1"), "tenant a: token_quota: "),
    "quota of 1.5": (table("token_quota = 1.5"), "tenant a: token_quota: "),
    "period": (table('quota_period = "year"'), "tenant a: quota_period: .*'hour'"),
    "cache": (table("cached_tokens = -1"), "tenant a: cached_tokens: "),
    "two problems": (table("weight = 0\nburst = 0"), "tenant a: weight.*; tenant a: burst"),
    "a shared token": (
        table("") + table("", "b"),
        "tenant b: token_sha256: a token is tenant a's too",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_tenant_and_key(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, content)
    assert str(tmp_path / "tenants.toml") in str(caught.value)


def test_a_token_where_its_hash_should_be_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"token_sha256: entry 1 .*`mili token`") as caught:
        read(tmp_path, '[tenants.a]\ntoken_sha256 = ["mili_secret"]')
    assert "mili_secret" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the tenants file .*nowhere\.toml: No such"):
        Tenants.read(tmp_path / "nowhere.toml")


def test_mili_token_makes_what_the_file_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for _ in range(2):
        assert main(["token"]) == 0
        (_, token), (_, digest) = (line.split() for line in capsys.readouterr().out.splitlines())
        made.append(token)
        tenants = read(tmp_path, f'[tenants.a]\ntoken_sha256 = ["{digest}"]')
        owner = tenants.of_token(token)
        assert owner is not None
        assert owner.name == "a"
    assert made[0] != made[1]
