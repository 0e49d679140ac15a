"""Quotas: how much of its rates and of its tokens a tenant has used.

Owns the counters, of this router process and since its start. Does not know requests, gRPC or
time: it is given a clock.
"""

from __future__ import annotations

from collections.abc import Callable

from mili.router.errors import Reason, RequestError
from mili.router.tenants import Tenant

Clock = Callable[[], float]

# Seconds that are only a rounding of the refilling.
_INSTANT = 1e-6
_PERIODS = {"hour": 3600, "day": 24 * 3600, "week": 7 * 24 * 3600}


class Bucket:
    """A token bucket: full at first, it holds `size` and gains `rate` a second.

    It may be overdrawn by what is known only afterwards; then it has to come back above zero.
    """

    def __init__(self, rate: float, size: float, now: float) -> None:
        self._rate = rate
        self._size = size
        self._level = size
        self._at = now

    def wait(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` can be taken; of more than all, until it is full."""
        self._refill(now)
        wait = (min(amount, self._size) - self._level) / self._rate
        return wait if wait > _INSTANT else 0.0

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, whether it is there or not."""
        self._refill(now)
        self._level -= amount

    def _refill(self, now: float) -> None:
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now


class Account:
    """What one tenant has used."""

    def __init__(self, tenant: Tenant, clock: Clock) -> None:
        self._tenant = tenant
        self._clock = clock
        now = clock()
        self._requests = self._tokens = None
        if (rate := tenant.requests_per_second) is not None:
            self._requests = Bucket(rate, tenant.burst or max(1.0, rate), now)
        if (per_minute := tenant.tokens_per_minute) is not None:
            self._tokens = Bucket(per_minute / 60, per_minute, now)
        self._period = _PERIODS.get(tenant.quota_period)
        self._period_start = now
        self._spent = 0

    def admit(self) -> None:
        """Count a request; raise RequestError where the tenant has had its share.

        TENANT_QUOTA when no token is left, TENANT_RATE_LIMIT with the time to wait.
        """
        self.check(1)
        if self._requests is None:
            return
        now = self._clock()
        wait = self._requests.wait(1, now)
        if wait:
            rate = self._tenant.requests_per_second
            raise RequestError(
                Reason.TENANT_RATE_LIMIT,
                f"the tenant may ask for {rate:g} generations a second",
                retry_after=wait,
            )
        self._requests.take(1, now)

    def check(self, tokens: int) -> None:
        """Raise RequestError, as `admit` does, unless a prompt of `tokens` may be charged."""
        now = self._clock()
        quota = self._tenant.token_quota
        if quota is not None and tokens > quota - self._spent_until(now):
            period = self._tenant.quota_period
            raise RequestError(
                Reason.TENANT_QUOTA,
                f"of the tenant's {quota} tokens, {period if period == 'total' else f'a {period}'},"
                f" {max(0, quota - self._spent)} are left, and {tokens} are asked for",
            )
        if self._tokens is not None and (wait := self._tokens.wait(tokens, now)):
            raise RequestError(
                Reason.TENANT_RATE_LIMIT,
                f"the tenant may use {self._tenant.tokens_per_minute} tokens a minute",
                retry_after=wait,
            )

    def charge(self, tokens: int) -> None:
        """Count tokens that were used: a prompt's when it is taken, an output's at its end."""
        now = self._clock()
        if self._tokens is not None:
            self._tokens.take(tokens, now)
        self._spent = self._spent_until(now) + tokens

    def _spent_until(self, now: float) -> int:
        """Return what is spent of the present period's quota; a new period begins at nothing."""
        if self._period is not None and now - self._period_start >= self._period:
            self._period_start += (now - self._period_start) // self._period * self._period
            self._spent = 0
        return self._spent


class Quotas:
    """The accounts of all tenants."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def account(self, tenant: Tenant) -> Account:
        """Return a tenant's account; its first use opens it."""
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = Account(tenant, self._clock)
        return account
