"""Which request fields work: everything else is refused unless it says nothing.

Owns the list. Does not know what the fields mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from mili.router.errors import Reason, RequestError

# By message type; a field that is not here is refused, so that a new one cannot be ignored.
_SUPPORTED = {
    "GenerateRequest": "request_id generation",
    "GenerateStreamRequest": "request_id generation stream_options",
    "StreamOptions": "max_tokens_per_message max_flush_interval resume_window"
    " include_recovery_notices",
    "AttachStreamRequest": "resume_token after_sequence",
    "Generation": "model text token_ids chat sampling stopping output structured_output"
    " scheduling cache"
    " truncate_prompt_tokens add_special_tokens",
    "TokenIds": "ids",
    "ChatPrompt": "messages tools template_variables_json continue_final_message",
    "ChatMessage": "role content reasoning_content tool_calls tool_call_id name",
    "ToolDefinition": "name description parameters_json_schema",
    "ToolCall": "id name arguments_json",
    "SamplingParams": "temperature top_p top_k min_p repetition_penalty presence_penalty"
    " frequency_penalty logit_bias allowed_token_ids seed num_sequences",
    "StopConditions": "max_tokens min_tokens stop_sequences stop_token_ids"
    " include_stop_text ignore_eos max_reasoning_tokens time_limit",
    "OutputOptions": "text token_ids top_logprobs prompt_top_logprobs skip_special_tokens"
    " parse_reasoning parse_tool_calls timing",
    "StructuredOutput": "json_schema json_object regex grammar choices after_reasoning",
    "JsonObject": "",
    "Choices": "values",
    "SchedulingHints": "priority max_queue_time session_id",
    "CacheOptions": "bypass_read bypass_write salt",
    "CancelGenerationRequest": "request_id",
    "ListModelsRequest": "page_size page_token",
    "GetModelRequest": "name",
    "TokenizeRequest": "model texts add_special_tokens return_offsets",
    "DetokenizeRequest": "model token_ids skip_special_tokens",
    "RenderChatRequest": "model chat",
    "EmbedRequest": "model inputs normalize dimensions scheduling",
    "EmbedInput": "text token_ids",
    "ScoreRequest": "model context continuations scheduling",
    "WatchLoadRequest": "interval",
    "DrainWorkerRequest": "name migrate_after",
    "UndrainWorkerRequest": "name",
    "ExplainRequestRequest": "request_id",
    "PinPrefixRequest": "model text token_ids chat time_to_live tenant",
    "UnpinPrefixRequest": "pin_id",
    "FlushCacheRequest": "tenant",
}
_SUPPORTED_FIELDS = frozenset(
    f"mili.v1.{message}.{name}" for message, names in _SUPPORTED.items() for name in names.split()
)

# A list of messages may be so long: each of them is looked at, one by one.
_MAX_MESSAGES = 8192


def check_supported(request: Message) -> None:
    """Raise RequestError for the first field that is set and does not work."""
    _check(request, "")


def _check(message: Message, prefix: str) -> None:
    for field, value in message.ListFields():
        path = prefix + field.name
        if field.full_name in _SUPPORTED_FIELDS:
            for item_path, item in _messages(field, value, path):
                _check(item, item_path + ".")
        elif _may_be_neutral(field, value):
            _check(value, path + ".")
        else:
            raise RequestError(
                Reason.UNSUPPORTED_FIELD, f"{path} is not supported by this server", field=path
            )


def _messages(
    field: FieldDescriptor,
    value: Any,  # noqa: ANN401
    path: str,
) -> Iterable[tuple[str, Message]]:
    if field.message_type is None or isinstance(value, Duration):
        return ()
    if not field.is_repeated:
        return ((path, value),)
    if field.message_type.GetOptions().map_entry:
        return ()
    if len(value) > _MAX_MESSAGES:
        raise RequestError(
            Reason.INVALID_FIELD, f"{field.name} has at most {_MAX_MESSAGES} entries", field=path
        )
    return ((f"{path}[{index}]", item) for index, item in enumerate(value))


def _may_be_neutral(field: FieldDescriptor, value: Any) -> bool:  # noqa: ANN401
    """Tell whether `value` is a message that may say nothing: a member of a oneof never does."""
    if field.message_type is None or field.is_repeated or field.containing_oneof is not None:
        return False
    return not (isinstance(value, Duration) and value.ListFields())
