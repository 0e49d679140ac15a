"""Log-probabilities in plain torch: of a token in each row, with its rank, and of the best ones.

The specification. Owns how equals are ordered: the lower id first, so that ranks are all different
and rank 1 is what greedy decoding takes. Does not know where logits come from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class LogprobColumns(NamedTuple):
    """Of each row first its own token, then the most likely ones in order: [rows, width]."""

    token_ids: torch.Tensor  # int32
    logprobs: torch.Tensor  # float32
    ranks: torch.Tensor  # int32; 1 is the most likely


def read_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, width: int) -> LogprobColumns:
    """Return the logarithm of softmax(logits), and the rank, of width tokens in each row.

    logits: [rows, vocab] float32, finite or -infinity; token_ids: [rows] int64, whose rows own
    them; width: from 1 to vocab + 1. Raises ValueError.
    """
    rows, vocab_size = logits.shape
    if logits.dtype != torch.float32 or token_ids.shape != (rows,):
        raise ValueError("logits must be [rows, vocab] float32, and token_ids [rows]")
    if not 1 <= width <= vocab_size + 1:
        raise ValueError(f"width must be from 1 to {vocab_size + 1}, not {width}")
    own = token_ids[:, None]
    own_logits = logits.gather(1, own)  # [rows, 1]
    ids = torch.arange(vocab_size, device=logits.device)
    better = (logits > own_logits) | ((logits == own_logits) & (ids < own))
    best = _best(logits, width - 1)  # [rows, width - 1]
    best_ranks = torch.arange(1, width, device=logits.device).expand(rows, -1)
    chosen = torch.cat([own, best], dim=1)
    total = logits.logsumexp(dim=1, keepdim=True)
    return LogprobColumns(
        token_ids=chosen.int(),
        logprobs=logits.gather(1, chosen) - total,
        ranks=torch.cat([better.sum(dim=1, keepdim=True) + 1, best_ranks], dim=1).int(),
    )


def _best(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the largest logits of each row, of equals the lower first: [rows, count] int64."""
    if count == 0:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    least = logits.topk(count, dim=1).values[:, -1:]
    rows = []
    for row, threshold in zip(logits, least, strict=True):
        candidates = (row >= threshold).nonzero().flatten()
        order = row[candidates].argsort(descending=True, stable=True)
        rows.append(candidates[order[:count]])
    return torch.stack(rows)
