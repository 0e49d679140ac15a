"""What OpenAI's answers have in common: usage, reasons, log-probabilities.

Owns these shapes. Which answer they stand in is chat.py's and completions.py's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mili.client.results import TokenLogprob, Usage

Json = dict[str, Any]

# A text that the server cut is "length", whatever cut it: OpenAI has no other word for it.
FINISH_REASONS = {
    "eos": "stop",
    "stop_sequence": "stop",
    "stop_token": "stop",
    "max_tokens": "length",
    "context_length": "length",
    "time_limit": "length",
    "cancelled": "length",
    "tool_calls": "tool_calls",
}


def usage_object(usages: Iterable[Usage]) -> Json:
    """The sum over the prompts of a call."""
    counts = list(usages)
    prompt = sum(usage.prompt_tokens for usage in counts)
    completion = sum(usage.completion_tokens for usage in counts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(usage.cached_prompt_tokens for usage in counts)
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(usage.reasoning_tokens for usage in counts)
        },
    }


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> Json:
    return {"content": [{**_chat_token(token), "top_logprobs": _top(token)} for token in tokens]}


def completion_logprobs(tokens: Iterable[TokenLogprob], offset: int) -> tuple[Json, int]:
    """Return the object and where the next piece's first token begins.

    offset: characters of the text before these tokens.
    """
    columns: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        text = _text(token)
        columns["tokens"].append(text)
        columns["token_logprobs"].append(token.logprob)
        columns["top_logprobs"].append({_text(other): other.logprob for other in token.top})
        columns["text_offset"].append(offset)
        offset += len(text)
    return columns, offset


def _top(token: TokenLogprob) -> list[Json]:
    return [_chat_token(other) for other in token.top]


def _chat_token(token: TokenLogprob) -> Json:
    return {"token": _text(token), "logprob": token.logprob, "bytes": list(token.token)}


def _text(token: TokenLogprob) -> str:
    return token.token.decode(errors="replace")
