"""Tokens that nobody can read, of which equal prefixes stay equal.

Owns the secret of one recording, which no file holds, and the places of tokens in a snapshot. Each
token becomes 32 bits of a keyed hash of all tokens up to it in its namespace: a radix tree, which
only compares tokens behind equal prefixes, decides the same.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterator
from hashlib import blake2b

from mili.router.radix_tree import TOKEN_BYTES
from mili.router.snapshot import Cell, Fields, Tokens

_STATE_BYTES = 16


class Mask:
    """The same for all that is to stay comparable: one recording."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def sequence(self, namespace: bytes, tokens: Tokens) -> Tokens:
        """Mask a whole sequence, also what lies behind its length."""
        _, masked = self._extend(self._start(namespace), tokens.ids.tobytes())
        return Tokens(array("I", masked), tokens.length)

    def cells(self, cells: list[Cell]) -> list[Cell]:
        """Mask every token of a snapshot: those of requests, and those of the tree."""
        masked = cells.copy()
        nodes = [number for number, cell in enumerate(cells) if cell.kind == "radix_tree:Node"]
        for number in nodes:
            fields = fields_of(cells[number])
            if fields["parent"] is None:
                self._branch(number, self._start(fields["namespace"]), masked)
        for number in nodes:
            _name_children(fields_of(cells[number])["children"], masked)
        for cell in cells:
            if cell.kind == "cache_memory:CacheMemory":
                self._memory(fields_of(cell), masked)
        for fields in requests_of(cells):
            (tokens,) = cells[fields["token_ids"]].items
            tokens = self.sequence(fields["namespace"], tokens)
            masked[fields["token_ids"]] = Cell("tokens", [tokens])
        return masked

    def _branch(self, top: int, state: bytes, masked: list[Cell]) -> None:
        """The keys of a node and of all below it."""
        stack = [(top, state)]
        while stack:
            number, state = stack.pop()
            kind, items, keys = masked[number]
            assert keys is not None
            place = keys.index("key")
            state, key = self._extend(state, items[place])
            masked[number] = Cell(kind, [*items[:place], key, *items[place + 1 :]], keys)
            children = masked[items[keys.index("children")]]
            stack += [(child, state) for child in children.items]

    def _memory(self, fields: Fields, masked: list[Cell]) -> None:
        """Fingerprints of prefixes: a short prompt could be guessed from one."""
        blocks, cached, evicted = (
            masked[fields[name]] for name in ("_fingerprints", "_num_cached", "_evicted")
        )
        hidden = [*map(self._fingerprint, blocks.items)]
        masked[fields["_fingerprints"]] = blocks._replace(items=hidden)
        for name, cell in (("_num_cached", cached), ("_evicted", evicted)):
            keys = [*map(self._fingerprint, cell.keys or [])]
            masked[fields[name]] = cell._replace(keys=keys)

    def _fingerprint(self, value: int) -> int:
        """The low 32 bits are hidden; above them, if there is something, is a namespace."""
        if not value:
            return 0
        low = (value & 0xFFFFFFFF).to_bytes(TOKEN_BYTES, "little")
        digest = blake2b(low, key=self._secret, digest_size=TOKEN_BYTES).digest()
        return value >> 32 << 32 | int.from_bytes(digest, "little")

    def _start(self, namespace: bytes) -> bytes:
        return blake2b(namespace, key=self._secret, digest_size=_STATE_BYTES).digest()

    def _extend(self, state: bytes, token_ids: bytes) -> tuple[bytes, bytes]:
        """Mask tokens that follow `state`; return the state behind them, too."""
        masked = bytearray()
        for at in range(0, len(token_ids), TOKEN_BYTES):
            data = state + token_ids[at : at + TOKEN_BYTES]
            state = blake2b(data, digest_size=_STATE_BYTES).digest()
            masked += state[:TOKEN_BYTES]  # the rest of the state is never told
        return state, bytes(masked)


def fields_of(cell: Cell) -> Fields:
    """An object's fields by name: atoms, and Refs to other cells."""
    assert cell.keys is not None
    return dict(zip(cell.keys, cell.items, strict=True))


def requests_of(cells: list[Cell]) -> Iterator[Fields]:
    """The fields of every request in a snapshot."""
    return (fields_of(cell) for cell in cells if cell.kind == "request:Request")


def _name_children(number: int, masked: list[Cell]) -> None:
    """Children are found by the first block of their key."""
    kind, children, names = masked[number]
    keys = [fields_of(masked[child])["key"] for child in children]
    firsts = [key[: len(name)] for name, key in zip(names or [], keys, strict=True)]
    masked[number] = Cell(kind, children, firsts)
