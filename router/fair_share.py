"""How much of the machine each tenant has had: a virtual token counter per tenant.

Owns the counters, shared by all worker groups. Does not know requests, queues or time.

Method: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024. The tenant with the
smallest counter is served next, so that those who always have requests waiting get equal service
for equal weight, however many they send. A tenant that comes back from idle is lifted to the
others: nobody saves up service by being away.
"""

from __future__ import annotations

from collections.abc import Mapping

# What a token costs: one in the prompt is computed, one in the output sampled and then computed.
PROMPT_TOKEN_COST = 1.0
OUTPUT_TOKEN_COST = 2.0


# Served, how many wait, weight, and whether it was the last tenant that waited.
Balance = tuple[float, int, float, bool]


class Account:
    """What one tenant was served, in token costs divided by its weight."""

    __slots__ = ("num_waiting", "output_token_cost", "served", "weight")

    def __init__(self, weight: float = 1.0) -> None:
        self.served = 0.0
        self.num_waiting = 0
        self.set_weight(weight)

    def set_weight(self, weight: float) -> None:
        """Raises ValueError unless it is above 0."""
        if not weight > 0:
            raise ValueError(f"a tenant's weight must be above 0, not {weight}")
        self.weight = weight
        self.output_token_cost = OUTPUT_TOKEN_COST / weight

    def charge_prompt(self, num_tokens: int) -> None:
        self.served += num_tokens * PROMPT_TOKEN_COST / self.weight

    def charge_output_token(self) -> None:
        self.served += self.output_token_cost


class FairShare:
    """The accounts of all tenants that ever asked: as many as the tenants file names."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        # Those with a request waiting, and the last one that had.
        self._waiting: dict[Account, None] = {}
        self._last: Account | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that wait, of all tenants and in all groups."""
        return sum(account.num_waiting for account in self._waiting)

    def account(self, tenant: str, weight: float) -> Account:
        """The tenant's account, of the weight that it has now."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(weight)
        elif account.weight != weight:
            account.set_weight(weight)
        return account

    def enter(self, account: Account) -> None:
        """One more request of the tenant waits."""
        if account.num_waiting == 0:
            account.served = self.served_on_arrival(account)
            self._waiting[account] = None
        account.num_waiting += 1

    def leave(self, account: Account) -> None:
        """One request of the tenant waits no longer."""
        assert account.num_waiting > 0
        account.num_waiting -= 1
        if account.num_waiting == 0:
            del self._waiting[account]
            self._last = account

    def served_on_arrival(self, account: Account) -> float:
        """What the tenant is taken to have had when a request of it comes now."""
        if account.num_waiting:
            return account.served
        if self._waiting:
            return max(account.served, min(each.served for each in self._waiting))
        return max(account.served, self._last.served) if self._last else account.served

    def balances(self) -> dict[str, Balance]:
        """What every tenant's account says, by tenant."""
        return {
            tenant: (account.served, account.num_waiting, account.weight, account is self._last)
            for tenant, account in self._accounts.items()
        }

    def restore(self, balances: Mapping[str, Balance]) -> None:
        """Let the accounts of some tenants say what others once said."""
        for tenant, (served, num_waiting, weight, is_last) in balances.items():
            account = self.account(tenant, weight)
            account.served, account.num_waiting = served, num_waiting
            self._waiting.pop(account, None)
            if num_waiting:
                self._waiting[account] = None
            if is_last:
                self._last = account
