"""BlockPool: which KV blocks are free.

Owns the free list. Does not know what a block holds or who holds it. Block 0 is the null block:
padding, never handed out, its contents never interpreted.
"""

from __future__ import annotations

from collections.abc import Iterable

NULL_BLOCK = 0


class BlockPool:
    """Hands out the block ids 1 .. num_blocks - 1, the most recently freed first."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool of {num_blocks} blocks holds nothing beside the null block")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._is_free = bytearray(b"\0" + b"\1" * (num_blocks - 1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; there must be that many."""
        assert 0 <= count <= len(self._free), (count, len(self._free))
        if count == 0:
            return []
        blocks = self._free[-count:]
        blocks.reverse()
        del self._free[-count:]
        for block in blocks:
            self._is_free[block] = 0
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back; each must have been handed out and not yet given back."""
        for block in blocks:
            assert block != NULL_BLOCK and not self._is_free[block], f"block {block} freed twice"
            self._is_free[block] = 1
            self._free.append(block)
