"""Python values in, request messages out.

Owns the names of the options. Checks only what a message cannot express: limits are the server's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

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
    that end the text. seed: the same seed gives the same text.
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


Prompt = str | Sequence[int]

# Integer options, and how many bits their fields have.
_UNSIGNED = {
    "top_k": 32,
    "seed": 64,
    "max_tokens": 32,
    "min_tokens": 32,
    "truncate_prompt_tokens": 32,
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
    for name, bits in _UNSIGNED.items():
        value = options.get(name)
        if isinstance(value, int) and not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be from 0 to {(1 << bits) - 1}, not {value}")


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
    )
