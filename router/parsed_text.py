"""What the parsers of a model make of its text: values only.

Owns how pieces become one. Does not know how text is parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias


class ToolCallPart(NamedTuple):
    """More of one call. id and name are set in its first part only.

    arguments: a fragment of their JSON text.
    """

    position: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedText:
    """A piece of an output, in its parts. len(): of all of it, in characters."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()

    def __len__(self) -> int:
        calls = sum(len(part.arguments) + len(part.name) for part in self.tool_calls)
        return len(self.content) + len(self.reasoning) + calls


# Plain, or parsed for a request that asked for it; all pieces of one output are of the same kind.
Text: TypeAlias = str | ParsedText


def join(pieces: Sequence[Text]) -> Text:
    """Return the pieces as one."""
    plain = [piece for piece in pieces if isinstance(piece, str)]
    parsed = [piece for piece in pieces if isinstance(piece, ParsedText)]
    if not parsed:
        return "".join(plain)
    assert not any(plain), "an output is parsed, or it is not"
    return ParsedText(
        "".join(piece.content for piece in parsed),
        "".join(piece.reasoning for piece in parsed),
        _join_calls(part for piece in parsed for part in piece.tool_calls),
    )


def _join_calls(parts: Iterable[ToolCallPart]) -> tuple[ToolCallPart, ...]:
    first: dict[int, ToolCallPart] = {}
    arguments: dict[int, list[str]] = {}
    for part in parts:
        first.setdefault(part.position, part)
        arguments.setdefault(part.position, []).append(part.arguments)
    return tuple(
        part._replace(arguments="".join(arguments[position])) for position, part in first.items()
    )
