"""A caller who has nothing to do with what a test does to the server, and must not notice it."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from mili.client import Client
from tests.streams import PATIENCE, Job, Told, told


class Bystander:
    """Streams the same generation again and again, in a thread: each must be like the first."""

    def __init__(self, address: str, job: Job) -> None:
        self._address = address
        self._job = job
        self._progress = threading.Condition()
        self._num_tokens = 0
        self._error: BaseException | None = None
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="bystander", daemon=True)

    def advance(self) -> None:
        """Wait for the next token but one: the one that was on its way says nothing."""
        with self._progress:
            wanted = self._num_tokens + 2
            moved = self._progress.wait_for(
                lambda: self._num_tokens >= wanted or self._error is not None, PATIENCE
            )
        assert self._error is None, f"a stream that had nothing to do with it: {self._error!r}"
        assert moved, "a stream that had nothing to do with it hangs"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leaving = True
        self._thread.join()
        if error is None:
            assert self._error is None, f"{self._error!r}"

    def _run(self) -> None:
        try:
            with Client(self._address, timeout=PATIENCE) as client:
                first = self._read(client)
                while not self._leaving:
                    again = self._read(client)
                    assert again == first, f"{again} after {first}"
        except BaseException as error:
            self._error = error
        finally:
            with self._progress:
                self._progress.notify_all()

    def _read(self, client: Client) -> Told:
        stream = client.stream(**self._job.options())
        for event in stream.events():
            with self._progress:
                self._num_tokens += event.delta.num_tokens
                self._progress.notify_all()
        return told(stream.generation)
