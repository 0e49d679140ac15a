"""Response messages in, Python values out.

Owns the folding of a stream's events into one result. Does not know how messages travel.
"""

from __future__ import annotations

from typing import NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration

from mili.client.errors import ServerError, from_message
from mili.v1 import inference_pb2 as pb


class Usage(NamedTuple):
    """Counts of tokens."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    recomputed_tokens: int


class Timing(NamedTuple):
    """Where the time went, in seconds on the server's clock."""

    queue: float
    prefill: float
    time_to_first_token: float
    decode: float
    total: float
    preemptions: int
    recoveries: int
    worker: str


class Generation(NamedTuple):
    """A finished generation.

    finish_reason: "eos", "stop_sequence", "stop_token", "max_tokens", "context_length",
    "time_limit" or "cancelled". matched: the stop sequence or stop token id that ended it, if one
    did. token_ids holds every generated token, also one that ended the text and is not part of it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    matched: str | int | None
    usage: Usage
    timing: Timing
    seed: int
    model: str
    model_revision: str
    request_id: str


class RenderedChat(NamedTuple):
    """Messages as the model reads them."""

    text: str
    token_ids: tuple[int, ...]


class PartialGeneration:
    """A generation while its events arrive."""

    def __init__(self) -> None:
        self._started = pb.Started()
        self._finished: pb.Finished | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []

    def push(self, event: pb.StreamEvent) -> None:
        """Take the next event. Raises MiliError for the event that says so."""
        match event.WhichOneof("event"):
            case "started":
                self._started = event.started
            case "delta":
                self._texts.append(event.delta.text)
                self._token_ids.extend(event.delta.token_ids)
            case "finished":
                _raise_failure(event.finished.finish_reason, event.finished.error)
                self._finished = event.finished

    def check_finished(self) -> None:
        """No more events come. Raises ServerError for a text without its end."""
        if self._finished is None:
            raise ServerError(grpc.StatusCode.INTERNAL, "the stream ended without a result")

    @property
    def generation(self) -> Generation:
        """The whole result. Raises RuntimeError until the stream has been read to its end."""
        if self._finished is None:
            raise RuntimeError("the stream has not been read to its end")
        return Generation(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=_reason_name(self._finished.finish_reason),
            matched=_matched(self._finished),
            usage=_usage(self._finished.usage),
            timing=_timing(self._finished.timing),
            seed=self._started.seed,
            model=self._started.model,
            model_revision=self._started.model_revision,
            request_id=self._started.request_id,
        )

    @property
    def request_id(self) -> str:
        """What `cancel` takes; empty until the first event."""
        return self._started.request_id

    @property
    def finish_reason(self) -> str:
        return self.generation.finish_reason

    @property
    def usage(self) -> Usage:
        return self.generation.usage


def from_response(response: pb.GenerateResponse) -> Generation:
    """Raises MiliError if the sequence failed."""
    (sequence,) = response.sequences
    _raise_failure(sequence.finish_reason, sequence.error)
    return Generation(
        text=sequence.text,
        token_ids=tuple(sequence.token_ids),
        finish_reason=_reason_name(sequence.finish_reason),
        matched=_matched(sequence),
        usage=_usage(response.usage),
        timing=_timing(response.timing),
        seed=response.seed,
        model=response.model,
        model_revision=response.model_revision,
        request_id=response.request_id,
    )


def _raise_failure(reason: pb.FinishReason.ValueType, error: pb.Error) -> None:
    if reason == pb.FINISH_REASON_ERROR:
        raise from_message(error)


def _reason_name(reason: pb.FinishReason.ValueType) -> str:
    return pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def _matched(message: pb.Finished | pb.GeneratedSequence) -> str | int | None:
    match message.WhichOneof("matched"):
        case "stop_sequence":
            return message.stop_sequence
        case "stop_token_id":
            return message.stop_token_id
    return None


def _usage(usage: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        recomputed_tokens=usage.recomputed_tokens,
    )


def _timing(timing: pb.Timing) -> Timing:
    return Timing(
        queue=_seconds(timing.queue),
        prefill=_seconds(timing.prefill),
        time_to_first_token=_seconds(timing.time_to_first_token),
        decode=_seconds(timing.decode),
        total=_seconds(timing.total),
        preemptions=timing.preemptions,
        recoveries=timing.recoveries,
        worker=timing.worker,
    )


def _seconds(duration: Duration) -> float:
    return duration.ToTimedelta().total_seconds()
