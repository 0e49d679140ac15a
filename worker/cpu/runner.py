"""The compute of one CPU worker: a step command in, a step result out.

Owns the model, its KV cache and the sequence table. Does not know where commands come from.
"""

from __future__ import annotations

import os
import time

import numpy as np
import numpy.typing as npt
import structlog
import torch

from mili.hub.folder import ModelFolder
from mili.internal.v1.step_pb2 import (
    ROW_FAULT_KIND_GRAMMAR,
    ROW_FAULT_KIND_NUMERIC,
    Prepare,
    Ready,
    RowFault,
    RowFaultKind,
    StepCommand,
    StepResult,
)
from mili.worker.completion import DoneStep
from mili.worker.config import WorkerConfig
from mili.worker.cpu.batch import Batch, make_batch
from mili.worker.cpu.decoder import Decoder
from mili.worker.cpu.kv_cache import KVCache, count_blocks
from mili.worker.cpu.reader import read_embeddings, read_samples, read_scores
from mili.worker.cpu.sampler import hold_to_grammars, sample_rows
from mili.worker.cpu.sequence_table import CpuSequenceTable, IntArray
from mili.worker.dtype import choose_dtype
from mili.worker.grammars import Grammars, Reply
from mili.worker.models.config import context_limit, read_decoder_config
from mili.worker.startup import Startup
from mili.worker.weights import open_weights

log = structlog.get_logger()

_DEFAULT_STEP_TOKENS = 128


class CpuRunner:
    """Loads a model when it is made; raises ValueError where folder or settings do not fit."""

    def __init__(self, folder: ModelFolder, config: WorkerConfig, startup: Startup) -> None:
        torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
        decoder_config = read_decoder_config(folder.config)
        limit = context_limit(decoder_config, config.max_model_len)
        self.dtype: torch.dtype = getattr(torch, choose_dtype(config.dtype, config.device))
        num_blocks = count_blocks(config, decoder_config, self.dtype.itemsize, limit)
        self._table = CpuSequenceTable(
            max_rows=config.max_num_seqs + 1,
            max_model_len=limit,
            block_size=config.block_size,
            num_blocks=num_blocks,
            vocab_size=decoder_config.vocab_size,
        )
        self._cache = KVCache(
            decoder_config,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_blocks_per_row=self._table.max_row_blocks,
            dtype=self.dtype,
        )
        self._max_step_tokens = config.max_num_batched_tokens or _DEFAULT_STEP_TOKENS
        self._vocab_size = decoder_config.vocab_size
        self._startup = startup
        self._grammars = Grammars(folder)
        with (
            startup.phase("load weights"),
            open_weights(folder, config.load_format, self.dtype) as source,
        ):
            self._decoder = Decoder(decoder_config, source)
        log.info(
            "model loaded",
            architecture=decoder_config.architecture,
            dtype=str(self.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            kv_blocks=num_blocks,
        )

    def ready(self) -> Ready:
        """What this worker can do, as the router has to know it."""
        return Ready(
            num_blocks=self._cache.num_blocks,
            block_size=self._cache.block_size,
            max_rows=self._table.max_rows,
            max_step_tokens=self._max_step_tokens,
            max_model_len=self._table.max_model_len,
            vocab_size=self._vocab_size,
            capabilities=self._grammars.capabilities,
            startup=self._startup.phases,
        )

    def reset(self) -> None:
        """Forget every row: a new epoch begins."""
        self._table.reset()
        self._grammars.reset()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compute what a step may ask for on the null row, so that no step is the first."""
        with self._startup.phase("warm up"):
            for count in (1, min(self._max_step_tokens, self._table.max_model_len)):
                zero = np.zeros(1, np.int64)
                batch = make_batch(self._table, self._cache, zero, zero, np.full(1, count))
                hidden = self._decoder.forward(batch, self._cache)
                self._decoder.logits(hidden[:2])
        with self._startup.phase("read tokens for grammars"):
            self._grammars.wait()

    def prepare(self, prepare: Prepare, reply: Reply) -> None:
        """Have a grammar ready for later admissions, or release it."""
        self._grammars.prepare(prepare, reply)

    def start(self, command: StepCommand) -> DoneStep:
        """Execute one step: on a CPU there is nothing to wait for."""
        return DoneStep(self.execute(command))

    @torch.inference_mode()
    def execute(self, command: StepCommand) -> StepResult:
        """Execute one step. Raises CommandError, after which nothing more may be executed."""
        started = time.perf_counter()
        taken = self._table.apply(command)
        self._grammars.admit(command.admissions)
        columns = (taken.rows, taken.starts, taken.counts)
        rows, starts, counts = (np.array(column, np.int64) for column in columns)
        num_new, token_ids = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        result = StepResult(step=command.step)
        alive = np.flatnonzero(~self._table.is_faulted(rows))
        if alive.size:
            batch = make_batch(self._table, self._cache, rows[alive], starts[alive], counts[alive])
            places = alive[batch.order]
            sampled, tokens = self._compute(batch, result)
            num_new[places[sampled]], token_ids[places[sampled]] = 1, tokens
            for read in result.logprobs:
                read.index = places[read.index]
            for embedding in result.embeddings:
                embedding.index = places[embedding.index]
        result.num_new.extend(num_new.tolist())
        result.token_ids.extend(token_ids[num_new == 1].tolist())
        result.faults.extend(
            RowFault(index=index, kind=self._fault_kind(int(rows[index])))
            for index in np.flatnonzero(self._table.is_faulted(rows)).tolist()
        )
        result.device_microseconds = round((time.perf_counter() - started) * 1e6)
        return result

    def _compute(self, batch: Batch, result: StepResult) -> tuple[IntArray, IntArray]:
        """Run the model; return which of the batch's rows sampled a token, and the tokens.

        What else is read goes into the result, with its index into the batch's rows.
        """
        table = self._table
        hidden = self._decoder.forward(batch, self._cache)
        for row, end in zip(batch.rows.tolist(), batch.ends.tolist(), strict=True):
            table.num_computed[row] = end
        num_tokens = batch.last_tokens[-1] + 1  # without padding
        finite = hidden[:num_tokens].isfinite().all(dim=1).numpy()  # [tokens]
        if not finite.all():
            self._fault(batch, ~np.logical_and.reduceat(finite, batch.first_tokens))
        complete = batch.ends == table.known(batch.rows)
        if table.wanted:
            self._read(batch, hidden, complete, result)
            complete &= table.generates(batch.rows)
        sampled = np.flatnonzero(complete & ~table.is_faulted(batch.rows))
        if not sampled.size:
            return sampled, sampled
        last_tokens = batch.last_tokens[sampled]
        # Two rows at least: see `linear`.
        padded = last_tokens if sampled.size > 1 else np.repeat(last_tokens, 2)
        logits = self._decoder.logits(hidden[torch.from_numpy(padded)])[: sampled.size]
        finite = logits.amax(dim=1).isfinite().numpy()  # [sampled]
        if not finite.all():
            self._fault(batch, np.isin(np.arange(len(batch.rows)), sampled[~finite]))
            sampled, logits = sampled[finite], logits[torch.from_numpy(finite)]
        raw = logits.clone() if table.wanted else logits  # what follows overwrites them
        if self._grammars.rows:
            fits = hold_to_grammars(logits, self._grammars, batch.rows[sampled])
            table.faulted.update(batch.rows[sampled[~fits]].tolist())
            kept = torch.from_numpy(fits)
            sampled, logits, raw = sampled[fits], logits[kept], raw[kept]
        tokens = sample_rows(logits, table, batch.rows[sampled])
        table.append_tokens(batch.rows[sampled], tokens.numpy())
        for row, token in zip(batch.rows[sampled].tolist(), tokens.tolist(), strict=True):
            if row in self._grammars.rows:
                self._grammars.rows[row].take([token])
        if table.wanted:
            result.logprobs.extend(read_samples(table, batch, sampled, raw, tokens))
        return sampled, tokens.numpy()

    def _read(
        self,
        batch: Batch,
        hidden: torch.Tensor,
        complete: npt.NDArray[np.bool_],
        result: StepResult,
    ) -> None:
        """Read what rows are asked for beside tokens; complete: [rows], all of it is computed."""
        table = self._table
        scores, wrong = read_scores(self._decoder, table, batch, hidden)
        if (wrong & ~table.is_faulted(batch.rows)).any():
            self._fault(batch, wrong)
        embedding = complete & table.embeds(batch.rows) & ~table.is_faulted(batch.rows)
        result.logprobs.extend(scores)
        if embedding.any():
            places = np.flatnonzero(embedding)
            result.embeddings.extend(read_embeddings(self._decoder, batch, places, hidden))

    def _fault_kind(self, row: int) -> RowFaultKind.ValueType:
        return ROW_FAULT_KIND_GRAMMAR if self._grammars.has_failed(row) else ROW_FAULT_KIND_NUMERIC

    def _fault(self, batch: Batch, rows: npt.NDArray[np.bool_]) -> None:
        """Mark rows, [rows] bool, until they are admitted again, and clear what they wrote."""
        self._table.faulted.update(batch.rows[rows].tolist())
        counts = batch.last_tokens - batch.first_tokens + 1
        tokens = np.flatnonzero(np.repeat(rows, counts))
        self._cache.clear(batch.slots[torch.from_numpy(tokens)])
        log.error("row is not finite", rows=batch.rows[rows].tolist())
