"""Find stop sequences in text that arrives in pieces.

Owns the rule which sequence ends an output, and holds back no more text than that rule needs. Does
not know tokens or requests.
"""

from __future__ import annotations

import re
from array import array
from functools import lru_cache

MAX_STOP_SEQUENCES = 64
MAX_STOP_SEQUENCE_BYTES = 1024


class StopMatcher:
    """Watches one text for any of some sequences, in time linear in the text.

    The match that ends first wins; of those that end at the same character, the longest. Raises
    ValueError for too many sequences, and for an empty or too long one. A set of sequences is
    prepared once and shared; the largest takes 0.1 s to prepare.
    """

    def __init__(self, sequences: tuple[str, ...]) -> None:
        if len(sequences) > MAX_STOP_SEQUENCES:
            raise ValueError(f"there may be at most {MAX_STOP_SEQUENCES} stop sequences")
        if "" in sequences:
            raise ValueError("a stop sequence must not be empty")
        if any(len(sequence.encode()) > MAX_STOP_SEQUENCE_BYTES for sequence in sequences):
            raise ValueError(f"a stop sequence may have at most {MAX_STOP_SEQUENCE_BYTES} bytes")
        self._automaton = _automaton(sequences)
        self._node = 0
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Take more text; return the text that can no longer be part of a match, and the match.

        With a match that is all the text before it, and what follows it is dropped. While may_stop
        is false, a match that ends is ordinary text; one that has only begun may still end later.
        """
        automaton, node = self._automaton, self._node
        seen = self._held + text
        index = len(self._held)
        while index < len(seen):
            if node == 0:
                index = automaton.skip(seen, index)
                if index == len(seen):
                    break
            node = automaton.step(node, seen[index])
            index += 1
            if may_stop and automaton.match_length[node]:
                begin = index - automaton.match_length[node]
                self._node, self._held = 0, ""
                return seen[:begin], seen[begin:index]
        certain = len(seen) - automaton.open_length[node]
        self._node, self._held = node, seen[certain:]
        return seen[:certain], None

    def flush(self) -> str:
        """No more text comes: return what was held back."""
        held, self._held, self._node = self._held, "", 0
        return held


class Automaton:
    """The automaton of Aho and Corasick (CACM 18(6), 1975). Node 0 is the root.

    A node stands for a prefix of a sequence; a text leads to the node of its longest suffix that is
    such a prefix. A sequence adds its nodes in a row, so that all edges but one a sequence go to
    the next number and need no dictionary: the largest set takes 0.6 MB, not 12.
    """

    def __init__(self, sequences: tuple[str, ...]) -> None:
        first = "".join({sequence[0] for sequence in sequences})
        self._beginning = re.compile(f"[{re.escape(first)}]" if first else "(?!)")
        self._entry = "\0"  # the character on the edge into each node
        self._in_row = bytearray(2)  # 1: that edge comes from the node before; one 0 at the end
        self._branches: dict[tuple[int, str], int] = {}  # the other edges
        parents, depths = array("I", [0]), array("H", [0])
        ends = {self._add(sequence, parents, depths) for sequence in sequences}

        # Per node: the node of its longest proper suffix; the length of the longest sequence that
        # ends in it; the length of the longest suffix that more text can make into a match.
        self._fallback = array("I", bytes(4 * len(depths)))
        self.match_length = array("H", bytes(2 * len(depths)))
        self.open_length = array("H", bytes(2 * len(depths)))
        inner = set(parents)
        for node in sorted(range(1, len(depths)), key=depths.__getitem__):
            parent, depth = parents[node], depths[node]
            fallback = self.step(self._fallback[parent], self._entry[node]) if parent else 0
            self._fallback[node] = fallback
            self.match_length[node] = depth if node in ends else self.match_length[fallback]
            self.open_length[node] = depth if node in inner else self.open_length[fallback]

    def step(self, node: int, character: str) -> int:
        """Return the node that the text leads to after one more character."""
        while True:
            child = self._child(node, character)
            if child or not node:
                return child
            node = self._fallback[node]

    def skip(self, text: str, index: int) -> int:
        """Return the next index at which a sequence can begin, or the text's length."""
        found = self._beginning.search(text, index)
        return found.start() if found else len(text)

    def _child(self, node: int, character: str) -> int:
        following = node + 1
        if self._in_row[following] and self._entry[following] == character:
            return following
        return self._branches.get((node, character), 0)

    def _add(self, sequence: str, parents: array[int], depths: array[int]) -> int:
        """Add the nodes that a sequence lacks; return its last."""
        node, shared = 0, 0
        for character in sequence:
            child = self._child(node, character)
            if not child:
                break
            node, shared = child, shared + 1
        for character in sequence[shared:]:
            child = len(parents)
            if child == node + 1:
                self._in_row[child] = 1
            else:
                self._branches[node, character] = child
            self._in_row.append(0)
            parents.append(node)
            depths.append(depths[node] + 1)
            node = child
        self._entry += sequence[shared:]
        return node


_automaton = lru_cache(maxsize=64)(Automaton)
