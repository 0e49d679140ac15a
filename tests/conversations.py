"""Conversations in the shape that transformers takes them, and the same as ChatPrompts.

Owns the corpus that chat templates are compared over. Does not know templates.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from mili.v1 import inference_pb2 as pb

Message = dict[str, Any]

_TEXTS = (
    "What is the weather in Zürich?",
    '  spaces around, and <tags> & "quotes"  ',
    "line one\n\nline two\n",
    "世界 👍🏽 <|im_end|> {{ not a template }}",
    "",
)
_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place, now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}
_TIME = {"type": "function", "function": {"name": "get_time", "description": "Die Uhrzeit: é"}}
_BARE = {"type": "function", "function": {"name": "noop", "parameters": {}}}


class Conversation(NamedTuple):
    """continued: the final message is to be gone on with, else an answer is opened."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}
    continued: bool = False

    def prompt(self) -> pb.ChatPrompt:
        return pb.ChatPrompt(
            messages=map(_to_message, self.messages),
            tools=[_to_tool(tool["function"]) for tool in self.tools or ()],
            template_variables_json=json.dumps(self.variables) if self.variables else "",
            continue_final_message=self.continued,
        )


def corpus() -> Iterator[Conversation]:
    """Yield some 110 conversations, 65 of them without tools."""
    for text in _TEXTS:
        yield Conversation([_user(text)])
        yield Conversation([_system(text), _user("Hello")])
        yield Conversation([_user("Hello"), _assistant(text), _user("And?")])
        yield Conversation([_user("Hello"), _assistant(text)])
        yield Conversation([_user("Hello"), _assistant("Say: " + text)], continued=True)
        yield Conversation([_user("Think"), _assistant("Done.", reasoning=text), _user("More")])
        yield Conversation([_user("Think"), _assistant("Done.", reasoning=text)])
        yield Conversation([_system(text), _user("Hello"), _assistant("Hi."), _user(text)])
        yield Conversation([_user(text), _assistant(text), _user(text), _assistant(text)])
        yield Conversation([_system("Be."), _user(text), _assistant("Well,")], continued=True)
        yield Conversation([_user("x" + text), _assistant(text), _user("Go on.")])
    for thinking, system in itertools.product((True, False), repeat=2):
        messages = [_system("Be brief.")] * system + [_user("Hello")]
        yield Conversation(messages, variables={"enable_thinking": thinking})
        yield Conversation(messages, [_WEATHER], {"enable_thinking": thinking})
    for tools in ([_WEATHER], [_TIME], [_BARE], [_WEATHER, _TIME, _BARE]):
        yield Conversation([_user("Which?")], tools)
        yield Conversation([_system("Be brief."), _user("Which?")], tools)
        yield from (Conversation(messages, tools) for messages in _with_calls())
    yield from map(Conversation, _with_calls())
    yield Conversation([_user("a"), _user("b")])
    yield Conversation([_user("a"), _assistant("b"), _system("late"), _user("c")])
    yield Conversation([_assistant("I begin."), _user("So?")])
    yield Conversation([_user("Go"), _assistant("<think>\nhm\n</think>\n\nYes"), _user("Why?")])
    yield Conversation([_user("Go"), _assistant("<think>\nhm\n</think>\n\nYes")], continued=True)
    yield Conversation([_user("Go"), _assistant("trailing  \n")], continued=True)
    yield Conversation([message for i in range(9) for message in (_user(f"{i}"), _assistant("y"))])


def _with_calls() -> Iterator[list[Message]]:
    """Yield messages with tool calls: one, two at once, beside text, and after reasoning."""
    city = _call("get_weather", {"city": "Zürich", "days": 2, "deep": {"a": [1, 2.5, None, True]}})
    time = _call("get_time", {})
    ask, result = _user("Which?"), {"role": "tool", "content": '{"sun": true}', "tool_call_id": "1"}
    yield [ask, _assistant(None, calls=[city])]
    yield [ask, _assistant(None, calls=[city]), result]
    yield [ask, _assistant(None, calls=[city]), result, _assistant("Sun."), _user("Thanks")]
    yield [ask, _assistant(None, calls=[city, time]), result, result]
    yield [ask, _assistant("Let me see.", calls=[city]), result]
    yield [ask, _assistant("See.", reasoning="A tool.", calls=[time]), result, _assistant("12:00")]
    yield [ask, _assistant(None, calls=[city]), result, _assistant(None, calls=[time]), result]


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(
    text: str | None, *, reasoning: str | None = None, calls: list[dict[str, Any]] | None = None
) -> Message:
    message: Message = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": f"id_{name}", "function": function}


def _to_message(message: Message) -> pb.ChatMessage:
    calls = [
        pb.ToolCall(
            id=call["id"],
            name=call["function"]["name"],
            arguments_json=json.dumps(call["function"]["arguments"], ensure_ascii=False),
        )
        for call in message.get("tool_calls", ())
    ]
    return pb.ChatMessage(
        role=message["role"],
        content=message["content"],
        reasoning_content=message.get("reasoning_content"),
        tool_call_id=message.get("tool_call_id", ""),
        tool_calls=calls,
    )


def _to_tool(function: dict[str, Any]) -> pb.ToolDefinition:
    parameters = function.get("parameters")
    return pb.ToolDefinition(
        name=function["name"],
        description=function.get("description", ""),
        parameters_json_schema="" if parameters is None else json.dumps(parameters),
    )
