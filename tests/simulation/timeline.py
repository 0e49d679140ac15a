"""Timeline: virtual time, and what is to happen in it.

Owns the clock and the order of events: by time, then by when they were asked for. Does not know
what happens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

Action = Callable[..., object]


class Timeline:
    """Runs actions at their times; `now` is in seconds and only ever grows."""

    def __init__(self) -> None:
        self.now = 0.0
        self._coming: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._coming)

    def at(self, when: float, action: Action, *args: Any) -> None:  # noqa: ANN401
        """Do something at a time, or now if that is past."""
        self._count += 1
        heapq.heappush(self._coming, (max(when, self.now), self._count, action, args))

    def after(self, seconds: float, action: Action, *args: Any) -> None:  # noqa: ANN401
        self.at(self.now + seconds, action, *args)

    def run(self, seconds: float) -> None:
        """Let `seconds` pass."""
        end = self.now + seconds
        while self._coming and self._coming[0][0] <= end:
            self.now, _, action, args = heapq.heappop(self._coming)
            action(*args)
        self.now = end
