"""What a caller gets to see: values without a message in them.

responses.py makes them of messages, and partial.py of a stream's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from mili.client.errors import MiliError
from mili.client.options import ToolCall

if TYPE_CHECKING:
    from pydantic import BaseModel


class Usage(NamedTuple):
    """Counts of tokens."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    recomputed_tokens: int
    reasoning_tokens: int = 0


class Timing(NamedTuple):
    """Where the time went, in seconds on the server's clock."""

    queue: float
    prefill: float
    time_to_first_token: float
    decode: float
    total: float
    preemptions: int
    recoveries: int
    worker: str


class TokenLogprob(NamedTuple):
    """A token and its log-probability.

    token: its bytes, which can be a part of a character; empty for a prompt's. rank: 1 is the
    likeliest. top: the likeliest tokens in its place.
    """

    token_id: int
    token: bytes
    logprob: float
    rank: int
    top: tuple[TokenLogprob, ...] = ()


class Sequence(NamedTuple):
    """One answer. error: why it failed, alone of its siblings; its text is then cut.

    finish_reason: "eos", "stop_sequence", "stop_token", "max_tokens", "context_length",
    "time_limit", "tool_calls", "cancelled" or "error". matched: the stop sequence or stop token id
    that ended it, if one did. token_ids holds every generated token, also one that ended the text
    and is not part of it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    matched: str | int | None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    error: MiliError | None = None


class Generation(NamedTuple):
    """A finished generation. What is read from it directly is its first sequence's.

    prompt_logprobs: of the prompt's tokens, in order: the first has none.
    response_model: the pydantic model that was asked for as response_format.
    """

    sequences: tuple[Sequence, ...]
    usage: Usage
    timing: Timing
    seed: int
    model: str
    model_revision: str
    request_id: str
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    response_model: type[BaseModel] | None = None

    @property
    def first(self) -> Sequence:
        """Raises MiliError if the first sequence failed, and others did not."""
        if self.sequences[0].error is not None:
            raise self.sequences[0].error
        return self.sequences[0]

    @property
    def text(self) -> str:
        return self.first.text

    @property
    def reasoning(self) -> str:
        return self.first.reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.first.tool_calls

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.first.token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.first.logprobs

    @property
    def finish_reason(self) -> str:
        return self.first.finish_reason

    @property
    def matched(self) -> str | int | None:
        return self.first.matched

    @property
    def parsed(self) -> Any:  # noqa: ANN401  (an instance of what the caller asked for)
        """The text as an instance of the response_format, None where that is no pydantic model.

        Raises pydantic.ValidationError, which is a ValueError, for a text that is not whole, as
        when max_tokens ended it.
        """
        if self.response_model is None:
            return None
        return self.response_model.model_validate_json(self.text)


class RenderedChat(NamedTuple):
    """Messages as the model reads them."""

    text: str
    token_ids: tuple[int, ...]


class Embeddings(NamedTuple):
    """A vector for each input, in their order."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage


class Score(NamedTuple):
    """logprob: of the whole continuation. is_greedy: temperature 0 would have given just it."""

    logprob: float
    num_tokens: int
    is_greedy: bool


class Scores(NamedTuple):
    """A score for each continuation, in their order."""

    scores: tuple[Score, ...]
    usage: Usage
