"""One JSON value that arrives in pieces.

Owns the grammar (RFC 8259), to the character. Does not keep the value, nor know what it means.
"""

from __future__ import annotations

import re
from enum import Enum

WHITE_SPACE = " \t\n\r"

_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_ATOM_RUN = re.compile(r"[-+.0-9A-Za-z]*")
_ATOM = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")
_ESCAPED = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")


class _Next(Enum):
    """What may come."""

    VALUE = 1
    VALUE_OR_END = 2  # of an array that is empty so far
    KEY = 3
    KEY_OR_END = 4  # of an object that is empty so far
    COLON = 5
    COMMA_OR_END = 6
    STRING = 7
    ATOM = 8  # a number or one of the three names


class JsonValue:
    """Reads from the value's first character to its last; done and broken end it.

    A number is done when a character comes that is none of its own.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._next = _Next.VALUE
        self._containers: list[str] = []
        self._is_key = False
        self._escape = ""  # the characters of an unfinished one
        self._atom = ""

    def take(self, text: str, index: int) -> int:
        """Read on from there; return the index of the first character that was not taken."""
        while index < len(text) and not (self.done or self.broken):
            if self._next is _Next.STRING:
                index = self._string(text, index)
            elif self._next is _Next.ATOM:
                index = self._in_atom(text, index)
            elif text[index] in WHITE_SPACE and (self._containers or self._next is _Next.COLON):
                index += 1
            else:
                index += self._token(text[index])
        return index

    def _string(self, text: str, index: int) -> int:
        if self._escape:
            return index + self._escaped(text[index])
        run = _STRING_RUN.match(text, index)
        assert run is not None
        index = run.end()
        if index == len(text):
            return index
        if text[index] == "\\":
            self._escape = "\\"
        elif text[index] == '"':
            self._end_value()
        else:
            self.broken = True
            return index
        return index + 1

    def _escaped(self, char: str) -> bool:
        if self._escape == "\\":
            self.broken = char not in _ESCAPED and char != "u"
            self._escape = "\\u" if char == "u" else ""
        else:
            self.broken = char not in _HEX
            self._escape += char
            if len(self._escape) == len("\\u0000"):
                self._escape = ""
        return not self.broken

    def _in_atom(self, text: str, index: int) -> int:
        run = _ATOM_RUN.match(text, index)
        assert run is not None
        self._atom += run.group()
        if run.end() < len(text):
            if _ATOM.fullmatch(self._atom):
                self._atom = ""
                self._end_value()
            else:
                self.broken = True
        return run.end()

    def _token(self, char: str) -> bool:
        """Take a character outside of strings and atoms; return whether it fits."""
        state, inner = self._next, self._containers[-1] if self._containers else ""
        if char in "]}" and state in (_Next.COMMA_OR_END, _Next.VALUE_OR_END, _Next.KEY_OR_END):
            self.broken = inner != ("[" if char == "]" else "{")
            if not self.broken:
                self._containers.pop()
                self._end_value()
        elif char == "," and state is _Next.COMMA_OR_END:
            self._next = _Next.KEY if inner == "{" else _Next.VALUE
        elif char == ":" and state is _Next.COLON:
            self._next = _Next.VALUE
        elif char == '"' and state in (_Next.KEY, _Next.KEY_OR_END):
            self._next, self._is_key = _Next.STRING, True
        elif state in (_Next.VALUE, _Next.VALUE_OR_END):
            return self._begin_value(char)
        else:
            self.broken = True
        return not self.broken

    def _begin_value(self, char: str) -> bool:
        if char == '"':
            self._next = _Next.STRING
        elif char in "[{":
            self._containers.append(char)
            self._next = _Next.VALUE_OR_END if char == "[" else _Next.KEY_OR_END
        elif char in "-0123456789tfn":
            self._next = _Next.ATOM
            return False  # it takes the character itself
        else:
            self.broken = True
        return not self.broken

    def _end_value(self) -> None:
        if self._is_key:
            self._is_key, self._next = False, _Next.COLON
        elif self._containers:
            self._next = _Next.COMMA_OR_END
        else:
            self.done = True
