"""An engine without workers, and a model folder without a model, for tests of the API.

Owns a made-up output for every request: token i is i, its text a letter. Does not know gRPC.
"""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from mili.hub.folder import ModelFolder, read_model_folder
from mili.internal.v1.step_pb2 import TASK_EMBED, TASK_GENERATE
from mili.router.api.admin import WorkerStatus
from mili.router.api.server import ApiServer
from mili.router.config import RouterConfig
from mili.router.errors import Reason, RequestError
from mili.router.introspection import Explanation, Load, Pinned
from mili.router.outcome import (
    Finish,
    Finished,
    FinishReason,
    RequestOutput,
    Started,
    Timing,
    Usage,
)
from mili.router.params import GenerationParams
from mili.router.readings import Readings, TokenLogprobs
from mili.router.tenants import Tenants
from mili.router.tokenizer import Tokenizer

VOCAB_SIZE = 320
CONTEXT_LIMIT = 64
HIDDEN_SIZE = 4
EOS_TOKEN_ID = 258
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if shout is defined %}!{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class FakeEngine:
    """Requests run until they are stepped, finished or cancelled by the test."""

    def __init__(self) -> None:
        self.context_limit = CONTEXT_LIMIT
        self.block_size = 16
        self.weights_sha256 = b"w" * 32
        self.constrains_outputs = False
        self.max_running = 256
        self.deliver: Callable[[list[RequestOutput]], None] = lambda outputs: None
        self.params: dict[str, GenerationParams] = {}
        self.lengths: dict[str, int] = {}
        self.started: set[str] = set()
        self.submitted: asyncio.Queue[str] = asyncio.Queue()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.refusal: Exception | None = None
        self.refused = asyncio.Event()
        self.known_workers: list[WorkerStatus] = []
        self.current_load = Load(0, 0, 0, 0.0, 0.0, 0.0, 0.0)
        self.explanations: dict[str, Explanation] = {}
        self.draining: dict[str, float | None] = {}
        self.pins: dict[str, tuple[bytes, list[int], float]] = {}
        self.flushed: list[bytes | None] = []

    @property
    def operations(self) -> FakeEngine:
        return self

    def submit(self, request_id: str, params: GenerationParams) -> None:
        if self.refusal is not None:
            self.refused.set()
            raise self.refusal
        assert request_id not in self.lengths
        self.params[request_id] = params
        self.lengths[request_id] = 0
        self.submitted.put_nowait(request_id)

    def cancel(self, request_id: str) -> bool:
        if request_id not in self.lengths:
            return False
        self.cancelled.put_nowait(request_id)
        self.finish(request_id, Finish(FinishReason.CANCELLED))
        return True

    def load(self) -> Load:
        return self.current_load

    def explain(self, request_id: str) -> Explanation | None:
        return self.explanations.get(request_id)

    def drain(self, group: str, migrate_after: float | None) -> int:
        self.draining[group] = migrate_after
        return 7

    def undrain(self, group: str) -> None:
        del self.draining[group]

    def pin(self, namespace: bytes, token_ids: Sequence[int], seconds: float) -> Pinned:
        self.pins["pin"] = (namespace, list(token_ids), seconds)
        return Pinned("pin", len(token_ids) // self.block_size * self.block_size)

    def unpin(self, pin_id: str) -> None:
        if self.pins.pop(pin_id, None) is None:
            raise refuse_with(Reason.PIN_NOT_FOUND)

    def flush(self, tenant_prefix: bytes | None) -> int:
        self.flushed.append(tenant_prefix)
        return 5

    def start(self, request_id: str) -> None:
        """Admit a request, without a token."""
        self.deliver([RequestOutput(request_id, started=self._started(request_id))])

    def step(self) -> None:
        """Give every sequence of every running request its next token, in one batch."""
        running = list(self.lengths)
        self.deliver([output for request_id in running for output in self._next(request_id)])

    async def run(self) -> None:
        """Step until nothing runs, as fast as the event loop goes round."""
        while self.lengths:
            self.step()
            await asyncio.sleep(0)

    def finish(self, request_id: str, finish: Finish) -> None:
        """End a request."""
        first = self.lengths[request_id]
        outputs = [
            RequestOutput(request_id, first_token_index=first, finished=finished, index=index)
            for index, finished in enumerate(self._finished(request_id, finish))
        ]
        self.deliver(outputs)

    def _next(self, request_id: str) -> list[RequestOutput]:
        params = self.params[request_id]
        if params.task != TASK_GENERATE:
            return [self._read(request_id, params)]
        index = self.lengths[request_id]
        self.lengths[request_id] += 1
        started = self._started(request_id)
        ends: list[Finished | None] = [None] * params.num_sequences
        if index + 1 == params.max_tokens:
            ends[:] = self._finished(request_id, Finish(FinishReason.MAX_TOKENS))
        text = letter(index) if params.text else ""
        first = RequestOutput(request_id, (index,), text, index, started, ends[0])
        others = enumerate(ends[1:], 1)
        return [
            first,
            *(first._replace(started=None, finished=end, index=number) for number, end in others),
        ]

    def _read(self, request_id: str, params: GenerationParams) -> RequestOutput:
        """A vector that begins with 3 and 4, or token i at rank i with -i / 2."""
        started = self._started(request_id)
        count = len(params.prompt_token_ids) - params.score_from
        positions = range(params.score_from, params.score_from + count)
        scored = TokenLogprobs(
            params.score_from,
            1,
            array("I", params.prompt_token_ids[params.score_from :]),
            array("f", [-position / 2 for position in positions]),
            array("I", positions),
        )
        readings = Readings(scored=(scored,))
        if params.task == TASK_EMBED:
            readings = Readings(embedding=array("f", [3.0, 4.0, 12.0, 84.0]))
        (finished,) = self._finished(request_id, Finish(FinishReason.MAX_TOKENS))
        return RequestOutput(request_id, started=started, finished=finished, readings=readings)

    def _started(self, request_id: str) -> Started | None:
        if request_id in self.started:
            return None
        self.started.add(request_id)
        return Started(len(self.params[request_id].prompt_token_ids), 2)

    def _finished(self, request_id: str, finish: Finish) -> list[Finished]:
        """The end of each sequence of a request, which they all come to in one step."""
        self.started.discard(request_id)
        params = self.params[request_id]
        completion = self.lengths.pop(request_id) * params.num_sequences
        usage = Usage(len(params.prompt_token_ids), 2, completion, 3)
        timing = Timing(0.5, 0.25, 0.75, 1.5, 2.25, 1, 0, "w0")
        left = reversed(range(params.num_sequences))
        return [Finished(finish, usage, timing, num_left) for num_left in left]


def letter(index: int) -> str:
    return chr(ord("a") + index % 26)


def refuse_with(reason: Reason, *, retry_after: float | None = None) -> RequestError:
    return RequestError(reason, "refused by the test", retry_after=retry_after)


def make_folder(
    path: Path,
    *,
    template: bool = True,
    context_limit: int = CONTEXT_LIMIT,
    **generation: Any,  # noqa: ANN401
) -> ModelFolder:
    """Write a folder that looks like a model: bytes for tokens, one tensor without data."""
    path.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "max_position_embeddings": context_limit,
        "dtype": "float32",
    }
    tokenizer_config = {"chat_template": TEMPLATE} if template else {}
    generation = {"eos_token_id": EOS_TOKEN_ID, **generation}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (path / "generation_config.json").write_text(json.dumps(generation))
    header = json.dumps({"t": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.save(str(path / "tokenizer.json"))
    return read_model_folder(path)


@asynccontextmanager
async def running_api(
    folder: ModelFolder,
    tenants: Tenants | None = None,
    engine: FakeEngine | None = None,
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[tuple[ApiServer, FakeEngine]]:
    """Serve a fake engine on two free ports; nothing may be live at the end."""
    engine = engine or FakeEngine()
    config = RouterConfig(**{"model": str(folder.path), "port": 0, "admin_port": 0} | settings)
    server = ApiServer(
        engine,
        folder,
        Tokenizer(folder),
        config,
        tenants=tenants or Tenants(),
        clock=time.monotonic,
        list_workers=lambda: engine.known_workers,
        startup_phases=[("read model", 0.25)],
    )
    engine.deliver = server.deliver
    await server.start()
    server.set_ready(True)
    try:
        yield server, engine
    finally:
        await server.stop()
    assert server.num_live == 0
    assert not engine.lengths
