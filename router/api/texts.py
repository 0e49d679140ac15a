"""Text, plain or parsed, as the fields of an answer.

Owns their shape. Does not know how text is parsed.
"""

from __future__ import annotations

from mili.router.parsed_text import Text
from mili.v1 import inference_pb2 as pb


def fill_text(target: pb.Delta | pb.GeneratedSequence, text: Text) -> None:
    """Put text where its reader looks for it."""
    if isinstance(text, str):
        target.text = text
        return
    target.text = text.content
    target.reasoning_text = text.reasoning
    for position, call_id, name, arguments in text.tool_calls:
        if isinstance(target, pb.Delta):
            target.tool_calls.add(
                position=position, id=call_id, name=name, arguments_json_fragment=arguments
            )
        else:
            target.tool_calls.add(id=call_id, name=name, arguments_json=arguments)
