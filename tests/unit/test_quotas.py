"""Rates and quotas of tenants, on a clock of the test's."""

from __future__ import annotations

from typing import Any

import pytest

from mili.router.errors import Reason, RequestError
from mili.router.quotas import Account, Quotas
from mili.router.tenants import EVERYONE, Tenant


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tenant(name: str = "a", **limits: Any) -> Tenant:  # noqa: ANN401
    return Tenant(name=name, token_sha256=("0" * 64,), **limits)


def refusal(account: Account, tokens: int = 0) -> RequestError | None:
    """Ask for a request, of so many prompt tokens; return what refuses it."""
    try:
        account.admit()
        account.check(tokens)
    except RequestError as error:
        return error
    return None


def test_everyone_has_no_limits(clock: Clock) -> None:
    account = Account(EVERYONE, clock)
    for _ in range(10_000):
        assert refusal(account, 10**9) is None
        account.charge(10**9)


def test_a_burst_then_the_rate(clock: Clock) -> None:
    account = Account(tenant(requests_per_second=4.0, burst=3), clock)
    assert [refusal(account) for _ in range(3)] == [None] * 3
    error = refusal(account)
    assert error is not None
    assert (error.reason, error.retry_after) == (Reason.TENANT_RATE_LIMIT, 0.25)
    assert "4 generations a second" in error.message
    clock.now += error.retry_after or 0
    assert refusal(account) is None, "who waits as told is let in"
    assert refusal(account) is not None
    clock.now += 1000
    assert [refusal(account) is None for _ in range(4)] == [True] * 3 + [False]


def test_slow_rates_let_one_in_at_once(clock: Clock) -> None:
    account = Account(tenant(requests_per_second=0.1), clock)
    assert refusal(account) is None
    error = refusal(account)
    assert error is not None
    assert error.retry_after == pytest.approx(10)


def test_whoever_waits_as_told_is_never_told_again(clock: Clock) -> None:
    """Refilling rounds; the sum of many small waits must not fall short of a token."""
    account = Account(tenant(requests_per_second=3.0, burst=1), clock)
    for _ in range(1000):
        assert refusal(account) is None
        error = refusal(account)
        assert error is not None
        clock.now += error.retry_after or 0


def test_tokens_per_minute_count_prompt_and_output(clock: Clock) -> None:
    account = Account(tenant(tokens_per_minute=600), clock)
    assert refusal(account, 500) is None
    account.charge(500)
    error = refusal(account, 200)
    assert error is not None
    assert (error.reason, error.retry_after) == (Reason.TENANT_RATE_LIMIT, pytest.approx(10))
    account.charge(400)  # an output, known at its end: 300 too many
    error = refusal(account)
    assert error is not None
    assert error.retry_after == pytest.approx(30.1)
    clock.now += 60
    assert refusal(account, 300) is None


def test_a_prompt_larger_than_a_minutes_tokens_waits_for_a_full_minute(clock: Clock) -> None:
    account = Account(tenant(tokens_per_minute=60), clock)
    assert refusal(account, 1000) is None
    account.charge(1000)
    error = refusal(account, 1000)
    assert error is not None
    assert error.retry_after == pytest.approx(941), "its turn comes once what it took is back"


def test_a_total_quota_is_spent_for_good(clock: Clock) -> None:
    account = Account(tenant(token_quota=100), clock)
    assert refusal(account, 100) is None
    account.charge(60)
    error = refusal(account, 50)
    assert error is not None
    assert (error.reason, error.retry_after) == (Reason.TENANT_QUOTA, None)
    assert "of the tenant's 100 tokens, total, 40 are left, and 50" in error.message
    account.charge(50)
    clock.now += 10**9
    assert refusal(account) is not None


def test_a_tenant_without_quota_is_refused_at_once(clock: Clock) -> None:
    error = refusal(Account(tenant(token_quota=0), clock))
    assert error is not None
    assert error.reason is Reason.TENANT_QUOTA


@pytest.mark.parametrize(("period", "seconds"), [("hour", 3600), ("day", 86400), ("week", 604800)])
def test_a_quota_begins_anew(clock: Clock, period: str, seconds: int) -> None:
    account = Account(tenant(token_quota=10, quota_period=period), clock)
    start = clock.now
    account.charge(10)
    clock.now = start + seconds - 1
    error = refusal(account)
    assert error is not None
    assert f"of the tenant's 10 tokens, a {period}, 0 are left" in error.message
    clock.now = start + seconds + 100
    assert refusal(account, 10) is None
    account.charge(10)
    clock.now = start + 2 * seconds - 1
    assert refusal(account) is not None
    clock.now = start + 2 * seconds
    assert refusal(account, 10) is None, "periods follow each other from the first one's start"


def test_an_output_is_charged_to_the_period_in_which_it_ends(clock: Clock) -> None:
    account = Account(tenant(token_quota=10, quota_period="hour"), clock)
    account.charge(10)
    clock.now += 3600
    account.charge(4)
    assert refusal(account, 6) is None
    assert refusal(account, 7) is not None


def test_what_is_refused_costs_nothing(clock: Clock) -> None:
    account = Account(tenant(requests_per_second=1.0, token_quota=10), clock)
    account.charge(10)
    for _ in range(5):
        error = refusal(account)
        assert error is not None
        assert error.reason is Reason.TENANT_QUOTA, "and the rate is not used up meanwhile"


def test_tenants_have_accounts_of_their_own(clock: Clock) -> None:
    quotas = Quotas(clock)
    first, second = tenant("a", token_quota=10), tenant("b", token_quota=10)
    quotas.account(first).charge(10)
    assert refusal(quotas.account(first)) is not None
    assert refusal(quotas.account(second)) is None
    assert quotas.account(first) is quotas.account(first)
