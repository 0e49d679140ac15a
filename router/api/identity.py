"""Who calls: the tenant whose bearer token a call carries.

Owns the authorization header, and the answer to a call without a good one. Does not know what a
tenant may do.
"""

from __future__ import annotations

from contextvars import ContextVar

from mili.router.api.health import SERVICE_NAME as HEALTH
from mili.router.api.status import Context
from mili.router.errors import Reason, RequestError
from mili.router.tenants import EVERYONE, Tenant, Tenants

# Each call has a task of its own, and so a value of its own.
_caller: ContextVar[Tenant] = ContextVar("caller")


def caller() -> Tenant:
    """Return the tenant that makes the present call."""
    return _caller.get()


class Identity:
    """Finds out who makes a call, before anything of it is read."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    def establish(self, method: str, context: Context) -> None:
        """Note the caller; raise RequestError (UNAUTHENTICATED) for one that is nobody.

        Probes carry no token: health tells everyone.
        """
        if self._tenants.is_open or method.startswith(f"/{HEALTH}/"):
            _caller.set(EVERYONE)
            return
        tenant = self._tenants.of_token(_bearer_token(context))
        if tenant is None:
            raise RequestError(Reason.UNAUTHENTICATED, "the bearer token is no tenant's")
        _caller.set(tenant)


def _bearer_token(context: Context) -> str:
    metadata = context.invocation_metadata() or ()
    values = [str(value) for key, value in metadata if key == "authorization"]
    if len(values) != 1:
        raise RequestError(
            Reason.UNAUTHENTICATED, "the call needs one header 'authorization: Bearer TOKEN'"
        )
    scheme, _, token = values[0].partition(" ")
    if scheme.lower() != "bearer":
        raise RequestError(Reason.UNAUTHENTICATED, "the authorization is not a bearer token")
    return token.strip()
