"""EmbeddingService: vectors and likelihoods, from forward passes that sample nothing.

Owns the checks of these calls, what of a pass is the answer, and what the tenant is charged. Does
not know how the passes run.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence

from mili.internal.v1.step_pb2 import TASK_EMBED, TASK_SCORE, Sampling, Task
from mili.router.api.engine import Engine
from mili.router.api.generation import check_length
from mili.router.api.identity import caller
from mili.router.api.model import ServedModel
from mili.router.api.passes import Passes, usage_of
from mili.router.api.prompt import PromptReader, TextThreads
from mili.router.api.sampling import check_token_ids
from mili.router.api.scheduling import to_scheduling
from mili.router.api.status import Context
from mili.router.api.stream import Gathered
from mili.router.api.supported import check_supported
from mili.router.errors import Reason, RequestError
from mili.router.params import GenerationParams, Scheduling
from mili.router.quotas import Quotas
from mili.v1 import embedding_pb2 as pb
from mili.v1 import embedding_pb2_grpc, inference_pb2

_MAX_INPUTS = 1024
# What clients take by default, less than the rest of an answer.
_MAX_VECTOR_BYTES = 4 * 1024 * 1024 - 64 * 1024
_FLOAT_BYTES = 4
_NO_SAMPLING = Sampling()


class EmbeddingService(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Reads the one model. clock: the engine's."""

    def __init__(
        self,
        *,
        engine: Engine,
        passes: Passes,
        model: ServedModel,
        prompts: PromptReader,
        threads: TextThreads,
        quotas: Quotas,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._passes = passes
        self._model = model
        self._prompts = prompts
        self._threads = threads
        self._quotas = quotas
        self._clock = clock

    async def Embed(  # noqa: N802
        self, request: pb.EmbedRequest, context: Context
    ) -> pb.EmbedResponse:
        check_supported(request)
        self._model.check_name(request.model, "model")
        size = self._check_vectors(request)
        account = self._quotas.account(caller())
        account.admit()
        scheduling = self._scheduling(request.scheduling, context)
        inputs = await self._threads.run(self._read_all, request.inputs, "inputs")
        account.check(sum(map(len, inputs)))
        asked = [self._params(ids, scheduling, TASK_EMBED) for ids in inputs]
        account.charge(sum(map(len, inputs)))
        gathered = await self._passes.run(asked)
        unit = request.normalize if request.HasField("normalize") else True
        return pb.EmbedResponse(
            embeddings=[pb.Embedding(values=_vector(each, size, unit=unit)) for each in gathered],
            usage=_usage(gathered, sum(map(len, inputs))),
        )

    async def Score(  # noqa: N802
        self, request: pb.ScoreRequest, context: Context
    ) -> pb.ScoreResponse:
        """The context is computed once, with the first continuation; the others find it cached."""
        check_supported(request)
        self._model.check_name(request.model, "model")
        _check_count(len(request.continuations), "continuations")
        account = self._quotas.account(caller())
        account.admit()
        scheduling = self._scheduling(request.scheduling, context)
        before, continuations = await self._threads.run(self._read_scored, request)
        num_tokens = len(before) + sum(map(len, continuations))
        account.check(num_tokens)
        asked = [
            self._params([*before, *ids], scheduling, TASK_SCORE, score_from=len(before))
            for ids in continuations
        ]
        account.charge(num_tokens)
        gathered = await self._passes.run(asked[:1])
        gathered += await self._passes.run(asked[1:])
        return pb.ScoreResponse(
            scores=[_score(each) for each in gathered], usage=_usage(gathered, num_tokens)
        )

    def _check_vectors(self, request: pb.EmbedRequest) -> int:
        """Return how many dimensions are asked for, if the answer fits a message."""
        _check_count(len(request.inputs), "inputs")
        most = self._model.hidden_size
        size = request.dimensions if request.HasField("dimensions") else most
        if not 1 <= size <= most:
            raise _invalid(f"dimensions is from 1 to {most}", "dimensions")
        fit = _MAX_VECTOR_BYTES // (size * _FLOAT_BYTES)
        if len(request.inputs) > fit:
            raise _invalid(f"an answer holds {fit} vectors of {size} dimensions", "inputs")
        return size

    def _scheduling(self, hints: inference_pb2.SchedulingHints, context: Context) -> Scheduling:
        remaining = context.time_remaining()
        deadline = math.inf if remaining is None else self._clock() + remaining
        asked = inference_pb2.Generation(scheduling=hints)
        return to_scheduling(asked, caller(), deadline, path="")

    def _read_all(self, inputs: Sequence[pb.EmbedInput], field: str) -> list[list[int]]:
        return [self._read(each, f"{field}[{index}]") for index, each in enumerate(inputs)]

    def _read_scored(self, request: pb.ScoreRequest) -> tuple[list[int], list[list[int]]]:
        """Return the context's tokens, and those of each continuation, which begins anew."""
        before = self._read(request.context, "context")
        continuations = []
        for index, each in enumerate(request.continuations):
            field = f"continuations[{index}]"
            ids = self._read(each, field, special=False)
            check_length(len(before) + len(ids), field, self._engine.context_limit)
            continuations.append(ids)
        return before, continuations

    def _read(self, given: pb.EmbedInput, field: str, *, special: bool = True) -> list[int]:
        if given.WhichOneof("input") is None:
            raise _invalid(f"{field} is missing", field)
        limit = self._engine.context_limit
        ids = self._prompts.read_input(given, field, limit, special=special)
        check_length(len(ids), field, limit)
        check_token_ids(ids, self._model.folder.vocab_size, field)
        return ids

    def _params(
        self,
        token_ids: list[int],
        scheduling: Scheduling,
        task: Task.ValueType,
        score_from: int | None = None,
    ) -> GenerationParams:
        return GenerationParams(
            prompt_token_ids=token_ids,
            sampling=_NO_SAMPLING,
            max_tokens=1,
            text=False,
            cache_namespace=caller().cache_namespace(""),
            scheduling=scheduling,
            num_prompt_logprobs=None if score_from is None else 0,
            score_from=score_from or 1,
            task=task,
        )


def _vector(gathered: Gathered, size: int, *, unit: bool) -> array[float]:
    """Return the first `size` numbers of the hidden state, `unit`: scaled to the length 1."""
    (values,) = (read.embedding for read in gathered.readings if read.embedding is not None)
    vector = values[:size]
    length = math.sqrt(math.fsum(value * value for value in vector)) if unit else 1.0
    return array("f", (value / length for value in vector)) if length else vector


def _score(gathered: Gathered) -> pb.Score:
    pieces = [piece for read in gathered.readings for piece in read.scored]
    return pb.Score(
        logprob=math.fsum(logprob for piece in pieces for logprob in piece.logprobs),
        num_tokens=sum(piece.num_positions for piece in pieces),
        is_greedy=all(rank == 1 for piece in pieces for rank in piece.ranks),
    )


def _usage(gathered: Sequence[Gathered], prompt_tokens: int) -> inference_pb2.Usage:
    """Return the sum. cached_prompt_tokens: what tokens that count once were not computed for."""
    used = [usage_of(each) for each in gathered]
    computed = sum(usage.prompt_tokens - usage.cached_prompt_tokens for usage in used)
    return inference_pb2.Usage(
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=max(0, prompt_tokens - computed),
        recomputed_tokens=sum(usage.recomputed_tokens for usage in used),
    )


def _check_count(count: int, field: str) -> None:
    if not 1 <= count <= _MAX_INPUTS:
        raise _invalid(f"{field} has from 1 to {_MAX_INPUTS} entries", field)


def _invalid(message: str, field: str) -> RequestError:
    return RequestError(Reason.INVALID_FIELD, message, field=field)
