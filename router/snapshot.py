"""A copy of plain objects at one moment, as data: freeze, thaw, and the copy's JSON.

Owns the walk over objects that refer to each other in any way. Does not know what they are for.
Plain means: numbers, texts, bytes, the standard containers, and objects of the router's own classes
that hold nothing else. No code is in the data, and thawing runs and imports none.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

PACKAGE = "mili.router."

Fields: TypeAlias = dict[str, Any]


class Ref(int):
    """The index of a cell."""


class Tokens(NamedTuple):
    """The first `length` of a sequence that only ever grows: shared, not copied."""

    ids: array[int]
    length: int


class Cell(NamedTuple):
    """One object. items: what it holds, atoms and Refs; keys: of a dict, or names of fields."""

    kind: str
    items: list[Any]
    keys: list[Any] | None = None


_ATOMS = frozenset({type(None), bool, int, float, str, bytes, Ref, Tokens})
_LISTS: dict[str, type] = {"list": list, "deque": deque}
_WHOLES: dict[str, type] = {"tuple": tuple, "frozenset": frozenset}
_DICTS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_KINDS: dict[type, str] = {cls: kind for kind, cls in (_LISTS | _WHOLES | _DICTS).items()}


def freeze(
    root: object,
    *,
    omit: frozenset[type] = frozenset(),
    fields_of: Mapping[type, Callable[[Any], Fields]] | None = None,
) -> list[Cell]:
    """Copy all that can be reached from `root`, which is the first cell.

    omit: objects of these types become None. fields_of: what objects of a type hold, where that is
    not simply all of their fields. Raises TypeError for what is not plain.
    """
    special = fields_of or {}
    objects = [root]
    index = {id(root): Ref(0)}

    def refer(value: Any) -> object:  # noqa: ANN401
        """An atom stays what it is; of anything else, which cell it is or will be."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind in omit:
            return None
        ref = index.get(id(value))
        if ref is None:
            ref = index[id(value)] = Ref(len(objects))
            objects.append(value)  # which keeps it alive, and its id its own
        return ref

    def refer_all(values: Any) -> list[Any]:  # noqa: ANN401 - any iterable that may be read twice
        return list(values) if _ATOMS.issuperset(map(type, values)) else [*map(refer, values)]

    cells: list[Cell] = []
    for value in objects:
        kind: Any = type(value)
        if kind in special:
            fields = special[kind](value)
            cells.append(Cell(_name(kind), refer_all(fields.values()), [*fields]))
        elif kind in _DICTS.values():
            assert isinstance(value, dict)
            cells.append(Cell(_KINDS[kind], refer_all(value.values()), refer_all(value)))
        elif kind in _KINDS:
            cells.append(Cell(_KINDS[kind], refer_all(value)))
        elif fields_in := _fields(kind):
            names, read = fields_in
            cells.append(Cell(_name(kind), refer_all(read(value)), names))
        else:
            cells.append(_odd_cell(value, refer_all))
    return cells


def _odd_cell(value: Any, refer_all: Callable[[Any], list[Any]]) -> Cell:  # noqa: ANN401
    """What there are few of."""
    match value:
        case array():
            return Cell("tokens", [Tokens(value, len(value))])
        case bytearray():
            return Cell("bytearray", [bytes(value)])
        case Enum():
            return Cell(f"enum {_name(value.__class__)}", [value.name])
        case FunctionType():
            return Cell(f"function {_name(value)}", [])
        case tuple():
            return Cell(f"tuple {_name(value.__class__)}", refer_all(value))
    if not hasattr(value, "__dict__"):
        raise TypeError(f"{type(value)} is nothing plain")
    kind: Any = type(value)
    fields = vars(value)
    return Cell(_name(kind), refer_all(fields.values()), [*fields])


def thaw(cells: list[Cell]) -> list[Any]:
    """Make the objects anew, the first of them the root. Raises ValueError for bad cells."""
    made: list[Any] = [None] * len(cells)
    try:
        for number, cell in enumerate(cells):
            made[number] = _shell(cell)
        for number in range(len(cells)):
            if made[number] is None:
                made[number] = _whole(number, cells, made)
        for thing, cell in zip(made, cells, strict=True):
            _fill(thing, cell, made)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"the snapshot is damaged, or of another version: {error}") from error
    return made


def to_json(value: object) -> Any:  # noqa: ANN401 - JSON
    """An atom as JSON knows it."""
    match value:
        case Ref():
            return [int(value)]
        case bytes():
            return {"hex": value.hex()}
        case Tokens(ids, length):
            return {"tokens": ids.tobytes().hex(), "length": length}
        case _:
            return value


def from_json(value: Any) -> object:  # noqa: ANN401 - JSON
    """The atom that to_json was given."""
    match value:
        case [index]:
            return Ref(index)
        case {"hex": text}:
            return bytes.fromhex(text)
        case {"tokens": text, "length": length}:
            return Tokens(array("I", bytes.fromhex(text)), length)
        case _:
            return value


@cache
def _name(thing: Any) -> str:  # noqa: ANN401 - a class or a function
    if not thing.__module__.startswith(PACKAGE):
        raise TypeError(f"{thing.__module__}.{thing.__qualname__} is nothing plain")
    return f"{thing.__module__.removeprefix(PACKAGE)}:{thing.__qualname__}"


def _find(name: str) -> Any:  # noqa: ANN401 - a class or a function of the router
    module, _, qualname = name.partition(":")
    found = getattr(sys.modules[PACKAGE + module], qualname)  # loaded by whoever can use it
    if found.__module__ != PACKAGE + module:
        raise TypeError(f"{name} is not the router's own")
    return found


@cache
def _fields(kind: Any) -> tuple[list[str], Callable[[object], Any]] | None:  # noqa: ANN401
    """The slots of a class, and how to read them all; None where it has none, or is no such one."""
    names = [name for cls in kind.__mro__ for name in getattr(cls, "__slots__", ())]
    return (names, attrgetter(*names)) if len(names) > 1 else None


def _shell(cell: Cell) -> object:
    """What others may refer to before it is filled; None for what is made whole."""
    kind, _, name = cell.kind.partition(" ")
    if name or kind in _WHOLES:
        return None
    if kind in _LISTS or kind in _DICTS:
        return (_LISTS | _DICTS)[kind]()
    match kind, cell.items:
        case "tokens", [Tokens(ids, length)]:
            return ids[:length]
        case "bytearray", [bytes(content)]:
            return bytearray(content)
    cls = _find(kind)
    if not isinstance(cls, type) or issubclass(cls, BaseException):
        raise TypeError(f"{kind} is nothing plain")
    return object.__new__(cls)


def _whole(number: int, cells: list[Cell], made: list[Any]) -> object:
    """A tuple, a frozenset, an enum's member or a function."""
    cell = cells[number]
    kind, _, name = cell.kind.partition(" ")
    if kind == "function":
        return _find(name)
    if kind == "enum":
        return _find(name)[cell.items[0]]
    for item in cell.items:
        if type(item) is Ref and made[item] is None:
            made[item] = _whole(item, cells, made)
    items = _resolve(cell.items, made)
    return _find(name)._make(items) if name else _WHOLES[kind](items)


def _fill(thing: Any, cell: Cell, made: list[Any]) -> None:  # noqa: ANN401 - any shell
    items = _resolve(cell.items, made)
    if isinstance(thing, (list, deque)):
        thing.extend(items)
    elif isinstance(thing, dict):
        thing.update(zip(_resolve(cell.keys or [], made), items, strict=True))
    elif cell.keys is not None:
        for name, item in zip(cell.keys, items, strict=True):
            object.__setattr__(thing, name, item)


def _resolve(items: list[Any], made: list[Any]) -> list[Any]:
    return [made[item] if type(item) is Ref else item for item in items]
