"""How a pull tells how far it is: a bar on a terminal, a line now and then elsewhere.

Owns the display. Does not know what is being done.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import structlog

log = structlog.get_logger()


class Progress(Protocol):
    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` bytes of `what` are finished."""


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Yield a Progress that writes to stderr."""
    if sys.stderr.isatty():
        with show_bars() as progress:
            yield progress
    else:
        yield _lines()


@contextmanager
def show_bars() -> Iterator[Progress]:
    """Yield a Progress that draws on the terminal of stderr."""
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    tasks: dict[str, rich_progress.TaskID] = {}
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as display:

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = display.add_task(what, total=total)
            display.update(tasks[what], completed=done)

        yield update


def _lines() -> Progress:
    """Log when something begins and when it is done."""
    begun: set[str] = set()

    def update(what: str, done: int, total: int) -> None:
        if what not in begun:
            begun.add(what)
            log.info(what, megabytes=round(total / 1e6))
        if done == total:
            log.info(f"{what}: done")

    return update
