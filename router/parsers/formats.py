"""Which reasoning tags and which tool-call syntax a model has, read from its own files.

Owns the table of those that are known. Does not know outputs.
"""

from __future__ import annotations

import re
from functools import partial
from typing import NamedTuple

from mili.router.parsers.calls import HeadedCall, JsonCall
from mili.router.parsers.reasoning import ReasoningTags
from mili.router.parsers.tool_calls import CallSyntax
from mili.router.tokenizer import Tokenizer

# A model has them if both are tokens of its vocabulary.
_REASONING = (ReasoningTags("<think>", "</think>"), ReasoningTags("[THINK]", "[/THINK]"))

HERMES = CallSyntax(
    name="hermes",
    tags=("<tool_call>",),
    bare=False,
    closing=("</tool_call>",),
    make_call=partial(JsonCall, ("arguments",), needs_arguments=False),
)
LLAMA = CallSyntax(
    name="llama",
    tags=("<|python_tag|>",),
    bare=True,
    closing=(";",),
    make_call=partial(JsonCall, ("parameters", "arguments"), needs_arguments=True),
)
# V3 writes the kind of tool before the name and fences the arguments; V3.1 does neither.
_DEEPSEEK_HEAD = re.compile(
    r"(?:\s*<｜tool▁call▁begin｜>)?"
    r"(?:function<｜tool▁sep｜>([^\n<]+)\n```json\n|([^\n<]+)<｜tool▁sep｜>)\s*"
)
DEEPSEEK = CallSyntax(
    name="deepseek",
    tags=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    bare=False,
    closing=("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    make_call=partial(HeadedCall, _DEEPSEEK_HEAD),
)


class Formats(NamedTuple):
    """What of a model's output can be parsed; None for what cannot."""

    reasoning: ReasoningTags | None = None
    tool_calls: CallSyntax | None = None

    @property
    def tags(self) -> frozenset[str]:
        """What parsing must see, be it a special token or not."""
        calls = (*self.tool_calls.tags, *self.tool_calls.closing) if self.tool_calls else ()
        return frozenset((*(self.reasoning or ()), *calls))


def read_formats(template: str | None, tokenizer: Tokenizer) -> Formats:
    """Return the formats of a model, by its vocabulary and its chat template's source."""
    tags = (tags for tags in _REASONING if None not in map(tokenizer.token_id, tags))
    return Formats(next(tags, None), _call_syntax(template or ""))


def _call_syntax(template: str) -> CallSyntax | None:
    """Return the syntax that a template teaches the model, by the words that it does it in."""
    if DEEPSEEK.tags[1] in template:
        return DEEPSEEK
    if HERMES.tags[0] in template:
        # Qwen3-Coder's are XML between the same tags.
        return None if "<function=" in template else HERMES
    if '"parameters": dictionary of argument name' in template or LLAMA.tags[0] in template:
        return LLAMA
    return None
