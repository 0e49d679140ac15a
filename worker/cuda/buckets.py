"""Sizes for which a step is recorded as a graph: a step runs in the smallest that holds it.

Owns the lists. Does not know what is recorded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# A step of more tokens is launched kernel by kernel, where launches hide behind arithmetic: except
# in sizes that are worth a graph of their own, which a step must nearly fill.
_PADDED_TOKENS = 1024
_FULL = 0.9
# Rows of a step that is recorded for decoding alone.
MAX_GRAPH_ROWS = 256
_ROWS = (1, 2, 4, *range(8, 64, 8), *range(64, MAX_GRAPH_ROWS + 1, 16))
_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Sizes of decode steps, up to max_rows."""
    return _up_to(_ROWS, min(max_rows, MAX_GRAPH_ROWS))


def sample_buckets(max_samples: int) -> tuple[int, ...]:
    """Numbers of samples, up to max_samples."""
    return _up_to((*_ROWS, *range(MAX_GRAPH_ROWS + 64, max_samples, 64)), max_samples)


def token_buckets(max_tokens: int) -> tuple[int, ...]:
    """Sizes of steps in which rows of several tokens take part, up to max_tokens."""
    return _up_to(_TOKENS, min(max_tokens, _TOKENS[-1]))


def smallest(buckets: Sequence[int], size: int) -> int | None:
    """The smallest bucket that holds `size`, or None."""
    index = bisect_left(buckets, size)
    return buckets[index] if index < len(buckets) else None


def smallest_worth(buckets: Sequence[int], num_tokens: int) -> int | None:
    """The smallest bucket that holds so many tokens, if padding to it costs less than it saves."""
    size = smallest(buckets, num_tokens)
    if size is None or (size > _PADDED_TOKENS and num_tokens < _FULL * size):
        return None
    return size


def _up_to(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    return (*(size for size in sizes if size < limit), limit)
