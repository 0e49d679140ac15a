"""How a command ends: the exit codes, and the error that carries one with its line.

Owns nothing else: who prints the line is main.py's business.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from enum import IntEnum


class ExitCode(IntEnum):
    """What a supervisor, a script or Kubernetes can tell from the exit code alone."""

    CLEAN = 0
    CRASH = 1
    USAGE = 2
    # EX_CONFIG of sysexits.h: the router refused this worker, and would again.
    REFUSED = 78
    # As a shell reports a death by SIGINT.
    INTERRUPTED = 130
    # As a shell reports a death by SIGTERM.
    TERMINATED = 143


class CommandError(Exception):
    """Ends the command with one clear line and no traceback."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def told_os_errors() -> Iterator[None]:
    """Turn what the system refuses to read or write into the command's error.

    A closed pipe passes: that the reader has had enough is nothing to tell.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise CommandError(str(error), ExitCode.CRASH) from None
