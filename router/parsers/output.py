"""Text of one output to its typed parts: reasoning, tool calls and the rest.

Owns in which order the parsers see the text. Does not know tokens or requests.
"""

from __future__ import annotations

from mili.router.parsed_text import ParsedText
from mili.router.parsers.formats import Formats
from mili.router.parsers.reasoning import ReasoningSplitter, Split
from mili.router.parsers.tool_calls import ToolCallParser


class OutputParser:
    """Takes an output apart. What is not asked for stays text, and no call is found in reasoning.

    reasoning_open: the prompt ends within the reasoning block.
    """

    def __init__(
        self, formats: Formats, *, reasoning: bool, tool_calls: bool, reasoning_open: bool
    ) -> None:
        self._splits = reasoning
        self._reasoning = (
            ReasoningSplitter(formats.reasoning, opened=reasoning_open, typed=reasoning)
            if formats.reasoning
            else None
        )
        wanted = formats.tool_calls if tool_calls else None
        self._calls = ToolCallParser(wanted) if wanted else None
        self._content = ""
        self._typed_reasoning = ""

    @property
    def in_reasoning(self) -> bool:
        """Whether the reasoning block is open."""
        return self._reasoning is not None and self._reasoning.inside

    @property
    def has_calls(self) -> bool:
        """Whether a whole tool call was found."""
        return self._calls is not None and self._calls.num_whole_calls > 0

    def push(self, text: str) -> None:
        """Take more text."""
        self._take(self._reasoning.push(text) if self._reasoning else Split("", text))

    def flush(self) -> None:
        """No more text comes."""
        if self._reasoning:
            self._take(self._reasoning.flush())
        if self._calls:
            self._calls.flush()

    def take(self) -> ParsedText:
        """Return what became certain since the last call."""
        content, reasoning = self._content, self._typed_reasoning
        self._content = self._typed_reasoning = ""
        if self._calls is None:
            return ParsedText(content, reasoning)
        rest, parts = self._calls.take()
        return ParsedText(content + rest, reasoning, parts)

    def _take(self, split: Split) -> None:
        if self._splits:
            self._typed_reasoning += split.reasoning
        else:
            self._content += split.reasoning
        if self._calls:
            self._calls.push(split.content)
        else:
            self._content += split.content
