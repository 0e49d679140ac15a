"""The client's options against the messages that they become."""

from __future__ import annotations

import json

import pytest
from google.protobuf.duration_pb2 import Duration

from mili.client.requests import Options, build_generation
from mili.client.results import PartialGeneration
from mili.v1 import inference_pb2 as pb


def test_nothing_is_set_that_was_not_asked_for() -> None:
    generation = build_generation("Hi", {})
    assert generation.text == "Hi"
    assert not generation.sampling.ListFields()
    assert not generation.stopping.ListFields()
    for field in ("scheduling", "cache", "add_special_tokens"):
        assert not generation.HasField(field)
    assert build_generation("Hi", {"temperature": None, "stop": ()}) == generation


def test_every_option_reaches_its_field() -> None:
    options: Options = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}],
        "template_variables": {"enable_thinking": False, "n": 1},
        "model": "m",
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "seed": 2**64 - 1,
        "max_tokens": 5,
        "min_tokens": 2,
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
                pb.ChatMessage(role="assistant", content=""),
            ]
        ),
        sampling=pb.SamplingParams(
            temperature=0.0, top_p=0.5, top_k=3, min_p=0.25, repetition_penalty=1.5, seed=2**64 - 1
        ),
        stopping=pb.StopConditions(
            max_tokens=5,
            min_tokens=2,
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
        output=pb.OutputOptions(token_ids=True, timing=True, skip_special_tokens=False),
        add_special_tokens=False,
        truncate_prompt_tokens=7,
    )


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
        assert partial.finish_reason == name
        assert partial.generation.matched == 0
