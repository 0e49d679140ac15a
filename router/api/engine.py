"""What the API asks of the engine: values in, values out.

Owns the shape of the boundary. Does not know how the engine keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mili.router.introspection import Explanation, Load, Pinned
from mili.router.params import GenerationParams


class Operations(Protocol):
    """What operators may ask for."""

    def load(self) -> Load:
        """Say how busy all worker groups are."""

    def explain(self, request_id: str) -> Explanation | None:
        """Tell a request's story; None for an id that is unknown or forgotten."""

    def drain(self, group: str, migrate_after: float | None) -> int:
        """Place nothing more on a group, and return how many sequences run there.

        They finish there, or move elsewhere after `migrate_after` seconds. RequestError
        (WORKER_NOT_FOUND) for a group that does not serve.
        """

    def undrain(self, group: str) -> None:
        """Place requests on a drained group again; RequestError (WORKER_NOT_FOUND)."""

    def pin(self, namespace: bytes, token_ids: Sequence[int], seconds: float) -> Pinned:
        """Keep what is cached of a prefix, where most of it is, from being evicted for a time."""

    def unpin(self, pin_id: str) -> None:
        """Release a pinned prefix; RequestError (PIN_NOT_FOUND)."""

    def flush(self, tenant_prefix: bytes | None) -> int:
        """Free what nobody holds of a tenant's cache, of everyone's for None; return the blocks."""


class Engine(Protocol):
    """Takes requests, and delivers their outputs to Streams.deliver on the asyncio thread.

    A submitted request gets exactly one output with `finished`, also after cancel(), and its id
    is free from then on.
    """

    @property
    def context_limit(self) -> int:
        """Tokens that prompt and output may have together; the model's while no worker serves."""

    @property
    def block_size(self) -> int:
        """Tokens in a KV block; 0 while no worker serves."""

    @property
    def weights_sha256(self) -> bytes:
        """The weights that the workers serve; empty while none does."""

    @property
    def max_running(self) -> int:
        """Sequences that run together on a worker; 0 while none takes requests."""

    @property
    def constrains_outputs(self) -> bool:
        """Whether the workers can hold an output to a grammar; False while none serves."""

    @property
    def operations(self) -> Operations:
        """What operators may ask for."""

    def submit(self, request_id: str, params: GenerationParams) -> None:
        """Start a request; raise RequestError when it cannot be taken."""

    def cancel(self, request_id: str) -> bool:
        """End a request; return False when it is unknown or already ended."""
