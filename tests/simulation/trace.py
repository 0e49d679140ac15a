"""Trace: everything that happens in a simulation, as one digest.

Owns the digest and the printing. Does not know what a happening means. Two runs with the same
digest had the same frames, outputs and faults at the same times.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b

from mili.internal.v1.step_pb2 import RouterFrame, WorkerFrame
from tests.simulation.timeline import Timeline


class Trace:
    """Notes with the time at which they were made; `totals` counts what is worth a sum."""

    def __init__(self, timeline: Timeline, *, verbose: bool) -> None:
        self.totals: Counter[str] = Counter()
        self._timeline = timeline
        self._verbose = verbose
        self._digest = blake2b(digest_size=16)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def note(self, text: str) -> None:
        """Something happened."""
        line = f"{self._timeline.now:.6f} {text}"
        self._digest.update(line.encode())
        if self._verbose:
            print(line)

    def frame(self, text: str, kind: type[RouterFrame | WorkerFrame], data: bytes) -> None:
        """A frame arrived somewhere."""
        self._digest.update(f"{self._timeline.now:.6f} {text} ".encode() + data)
        if self._verbose:
            print(f"{self._timeline.now:.6f} {text}: {_describe(kind, data)}")


def _describe(kind: type[RouterFrame | WorkerFrame], data: bytes) -> str:
    try:
        frame = kind.FromString(data)
    except Exception:
        return f"{len(data)} bytes of garbage"
    body = frame.WhichOneof("body")
    detail = ""
    if body == "step":
        step = frame.step
        rows = zip(step.rows, step.starts, step.num_tokens, strict=False)
        detail = f" {step.step} rows {[*rows]} admits {[each.row for each in step.admissions]}"
    elif body == "result":
        detail = f" {frame.result.step} tokens {[*frame.result.token_ids]}"
    elif body in ("hello", "heartbeat", "failure", "goodbye"):
        detail = f" {getattr(frame, body)}".replace("\n", " ")[:160]
    return f"{frame.epoch % 10_000}/{frame.sequence} {body}{detail}"
