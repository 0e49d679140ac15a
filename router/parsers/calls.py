"""One tool call that arrives in pieces, as a model writes it between its tags.

Owns what a call looks like. Does not know the text before and behind it.
"""

from __future__ import annotations

import json
import re
from typing import Protocol

from mili.router.parsers.json_value import WHITE_SPACE, JsonValue

_VALUE = '"{[-0123456789tfn'
_MAX_HEAD = 1024


class Call(Protocol):
    """What was read of a call; done and broken end it.

    arguments: their JSON text, as far as nobody took it yet.
    """

    name: str
    arguments: str
    done: bool
    broken: bool

    @property
    def is_begun(self) -> bool:
        """Whether this is a call for certain, so that it may be told."""

    def take(self, text: str, index: int) -> int:
        """Read on from there; return the index of the first character that was not taken."""


class JsonCall:
    """{"name": "f", "arguments": {...}}; the members in any order, and others are left out.

    keys: what the arguments may be called. needs_arguments: an object without them is no call.
    """

    def __init__(self, keys: tuple[str, ...], *, needs_arguments: bool) -> None:
        self.name = ""
        self.arguments = ""
        self.done = False
        self.broken = False
        self._keys = keys
        self._needs_arguments = needs_arguments
        self._has_arguments = False
        self._expected = "{"  # one of these characters
        self._value: JsonValue | None = None
        self._key: str | None = None  # of the value; None: the value is a key itself
        self._text = ""  # of a key or the name

    @property
    def is_begun(self) -> bool:
        return bool(self.name) and self._has_arguments

    def take(self, text: str, index: int) -> int:
        while index < len(text) and not (self.done or self.broken):
            if self._value is not None:
                end = self._value.take(text, index)
                self._read(self._value, text[index:end])
                index = end
            elif text[index] in WHITE_SPACE:
                index += 1
            elif text[index] in self._expected:
                index += self._token(text[index])
            else:
                self.broken = True
        return index

    def _token(self, char: str) -> bool:
        """Take a character between keys and values; return False where it begins one."""
        if self._expected == _VALUE or char == '"':
            self._begin(char)
            return False
        if char == "}":
            self._end()
        elif char == ":":
            self._expected = _VALUE
        else:
            self._expected = '"}' if char == "{" else '"'
        return True

    def _begin(self, char: str) -> None:
        """A key or a value begins with this character."""
        self._value = JsonValue()
        if self._key in self._keys:
            self._has_arguments = char == "{"
            self.broken = not self._has_arguments
        elif self._key == "name":
            self.broken = char != '"'

    def _read(self, value: JsonValue, piece: str) -> None:
        if self._key in self._keys:
            self.arguments += piece
        elif self._key in (None, "name"):
            self._text += piece
        if value.broken:
            self.broken = True
        elif value.done:
            self._value = None
            self._end_value()

    def _end_value(self) -> None:
        text, self._text = self._text, ""
        if self._key is None:
            self._key, self._expected = json.loads(text), ":"
            doubled = self._key == "name" and self.name
            self.broken = bool(doubled or (self._key in self._keys and self._has_arguments))
            return
        if self._key == "name":
            self.name = json.loads(text)
            self.broken = not (self.name and self.name.isprintable())
        self._key, self._expected = None, ",}"

    def _end(self) -> None:
        if self.name and not self._has_arguments and not self._needs_arguments:
            self.arguments, self._has_arguments = "{}", True
        self.done = self.is_begun
        self.broken = not self.done


class HeadedCall:
    """A head that names the function, and a JSON object of arguments.

    head: what stands before the object; the one of its groups that matches is the name.
    """

    def __init__(self, head: re.Pattern[str]) -> None:
        self.name = ""
        self.arguments = ""
        self.done = False
        self.broken = False
        self._head = head
        self._seen = ""
        self._value = JsonValue()

    @property
    def is_begun(self) -> bool:
        return bool(self.name)

    def take(self, text: str, index: int) -> int:
        if not self.name:
            index = self._take_head(text, index)
        if self.name and index < len(text):
            end = self._value.take(text, index)
            self.arguments += text[index:end]
            self.done, self.broken = self._value.done, self._value.broken
            index = end
        return index

    def _take_head(self, text: str, index: int) -> int:
        end = text.find("{", index)
        stop = min(len(text) if end < 0 else end, index + _MAX_HEAD - len(self._seen))
        self._seen += text[index:stop]
        if stop == end:
            match = self._head.fullmatch(self._seen)
            name = next(filter(None, match.groups()), "") if match else ""
            self.name = name if name.isprintable() else ""
            self.broken = not self.name
        elif len(self._seen) == _MAX_HEAD:
            self.broken = True
        return stop
