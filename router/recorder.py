"""The flight recorder: the last decisions of every scheduler, and the file they go to when asked.

Owns the tapes and the file's format. Does not know when to write, nor what decisions mean. The file
has no text, no token and no sampling setting: mask.py sees to what looks like tokens. It is JSON,
one line for the header and one for each worker group, in gzip.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from mili.router.mask import Mask
from mili.router.snapshot import Cell, Tokens, from_json, to_json
from mili.router.tape import Arrival, Call, Named, Recorded, Section, StepDone, Tape

FORMAT = "mili-recording-1"
# Tapes that are kept, those of lost worker groups included.
MAX_TAPES = 128


class Reel(NamedTuple):
    """What was recorded of one worker group: a state, and all calls since."""

    group: str
    state: list[Cell]
    calls: list[Call]


class Recorder:
    """length: decisions of each worker group that are remembered at least."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._tapes: dict[str, Tape] = {}

    def watch(self, group: str, scheduler: Recorded) -> None:
        """Record a new scheduler from now on; an earlier one of the group is forgotten."""
        tape = Tape(scheduler, self._length)
        scheduler.tape = scheduler.kv.tape = tape
        self._tapes.pop(group, None)
        self._tapes[group] = tape
        if len(self._tapes) > MAX_TAPES:
            del self._tapes[next(iter(self._tapes))]

    def reels(self) -> list[Reel]:
        """All that is remembered now. Quick: it can be written later, on another thread."""
        return [_reel(group, tape.sections()) for group, tape in self._tapes.items()]


def write(path: Path, reels: Sequence[Reel]) -> None:
    """Write a recording that only its owner can read. Raises OSError."""
    mask = Mask()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as raw, gzip.open(raw, "wt", compresslevel=3) as file:
        file.write(json.dumps({"format": FORMAT, "version": version("mili")}) + "\n")
        for reel in reels:
            calls = [_written(call, mask) for call in reel.calls]
            state = _cells_to_json(mask.cells(reel.state))
            line = {"group": reel.group, "state": state, "calls": calls}
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def read(path: Path) -> Iterator[Reel]:
    """Read a recording, group after group. Raises OSError, and ValueError for another file."""
    try:
        with gzip.open(path, "rt") as file:
            if json.loads(file.readline())["format"] != FORMAT:
                raise ValueError(f"{path} is a recording of another version of MILI")
            for line in file:
                reel = json.loads(line)
                calls = [_read_call(call) for call in reel["calls"]]
                yield Reel(reel["group"], _cells_from_json(reel["state"]), calls)
    except (gzip.BadGzipFile, EOFError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no recording, or not all of one") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no recording: {error}") from error


def _reel(group: str, sections: Sequence[Section]) -> Reel:
    return Reel(group, sections[0].state, [call for each in sections for call in each.calls])


def _written(call: Call, mask: Mask) -> list[Any]:
    # Tokens are of the namespace beside them.
    values = (*call.arguments, *call.named.values())
    namespace = next((value for value in values if isinstance(value, bytes)), b"")
    arguments = [_argument_to_json(value, namespace, mask) for value in call.arguments]
    named = {name: _argument_to_json(value, namespace, mask) for name, value in call.named.items()}
    return [call.name, arguments, named, call.balances, to_json(call.outcome)]


def _argument_to_json(value: object, namespace: bytes, mask: Mask) -> Any:  # noqa: ANN401 - JSON
    match value:
        case Arrival(cells):
            return {"arrival": _cells_to_json(mask.cells(cells))}
        case Named(request_id):
            return {"request": request_id}
        case StepDone():
            return {"done": value}
        case Tokens():
            return to_json(mask.sequence(namespace, value))
        case _:
            return to_json(value)


def _read_call(data: list[Any]) -> Call:
    name, arguments, named, balances, outcome = data
    read_named = {key: _argument_from_json(value) for key, value in named.items()}
    # Lists of ids are as they were, and no atom is a list.
    outcome = outcome if isinstance(outcome, list) else from_json(outcome)
    return Call(name, tuple(map(_argument_from_json, arguments)), read_named, balances, outcome)


def _argument_from_json(value: Any) -> object:  # noqa: ANN401 - JSON
    match value:
        case {"arrival": cells}:
            return Arrival(_cells_from_json(cells))
        case {"request": request_id}:
            return Named(request_id)
        case {"done": [step, microseconds, faults]}:
            return StepDone(step, microseconds, tuple(faults))
        case _:
            return from_json(value)


def _cells_to_json(cells: list[Cell]) -> list[Any]:
    return [
        [cell.kind, [*map(to_json, cell.items)], cell.keys and [*map(to_json, cell.keys)]]
        for cell in cells
    ]


def _cells_from_json(data: list[Any]) -> list[Cell]:
    return [
        Cell(kind, [*map(from_json, items)], keys and [*map(from_json, keys)])
        for kind, items, keys in data
    ]
