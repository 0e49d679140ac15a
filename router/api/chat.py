"""A ChatPrompt as the values that a chat template takes.

Owns what a conversation may hold, in the shape that transformers gives its templates: the same
conversation gives the same prompt. Does not know templates or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mili.router.chat_template import CallForm
from mili.router.errors import Reason, RequestError
from mili.v1 import inference_pb2 as pb

_ROLES = ("system", "user", "assistant", "tool", "developer")
_MAX_VARIABLES_BYTES = 64 * 1024


def template_messages(
    chat: pb.ChatPrompt, path: str, call_form: CallForm | None
) -> list[dict[str, Any]]:
    """Return the messages; an absent field is an absent key, as templates tell it from empty.

    But a message with nothing but tool calls is as the template wants it.
    """
    if not chat.messages:
        raise RequestError(Reason.INVALID_FIELD, "the chat has no messages", field=path)
    return [
        _template_message(message, f"{path}.messages[{index}]", call_form)
        for index, message in enumerate(chat.messages)
    ]


def template_tools(chat: pb.ChatPrompt, path: str, *, shown: bool) -> list[dict[str, Any]] | None:
    """Return the tools as JSON-schema functions; None where there is none.

    shown: whether the template shows tools to the model; where it does not, none may be given.
    """
    if chat.tools and not shown:
        raise RequestError(
            Reason.UNSUPPORTED_FIELD,
            "the model's chat template does not show tools to the model",
            field=f"{path}.tools",
        )
    tools = [_template_tool(tool, f"{path}.tools[{i}]") for i, tool in enumerate(chat.tools)]
    return tools or None


def template_variables(chat: pb.ChatPrompt, path: str) -> dict[str, Any]:
    """Return the caller's variables for the template."""
    field = f"{path}.template_variables_json"
    text = chat.template_variables_json
    if len(text.encode()) > _MAX_VARIABLES_BYTES:
        raise RequestError(
            Reason.INVALID_FIELD, f"it has at most {_MAX_VARIABLES_BYTES} bytes", field=field
        )
    return _json_object(text, field) if text else {}


def check_continued(chat: pb.ChatPrompt, path: str) -> None:
    """Raise RequestError where continue_final_message has nothing to go on from."""
    final = chat.messages[-1]
    if final.role != "assistant" or not final.HasField("content") or final.tool_calls:
        raise RequestError(
            Reason.INVALID_FIELD,
            "the final message is no assistant's with content and without tool calls",
            field=f"{path}.continue_final_message",
        )


def texts_of(chat: pb.ChatPrompt) -> Iterator[str]:
    """Yield every text of a chat that its prompt may hold."""
    for message in chat.messages:
        yield from (message.role, message.name, message.tool_call_id)
        yield from (message.content, message.reasoning_content)
        for call in message.tool_calls:
            yield from (call.id, call.name, call.arguments_json)
    for tool in chat.tools:
        yield from (tool.name, tool.description, tool.parameters_json_schema)


def _template_message(
    message: pb.ChatMessage, path: str, call_form: CallForm | None
) -> dict[str, Any]:
    if message.role not in _ROLES:
        raise RequestError(
            Reason.INVALID_FIELD, f"a role is one of {', '.join(_ROLES)}", field=f"{path}.role"
        )
    result: dict[str, Any] = {"role": message.role}
    if message.HasField("content"):
        result["content"] = message.content
    if message.HasField("reasoning_content"):
        # Some templates know it by the other name.
        result["reasoning_content"] = result["thinking"] = message.reasoning_content
    if message.tool_calls:
        if call_form is None:
            raise RequestError(
                Reason.UNSUPPORTED_FIELD,
                "the model's chat template does not show tool calls to the model",
                field=f"{path}.tool_calls",
            )
        result = {**call_form.no_content, **result}
        result["tool_calls"] = [
            _template_call(call, f"{path}.tool_calls[{index}]", call_form.arguments_as_text)
            for index, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id:
        result["tool_call_id"] = message.tool_call_id
    if message.name:
        result["name"] = message.name
    return result


def _template_call(call: pb.ToolCall, path: str, arguments_as_text: bool) -> dict[str, Any]:
    _require_name(call.name, path)
    text = call.arguments_json or "{}"
    arguments = _json_object(text, f"{path}.arguments_json")
    function = {"name": call.name, "arguments": text if arguments_as_text else arguments}
    result: dict[str, Any] = {"type": "function", "function": function}
    if call.id:
        result["id"] = call.id
    return result


def _template_tool(tool: pb.ToolDefinition, path: str) -> dict[str, Any]:
    _require_name(tool.name, path)
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json_schema:
        schema = _json_object(tool.parameters_json_schema, f"{path}.parameters_json_schema")
        function["parameters"] = schema
    return {"type": "function", "function": function}


def _require_name(name: str, path: str) -> None:
    if not name:
        raise RequestError(Reason.INVALID_FIELD, "the name is missing", field=f"{path}.name")


def _json_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RequestError(Reason.INVALID_FIELD, "it is not valid JSON", field=field) from None
    if not isinstance(value, dict):
        raise RequestError(Reason.INVALID_FIELD, "it is not a JSON object", field=field)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")
