"""From what a stream gathered to the messages of the wire.

Owns the shape of the answers. Does not know where the output comes from or how it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mili.router.api.logprobs import output_logprobs, prompt_logprobs, prompt_pieces
from mili.router.api.status import clip, code_number, duration
from mili.router.api.stream import Gathered
from mili.router.api.texts import fill_text
from mili.router.outcome import Finish, Finished, FinishReason, Recovery, Started, Timing, Usage
from mili.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Answering:
    """What every answer to one request repeats, and what its caller asked to see.

    token_bytes: what a token id spells.
    """

    request_id: str
    model: str
    model_revision: str
    instance_id: str
    seed: int
    options: pb.OutputOptions
    token_bytes: Callable[[int], bytes]
    # Empty unless the stream can be resumed.
    resume_token: str = ""
    recovery_notices: bool = False


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
    if gathered.recoveries and answering.recovery_notices:
        for recovery in gathered.recoveries:
            response = pb.GenerateStreamResponse()
            response.event.sequence = sequence
            response.event.recovery.index = gathered.index
            _fill_recovery(response.event.recovery, recovery)
            yield response
            sequence += 1
    for piece in prompt_pieces(gathered.readings):
        response = pb.GenerateStreamResponse()
        response.event.sequence = sequence
        response.event.prompt_logprobs.CopyFrom(piece)
        yield response
        sequence += 1
    if gathered.token_ids or gathered.text:
        response = pb.GenerateStreamResponse()
        response.event.sequence = sequence
        response.event.delta.index = gathered.index
        _fill_delta(response.event.delta, answering, gathered)
        yield response
        sequence += 1
    if gathered.finished is not None:
        check_success(gathered.finished)
        response = pb.GenerateStreamResponse()
        response.event.sequence = sequence
        finished = response.event.finished
        finished.index = gathered.index
        _fill_finish(finished, gathered.finished.finish)
        finished.usage.CopyFrom(to_usage(gathered.finished.usage))
        if answering.options.timing:
            finished.timing.CopyFrom(to_timing(gathered.finished.timing))
        yield response


def whole_response(answering: Answering, gathered: Sequence[Gathered]) -> pb.GenerateResponse:
    """Return the unary answer: all of the output at once, of each sequence in its place."""
    finished = gathered[-1].finished
    assert finished is not None
    check_success(finished)
    by_index = sorted(gathered, key=lambda each: each.index)
    return pb.GenerateResponse(
        request_id=answering.request_id,
        model=answering.model,
        model_revision=answering.model_revision,
        sequences=[_sequence(answering, each) for each in by_index],
        # Of the call: its first sequence has it.
        prompt_logprobs=prompt_logprobs(by_index[0].readings),
        usage=to_usage(finished.usage),
        timing=to_timing(finished.timing) if answering.options.timing else None,
        seed=answering.seed,
    )


def check_success(finished: Finished) -> None:
    """Raise the call's error, if it ends here and failed: no sequence of it succeeded."""
    if finished.failure is not None:
        raise finished.failure


def _sequence(answering: Answering, gathered: Gathered) -> pb.GeneratedSequence:
    assert gathered.finished is not None
    sequence = pb.GeneratedSequence(index=gathered.index)
    fill_text(sequence, gathered.text)
    if answering.options.token_ids:
        sequence.token_ids.extend(gathered.token_ids)
    if answering.options.HasField("top_logprobs"):
        sequence.logprobs.tokens.extend(output_logprobs(gathered.readings, answering.token_bytes))
    _fill_finish(sequence, gathered.finished.finish)
    return sequence


def _fill_started(started: pb.Started, answering: Answering, admitted: Started) -> None:
    started.prompt_tokens = admitted.prompt_tokens
    started.cached_prompt_tokens = admitted.cached_prompt_tokens
    started.model = answering.model
    started.model_revision = answering.model_revision
    started.seed = answering.seed
    started.request_id = answering.request_id
    started.instance_id = answering.instance_id
    started.resume_token = answering.resume_token


def _fill_recovery(notice: pb.RecoveryNotice, recovery: Recovery) -> None:
    notice.reason = recovery.reason
    notice.recomputed_tokens = recovery.recomputed_tokens
    notice.gap.CopyFrom(duration(recovery.gap))


def _fill_delta(delta: pb.Delta, answering: Answering, gathered: Gathered) -> None:
    fill_text(delta, gathered.text)
    if gathered.readings and answering.options.HasField("top_logprobs"):
        delta.logprobs.tokens.extend(output_logprobs(gathered.readings, answering.token_bytes))
    if answering.options.token_ids:
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
    if finish.error is not None:
        target.error.code = code_number(finish.error.reason)
        target.error.reason = finish.error.reason
        target.error.message = clip(finish.error.message)


def to_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(**usage._asdict())


def to_timing(timing: Timing) -> pb.Timing:
    return pb.Timing(
        queue=duration(timing.queue),
        grammar_compile=duration(timing.grammar_compile),
        prefill=duration(timing.prefill),
        time_to_first_token=duration(timing.time_to_first_token),
        decode=duration(timing.decode),
        total=duration(timing.total),
        preemptions=timing.preemptions,
        recoveries=timing.recoveries,
        worker=timing.worker,
    )
