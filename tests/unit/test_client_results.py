"""What the client makes of responses and of a stream's events."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from mili.client import MiliError, Sequence, ServerError, TokenLogprob, ToolCall
from mili.client.partial import PartialGeneration
from mili.client.responses import from_response
from mili.v1 import inference_pb2 as pb
from tests.scripted_server import delta, finished, started


def folded(*events: pb.StreamEvent) -> PartialGeneration:
    partial = PartialGeneration()
    for event in events:
        partial.push(event)
    partial.end()
    return partial


def end(index: int, **fields: object) -> pb.StreamEvent:
    reason = fields.pop("finish_reason", pb.FINISH_REASON_EOS)
    return pb.StreamEvent(finished=pb.Finished(index=index, finish_reason=reason, **fields))


def piece(index: int, **fields: object) -> pb.StreamEvent:
    return pb.StreamEvent(delta=pb.Delta(index=index, **fields))


def test_sequences_are_kept_apart() -> None:
    result = folded(
        started(),
        piece(1, text="b", token_ids=[2]),
        piece(0, text="a", token_ids=[1], reasoning_text="so"),
        end(0),
        piece(1, text="B", reasoning_text="hm"),
        end(1, usage=pb.Usage(completion_tokens=3, reasoning_tokens=2)),
    ).generation
    assert result.sequences == (
        Sequence("a", (1,), "eos", None, reasoning="so"),
        Sequence("bB", (2,), "eos", None, reasoning="hm"),
    )
    assert (result.text, result.reasoning, result.finish_reason) == ("a", "so", "eos")
    assert (result.usage.completion_tokens, result.usage.reasoning_tokens) == (3, 2)


def test_a_tool_call_in_pieces() -> None:
    def call(position: int, *, id: str = "", name: str = "", fragment: str = "") -> pb.StreamEvent:
        return piece(
            0,
            tool_calls=[
                pb.ToolCallDelta(
                    position=position, id=id, name=name, arguments_json_fragment=fragment
                )
            ],
        )

    result = folded(
        call(0, id="c0", name="add"),
        call(0, fragment='{"a"'),
        call(1, id="c1", name="now"),
        call(0, fragment=": 1}"),
        call(1, fragment="{}"),
        end(0, finish_reason=pb.FINISH_REASON_TOOL_CALLS),
    ).generation
    assert result.tool_calls == (ToolCall("c0", "add", '{"a": 1}'), ToolCall("c1", "now", "{}"))
    assert result.finish_reason == "tool_calls"


def test_log_probabilities() -> None:
    token = pb.TokenLogprob(
        token_id=5,
        token=b"\xe2",
        logprob=-1.5,
        rank=2,
        top=[pb.TokenLogprob(token_id=6, token=b"x", logprob=-0.5, rank=1)],
    )
    expected = TokenLogprob(5, b"\xe2", -1.5, 2, (TokenLogprob(6, b"x", -0.5, 1),))
    logprobs = pb.TokenLogprobs(tokens=[token])
    assert folded(piece(0, logprobs=logprobs), end(0)).generation.logprobs == (expected,)
    response = pb.GenerateResponse(sequences=[pb.GeneratedSequence(logprobs=logprobs)])
    assert from_response(response).logprobs == (expected,)


def test_log_probabilities_of_the_prompt_come_in_pieces() -> None:
    def columns(first: int, ids: list[int]) -> pb.StreamEvent:
        return pb.StreamEvent(
            prompt_logprobs=pb.PromptLogprobs(
                first_position=first,
                width=2,
                token_ids=ids,
                logprobs=[-1.0] * len(ids),
                ranks=[1] * len(ids),
            )
        )

    result = folded(columns(1, [1, 2, 3, 4]), columns(3, [5, 6]), end(0)).generation
    told = [(p.token_id, [other.token_id for other in p.top]) for p in result.prompt_logprobs]
    assert told == [(1, [2]), (3, [4]), (5, [6])]


def test_one_failed_sequence_leaves_the_others() -> None:
    error = pb.Error(code=13, reason="NUMERIC_FAULT", message="NaN")
    failed = end(0, finish_reason=pb.FINISH_REASON_ERROR, error=error)
    result = folded(failed, piece(1, text="fine"), end(1)).generation
    assert result.sequences[1].text == "fine"
    with pytest.raises(ServerError, match="NaN") as caught:
        _ = result.text
    assert caught.value.reason == "NUMERIC_FAULT"
    with pytest.raises(ServerError, match="NaN"):
        folded(failed)
    sequences = [
        pb.GeneratedSequence(finish_reason=pb.FINISH_REASON_ERROR, error=error),
        pb.GeneratedSequence(text="fine"),
    ]
    assert from_response(pb.GenerateResponse(sequences=sequences)).sequences[1].text == "fine"
    with pytest.raises(ServerError):
        from_response(pb.GenerateResponse(sequences=sequences[:1]))


def test_a_stream_without_its_end() -> None:
    with pytest.raises(MiliError, match="without a result"):
        folded(started(), delta("x", 1))
    with pytest.raises(MiliError, match="without a result"):
        folded(piece(0), piece(1), end(0))


class Answer(BaseModel):
    number: int


def test_the_text_as_an_instance_of_the_model() -> None:
    partial = PartialGeneration(Answer)
    for event in (delta('{"number"'), delta(": 3}"), finished()):
        partial.push(event)
    partial.end()
    assert partial.generation.parsed == Answer(number=3)
    cut = pb.GenerateResponse(sequences=[pb.GeneratedSequence(text='{"number"')])
    with pytest.raises(ValidationError):
        _ = from_response(cut, Answer).parsed
    assert from_response(cut).parsed is None
