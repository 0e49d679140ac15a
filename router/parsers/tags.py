"""Tags in text that arrives in pieces.

Owns how they are found, and how much of a text's end may yet become one. Does not know what they
mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# A model writes two line breaks next to a tag, and few spaces. Of more, it would cost time to wait.
MAX_LINE_BREAKS = 8
MAX_SPACES = 64


class Found(NamedTuple):
    """text[start:end] is a tag."""

    start: int
    end: int


def find_first(text: str, tags: Iterable[str]) -> Found | None:
    """Return the place of the tag that begins first; no tag may begin with another."""
    places = [Found(start, start + len(tag)) for tag in tags if (start := text.find(tag)) >= 0]
    return min(places, default=None)


def certain_length(text: str, tags: Iterable[str]) -> int:
    """Return how many characters at its beginning no more text can make a part of a tag.

    Nor a part of the line breaks before it, which go with a tag.
    """
    held = max((_begun(text, tag) for tag in tags), default=0)
    return len(without_breaks(text[: len(text) - held]))


def without_breaks(text: str) -> str:
    """Return text without the line breaks at its end that go with the tag behind it."""
    breaks = len(text) - len(text.rstrip("\n"))
    return text[: len(text) - min(breaks, MAX_LINE_BREAKS)]


def _begun(text: str, tag: str) -> int:
    """Return the length of the longest end of the text that the tag begins with."""
    start = max(0, len(text) - len(tag) + 1)
    while (start := text.find(tag[0], start)) >= 0:
        if tag.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
