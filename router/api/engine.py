"""What the API asks of the engine: values in, values out.

Owns the shape of the boundary. Does not know how the engine keeps it.
"""

from __future__ import annotations

from typing import Protocol

from mili.router.request import GenerationParams


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

    def submit(self, request_id: str, params: GenerationParams) -> None:
        """Start a request; raise RequestError when it cannot be taken."""

    def cancel(self, request_id: str) -> bool:
        """End a request; return False when it is unknown or already ended."""
