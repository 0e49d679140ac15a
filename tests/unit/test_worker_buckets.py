"""Sizes that steps are recorded for: every step that may come has one, or is told that it has none.

A GPU is not needed: what is recorded is tested with one.
"""

from __future__ import annotations

import pytest

from mili.worker.cuda.buckets import (
    MAX_GRAPH_ROWS,
    row_buckets,
    sample_buckets,
    smallest,
    smallest_worth,
    token_buckets,
)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16, 63, 64, 255, 256, 257, 300, 320, 1024, 9000])
def test_sizes_rise_to_the_largest_step(most: int) -> None:
    for buckets, end in (
        (row_buckets(most), min(most, MAX_GRAPH_ROWS)),
        (sample_buckets(most), most),
        (token_buckets(most), min(most, 8192)),
    ):
        assert list(buckets) == sorted(set(buckets))
        assert buckets[0] >= 1 and buckets[-1] == end


@pytest.mark.parametrize("most", [1, 6, 100, 256])
def test_every_number_of_rows_has_the_smallest_size_that_holds_it(most: int) -> None:
    buckets = row_buckets(most)
    for rows in range(1, most + 1):
        size = smallest(buckets, rows)
        assert size is not None and size >= rows
        assert not [other for other in buckets if rows <= other < size]
        assert size - rows < max(16, rows), "more padding than rows"
    assert smallest(buckets, most + 1) is None


def test_every_number_of_samples_has_a_size() -> None:
    buckets = sample_buckets(1000)
    padded = [(smallest(buckets, samples) or 0) - samples for samples in range(1, 1001)]
    assert min(padded) == 0 and max(padded) < 64


def test_a_large_step_must_nearly_fill_its_size() -> None:
    buckets = token_buckets(8192)
    assert smallest_worth(buckets, 769) == smallest_worth(buckets, 1024) == 1024
    assert smallest_worth(buckets, 1025) is None, "half of 1536 more would be padding"
    assert smallest_worth(buckets, 1383) == smallest_worth(buckets, 1536) == 1536
    assert smallest_worth(buckets, 7372) is None
    assert smallest_worth(buckets, 7373) == 8192
    assert smallest_worth(buckets, 8193) is None
