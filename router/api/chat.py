"""A ChatPrompt as the values that a chat template takes.

Owns what a conversation may hold. Does not know templates or tokens.
"""

from __future__ import annotations

import json
from typing import Any

from mili.router.errors import Reason, RequestError
from mili.v1 import inference_pb2 as pb

_ROLES = ("system", "user", "assistant", "tool", "developer")
_MAX_VARIABLES_BYTES = 64 * 1024


def template_messages(chat: pb.ChatPrompt, path: str) -> list[dict[str, str]]:
    """Return the messages; an absent field is an absent key, as templates tell it from empty."""
    if not chat.messages:
        raise RequestError(Reason.INVALID_FIELD, "the chat has no messages", field=path)
    return [
        _template_message(message, f"{path}.messages[{index}]")
        for index, message in enumerate(chat.messages)
    ]


def _template_message(message: pb.ChatMessage, path: str) -> dict[str, str]:
    if message.role not in _ROLES:
        raise RequestError(
            Reason.INVALID_FIELD, f"a role is one of {', '.join(_ROLES)}", field=f"{path}.role"
        )
    result = {"role": message.role}
    if message.HasField("content"):
        result["content"] = message.content
    if message.HasField("reasoning_content"):
        result["reasoning_content"] = message.reasoning_content
    if message.tool_call_id:
        result["tool_call_id"] = message.tool_call_id
    if message.name:
        result["name"] = message.name
    return result


def template_variables(chat: pb.ChatPrompt, path: str) -> dict[str, Any]:
    """Return the caller's variables for the template."""
    field = f"{path}.template_variables_json"
    text = chat.template_variables_json
    if not text:
        return {}
    if len(text.encode()) > _MAX_VARIABLES_BYTES:
        raise RequestError(
            Reason.INVALID_FIELD, f"it has at most {_MAX_VARIABLES_BYTES} bytes", field=field
        )
    try:
        variables = json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(Reason.INVALID_FIELD, "it is not valid JSON", field=field) from None
    if not isinstance(variables, dict):
        raise RequestError(Reason.INVALID_FIELD, "it is not a JSON object", field=field)
    return variables
