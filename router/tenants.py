"""Tenants: who may call, what they may ask for, and whose cache is whose.

Owns the tenants file and the comparison of tokens. Does not know gRPC, nor what a tenant has used
so far: that is quotas.py.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from hashlib import blake2b, sha256
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mili.router.radix_tree import TENANT_BYTES

LEAST_PRIORITY, GREATEST_PRIORITY = -100, 100

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SALT_BYTES = 16


class Tenant(BaseModel):
    """One tenant: a table of the tenants file, whose keys are these fields; None is no limit.

    token_sha256: of its bearer tokens, in hex. weight: its share of the workers against others'.
    requests_per_second: generations, of which `burst` may come at once. tokens_per_minute and
    token_quota count prompts and outputs. cached_tokens: of its prefixes, in each worker group.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    token_sha256: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    weight: float = Field(default=1.0, ge=0.001, le=1000)
    max_priority: int = Field(default=0, ge=LEAST_PRIORITY, le=GREATEST_PRIORITY)
    requests_per_second: float | None = Field(default=None, gt=0)
    burst: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    token_quota: int | None = Field(default=None, ge=0)
    quota_period: Literal["hour", "day", "week", "total"] = "total"
    cached_tokens: int | None = Field(default=None, ge=0)

    @field_validator("token_sha256")
    @classmethod
    def _check_digests(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        for number, digest in enumerate(digests, 1):
            if not _SHA256.fullmatch(digest):
                raise ValueError(
                    f"entry {number} is not the SHA-256 of a token in 64 lower-case hex digits;"
                    " `mili token` makes a token and its hash"
                )
        return digests

    @property
    def cache_prefix(self) -> bytes:
        """What all of its cache namespaces begin with."""
        return blake2b(self.name.encode(), digest_size=TENANT_BYTES).digest()

    def cache_namespace(self, salt: str) -> bytes:
        """Where its prefixes are shared: all over the tenant, or with the same salt only."""
        if salt:
            narrowed = blake2b(salt.encode(), digest_size=_SALT_BYTES).digest()
            return self.cache_prefix + narrowed
        return self.cache_prefix if self.name else b""

    def scoped(self, request_id: str) -> str:
        """Return an id that no other tenant's request can have."""
        return f"{self.name}/{request_id}" if self.name else request_id


# The one caller of a server without a tenants file: anyone, and without limits.
EVERYONE = Tenant.model_construct(name="", token_sha256=(), max_priority=GREATEST_PRIORITY)


class Tenants:
    """All who may call; without any, everyone may."""

    def __init__(self, tenants: Sequence[Tenant] = ()) -> None:
        """Raises ValueError where two tenants have the same token."""
        self._by_name = {tenant.name: tenant for tenant in tenants}
        owners: dict[str, Tenant] = {}
        for tenant in tenants:
            for digest in tenant.token_sha256:
                if owners.setdefault(digest, tenant) is not tenant:
                    raise ValueError(
                        f"tenant {tenant.name}: token_sha256: a token is tenant"
                        f" {owners[digest].name}'s too"
                    )
        self._digests = [(bytes.fromhex(digest), tenant) for digest, tenant in owners.items()]

    @classmethod
    def read(cls, path: Path) -> Tenants:
        """Read a tenants file; raise ValueError naming file, tenant and key."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read the tenants file {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"the tenants file {path} is not TOML: {error}") from None
        tables = content.pop("tenants", None)
        for key in content:
            raise ValueError(f"{path}: unknown key {key}: a tenant is a table [tenants.NAME]")
        if not isinstance(tables, dict) or not tables:
            raise ValueError(f"{path}: names no tenant: each is a table [tenants.NAME]")
        try:
            return cls([_tenant(name, table) for name, table in tables.items()])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def is_open(self) -> bool:
        """Whether anyone may call."""
        return not self._by_name

    @property
    def cached_tokens(self) -> Mapping[bytes, int]:
        """The caps on tenants' caches in tokens, by cache_prefix."""
        return {
            tenant.cache_prefix: tenant.cached_tokens
            for tenant in self._by_name.values()
            if tenant.cached_tokens is not None
        }

    def named(self, name: str) -> Tenant | None:
        """Return a tenant; the empty name is everyone's, where everyone may call."""
        return EVERYONE if self.is_open and not name else self._by_name.get(name)

    def of_token(self, token: str) -> Tenant | None:
        """Return whose token it is.

        Every known hash is compared to its end, so that the time tells nothing about any.
        """
        presented = sha256(token.encode(errors="replace")).digest()
        owner = None
        for digest, tenant in self._digests:
            if compare_digest(digest, presented):
                owner = tenant
        return owner


def _tenant(name: str, table: Any) -> Tenant:  # noqa: ANN401 (TOML can hold anything)
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"tenant {name!r}: a name has from 1 to 64 letters, digits, dots, dashes and"
            " underscores, a letter or digit first"
        )
    if not isinstance(table, dict):
        raise ValueError(f"tenant {name}: is not a table")
    if "name" in table:
        raise ValueError(f"tenant {name}: name: unknown key, the table's own name counts")
    try:
        return Tenant.model_validate({"name": name, **table})
    except ValidationError as error:
        raise ValueError("; ".join(_complaints(name, error))) from None


def _complaints(name: str, error: ValidationError) -> list[str]:
    """One for each bad key, without its value: a token may stand where its hash should."""
    problems = error.errors(include_url=False)
    return [
        f"tenant {name}: {problem['loc'][0]}: {_words(problem['type'], problem['msg'])}"
        for problem in problems
    ]


def _words(kind: str, message: str) -> str:
    match kind:
        case "extra_forbidden":
            return "unknown key"
        case "missing":
            return "is missing"
    return message.removeprefix("Value error, ").replace("Input should", "should", 1)
