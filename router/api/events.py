"""From what a stream gathered to the messages of the wire.

Owns the shape of the answers. Does not know where the output comes from or how it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mili.router.api.status import duration
from mili.router.api.stream import Gathered
from mili.router.api.texts import fill_text
from mili.router.errors import Reason, RequestError
from mili.router.request import Finish, FinishReason, Started, Timing, Usage
from mili.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Answering:
    """What every answer to one request repeats, and what its caller asked to see."""

    request_id: str
    model: str
    model_revision: str
    instance_id: str
    seed: int
    options: pb.OutputOptions


def stream_events(
    answering: Answering, gathered: Gathered, sequence: int
) -> Iterator[pb.GenerateStreamResponse]:
    """Yield the events that tell what was gathered, numbered from `sequence`."""
    if gathered.started is not None:
        response = pb.GenerateStreamResponse()
        response.event.sequence = sequence
        _fill_started(response.event.started, answering, gathered.started)
        yield response
        sequence += 1
    if gathered.token_ids or gathered.text:
        response = pb.GenerateStreamResponse()
        response.event.sequence = sequence
        _fill_delta(response.event.delta, answering.options, gathered)
        yield response
        sequence += 1
    if gathered.finished is not None:
        finish = check_finish(gathered.finished.finish)
        response = pb.GenerateStreamResponse()
        response.event.sequence = sequence
        finished = response.event.finished
        _fill_finish(finished, finish)
        finished.usage.CopyFrom(to_usage(gathered.finished.usage))
        if answering.options.timing:
            finished.timing.CopyFrom(to_timing(gathered.finished.timing))
        yield response


def whole_response(answering: Answering, gathered: Gathered) -> pb.GenerateResponse:
    """Return the unary answer: all of the output at once."""
    assert gathered.finished is not None
    finish = check_finish(gathered.finished.finish)
    sequence = pb.GeneratedSequence()
    fill_text(sequence, gathered.text)
    if answering.options.token_ids:
        sequence.token_ids.extend(gathered.token_ids)
    _fill_finish(sequence, finish)
    return pb.GenerateResponse(
        request_id=answering.request_id,
        model=answering.model,
        model_revision=answering.model_revision,
        sequences=[sequence],
        usage=to_usage(gathered.finished.usage),
        timing=to_timing(gathered.finished.timing) if answering.options.timing else None,
        seed=answering.seed,
    )


def check_finish(finish: Finish) -> Finish:
    """Return how the request ended; raise its error where it failed."""
    if finish.reason is FinishReason.ERROR:
        raise finish.error or RequestError(Reason.INTERNAL, "the request failed without a reason")
    return finish


def _fill_started(started: pb.Started, answering: Answering, admitted: Started) -> None:
    started.prompt_tokens = admitted.prompt_tokens
    started.cached_prompt_tokens = admitted.cached_prompt_tokens
    started.model = answering.model
    started.model_revision = answering.model_revision
    started.seed = answering.seed
    started.request_id = answering.request_id
    started.instance_id = answering.instance_id


def _fill_delta(delta: pb.Delta, options: pb.OutputOptions, gathered: Gathered) -> None:
    fill_text(delta, gathered.text)
    if options.token_ids:
        delta.token_ids.extend(gathered.token_ids)
    delta.num_tokens = len(gathered.token_ids)
    delta.first_token_index = gathered.first_token_index


def _fill_finish(target: pb.Finished | pb.GeneratedSequence, finish: Finish) -> None:
    target.finish_reason = pb.FinishReason.ValueType(finish.reason)
    if finish.reason is FinishReason.STOP_SEQUENCE:
        assert isinstance(finish.matched, str)
        target.stop_sequence = finish.matched
    elif isinstance(finish.matched, int):
        target.stop_token_id = finish.matched


def to_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(**usage._asdict())


def to_timing(timing: Timing) -> pb.Timing:
    return pb.Timing(
        queue=duration(timing.queue),
        prefill=duration(timing.prefill),
        time_to_first_token=duration(timing.time_to_first_token),
        decode=duration(timing.decode),
        total=duration(timing.total),
        preemptions=timing.preemptions,
        recoveries=timing.recoveries,
        worker=timing.worker,
    )
