"""What a caller may ask of the parsers of this model.

Owns the refusals. Does not know how text is parsed.
"""

from __future__ import annotations

from mili.router.errors import Reason, RequestError
from mili.router.parsers.formats import Formats
from mili.v1 import inference_pb2 as pb

_NO_REASONING = "the model's vocabulary has no tags of a reasoning block"
_NO_CALLS = "the model's chat template teaches no form of tool calls that this server knows"


def check_parsing(generation: pb.Generation, formats: Formats) -> None:
    """Raise RequestError for what this model's output cannot be parsed for."""
    output, path = generation.output, "generation.output."
    if output.parse_reasoning and formats.reasoning is None:
        raise RequestError(Reason.UNSUPPORTED_FIELD, _NO_REASONING, field=path + "parse_reasoning")
    if generation.stopping.HasField("max_reasoning_tokens"):
        field = "generation.stopping.max_reasoning_tokens"
        if formats.reasoning is None:
            raise RequestError(Reason.UNSUPPORTED_FIELD, _NO_REASONING, field=field)
        if generation.stopping.max_reasoning_tokens < 1:
            message = "max_reasoning_tokens must be at least 1"
            raise RequestError(Reason.INVALID_FIELD, message, field=field)
        if output.HasField("top_logprobs"):
            message = "max_reasoning_tokens forces tokens, which have no log-probability"
            raise RequestError(Reason.INVALID_FIELD, message, field=field)
    if output.parse_tool_calls and formats.tool_calls is None:
        raise RequestError(Reason.UNSUPPORTED_FIELD, _NO_CALLS, field=path + "parse_tool_calls")
    if output.HasField("text") and not output.text:
        for name in ("parse_reasoning", "parse_tool_calls"):
            if getattr(output, name):
                message = f"{name} needs the text"
                raise RequestError(Reason.INVALID_FIELD, message, field=path + name)
