"""Make a bearer token for a tenant.

Owns its form. Does not know the tenants file, where its hash goes.
"""

from __future__ import annotations

import secrets
from hashlib import sha256


def make_token() -> tuple[str, str]:
    """Return a token of 256 random bits, and its SHA-256 in hex: all that a server needs."""
    token = f"mili_{secrets.token_urlsafe(32)}"
    return token, sha256(token.encode()).hexdigest()
