"""What a step on the CPU reads off the model beside tokens: log-probabilities and vectors.

Owns how many logits there are at once. Does not know which positions are due.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from mili.internal.v1.step_pb2 import Embedding, Logprobs
from mili.kernels.reference_logprobs import LogprobColumns, read_logprobs
from mili.worker.cpu.batch import Batch
from mili.worker.cpu.decoder import Decoder
from mili.worker.cpu.sequence_table import CpuSequenceTable, IntArray
from mili.worker.readings import Piece, scored_pieces, to_message

# Scored positions whose logits are there at once, of whole vocabularies.
_POSITIONS = 32


def read_scores(
    decoder: Decoder, table: CpuSequenceTable, batch: Batch, hidden: torch.Tensor
) -> tuple[list[Logprobs], npt.NDArray[np.bool_]]:
    """Read the log-probabilities of known tokens that are due; hidden: [tokens, hidden].

    Returns messages whose index is into the batch's rows, and which rows, [rows], have logits that
    are not finite: these are left out.
    """
    messages = []
    wrong = table.is_faulted(batch.rows)
    starts = batch.ends - (batch.last_tokens - batch.first_tokens + 1)
    columns = (batch.rows.tolist(), starts.tolist(), batch.ends.tolist())
    for piece in scored_pieces(table.wanted, *columns):
        if wrong[piece.place]:
            continue
        read = _read_piece(decoder, table, piece, hidden, int(batch.first_tokens[piece.place]))
        if read is None:
            wrong[piece.place] = True
        else:
            messages.append(to_message(piece.place, piece.positions.start, read))
    return messages, wrong


def read_samples(
    table: CpuSequenceTable,
    batch: Batch,
    sampled: IntArray,
    logits: torch.Tensor,
    tokens: torch.Tensor,
) -> list[Logprobs]:
    """Read the log-probabilities of sampled tokens.

    sampled: [samples], which rows of the batch they are of; logits: [samples, vocab], as the model
    gave them; tokens: [samples] int64.
    """
    messages = []
    for sample, place in enumerate(sampled.tolist()):
        wanted = table.wanted.get(int(batch.rows[place]))
        if wanted and wanted.sampled_width:
            one = slice(sample, sample + 1)
            read = read_logprobs(logits[one], tokens[one], wanted.sampled_width)
            messages.append(to_message(place, int(batch.ends[place]), read))
    return messages


def read_embeddings(
    decoder: Decoder, batch: Batch, places: IntArray, hidden: torch.Tensor
) -> list[Embedding]:
    """Read the final hidden state of the last token of some of the batch's rows."""
    vectors = decoder.final(hidden[torch.from_numpy(batch.last_tokens[places])]).float()
    return [
        Embedding(index=place, values=vector.numpy().astype("<f4").tobytes())
        for place, vector in zip(places.tolist(), vectors, strict=True)
    ]


def _read_piece(
    decoder: Decoder,
    table: CpuSequenceTable,
    piece: Piece,
    hidden: torch.Tensor,
    first_token: int,
) -> LogprobColumns | None:
    """None where a logit is not finite. first_token: of the row, in hidden."""
    parts = []
    for first in range(0, len(piece.positions), _POSITIONS):
        positions = piece.positions[first : first + _POSITIONS]
        at = first_token + piece.offset + first + np.arange(len(positions))
        # Two rows at least: see `linear`.
        padded = at if len(at) > 1 else np.repeat(at, 2)
        logits = decoder.logits(hidden[torch.from_numpy(padded)])[: len(at)]
        if not logits.amax(dim=1).isfinite().all():
            return None
        own = torch.from_numpy(table.token_ids[piece.row, positions.start : positions.stop])
        parts.append(read_logprobs(logits, own, piece.width))
    return LogprobColumns(*(torch.cat(column) for column in zip(*parts, strict=True)))
