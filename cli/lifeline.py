"""A child process that dies with its parent.

Owns the tie between `mili serve` and its children, from both ends. Linux only: prctl. It is made
inside the child's own start-up, because code run between fork and exec is unsafe with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PARENT_PID = "MILI_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def tied_environment() -> dict[str, str]:
    """Return the variable that makes a child of this process call `tie_to_parent` to effect.

    The kernel's signal follows the death of the *thread* that started the child: start it from
    the main thread.
    """
    return {_PARENT_PID: str(os.getpid())}


def tie_to_parent() -> None:
    """Have the kernel kill this process when its parent dies, if the parent asked for that."""
    parent = os.environ.pop(_PARENT_PID, None)
    if parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died before the call above.
    if os.getppid() != int(parent):
        sys.exit(f"mili: parent process {parent} is gone")
