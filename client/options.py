"""What a caller can ask for: messages, tools, and the names of all options.

Owns names and types only: requests.py makes messages of them, and limits are the server's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, TypedDict

if TYPE_CHECKING:
    from pydantic import BaseModel

Prompt = str | Sequence[int]


class ToolCall(NamedTuple):
    """A call of a tool that the model asks for. arguments: JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(TypedDict):
    """One chat message: {"role": "user", "content": "Hello"}.

    The answer to a tool call has the role "tool" and the call's id in tool_call_id.
    """

    role: str
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[Sequence[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Tool(TypedDict):
    """A function that the model may call. parameters: the JSON Schema of its arguments."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[Mapping[str, object]]


class ChatOptions(TypedDict, total=False):
    """What becomes of messages.

    model: empty means the only one served. tools: what the model may call. template_variables: for
    the model's chat template, as {"enable_thinking": False}. continue_final_message: go on with the
    last message instead of answering it.
    """

    model: str
    tools: Sequence[Tool]
    template_variables: Mapping[str, object] | None
    continue_final_message: bool


class Options(ChatOptions, total=False):
    """What a call may ask for. None, or leaving it out, means the model's own default.

    messages: a chat, in place of a prompt.

    logit_bias: what is added to token ids' logits. stop: a string or several that end the text.
    seed: the same seed gives the same text. num_sequences: so many answers to the one prompt.
    time_limit: seconds until the text ends as far as it is. max_reasoning_tokens: the model must
    begin its answer after so many.

    response_format: a pydantic model, whose instance `Generation.parsed` then is; or a JSON Schema;
    or "json_object" for any. regex, choices, grammar (Lark's notation): other forms of the answer.
    after_reasoning: the form holds only after the reasoning.

    top_logprobs: log-probabilities of every token, and of so many likeliest beside it;
    prompt_top_logprobs: the same for the prompt. parse_reasoning, parse_tool_calls: give these
    apart from the text.

    priority: larger runs first. max_queue_time: seconds to wait for a turn at most. session_id:
    requests of one conversation, which find its cache. cache_salt: prompts are shared in the cache
    only with this salt's; bypass_cache_read and bypass_cache_write leave the cache alone.
    """

    messages: Sequence[Message] | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    seed: int | None
    num_sequences: int | None
    max_tokens: int | None
    min_tokens: int | None
    max_reasoning_tokens: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_text: bool
    ignore_eos: bool
    time_limit: float | None
    response_format: type[BaseModel] | Mapping[str, object] | Literal["json_object"] | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str]
    after_reasoning: bool
    top_logprobs: int | None
    prompt_top_logprobs: int | None
    parse_reasoning: bool
    parse_tool_calls: bool
    skip_special_tokens: bool | None
    add_special_tokens: bool | None
    truncate_prompt_tokens: int | None
    priority: int
    max_queue_time: float | None
    session_id: str
    cache_salt: str
    bypass_cache_read: bool
    bypass_cache_write: bool


class Delivery(TypedDict, total=False):
    """What only a stream may ask for.

    resume_window: seconds that the server keeps the generation when the connection is lost; the
    stream then connects again by itself and goes on where it was. max_tokens_per_message and
    max_flush_interval (seconds): gather so much before a piece is sent. include_recovery_notices:
    an event when the generation moved to another worker.
    """

    resume_window: float | None
    max_tokens_per_message: int | None
    max_flush_interval: float | None
    include_recovery_notices: bool


class StreamOptions(Options, Delivery, total=False):
    """All that a stream may ask for."""
