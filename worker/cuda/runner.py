"""The compute of one GPU worker: step commands in, step results out, several in flight.

Owns the model, its KV cache and the sequence table on the device, and the order of a step's
launches on one stream. Does not know where commands come from.

A step is a kernel that takes over what changed, a graph of the forward pass and the sampling (two
where prompts take part), and a kernel that hands out the results. A sampled token reaches the next
step on the device, so that the next may be launched before this one's result is known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import structlog
import torch

from mili.hub.folder import ModelFolder
from mili.internal.v1.step_pb2 import Prepare, Ready, StepCommand, StepResult
from mili.kernels.sampling import Sampler
from mili.kernels.step import MAX_ROWS, allocate_batch, allocate_sequences, make_batch
from mili.worker.config import WorkerConfig
from mili.worker.cuda.buckets import (
    row_buckets,
    sample_buckets,
    smallest,
    smallest_worth,
    token_buckets,
)
from mili.worker.cuda.graphs import Graphs
from mili.worker.cuda.loading import load_decoder
from mili.worker.cuda.masks import GrammarMasks
from mili.worker.cuda.memory import check_device, count_blocks, log_capacity, out_of_memory
from mili.worker.cuda.pending_step import PendingStep
from mili.worker.cuda.reader import Reader, due
from mili.worker.cuda.staging import order_rows, pack_deltas, pack_rows
from mili.worker.cuda.transfer import Transfer
from mili.worker.grammars import Grammars, Reply
from mili.worker.models.config import context_limit, read_decoder_config
from mili.worker.sequence_table import SequenceTable, Taken
from mili.worker.startup import Startup

log = structlog.get_logger()

DEFAULT_STEP_TOKENS = 8192
# Tokens of a step that is not recorded are padded to a multiple of this.
_PADDING = 64


class CudaRunner:
    """Loads a model when it is made; raises ValueError where folder, settings or GPU do not fit."""

    @torch.inference_mode()
    def __init__(self, folder: ModelFolder, config: WorkerConfig, startup: Startup) -> None:
        if config.max_num_seqs >= MAX_ROWS:
            raise ValueError(
                f"--max-num-seqs {config.max_num_seqs} is too many: a GPU step has room for "
                f"{MAX_ROWS - 1} rows"
            )
        decoder_config = read_decoder_config(folder.config)
        limit = context_limit(decoder_config, config.max_model_len)
        device = self._device = torch.device("cuda", 0)
        with startup.phase("open the GPU"):
            check_device(device)
            torch.cuda.set_device(device)
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._startup = startup
        self._grammars = Grammars(folder)
        self._max_step_tokens = config.max_num_batched_tokens or DEFAULT_STEP_TOKENS
        self._vocab_size = decoder_config.vocab_size
        self._block_size = config.block_size
        max_samples = min(config.max_num_seqs, self._max_step_tokens)
        max_tokens = -(-self._max_step_tokens // _PADDING) * _PADDING
        try:
            self._decoder = load_decoder(
                folder,
                config,
                decoder_config,
                startup,
                max_tokens=max_tokens,
                max_samples=max_samples,
                max_model_len=limit,
                device=device,
            )
            self.dtype = self._decoder.dtype
            self._sequences = allocate_sequences(
                table_rows=config.max_num_seqs + 1,
                max_model_len=limit,
                max_blocks=-(-limit // config.block_size),
                vocab_size=decoder_config.vocab_size,
                device=device,
            )
            self._batch = allocate_batch(max_tokens, device)
            self._sampler = Sampler(decoder_config.vocab_size, max_samples)
            self._logprobs = torch.zeros(MAX_ROWS, device=device)
            num_blocks = count_blocks(config, decoder_config, self.dtype.itemsize, device)
            self.cache = torch.empty(
                decoder_config.num_layers,
                num_blocks,
                2 * decoder_config.num_kv_heads,
                config.block_size,
                decoder_config.head_dim,
                dtype=self.dtype,
                device=device,
            )
            self._decoder.attach(self.cache, MAX_ROWS)
            self._reader = Reader(self._decoder, self._sequences, max_samples)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, device) from error
        log_capacity(num_blocks, config.block_size, self._sequences.sampling.num_bytes)
        with torch.cuda.stream(self._stream):
            self._transfer = Transfer(self._batch, self._sequences, device)
        self._masks = GrammarMasks(
            self._grammars, self._sequences.sampling.allowed_mask, max_samples
        )
        self._graphs = Graphs(enabled=not config.enforce_eager)
        self._row_buckets = row_buckets(max_samples)
        self._sample_buckets = sample_buckets(max_samples)
        self._token_buckets = token_buckets(max_tokens)
        self._table = SequenceTable(
            max_rows=config.max_num_seqs + 1,
            max_model_len=limit,
            block_size=config.block_size,
            num_blocks=num_blocks,
            vocab_size=decoder_config.vocab_size,
        )

    def ready(self) -> Ready:
        """What this worker can do, as the router has to know it."""
        return Ready(
            num_blocks=self.cache.shape[1],
            block_size=self._block_size,
            max_rows=self._table.max_rows,
            max_step_tokens=self._max_step_tokens,
            max_model_len=self._table.max_model_len,
            vocab_size=self._vocab_size,
            capabilities=self._grammars.capabilities,
            startup=self._startup.phases,
        )

    def reset(self) -> None:
        """Forget every row: a new epoch begins. No step may be in flight."""
        self._table.reset()
        self._grammars.reset()
        self._masks.reset()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Record the graphs of steps that decode and of steps that prefill, without any rows.

        That of a step that does both is recorded when one of its size first comes: it delays that
        one by some 30 ms, where recording all of them here would delay every start.
        """
        with self._startup.phase("record graphs"), torch.cuda.stream(self._stream):
            slot = self._transfer.take()
            self._transfer.begin(slot, b"")
            for size in reversed(self._row_buckets):
                self._run(size, size, size)
            for size in reversed(self._sample_buckets):
                self._sample(size)
            for size in reversed(self._token_buckets):
                self._run(size, 0, 0)
            self._run(len(self._batch.token_ids), 0, 0)
            self._transfer.end(slot)
            slot.ended.synchronize()
        with self._startup.phase("read tokens for grammars"):
            self._grammars.wait()
        log.info("graphs recorded", graphs=len(self._graphs))

    def prepare(self, prepare: Prepare, reply: Reply) -> None:
        """Have a grammar ready for later admissions, or release it."""
        self._grammars.prepare(prepare, reply)

    def start(self, command: StepCommand) -> PendingStep:
        """Launch one step. Raises CommandError, after which nothing more may be executed.

        Leaves the runner's stream as the thread's current one.
        """
        taken = self._table.take(command)
        self._grammars.admit(command.admissions)
        try:
            pending = self._launch(command, taken)
        finally:
            # While the device works. Of a launch that failed it may be the cause.
            self._table.check(command, taken)
        rows = pending.rows
        self._table.advance(rows.rows, rows.ends, rows.samples)
        return pending

    def _launch(self, command: StepCommand, taken: Taken) -> PendingStep:
        rows = order_rows(taken.rows, taken.starts, taken.counts, self._table.num_known)
        slot = self._transfer.take()
        pack_rows(rows, command, len(taken.appended) // 3, slot.columns)
        torch.cuda.set_stream(self._stream)
        torch.cuda.nvtx.range_push(f"step {command.step}")  # type: ignore[no-untyped-call]
        self._transfer.begin(slot, pack_deltas(command, taken.appended))
        unfit: frozenset[int] = frozenset()

        def hold() -> None:
            nonlocal unfit
            unfit = self._masks.upload(held, slot)

        held = self._masks.held(rows)
        wanted = self._table.wanted
        scored = due(rows, wanted) if wanted else []
        sizes = (rows.num_tokens, rows.num_decode_rows, rows.num_samples)
        self._run(*sizes, scores=bool(scored), hold=hold if held else None)
        readings = self._reader.read(rows, wanted, scored) if wanted else None
        self._transfer.end(slot)
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        if not held:
            self._masks.hear()
        return PendingStep(command.step, rows, slot, readings, unfit)

    def execute(self, command: StepCommand) -> StepResult:
        """Execute one step, and wait for it."""
        return self.start(command).result()

    def _run(
        self,
        num_tokens: int,
        num_decode_rows: int,
        num_samples: int,
        *,
        scores: bool = False,
        hold: Callable[[], None] | None = None,
    ) -> None:
        """Compute the batch that the input names, in the smallest graphs that hold it.

        scores: known tokens are scored, for which a prefill keeps what is needed. hold: to be
        called between the forward pass and the sampling; a decode step takes two graphs instead of
        one then.
        """
        num_rows = smallest(self._row_buckets, num_decode_rows)
        if num_rows is not None and num_tokens == num_decode_rows and not scores:
            if hold is None:
                self._graphs.run(("decode", num_rows), partial(self._decode, num_rows))
                return
            self._graphs.run(("forward", num_rows), partial(self._forward, num_rows))
            hold()
            self._graphs.run(("draw", num_rows), partial(self._draw, num_rows))
            return
        decodes = num_decode_rows > 0
        padded = smallest_worth(self._token_buckets, num_tokens)
        if padded is not None:
            key = ("mixed" if decodes else "prefill", padded)
            self._graphs.run(key, partial(self._prefill, padded, decodes))
        else:
            self._prefill(-(-num_tokens // _PADDING) * _PADDING, decodes)
        if num_samples:
            if hold is not None:
                hold()
            self._sample(num_samples)

    @torch.inference_mode()
    def _decode(self, num_rows: int) -> None:
        """A whole step in which every row has one new token; nearly all of them sample."""
        self._forward(num_rows)
        self._draw(num_rows)

    @torch.inference_mode()
    def _forward(self, num_rows: int) -> None:
        """A decode step up to its logits."""
        self._make_batch(num_rows)
        self._decoder.decode(self._batch, self._sequences, num_rows)
        self._decoder.compute_logits(num_rows)

    @torch.inference_mode()
    def _prefill(self, num_tokens: int, decodes: bool) -> None:
        """A step in which rows of several new tokens take part, but for what only samples need."""
        self._make_batch(num_tokens)
        self._decoder.prefill(self._batch, self._sequences, num_tokens, decodes=decodes)

    def _sample(self, num_samples: int) -> None:
        size = smallest(self._sample_buckets, num_samples)
        assert size is not None, num_samples
        self._graphs.run(("sample", size), partial(self._finish, size))

    @torch.inference_mode()
    def _finish(self, num_samples: int) -> None:
        self._decoder.finish(self._batch, self._sequences, num_samples)
        self._decoder.compute_logits(num_samples)
        self._draw(num_samples)

    def _make_batch(self, num_tokens: int) -> None:
        make_batch(
            self._transfer.input,
            self._sequences,
            self._batch,
            num_padded=num_tokens,
            block_size=self._block_size,
        )

    @torch.inference_mode()
    def _draw(self, num_samples: int) -> None:
        self._sampler.sample(
            self._decoder.activations.logits[:num_samples],
            self._sequences.sampling,
            self._batch.sample_rows,
            self._batch.sample_positions,
            self._batch.sizes,
            self._sequences.token_ids,
            self._sequences.faulted,
            self._transfer.sampled,
            self._logprobs,
        )
