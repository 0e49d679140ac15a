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
    if formats.reasoning is None:
        _refuse_reasoning(generation)
    if generation.stopping.HasField("max_reasoning_tokens"):
        _check_max_reasoning_tokens(generation)
    if output.parse_tool_calls and formats.tool_calls is None:
        raise RequestError(Reason.UNSUPPORTED_FIELD, _NO_CALLS, field=path + "parse_tool_calls")
    if output.HasField("text") and not output.text:
        for name in ("parse_reasoning", "parse_tool_calls"):
            if getattr(output, name):
                message = f"{name} needs the text"
                raise RequestError(Reason.INVALID_FIELD, message, field=path + name)


def _refuse_reasoning(generation: pb.Generation) -> None:
    """Refuse whatever needs a reasoning block, for a model that has none."""
    asked = {
        "output.parse_reasoning": generation.output.parse_reasoning,
        "stopping.max_reasoning_tokens": generation.stopping.HasField("max_reasoning_tokens"),
        "structured_output.after_reasoning": generation.structured_output.after_reasoning,
    }
    for name, is_asked in asked.items():
        if is_asked:
            field = f"generation.{name}"
            raise RequestError(Reason.UNSUPPORTED_FIELD, _NO_REASONING, field=field)


def _check_max_reasoning_tokens(generation: pb.Generation) -> None:
    structured = generation.structured_output
    constrained = structured.WhichOneof("constraint") is not None
    if generation.stopping.max_reasoning_tokens < 1:
        message = "max_reasoning_tokens must be at least 1"
    elif generation.output.HasField("top_logprobs"):
        message = "max_reasoning_tokens forces tokens, which have no log-probability"
    elif constrained and not structured.after_reasoning:
        message = "max_reasoning_tokens goes with structured_output only with after_reasoning"
    else:
        return
    field = "generation.stopping.max_reasoning_tokens"
    raise RequestError(Reason.INVALID_FIELD, message, field=field)
