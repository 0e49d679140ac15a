"""Which fields work: every other field of every request is refused, and says which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from mili.router.api import supported
from mili.router.api.supported import check_supported
from mili.router.errors import Reason, RequestError
from mili.v1 import admin_pb2
from mili.v1 import inference_pb2 as pb

MESSAGE = ("role", "content", "reasoning_content", "tool_call_id", "name")
CALL = ("id", "name", "arguments_json")
TOOL = ("name", "description", "parameters_json_schema")
CHAT = {
    *(f"chat.messages[0].{name}" for name in MESSAGE),
    *(f"chat.messages[0].tool_calls[0].{name}" for name in CALL),
    *(f"chat.tools[0].{name}" for name in TOOL),
    "chat.template_variables_json",
    "chat.continue_final_message",
}
WORKING = {
    "request_id",
    *(f"generation.{name}" for name in ("model", "text", "token_ids.ids")),
    *(f"generation.{name}" for name in ("truncate_prompt_tokens", "add_special_tokens")),
    *(f"generation.{field}" for field in CHAT),
    *(
        f"generation.sampling.{name}"
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    ),
    "generation.sampling.num_sequences",
    *(
        f"generation.sampling.{name}"
        for name in ("presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids")
    ),
    *(
        f"generation.stopping.{name}"
        for name in ("max_tokens", "min_tokens", "stop_sequences", "stop_token_ids")
    ),
    *(
        f"generation.stopping.{name}"
        for name in ("include_stop_text", "ignore_eos", "max_reasoning_tokens", "time_limit")
    ),
    *(
        f"generation.output.{name}"
        for name in (
            "text",
            "token_ids",
            "top_logprobs",
            "prompt_top_logprobs",
            "skip_special_tokens",
            "parse_reasoning",
            "parse_tool_calls",
        )
    ),
    *(
        f"generation.structured_output.{name}"
        for name in ("json_schema", "json_object", "regex", "grammar", "choices.values")
    ),
    "generation.structured_output.after_reasoning",
    "generation.output.timing",
    *(f"generation.scheduling.{name}" for name in ("priority", "max_queue_time", "session_id")),
    *(f"generation.cache.{name}" for name in ("bypass_read", "bypass_write", "salt")),
}
STREAMING = {
    f"stream_options.{name}"
    for name in (
        "max_tokens_per_message",
        "max_flush_interval",
        "resume_window",
        "include_recovery_notices",
    )
}
DURATION = "google.protobuf.Duration"


def leaves(message: Message, descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    """Set each leaf field of `message` in turn, yielding its path while nothing else is set."""
    for field in descriptor.fields:
        path = prefix + field.name
        if field.message_type is None or is_map(field):
            set_leaf(message, field)
            yield path
        elif field.message_type.full_name == DURATION:
            getattr(message, field.name).seconds = 1
            yield path
        elif field.is_repeated:
            yield from leaves(getattr(message, field.name).add(), field.message_type, path + "[0].")
        elif not field.message_type.fields:
            getattr(message, field.name).SetInParent()
            yield path
        else:
            yield from leaves(getattr(message, field.name), field.message_type, path + ".")
        message.ClearField(field.name)


def is_map(field: FieldDescriptor) -> bool:
    assert field.message_type is not None
    return field.message_type.GetOptions().map_entry


def set_leaf(message: Message, field: FieldDescriptor) -> None:
    if field.message_type is not None:
        getattr(message, field.name)[1] = 1.0
        return
    value: Any = {
        FieldDescriptor.CPPTYPE_STRING: "x",
        FieldDescriptor.CPPTYPE_BOOL: True,
        FieldDescriptor.CPPTYPE_FLOAT: 0.5,
    }.get(field.cpp_type, 7)
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


def refused(message: Message) -> RequestError | None:
    try:
        check_supported(message)
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("request_type", "working"),
    [
        (pb.GenerateRequest, WORKING),
        (pb.GenerateStreamRequest, WORKING | STREAMING),
        (pb.AttachStreamRequest, {"resume_token", "after_sequence"}),
    ],
)
def test_exactly_the_working_fields_are_taken(
    request_type: type[Message], working: set[str]
) -> None:
    request = request_type()
    taken = set()
    for path in leaves(request, request_type.DESCRIPTOR):
        error = refused(request)
        if error is None:
            taken.add(path)
            continue
        assert error.reason is Reason.UNSUPPORTED_FIELD
        # A list or a oneof's member that does not work is named as a whole.
        assert path.startswith(error.field), path
        assert error.field in str(error)
    assert taken == working


OPERATORS = {
    "WatchLoad": {"interval"},
    "DrainWorker": {"name", "migrate_after"},
    "UndrainWorker": {"name"},
    "ExplainRequest": {"request_id"},
    "PinPrefix": {
        "model",
        "text",
        "token_ids.ids",
        *CHAT,
        "time_to_live",
        "tenant",
    },
    "UnpinPrefix": {"pin_id"},
    "FlushCache": {"tenant"},
}


@pytest.mark.parametrize("method", OPERATORS)
def test_what_operators_may_say(method: str) -> None:
    request: Message = getattr(admin_pb2, f"{method}Request")()
    fields = leaves(request, request.DESCRIPTOR)
    assert {path for path in fields if refused(request) is None} == OPERATORS[method]


def test_neutral_values_say_nothing() -> None:
    request = pb.GenerateStreamRequest()
    request.generation.structured_output.after_reasoning = False
    request.generation.structured_output.SetInParent()
    request.stream_options.resume_window.SetInParent()
    request.stream_options.include_recovery_notices = False
    check_supported(request)


def test_an_empty_member_of_a_oneof_is_a_choice() -> None:
    request = pb.GenerateRequest()
    request.generation.chat.SetInParent()
    request.generation.structured_output.json_object.SetInParent()
    assert refused(request) is None


def test_the_path_names_the_entry_of_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    works = supported._SUPPORTED_FIELDS - {"mili.v1.ChatMessage.tool_calls"}
    monkeypatch.setattr(supported, "_SUPPORTED_FIELDS", works)
    request = pb.GenerateRequest()
    for _ in range(3):
        request.generation.chat.messages.add(role="user", content="x")
    request.generation.chat.messages[2].tool_calls.add(name="f")
    error = refused(request)
    assert error is not None
    assert error.field == "generation.chat.messages[2].tool_calls"


def test_a_list_of_messages_has_a_limit() -> None:
    request = pb.GenerateRequest()
    for _ in range(8193):
        request.generation.chat.messages.add()
    error = refused(request)
    assert error is not None
    assert (error.reason, error.field) == (Reason.INVALID_FIELD, "generation.chat.messages")
