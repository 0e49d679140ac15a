"""The reasoning block of an output, told from the rest of it.

Owns where the block begins and ends. Does not know tool calls, tokens or requests.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from mili.router.parsers.tags import MAX_SPACES, certain_length, find_first, without_breaks


class ReasoningTags(NamedTuple):
    """What a model writes around its reasoning, as in <think> and </think>."""

    open: str
    close: str


class Split(NamedTuple):
    """A piece of text, taken apart."""

    reasoning: str
    content: str


class _Place(Enum):
    BEFORE = 1  # nothing but white space so far
    INSIDE = 2
    BEHIND = 3  # no more than line breaks since the block closed
    CONTENT = 4


class ReasoningSplitter:
    """An output may begin with one block; a tag later in it is text as any.

    opened: the prompt ends within the block. typed: leave out the tags, and the line breaks next to
    them; else reasoning and content together are the text as it is.
    """

    def __init__(self, tags: ReasoningTags, *, opened: bool, typed: bool) -> None:
        self._tags = tags
        self._typed = typed
        self._place = _Place.INSIDE if opened else _Place.BEFORE
        self._begun = False  # with text in the block
        self._held = ""

    @property
    def inside(self) -> bool:
        """Whether the block is open."""
        return self._place is _Place.INSIDE

    def push(self, text: str) -> Split:
        """Take more text; return what of it is certain."""
        if self._place is _Place.CONTENT:
            return Split("", text)
        text, self._held = self._held + text, ""
        opening = reasoning = ""
        if self._place is _Place.BEFORE:
            opening, text = self._before(text)
        if self._place is _Place.INSIDE:
            reasoning, text = self._inside(text)
        if self._place is _Place.BEHIND:
            text = self._behind(text)
        return Split(opening + reasoning, text)

    def flush(self) -> Split:
        """No more text comes: return what was held back."""
        held, self._held = self._held, ""
        return Split(held, "") if self._place is _Place.INSIDE else Split("", held)

    def _before(self, text: str) -> Split:
        """Look for the opening tag; return it where it shows, and the rest."""
        tag, begin = self._tags.open, text.lstrip()
        if len(text) - len(begin) > MAX_SPACES:
            self._place = _Place.CONTENT
            return Split("", text)
        if begin.startswith(tag):
            self._place = _Place.INSIDE
            end = len(text) - len(begin) + len(tag)
            return Split("" if self._typed else text[:end], text[end:])
        if tag.startswith(begin):
            self._held = text
            return Split("", "")
        self._place = _Place.CONTENT
        return Split("", text)

    def _inside(self, text: str) -> Split:
        """Return the reasoning, and what follows its end."""
        found = find_first(text, (self._tags.close,))
        if found is not None:
            self._place = _Place.BEHIND
            reasoning, text = text[: found.start], text[found.end :]
            if self._typed:
                return Split(self._trimmed(without_breaks(reasoning)), text)
            return Split(reasoning + self._tags.close, text)
        certain = certain_length(text, (self._tags.close,))
        self._held = text[certain:]
        return Split(self._trimmed(text[:certain]), "")

    def _trimmed(self, reasoning: str) -> str:
        if self._typed and not self._begun:
            reasoning = reasoning.lstrip("\n")
        self._begun = self._begun or bool(reasoning)
        return reasoning

    def _behind(self, text: str) -> str:
        if self._typed:
            text = text.lstrip("\n")
        if text:
            self._place = _Place.CONTENT
        return text
