"""What a worker group can do: read from its Ready, and assumed by nobody.

Owns nothing else. Apart from worker_group.py, so that the scheduler knows no link.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """The least of what the ranks of a group said.

    num_blocks counts the null block, max_rows the null row.
    """

    num_blocks: int
    block_size: int
    max_rows: int
    max_step_tokens: int
    max_model_len: int
    vocab_size: int
    capabilities: frozenset[str] = frozenset()

    @property
    def context_limit(self) -> int:
        """Tokens of the longest request that fits the KV pool alone (invariant 8)."""
        return min(self.max_model_len, (self.num_blocks - 1) * self.block_size)
