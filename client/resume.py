"""How a stream goes on after its connection was lost.

Owns what is known of the stream on the server, which losses can be mended, and how long to wait.
Does not know how messages travel, and does not wait itself.
"""

from __future__ import annotations

import time

import grpc

from mili.client.errors import MiliError
from mili.v1 import inference_pb2 as pb

# Seconds between two tries.
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 2.0
# What gRPC says of a lost connection. The server's own errors carry a reason.
_LOST = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})


class Resumption:
    """The place where a stream goes on.

    window: seconds that the server keeps what is not read, None where a loss is final. token and
    after_sequence: where an earlier call's stream is taken up.
    """

    def __init__(
        self,
        window: float | None,
        token: str = "",
        after_sequence: int = 0,
    ) -> None:
        self.token = token
        self.last_sequence = after_sequence
        self._window = window or 0.0
        self._lost_at: float | None = None
        self._delay = 0.0

    def takes(self, event: pb.StreamEvent) -> bool:
        """Note an event; False for one that had come before."""
        self._lost_at, self._delay = None, 0.0
        if event.HasField("started"):
            self.token = event.started.resume_token
        if 0 < event.sequence <= self.last_sequence:
            return False
        self.last_sequence = event.sequence
        return True

    def delay(self, error: MiliError) -> float:
        """Seconds until the next `request`. Raises the error where there is no point in one."""
        mendable = error.reason == "SLOW_READER" or (not error.reason and error.code in _LOST)
        if not (self._window and self.token and mendable):
            raise error
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        if now + self._delay > self._lost_at + self._window:
            raise error
        delay = self._delay
        self._delay = min(max(_FIRST_DELAY, 2 * self._delay), _LONGEST_DELAY)
        return delay

    def request(self) -> pb.AttachStreamRequest:
        return pb.AttachStreamRequest(
            resume_token=self.token,
            after_sequence=self.last_sequence,
        )
