"""Log-probabilities on the GPU: of chosen rows of logits, of any token, with rank and alternatives.

Owns the launch. Does not know why they are wanted; the arithmetic is
kernels/reference_logprobs.py's.
"""

from __future__ import annotations

import torch

from mili.kernels.checks import check, require
from mili.kernels.module import Constant, Grid, load

CONSTANTS: dict[str, Constant] = {"SCALAR": "__nv_bfloat16"}  # for common.cuh: nothing is of it
_THREADS = 1024


def read_logprobs(
    logits: torch.Tensor,
    sources: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor,
    faulted: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Entry e reads logits[sources[e]], for the token token_ids[rows[e], positions[e]].

    logits: [any, vocab_size] float32; sources, rows, positions: [entries] int32; token_ids:
    [table_rows, > positions] int32; faulted: [table_rows] int32; output: [3, entries, width] int32,
    pinned: ids, the bits of float32 log-probabilities, ranks; of each entry first its own token,
    then the width - 1 most likely ones. Entries whose logits are NaN, +infinity or all -infinity
    set faulted[rows[e]] = 1, and mean nothing. Raises ValueError.
    """
    vocab_size, device = logits.shape[1], logits.device
    _, entries, width = output.shape
    require(entries > 0, "there must be an entry")
    require(1 <= width <= vocab_size + 1, "width must be 1 to {}, not {}", vocab_size + 1, width)
    check("logits", logits, (len(logits), vocab_size), torch.float32, device)
    for name, column in (("sources", sources), ("rows", rows), ("positions", positions)):
        check(name, column, (entries,), torch.int32, device)
    check("token_ids", token_ids, token_ids.shape, torch.int32, device)
    check("faulted", faulted, (len(token_ids),), torch.int32, device)
    check("output", output, (3, entries, width), torch.int32, output.device)
    load("logprobs", **CONSTANTS)["read_logprobs"].launch(
        Grid((entries, 1, 1), _THREADS),
        logits,
        vocab_size,
        sources,
        rows,
        positions,
        token_ids,
        token_ids.shape[1],
        width,
        faulted,
        output,
    )
