"""Python values in, request messages out.

Owns which option becomes which field. Checks only what a message cannot express: limits are the
server's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, cast

from google.protobuf.duration_pb2 import Duration

from mili.client.options import ChatOptions, Delivery, Message, Options, Prompt, StreamOptions, Tool
from mili.v1 import embedding_pb2
from mili.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from pydantic import BaseModel

# What a Duration holds.
_MAX_SECONDS = 315_576_000_000

_UINT32 = (0, 2**32 - 1)
# Integer options, and the least and the greatest value that their fields hold.
_INTEGERS = {
    "top_k": _UINT32,
    "seed": (0, 2**64 - 1),
    "num_sequences": _UINT32,
    "max_tokens": _UINT32,
    "min_tokens": _UINT32,
    "max_reasoning_tokens": _UINT32,
    "top_logprobs": _UINT32,
    "prompt_top_logprobs": _UINT32,
    "truncate_prompt_tokens": _UINT32,
    "priority": (-(2**31), 2**31 - 1),
    "max_tokens_per_message": _UINT32,
}
_DELIVERY = Delivery.__annotations__.keys()
_FORMATS = ("response_format", "regex", "grammar", "choices")


def build_stream_request(
    prompt: Prompt | None, options: StreamOptions, request_id: str = ""
) -> pb.GenerateStreamRequest:
    """Raises what `build_generation` and `build_delivery` raise."""
    delivery = {name: value for name, value in options.items() if name in _DELIVERY}
    rest = {name: value for name, value in options.items() if name not in _DELIVERY}
    return pb.GenerateStreamRequest(
        request_id=request_id,
        generation=build_generation(prompt, cast(Options, rest)),
        stream_options=build_delivery(cast(Delivery, delivery)),
    )


def build_delivery(options: Delivery) -> pb.StreamOptions | None:
    """Raises TypeError or ValueError for an unknown option, or what its field cannot hold."""
    _check_options(options, _DELIVERY)
    built = pb.StreamOptions(
        max_tokens_per_message=options.get("max_tokens_per_message"),
        max_flush_interval=_duration(options, "max_flush_interval"),
        resume_window=_duration(options, "resume_window"),
        include_recovery_notices=options.get("include_recovery_notices", False),
    )
    return built if built.ListFields() else None


def build_generation(prompt: Prompt | None, options: Options) -> pb.Generation:
    """Raises ValueError unless there is exactly one of a prompt (text or token ids) and messages,
    and TypeError or ValueError for a value that its field cannot hold; a number's names it."""
    _check_options(options, Options.__annotations__.keys())
    generation = pb.Generation(
        model=options.get("model", ""),
        sampling=_sampling(options),
        stopping=_stopping(options),
        output=_output(options),
        structured_output=_structured_output(options),
        scheduling=_scheduling(options),
        cache=_cache(options),
        add_special_tokens=options.get("add_special_tokens"),
        truncate_prompt_tokens=options.get("truncate_prompt_tokens"),
    )
    messages = options.get("messages")
    if (prompt is None) == (messages is None):
        raise ValueError("pass either a prompt or messages")
    if messages is not None:
        generation.chat.CopyFrom(build_chat(messages, options))
    elif isinstance(prompt, str):
        generation.text = prompt
    else:
        generation.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    return generation


def build_chat(messages: Sequence[Message], options: ChatOptions) -> pb.ChatPrompt:
    variables = options.get("template_variables")
    return pb.ChatPrompt(
        messages=[_message(message) for message in messages],
        tools=[_tool(tool) for tool in options.get("tools", ())],
        template_variables_json=json.dumps(variables) if variables else "",
        continue_final_message=options.get("continue_final_message", False),
    )


def response_model(options: Options) -> type[BaseModel] | None:
    """The pydantic model that the answer is to be an instance of, if it is one."""
    response_format = options.get("response_format")
    return response_format if isinstance(response_format, type) else None


def build_inputs(inputs: Sequence[Prompt]) -> list[embedding_pb2.EmbedInput]:
    """Raises ValueError for one text or prompt where a list of them is meant."""
    if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
        raise ValueError("pass a list of texts, or of lists of token ids")
    return [
        embedding_pb2.EmbedInput(text=item)
        if isinstance(item, str)
        else embedding_pb2.EmbedInput(token_ids=pb.TokenIds(ids=item))
        for item in inputs
    ]


def _check_options(options: Mapping[str, object], known: Set[str]) -> None:
    """Protobuf's own error does not say which field it is about."""
    unknown = options.keys() - known
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    for name, (least, greatest) in _INTEGERS.items():
        value = options.get(name)
        if isinstance(value, int) and not least <= value <= greatest:
            raise ValueError(f"{name} must be from {least} to {greatest}, not {value}")


def _message(message: Message) -> pb.ChatMessage:
    unknown = message.keys() - Message.__annotations__.keys()
    if unknown:
        raise ValueError(f"unknown field of a message: {', '.join(sorted(unknown))}")
    return pb.ChatMessage(
        role=message["role"],
        content=message.get("content"),
        reasoning_content=message.get("reasoning_content"),
        tool_calls=[
            pb.ToolCall(id=call_id, name=name, arguments_json=arguments)
            for call_id, name, arguments in message.get("tool_calls", ())
        ],
        tool_call_id=message.get("tool_call_id", ""),
        name=message.get("name", ""),
    )


def _tool(tool: Tool) -> pb.ToolDefinition:
    parameters = tool.get("parameters")
    return pb.ToolDefinition(
        name=tool["name"],
        description=tool.get("description", ""),
        parameters_json_schema="" if parameters is None else json.dumps(parameters),
    )


def _sampling(options: Options) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=options.get("temperature"),
        top_p=options.get("top_p"),
        top_k=options.get("top_k"),
        min_p=options.get("min_p"),
        presence_penalty=options.get("presence_penalty"),
        frequency_penalty=options.get("frequency_penalty"),
        repetition_penalty=options.get("repetition_penalty"),
        logit_bias=options.get("logit_bias", {}),
        allowed_token_ids=options.get("allowed_token_ids", ()),
        seed=options.get("seed"),
        num_sequences=options.get("num_sequences"),
    )


def _stopping(options: Options) -> pb.StopConditions:
    stop = options.get("stop", ())
    return pb.StopConditions(
        max_tokens=options.get("max_tokens"),
        min_tokens=options.get("min_tokens"),
        max_reasoning_tokens=options.get("max_reasoning_tokens"),
        stop_sequences=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=options.get("stop_token_ids", ()),
        include_stop_text=options.get("include_stop_text", False),
        ignore_eos=options.get("ignore_eos", False),
        time_limit=_duration(options, "time_limit"),
    )


def _output(options: Options) -> pb.OutputOptions:
    return pb.OutputOptions(
        token_ids=True,
        timing=True,
        skip_special_tokens=options.get("skip_special_tokens"),
        top_logprobs=options.get("top_logprobs"),
        prompt_top_logprobs=options.get("prompt_top_logprobs"),
        parse_reasoning=options.get("parse_reasoning", False),
        parse_tool_calls=options.get("parse_tool_calls", False),
    )


def _structured_output(options: Options) -> pb.StructuredOutput | None:
    given = [name for name in _FORMATS if options.get(name)]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} exclude each other")
    built = pb.StructuredOutput(after_reasoning=options.get("after_reasoning", False))
    response_format = options.get("response_format")
    if model := response_model(options):
        built.json_schema = json.dumps(model.model_json_schema())
    elif isinstance(response_format, Mapping):
        built.json_schema = json.dumps(response_format)
    elif response_format == "json_object":
        built.json_object.SetInParent()
    if regex := options.get("regex"):
        built.regex = regex
    if grammar := options.get("grammar"):
        built.grammar = grammar
    if choices := options.get("choices"):
        built.choices.values.extend(choices)
    return built if built.ListFields() else None


def _scheduling(options: Options) -> pb.SchedulingHints | None:
    hints = pb.SchedulingHints(
        priority=options.get("priority", 0),
        max_queue_time=_duration(options, "max_queue_time"),
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


def _duration(options: Mapping[str, object], name: str) -> Duration | None:
    seconds = options.get(name)
    if seconds is None:
        return None
    if not isinstance(seconds, (int, float)) or not 0 < seconds < _MAX_SECONDS:
        raise ValueError(f"{name} must be above 0 seconds and below {_MAX_SECONDS}, not {seconds}")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
