"""The client's options against the messages that they become."""

from __future__ import annotations

import json

import pytest
from google.protobuf.duration_pb2 import Duration
from pydantic import BaseModel

from mili.client.options import Options, StreamOptions, ToolCall
from mili.client.partial import PartialGeneration
from mili.client.requests import build_generation, build_inputs, build_stream_request
from mili.v1 import inference_pb2 as pb


def test_nothing_is_set_that_was_not_asked_for() -> None:
    generation = build_generation("Hi", {})
    assert generation.text == "Hi"
    assert not generation.sampling.ListFields()
    assert not generation.stopping.ListFields()
    for field in ("structured_output", "scheduling", "cache", "add_special_tokens"):
        assert not generation.HasField(field)
    assert build_generation("Hi", {"temperature": None, "stop": ()}) == generation


def test_every_option_reaches_its_field() -> None:
    options: Options = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "",
                "tool_calls": [ToolCall("c1", "add", '{"a": 1}')],
            },
            {"role": "tool", "content": "", "tool_call_id": "c1", "name": "add"},
        ],
        "tools": [
            {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
            {"name": "now"},
        ],
        "continue_final_message": True,
        "template_variables": {"enable_thinking": False, "n": 1},
        "model": "m",
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.25,
        "presence_penalty": 0.0,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {7: -100.0},
        "allowed_token_ids": [1, 2],
        "num_sequences": 4,
        "seed": 2**64 - 1,
        "max_tokens": 5,
        "min_tokens": 2,
        "max_reasoning_tokens": 6,
        "response_format": None,
        "regex": "a+",
        "grammar": None,
        "choices": (),
        "after_reasoning": True,
        "top_logprobs": 0,
        "prompt_top_logprobs": 20,
        "parse_reasoning": True,
        "parse_tool_calls": True,
        "stop": ["a", "b"],
        "stop_token_ids": [8, 9],
        "include_stop_text": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
        "truncate_prompt_tokens": 7,
        "time_limit": 2.5,
        "priority": -3,
        "max_queue_time": 0.25,
        "session_id": "s",
        "cache_salt": "salt",
        "bypass_cache_read": True,
        "bypass_cache_write": False,
    }
    assert options.keys() == Options.__annotations__.keys()
    built = build_generation(None, options)
    assert json.loads(built.chat.template_variables_json) == {"enable_thinking": False, "n": 1}
    built.chat.template_variables_json = ""
    assert built == pb.Generation(
        model="m",
        chat=pb.ChatPrompt(
            messages=[
                pb.ChatMessage(role="user", content="Hi"),
                pb.ChatMessage(
                    role="assistant",
                    reasoning_content="",
                    tool_calls=[pb.ToolCall(id="c1", name="add", arguments_json='{"a": 1}')],
                ),
                pb.ChatMessage(role="tool", content="", tool_call_id="c1", name="add"),
            ],
            tools=[
                pb.ToolDefinition(
                    name="add", description="Adds.", parameters_json_schema='{"type": "object"}'
                ),
                pb.ToolDefinition(name="now"),
            ],
            continue_final_message=True,
        ),
        sampling=pb.SamplingParams(
            temperature=0.0,
            top_p=0.5,
            top_k=3,
            min_p=0.25,
            presence_penalty=0.0,
            frequency_penalty=-0.5,
            repetition_penalty=1.5,
            logit_bias={7: -100.0},
            allowed_token_ids=[1, 2],
            seed=2**64 - 1,
            num_sequences=4,
        ),
        stopping=pb.StopConditions(
            max_tokens=5,
            min_tokens=2,
            max_reasoning_tokens=6,
            stop_sequences=["a", "b"],
            stop_token_ids=[8, 9],
            include_stop_text=True,
            ignore_eos=True,
            time_limit=Duration(seconds=2, nanos=500_000_000),
        ),
        scheduling=pb.SchedulingHints(
            priority=-3, max_queue_time=Duration(nanos=250_000_000), session_id="s"
        ),
        cache=pb.CacheOptions(bypass_read=True, salt="salt"),
        output=pb.OutputOptions(
            token_ids=True,
            timing=True,
            skip_special_tokens=False,
            top_logprobs=0,
            prompt_top_logprobs=20,
            parse_reasoning=True,
            parse_tool_calls=True,
        ),
        structured_output=pb.StructuredOutput(regex="a+", after_reasoning=True),
        add_special_tokens=False,
        truncate_prompt_tokens=7,
    )


class Answer(BaseModel):
    number: int


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"response_format": "json_object"}, pb.StructuredOutput(json_object=pb.JsonObject())),
        (
            {"response_format": {"type": "null"}},
            pb.StructuredOutput(json_schema='{"type": "null"}'),
        ),
        (
            {"response_format": Answer},
            pb.StructuredOutput(json_schema=json.dumps(Answer.model_json_schema())),
        ),
        ({"grammar": "start: A"}, pb.StructuredOutput(grammar="start: A")),
        ({"choices": ["a", "b"]}, pb.StructuredOutput(choices=pb.Choices(values=["a", "b"]))),
    ],
)
def test_forms_of_the_answer(options: Options, expected: pb.StructuredOutput) -> None:
    assert build_generation("Hi", options).structured_output == expected


def test_what_only_a_stream_may_ask_for() -> None:
    options: StreamOptions = {
        "model": "m",
        "resume_window": 60,
        "max_tokens_per_message": 8,
        "max_flush_interval": 0.5,
        "include_recovery_notices": True,
    }
    assert build_stream_request("Hi", options, "r") == pb.GenerateStreamRequest(
        request_id="r",
        generation=build_generation("Hi", {"model": "m"}),
        stream_options=pb.StreamOptions(
            max_tokens_per_message=8,
            max_flush_interval=Duration(nanos=500_000_000),
            resume_window=Duration(seconds=60),
            include_recovery_notices=True,
        ),
    )
    assert not build_stream_request("Hi", {}).HasField("stream_options")
    with pytest.raises(ValueError, match="max_tokens_per_message must be from 0"):
        build_stream_request("Hi", {"max_tokens_per_message": -1})


def test_inputs() -> None:
    text, tokens = build_inputs(["a", [1, 2]])
    assert (text.text, list(tokens.token_ids.ids)) == ("a", [1, 2])
    for single in ("a", [1, 2]):
        with pytest.raises(ValueError, match="pass a list of texts"):
            build_inputs(single)


def test_prompts() -> None:
    assert build_generation("", {}).WhichOneof("prompt") == "text"
    assert list(build_generation([1, 2], {}).token_ids.ids) == [1, 2]
    assert build_generation([], {}).WhichOneof("prompt") == "token_ids"
    assert list(build_generation("Hi", {"stop": "END"}).stopping.stop_sequences) == ["END"]


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        (None, {}, "either a prompt or messages"),
        ("Hi", {"messages": []}, "either a prompt or messages"),
        ("Hi", {"temprature": 1.0}, "unknown option: temprature"),
        ("Hi", {"resume_window": 1}, "unknown option: resume_window"),
        ("Hi", {"regex": "a", "choices": ["a"]}, "regex and choices exclude each other"),
        (None, {"messages": [{"role": "user", "text": "Hi"}]}, "field of a message: text"),
        ("Hi", {"top_k": -1}, "top_k must be from 0"),
        ("Hi", {"priority": 2**31}, "priority must be from -2147483648"),
        ("Hi", {"max_queue_time": 0}, "max_queue_time must be above 0 seconds"),
        ("Hi", {"time_limit": float("nan")}, "time_limit must be above 0 seconds"),
        ("Hi", {"temperature": "warm"}, "must be real number"),
    ],
)
def test_refused(prompt: str | None, options: Options, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        build_generation(prompt, options)


def test_finish_reasons() -> None:
    for number, name in ((pb.FINISH_REASON_EOS, "eos"), (pb.FINISH_REASON_CANCELLED, "cancelled")):
        partial = PartialGeneration()
        partial.push(pb.StreamEvent(finished=pb.Finished(finish_reason=number, stop_token_id=0)))
        partial.end()
        assert partial.finish_reason == name
        assert partial.generation.matched == 0
