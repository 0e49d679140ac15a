"""POST /v1/chat/completions: what the body asks for, and the answer, whole or in chunks.

Owns this translation only. Does not know how answers travel.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from mili.client.http.answers import FINISH_REASONS, Json, chat_logprobs, usage_object
from mili.client.http.bodies import ChatBody, ChatMessage, JsonFormat, JsonSchemaFormat
from mili.client.options import Message, Options, Tool, ToolCall
from mili.client.responses import reason_name, to_logprob
from mili.client.results import Generation, Sequence, Usage
from mili.v1 import inference_pb2 as pb


def chat_options(body: ChatBody) -> Options:
    options = body.common_options()
    options["messages"] = [_message(message) for message in body.messages]
    if body.tools and body.tool_choice != "none":
        options["tools"] = _tools(body)
        options["parse_tool_calls"] = True
    if body.max_completion_tokens is not None:
        options["max_tokens"] = body.max_completion_tokens
    if body.logprobs:
        options["top_logprobs"] = body.top_logprobs or 0
    if isinstance(body.response_format, JsonFormat):
        options["response_format"] = "json_object"
    elif isinstance(body.response_format, JsonSchemaFormat):
        options["response_format"] = body.response_format.json_schema.schema_
    options["parse_reasoning"] = body.include_reasoning
    options["after_reasoning"] = body.include_reasoning and "response_format" in options
    options["template_variables"] = body.chat_template_kwargs
    options["continue_final_message"] = body.continue_final_message
    return options


def chat_answer(result: Generation, body: ChatBody) -> Json:
    return {
        "id": f"chatcmpl-{result.request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": result.model,
        "system_fingerprint": result.model_revision,
        "choices": [
            {
                "index": index,
                "message": _answer_message(sequence),
                "logprobs": chat_logprobs(sequence.logprobs) if body.logprobs else None,
                "finish_reason": FINISH_REASONS[sequence.finish_reason],
            }
            for index, sequence in enumerate(result.sequences)
        ],
        "usage": usage_object([result.usage]),
    }


class ChatChunks:
    """The chunks of one streamed answer."""

    def __init__(self, body: ChatBody) -> None:
        self._body = body
        self._created = int(time.time())
        self._started = pb.Started()
        self._opened: set[int] = set()

    def of(self, number: int, event: pb.StreamEvent) -> Iterator[Json]:
        """The chunks that an event of the only prompt becomes."""
        match event.WhichOneof("event"):
            case "started":
                self._started = event.started
            case "delta":
                delta = _delta(event.delta)
                logprobs = self._logprobs(event.delta)
                if delta or logprobs:
                    yield from self._opening(event.delta.index)
                    yield self._choice(event.delta.index, delta, logprobs)
            case "finished":
                yield from self._opening(event.finished.index)
                reason = FINISH_REASONS[reason_name(event.finished.finish_reason)]
                yield self._choice(event.finished.index, {}, None, reason)

    def end(self, usages: list[Usage]) -> Json:
        return self._chunk([], usage_object(usages))

    def _opening(self, index: int) -> Iterator[Json]:
        """Every choice begins with its role."""
        if index not in self._opened:
            self._opened.add(index)
            yield self._choice(index, {"role": "assistant", "content": ""}, None)

    def _logprobs(self, delta: pb.Delta) -> Json | None:
        if not (self._body.logprobs and delta.logprobs.tokens):
            return None
        return chat_logprobs(map(to_logprob, delta.logprobs.tokens))

    def _choice(
        self, index: int, delta: Json, logprobs: Json | None, reason: str | None = None
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk([choice])

    def _chunk(self, choices: list[Json], usage: Json | None = None) -> Json:
        chunk = {
            "id": f"chatcmpl-{self._started.request_id}",
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._started.model,
            "system_fingerprint": self._started.model_revision,
            "choices": choices,
        }
        return {**chunk, "usage": usage} if self._body.include_usage else chunk


def _message(message: ChatMessage) -> Message:
    built: Message = {"role": "system" if message.role == "developer" else message.role}
    if isinstance(message.content, list):
        built["content"] = "".join(part.text for part in message.content)
    else:
        built["content"] = message.content
    if message.reasoning_content is not None:
        built["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        built["tool_calls"] = [
            ToolCall(call.id, call.function.name, call.function.arguments)
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        built["tool_call_id"] = message.tool_call_id
    if message.name:
        built["name"] = message.name
    return built


def _tools(body: ChatBody) -> list[Tool]:
    tools: list[Tool] = []
    for definition in body.tools or ():
        function = definition.function
        tool: Tool = {"name": function.name, "description": function.description or ""}
        if function.parameters is not None:
            tool["parameters"] = function.parameters
        tools.append(tool)
    return tools


def _answer_message(sequence: Sequence) -> Json:
    content = sequence.text if sequence.text or not sequence.tool_calls else None
    message: Json = {"role": "assistant", "content": content, "refusal": None}
    if sequence.reasoning:
        message["reasoning_content"] = sequence.reasoning
    if sequence.tool_calls:
        message["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in sequence.tool_calls
        ]
    return message


def _delta(delta: pb.Delta) -> Json:
    built: Json = {}
    if delta.text:
        built["content"] = delta.text
    if delta.reasoning_text:
        built["reasoning_content"] = delta.reasoning_text
    if delta.tool_calls:
        built["tool_calls"] = [_call_delta(call) for call in delta.tool_calls]
    return built


def _call_delta(call: pb.ToolCallDelta) -> Json:
    """Id, type and name stand in a call's first piece only."""
    function = {"arguments": call.arguments_json_fragment}
    if not call.name:
        return {"index": call.position, "function": function}
    function["name"] = call.name
    return {"index": call.position, "id": call.id, "type": "function", "function": function}
