"""The tool calls of an output, told from its text.

Owns where calls begin and end, and that what only looks like one stays text, to the character: a
call is told once it can be nothing else. Does not know reasoning, tokens or requests.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import NamedTuple

from mili.router.parsed_text import ToolCallPart
from mili.router.parsers.calls import Call
from mili.router.parsers.tags import MAX_SPACES, certain_length, find_first, without_breaks


class CallSyntax(NamedTuple):
    """How a model writes calls.

    tags: what a call begins with. bare: at the beginning of an output, or behind another call, an
    object may begin one without a tag. closing: what may stand behind it, in this order.
    """

    name: str
    tags: tuple[str, ...]
    bare: bool
    closing: tuple[str, ...]
    make_call: Callable[[], Call]


class ToolCallParser:
    """What is left of the text when the calls, and the line breaks next to them, are taken out.

    An output that ends within a call leaves it as it is: its arguments are then no whole JSON. So
    does one that breaks the grammar in the arguments; what follows is text again.
    """

    def __init__(self, syntax: CallSyntax) -> None:
        self.num_whole_calls = 0
        self._syntax = syntax
        self._content = ""
        self._parts: list[ToolCallPart] = []
        self._held = ""  # what more text may make a part of a tag
        self._call: Call | None = None
        self._doubtful = ""  # the text of a call that is not told yet
        self._closing: tuple[str, ...] = ()  # what may still stand behind a call
        self._num_calls = 0
        self._is_told = False  # of the call that is being read
        self._is_fresh = True  # no text since the beginning, or since a call

    def push(self, text: str) -> None:
        text, self._held = self._held + text, ""
        while text:
            if self._call is not None:
                text = self._in_call(self._call, text)
            elif self._closing:
                text = self._behind_call(text)
            else:
                text = self._plain(text)

    def flush(self) -> None:
        """No more text comes: what was held back is text."""
        held = self._doubtful + self._held
        if held.strip() or not (self._num_calls and self._is_fresh):
            self._say(held)
        self._held = self._doubtful = ""

    def take(self) -> tuple[str, tuple[ToolCallPart, ...]]:
        """Return the text and the parts of calls that became certain since the last call."""
        content, parts = self._content, tuple(self._parts)
        self._content, self._parts = "", []
        return content, parts

    def _plain(self, text: str) -> str:
        """Look for a call; return what is still to be read."""
        if self._is_fresh and self._syntax.bare:
            begin = text.lstrip()
            if len(text) - len(begin) > MAX_SPACES:
                self._is_fresh = False
            elif begin.startswith("{"):
                return self._begin(text[: len(text) - len(begin)], begin)
            elif not begin:
                self._held = text
                return ""
        found = find_first(text, self._syntax.tags)
        if found is None:
            certain = certain_length(text, self._syntax.tags)
            self._say(text[:certain])
            self._held = text[certain:]
            return ""
        content = without_breaks(text[: found.start])
        self._say(content)
        return self._begin(text[len(content) : found.end], text[found.end :])

    def _begin(self, doubtful: str, rest: str) -> str:
        self._call, self._is_told = self._syntax.make_call(), False
        self._doubtful = doubtful
        return rest

    def _in_call(self, call: Call, text: str) -> str:
        """Read on in a call; return what is still to be read."""
        end = call.take(text, 0)
        if call.is_begun and not self._is_told:
            self._is_told, self._doubtful = True, ""
            call_id = f"call_{secrets.token_hex(12)}"
            self._parts.append(ToolCallPart(self._num_calls, call_id, call.name, call.arguments))
            self._num_calls += 1
        elif self._is_told and call.arguments:
            self._parts.append(ToolCallPart(self._num_calls - 1, "", "", call.arguments))
        if self._is_told:
            call.arguments = ""
        else:
            self._doubtful += text[:end]
        if call.done or call.broken:
            self._end(whole=call.done)
        return text[end:]

    def _end(self, *, whole: bool) -> None:
        self._call = None
        if self._is_told:
            self._is_fresh = True
            self._closing = self._syntax.closing if whole else ()
            self.num_whole_calls += whole
        else:
            self._say(self._doubtful)
            self._is_fresh, self._doubtful = False, ""

    def _behind_call(self, text: str) -> str:
        """Leave out what closes a call; return what is still to be read."""
        begin = text.lstrip()
        for index, tag in enumerate(self._closing):
            if len(text) - len(begin) > MAX_SPACES:
                break
            if begin.startswith(tag):
                self._closing = self._closing[index + 1 :]
                return begin[len(tag) :]
            if tag.startswith(begin):
                self._held = text
                return ""
        self._closing = ()
        return text

    def _say(self, text: str) -> None:
        """Put out text; line breaks behind a call go with the call."""
        if self._num_calls and self._is_fresh:
            text = text.lstrip("\n")
        if text.strip():
            self._is_fresh = False
        self._content += text
