"""Sampling in plain torch: logits, parameters, a seed and a position in, one token out.

Owns the definition of every step, their order, and the random generator. The order: repetition
penalty (prompt and output), presence and frequency penalty (output alone), biases, the tokens that
are allowed, the tokens that are suppressed; then temperature, top-k, top-p, min-p, as in
transformers. A row's token is a function of that row alone. Does not know where logits come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_MASK = 0xFFFFFFFF
# top-p first looks at this many of the best tokens; the whole vocabulary is sorted only if they do
# not hold top_p of the probability.
_TOP_P_CANDIDATES = 1024
# Biases that a row may have, and how often a token of it is counted at most.
MAX_BIASES = 1024
MAX_COUNT = 0xFFFF


class SamplingRows(NamedTuple):
    """One value a row, [rows]. A value of 0 turns its step off; temperature 0 is greedy."""

    temperature: torch.Tensor  # float32
    top_k: torch.Tensor  # int64
    top_p: torch.Tensor  # float32; also off at 1
    min_p: torch.Tensor  # float32
    seed: torch.Tensor  # int64, the bits of an unsigned number
    position: torch.Tensor  # int64: where the sampled token will stand


def penalize_repetition_(
    logits: torch.Tensor, history: torch.Tensor, lengths: torch.Tensor, penalty: torch.Tensor
) -> None:
    """Divide the positive logits of known tokens by the penalty, multiply the others, in place.

    logits: [rows, vocab] float32; history: [rows, >= longest] int64, the known tokens, prompt
    included; lengths: [rows] int64; penalty: [rows] float32, 0 and 1 change nothing. Keskar et al.
    2019.
    """
    _check_logits(logits, history, lengths, penalty)
    for row in ((penalty != 0) & (penalty != 1)).nonzero().flatten().tolist():
        seen = history[row, : int(lengths[row])]
        values = logits[row, seen]
        logits[row, seen] = torch.where(values > 0, values / penalty[row], values * penalty[row])


def penalize_output_(
    logits: torch.Tensor,
    history: torch.Tensor,
    begins: torch.Tensor,
    lengths: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Subtract frequency x count + presence from the logits of generated tokens, in place.

    logits: [rows, vocab] float32; history: [rows, >= longest] int64, the known tokens; begins,
    lengths: [rows] int64, where the output begins, the prompt being before, and where it ends;
    presence, frequency: [rows] float32, 0 changes nothing. OpenAI's definition, and vLLM's; counts
    end at MAX_COUNT.
    """
    _check_logits(logits, history, begins, lengths, presence, frequency)
    for row in ((presence != 0) | (frequency != 0)).nonzero().flatten().tolist():
        output = history[row, int(begins[row]) : int(lengths[row])]
        token_ids, counts = output.unique(return_counts=True)  # type: ignore[no-untyped-call]
        logits[row, token_ids] -= frequency[row] * counts.clamp(max=MAX_COUNT) + presence[row]


def add_biases_(
    logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, biases: torch.Tensor
) -> None:
    """Add biases[i] to the logit of token_ids[i] in rows[i], in place.

    rows, token_ids: [pairs] int64, no pair twice; biases: [pairs] float32.
    """
    _check_logits(logits)
    logits[rows, token_ids] += biases


def allow_only_(logits: torch.Tensor, rows: torch.Tensor, allowed_mask: torch.Tensor) -> None:
    """Make all tokens of some rows impossible but those of a mask, in place.

    rows: [masks] int64, none twice; allowed_mask: [masks, words] int32, see `pack_mask`.
    """
    _check_logits(logits)
    bits = np.unpackbits(allowed_mask.numpy().view(np.uint8), axis=1, bitorder="little")
    allowed = torch.from_numpy(bits[:, : logits.shape[1]]).bool()
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)


def pack_mask(token_ids: Sequence[int], vocab_size: int) -> torch.Tensor:
    """Return the mask of some tokens, [words] int32: token t is bit t % 32 of word t // 32."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(token_ids)] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))


def suppress_(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Make token_ids[i] impossible in rows[i], in place. rows, token_ids: [pairs] int64."""
    _check_logits(logits)
    logits[rows, token_ids] = -torch.inf


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Draw one token a row, [rows] int64, from logits [rows, vocab] float32.

    The draw is Gumbel-max: the largest of logit / temperature - log(E), where E is exponential and
    a function of (seed, position, token id) alone. Hence a draw depends on nothing else in the
    batch, and a token that no filter removed keeps its E whatever the filters.
    """
    _check_logits(logits, *rows)
    tokens = logits.argmax(dim=-1)
    for row in rows.temperature.nonzero().flatten().tolist():
        tokens[row] = _draw(
            logits[row],
            float(rows.temperature[row]),
            int(rows.top_k[row]),
            float(rows.top_p[row]),
            float(rows.min_p[row]),
            int(rows.seed[row]),
            int(rows.position[row]),
        )
    return tokens


def _draw(
    logits: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> torch.Tensor:
    scores = (logits - logits.max()) / temperature  # [vocab]; then [candidates], falling
    token_ids: torch.Tensor | None = None
    if 0 < top_k < len(scores):
        scores, token_ids = scores.topk(top_k)
    if 0 < top_p < 1:
        scores, chosen = _keep_top_p(scores, top_p)
        token_ids = chosen if token_ids is None else token_ids[chosen]
    if min_p > 0:
        scores = scores.masked_fill(scores.exp() < min_p, -torch.inf)
    winner = (scores - exponentials(seed, position, token_ids, len(logits)).log_()).argmax()
    return winner if token_ids is None else token_ids[winner]


def _keep_top_p(scores: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest best scores whose probabilities reach top_p, and where they stood."""
    total = scores.logsumexp(dim=0)
    best, index = scores.topk(min(_TOP_P_CANDIDATES, len(scores)))
    if (best - total).exp().sum() < top_p:
        best, index = scores.sort(descending=True, stable=True)
    probabilities = (best - total).exp()
    before = probabilities.cumsum(dim=0) - probabilities
    kept = max(int((before < top_p).sum()), 1)
    return best[:kept], index[:kept]


def exponentials(
    seed: int, position: int, token_ids: torch.Tensor | None, vocab_size: int
) -> torch.Tensor:
    """Exponential variables for some tokens, or for all: [tokens] float32.

    Token t takes word t % 4 of the Philox block whose counter is (t // 4, position, 0, 0) and whose
    key is the seed's low and high half. Small values are exact to float32's last bits, and those
    decide; the largest may be infinite, which never wins.
    """
    if token_ids is None:
        bits = philox4x32(np.arange(-(-vocab_size // 4)), position, seed).ravel()[:vocab_size]
    else:
        blocks, words = np.divmod(token_ids.numpy(), 4)
        bits = philox4x32(blocks, position, seed)[np.arange(len(blocks)), words]
    uniform = torch.from_numpy((bits + 0.5) * 2.0**-32).float()
    return uniform.neg_().log1p_().neg_()


def philox4x32(
    counter: npt.NDArray[np.int64], position: int, key: int, *, high: tuple[int, int] = (0, 0)
) -> npt.NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al. 2011) of the counters (counter[i], position, *high).

    counter: [n], below 2^32. Returns words of 32 bits, [n, 4].
    """
    size = len(counter)
    words = [counter.astype(np.uint64), *(np.full(size, x, np.uint64) for x in (position, *high))]
    keys = [key & _MASK, key >> 32 & _MASK]
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            second >> np.uint64(32) ^ words[1] ^ np.uint64(keys[0]),
            second & np.uint64(_MASK),
            first >> np.uint64(32) ^ words[3] ^ np.uint64(keys[1]),
            first & np.uint64(_MASK),
        ]
        keys = [keys[0] + 0x9E3779B9 & _MASK, keys[1] + 0xBB67AE85 & _MASK]
    return np.stack(words, axis=1)


def _check_logits(logits: torch.Tensor, *columns: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be [rows, vocab] float32, not {logits.dtype}")
    if any(len(column) != len(logits) for column in columns):
        raise ValueError(f"every parameter must have one value for each of {len(logits)} rows")
