"""What a step on the GPU reads off the model beside tokens: log-probabilities and vectors.

Owns the launches that only such a step has, and the memory of the host that they write. Does not
know which positions are due.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from mili.internal.v1.step_pb2 import Embedding, Logprobs, StepResult
from mili.kernels.logprobs import read_logprobs
from mili.kernels.step import SequenceTensors
from mili.worker.cuda.buckets import sample_buckets, smallest
from mili.worker.cuda.decoder import Decoder
from mili.worker.cuda.staging import StepRows
from mili.worker.readings import Piece, Wanted, portions, scored_pieces, to_logprobs

# Scored positions whose logits are there at once; no more than a step has samples.
_POSITIONS = 256


class Block(NamedTuple):
    """Log-probabilities that one launch writes: of each piece its positions, one after another."""

    pieces: list[Piece]
    columns: torch.Tensor  # [3, entries, width] int32, pinned

    def messages(self, order: Sequence[int], faulted: Sequence[int]) -> list[Logprobs]:
        """Without those of faulted rows; order: where each row stands in the command."""
        messages = []
        columns = self.columns.numpy()
        start = 0
        for piece in self.pieces:
            end = start + len(piece.positions)
            if not faulted[piece.place]:
                token_ids, logprobs, ranks = columns[:, start:end, : piece.width].copy()
                index, first = order[piece.place], piece.positions.start
                messages.append(
                    to_logprobs(index, first, token_ids, logprobs.view(np.float32), ranks)
                )
            start = end
        return messages


class StepReadings(NamedTuple):
    """What was launched. silent: places of rows that sample nothing."""

    silent: frozenset[int]
    blocks: list[Block]
    embedding_places: list[int]
    embeddings: torch.Tensor  # [rows, hidden] float32, pinned

    def fill(self, result: StepResult, order: Sequence[int], faulted: Sequence[int]) -> None:
        """Put all into the result. The step must have ended."""
        for block in self.blocks:
            result.logprobs.extend(block.messages(order, faulted))
        for place, vector in zip(self.embedding_places, self.embeddings.numpy(), strict=True):
            if not faulted[place]:
                values = vector.astype("<f4").tobytes()
                result.embeddings.append(Embedding(index=order[place], values=values))


class Reader:
    """Launches on the current stream, behind what computes the step."""

    def __init__(self, decoder: Decoder, table: SequenceTensors, max_samples: int) -> None:
        self._decoder, self._table = decoder, table
        self._max_positions = min(max_samples, _POSITIONS)
        self._sizes = sample_buckets(max_samples)

    @torch.inference_mode()
    def read(self, rows: StepRows, wanted: dict[int, Wanted], scored: list[Piece]) -> StepReadings:
        """Read what the step's rows want, once logits and samples are there.

        scored: of known tokens; the step must have been computed as a prefill then.
        """
        silent, samples, embedding = self._wants(rows, wanted)
        vectors = self._embed([sample for sample, _ in embedding])
        blocks = []
        if samples:
            logits = self._decoder.activations.logits
            sources = [sample for sample, _ in samples]
            blocks.append(self._launch(logits, sources, [piece for _, piece in samples]))
        # These overwrite what the samples were read from.
        blocks += [self._score(rows, pieces) for pieces in portions(scored, self._max_positions)]
        return StepReadings(silent, blocks, [place for _, place in embedding], vectors)

    def _wants(
        self, rows: StepRows, wanted: dict[int, Wanted]
    ) -> tuple[frozenset[int], list[tuple[int, Piece]], list[tuple[int, int]]]:
        """Places that sample nothing; samples with what to read of them; samples to embed."""
        silent, samples, embedding = [], [], []
        sample = 0
        columns = zip(rows.rows, rows.ends, rows.samples, strict=True)
        for place, (row, end, gives_sample) in enumerate(columns):
            of_row = wanted.get(row)
            if of_row and gives_sample:
                if not of_row.generates:
                    silent.append(place)
                if of_row.embeds:
                    embedding.append((sample, place))
                if of_row.sampled_width:
                    positions = range(end, end + 1)
                    samples.append((sample, Piece(place, row, positions, 0, of_row.sampled_width)))
            sample += gives_sample
        return frozenset(silent), samples, embedding

    def _embed(self, samples: list[int]) -> torch.Tensor:
        """The normed hidden states of some samples, on the host once the step has ended."""
        states = self._decoder.activations.sampled
        host = torch.empty(len(samples), states.shape[1], dtype=torch.float32, pin_memory=True)
        if samples:
            host.copy_(states[self._upload(samples)[0].long()].float(), non_blocking=True)
        return host

    def _score(self, rows: StepRows, pieces: list[Piece]) -> Block:
        first_tokens = [0]
        for count in rows.counts:
            first_tokens.append(first_tokens[-1] + count)
        tokens = [
            first_tokens[piece.place] + piece.offset + index
            for piece in pieces
            for index in range(len(piece.positions))
        ]
        table_rows = [piece.row for piece in pieces for _ in piece.positions]
        # Sizes for which kernels were compiled. Padding is token 0 of the batch, in the null row.
        size = smallest(self._sizes, len(tokens))
        assert size is not None, len(tokens)
        padding = [0] * (size - len(tokens))
        counts = [len(tokens)] * size
        index, of_rows, count = self._upload(tokens + padding, table_rows + padding, counts)
        self._decoder.finish_tokens(index, of_rows, self._table, count)
        logits = self._decoder.compute_logits(size)
        return self._launch(logits, range(len(tokens)), pieces)

    def _launch(self, logits: torch.Tensor, sources: Sequence[int], pieces: list[Piece]) -> Block:
        """sources: the row of the logits that each position reads."""
        rows = [piece.row for piece in pieces for _ in piece.positions]
        positions = [position for piece in pieces for position in piece.positions]
        width = max(piece.width for piece in pieces)
        output = torch.empty(3, len(rows), width, dtype=torch.int32, pin_memory=True)
        from_rows, of_rows, at = self._upload(list(sources), rows, positions)
        table = self._table
        read_logprobs(logits, from_rows, of_rows, at, table.token_ids, table.faulted, output)
        return Block(pieces, output)

    def _upload(self, *columns: Sequence[int]) -> torch.Tensor:
        """[columns, n] int32 on the device."""
        host = torch.tensor(columns, dtype=torch.int32).pin_memory()
        return host.to(self._table.token_ids.device, non_blocking=True)


def due(rows: StepRows, wanted: dict[int, Wanted]) -> list[Piece]:
    """What a step has to read of known tokens."""
    return scored_pieces(wanted, rows.rows, rows.starts, rows.ends)
