"""Where a prompt leaves the reasoning block of the turn that its output goes on with.

Owns how that is told from tokens. Does not know outputs or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from mili.router.parsers.reasoning import ReasoningTags
from mili.router.tokenizer import Tokenizer


class Block(Enum):
    NONE = 1  # the output may begin with one
    OPEN = 2
    CLOSED = 3


class PromptReasoning:
    """Reads the prompts of one model. turn_ends: the tokens that end a turn.

    close_id: the token that closes a block; None for a model that has none.
    """

    def __init__(
        self, tags: ReasoningTags | None, tokenizer: Tokenizer, turn_ends: Sequence[int]
    ) -> None:
        self.close_id = tokenizer.token_id(tags.close) if tags else None
        self._open_id = tokenizer.token_id(tags.open) if tags else None
        self._turn_ends = frozenset(turn_ends)

    def block(self, token_ids: Sequence[int]) -> Block:
        """Look through the last turn, from its end."""
        for token_id in reversed(token_ids):
            if token_id == self._open_id:
                return Block.OPEN
            if token_id == self.close_id:
                return Block.CLOSED
            if token_id in self._turn_ends:
                return Block.NONE
        return Block.NONE
