"""The bodies of OpenAI's requests, and the options that they become.

Owns the fields: one that is not here is refused by its name, and one that is here does what OpenAI
says, or is among those that OpenAI defines to have no effect on the answer. Beside OpenAI's there
are some of MILI's, under the names that vLLM gave them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mili.client.options import Options

# Prompts of one call.
MAX_PROMPTS = 256


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """include_obfuscation adds nothing to the answer, and there is none."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class SamplingBody(Body):
    """What /v1/chat/completions and /v1/completions have in common."""

    model: str
    n: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    # For OpenAI's own books: they change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    # MILI's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    allowed_token_ids: list[int] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def common_options(self) -> Options:
        return {
            "model": self.model,
            "num_sequences": self.n,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias or {},
            "seed": self.seed,
            "stop": self.stop or (),
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids or (),
            "include_stop_text": self.include_stop_str_in_output,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "cache_salt": self.cache_salt or "",
        }


class CompletionBody(SamplingBody):
    """POST /v1/completions. logprobs: so many alternatives beside each token."""

    prompt: str | list[str] | list[int] | list[list[int]]
    # What OpenAI gives without a limit.
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0)
    best_of: int | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of other than n is not supported")
        if isinstance(self.prompt, list) and not 0 < len(self.prompts) <= MAX_PROMPTS:
            raise ValueError(f"prompt must have from 1 to {MAX_PROMPTS} prompts")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return as_list(self.prompt)

    def options(self) -> Options:
        return {**self.common_options(), "top_logprobs": self.logprobs}


class EmbeddingsBody(Body):
    """POST /v1/embeddings."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    dimensions: int | None = Field(default=None, ge=1, le=2**32 - 1)
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return as_list(self.input)


def as_list(prompts: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """A single text, or the token ids of one, in a list of its own."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)  # type: ignore[arg-type]


class TextPart(Body):
    type: Literal["text"]
    text: str


class Function(Body):
    name: str
    arguments: str


class Call(Body):
    id: str
    type: Literal["function"]
    function: Function


class ChatMessage(Body):
    """A message; what answers carry besides (refusal, audio, ...) is taken back when it is null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)


class FunctionDefinition(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class ToolDefinition(Body):
    type: Literal["function"]
    function: FunctionDefinition


class TextFormat(Body):
    type: Literal["text"]


class JsonFormat(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    """The text always follows the schema, strict or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatBody(SamplingBody):
    """POST /v1/chat/completions.

    include_reasoning gives the reasoning apart from the content, as reasoning_content.
    """

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: (
        Annotated[TextFormat | JsonFormat | JsonSchemaFormat, Field(discriminator="type")] | None
    ) = None
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    modalities: list[Literal["text"]] | None = None
    # MILI's.
    include_reasoning: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens exclude each other")
        return self
