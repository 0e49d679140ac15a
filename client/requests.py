"""Python values in, request messages out.

Owns the names of the options. Checks only what a message cannot express: limits are the server's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from google.protobuf.duration_pb2 import Duration

from mili.v1 import inference_pb2 as pb


class Message(TypedDict):
    """One chat message: {"role": "user", "content": "Hello"}."""

    role: str
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    name: NotRequired[str]
    tool_calls: NotRequired[Sequence[pb.ToolCall]]
    tool_call_id: NotRequired[str]


class Options(TypedDict, total=False):
    """What `generate` and `stream` take beside the prompt; what is absent or None is the server's.

    messages: a chat, in place of a prompt. template_variables: for the model's chat template, as
    {"enable_thinking": False}. model: empty means the only one served. stop: a string or several
    that end the text. seed: the same seed gives the same text. time_limit: seconds until the text
    ends as far as it is. priority: larger runs first. max_queue_time: seconds to wait for a turn
    at most. session_id: requests of one conversation, which find its cache. cache_salt: prompts
    are shared in the cache only with this salt's; bypass_cache_read and bypass_cache_write leave
    the cache alone.
    """

    messages: Sequence[Message] | None
    template_variables: Mapping[str, object] | None
    model: str
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_text: bool
    ignore_eos: bool
    skip_special_tokens: bool | None
    add_special_tokens: bool | None
    truncate_prompt_tokens: int | None
    time_limit: float | None
    priority: int
    max_queue_time: float | None
    session_id: str
    cache_salt: str
    bypass_cache_read: bool
    bypass_cache_write: bool


Prompt = str | Sequence[int]

# What a Duration holds.
_MAX_SECONDS = 315_576_000_000

_UINT32 = (0, 2**32 - 1)
# Integer options, and the least and the greatest value that their fields hold.
_INTEGERS = {
    "top_k": _UINT32,
    "seed": (0, 2**64 - 1),
    "max_tokens": _UINT32,
    "min_tokens": _UINT32,
    "truncate_prompt_tokens": _UINT32,
    "priority": (-(2**31), 2**31 - 1),
}


def build_generation(prompt: Prompt | None, options: Options) -> pb.Generation:
    """Raises ValueError unless there is exactly one of a prompt (text or token ids) and messages,
    and TypeError or ValueError for a value that its field cannot hold; a number's names it."""
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    _check_integers(options)
    generation = pb.Generation(
        model=options.get("model", ""),
        sampling=_sampling(options),
        stopping=_stopping(options),
        output=pb.OutputOptions(
            token_ids=True, timing=True, skip_special_tokens=options.get("skip_special_tokens")
        ),
        scheduling=_scheduling(options),
        cache=_cache(options),
        add_special_tokens=options.get("add_special_tokens"),
        truncate_prompt_tokens=options.get("truncate_prompt_tokens"),
    )
    messages = options.get("messages")
    if (prompt is None) == (messages is None):
        raise ValueError("pass either a prompt or messages")
    if messages is not None:
        generation.chat.CopyFrom(build_chat(messages, options.get("template_variables")))
    elif isinstance(prompt, str):
        generation.text = prompt
    else:
        generation.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    return generation


def _check_integers(options: Options) -> None:
    """Protobuf's own error does not say which field it is about."""
    for name, (least, greatest) in _INTEGERS.items():
        value = options.get(name)
        if isinstance(value, int) and not least <= value <= greatest:
            raise ValueError(f"{name} must be from {least} to {greatest}, not {value}")


def build_chat(
    messages: Sequence[Message], template_variables: Mapping[str, object] | None
) -> pb.ChatPrompt:
    return pb.ChatPrompt(
        messages=[pb.ChatMessage(**message) for message in messages],
        template_variables_json=json.dumps(template_variables) if template_variables else "",
    )


def _sampling(options: Options) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=options.get("temperature"),
        top_p=options.get("top_p"),
        top_k=options.get("top_k"),
        min_p=options.get("min_p"),
        repetition_penalty=options.get("repetition_penalty"),
        seed=options.get("seed"),
    )


def _stopping(options: Options) -> pb.StopConditions:
    stop = options.get("stop", ())
    return pb.StopConditions(
        max_tokens=options.get("max_tokens"),
        min_tokens=options.get("min_tokens"),
        stop_sequences=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=options.get("stop_token_ids", ()),
        include_stop_text=options.get("include_stop_text", False),
        ignore_eos=options.get("ignore_eos", False),
        time_limit=_duration("time_limit", options.get("time_limit")),
    )


def _scheduling(options: Options) -> pb.SchedulingHints | None:
    hints = pb.SchedulingHints(
        priority=options.get("priority", 0),
        max_queue_time=_duration("max_queue_time", options.get("max_queue_time")),
        session_id=options.get("session_id", ""),
    )
    return hints if hints.ListFields() else None


def _cache(options: Options) -> pb.CacheOptions | None:
    cache = pb.CacheOptions(
        bypass_read=options.get("bypass_cache_read", False),
        bypass_write=options.get("bypass_cache_write", False),
        salt=options.get("cache_salt", ""),
    )
    return cache if cache.ListFields() else None


def _duration(name: str, seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    if not 0 < seconds < _MAX_SECONDS:
        raise ValueError(f"{name} must be above 0 seconds and below {_MAX_SECONDS}, not {seconds}")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
