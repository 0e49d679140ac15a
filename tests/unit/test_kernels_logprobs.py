"""The reference of log-probabilities against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mili.kernels.reference_logprobs import read_logprobs

# Few values, so that equals are common.
LOGITS = st.sampled_from([-torch.inf, -3.0, -0.5, 0.0, 0.5, 30.0])


@given(st.data())
def test_equals_brute_force(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(1, 12))
    rows = data.draw(
        st.lists(st.lists(LOGITS, min_size=vocab_size, max_size=vocab_size), min_size=1, max_size=3)
    )
    rows = [row if max(row) > -torch.inf else [0.0, *row[1:]] for row in rows]
    own = data.draw(
        st.lists(st.integers(0, vocab_size - 1), min_size=len(rows), max_size=len(rows))
    )
    width = data.draw(st.integers(1, vocab_size + 1))
    read = read_logprobs(torch.tensor(rows), torch.tensor(own), width)
    for row, token, ids, logprobs, ranks in zip(rows, own, *read, strict=True):
        order = sorted(range(vocab_size), key=lambda each: (-row[each], each))
        assert ids.tolist() == [token, *order[: width - 1]]
        assert ranks.tolist() == [order.index(token) + 1, *range(1, width)]
        exact = torch.tensor(row, dtype=torch.float64).log_softmax(0)[ids.long()]
        assert torch.allclose(logprobs.double(), exact, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="float32"):
        read_logprobs(logits.double(), torch.tensor([0, 1]), 1)
    with pytest.raises(ValueError, match=r"token_ids \[rows\]"):
        read_logprobs(logits, torch.tensor([0]), 1)
    for width in (0, 7):
        with pytest.raises(ValueError, match="width must be from 1 to 6"):
            read_logprobs(logits, torch.tensor([0, 1]), width)
