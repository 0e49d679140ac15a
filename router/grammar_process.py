"""A process that tries grammars out, each in a child of its own that may be killed.

Owns the limits on a trial: a second of CPU, 256 MiB. Started by router/grammar_checker.py, whose
questions come on stdin and whose answers go to stdout; it ends when stdin does. One thread, so that
a child of fork, which has the tokenizer already, costs a millisecond.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
import sys
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from pathlib import Path
from struct import Struct

from mili.hub.grammars import GrammarCompiler, GrammarError, GrammarKind

# A question: number, kind, whether line breaks may come first, bytes of the source that follows. An
# answer: number, verdict, bytes of the message that follows. The first answer, of number 0, says
# whether the tokenizer can be used.
QUESTION, ANSWER = Struct("<IB?I"), Struct("<IBI")
CPU_SECONDS = 1
MEMORY_BYTES = 256 * 1024 * 1024
# By then a machine that is not overloaded has found the second of CPU.
WALL_SECONDS = 20
MAX_TRIALS = 2  # at a time
TOO_LONG = f"it takes more than {CPU_SECONDS} s to prepare"
NO_TIME = f"the machine is too busy to check it within {WALL_SECONDS} s"
TOO_MUCH = f"it takes more than {MEMORY_BYTES >> 20} MiB to prepare"


class Verdict(IntEnum):
    GOOD = 0
    INVALID = 1
    TOO_COMPLEX = 2
    UNUSABLE = 3  # no grammar works with this model
    UNDECIDED = 4  # the machine did not find the time


class Trials:
    """The children at work, by the pipe on which each answers."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.buffer, selectors.EVENT_READ)
        self._running: dict[int, tuple[int, int]] = {}  # pipe -> number of the question, child

    def run(self) -> None:
        """Answer until stdin ends. Questions wait in their pipe while enough are tried."""
        while True:
            for key, _ in self._selector.select():
                if key.fd in self._running:
                    self._finish(key.fd)
                elif len(self._running) < MAX_TRIALS and not self._begin():
                    return
            listening = sys.stdin.fileno() in self._selector.get_map()
            if len(self._running) == MAX_TRIALS and listening:
                self._selector.unregister(sys.stdin.buffer)
            elif len(self._running) < MAX_TRIALS and not listening:
                self._selector.register(sys.stdin.buffer, selectors.EVENT_READ)

    def _begin(self) -> bool:
        """Read a question and start its trial; False at the end of stdin."""
        header = _read(QUESTION.size)
        if len(header) < QUESTION.size:
            return False
        number, kind, after_breaks, size = QUESTION.unpack(header)
        source = _read(size)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            compiled = partial(
                self._compiler.compile,
                GrammarKind(kind),
                source.decode(),
                after_breaks=after_breaks,
            )
            _try(compiled, writer)
        os.close(writer)
        self._running[reader] = number, child
        self._selector.register(reader, selectors.EVENT_READ)
        return True

    def _finish(self, reader: int) -> None:
        """Read what a child had to say: it is short, and comes at once or never."""
        self._selector.unregister(reader)
        said = os.read(reader, 4096)
        os.close(reader)
        number, child = self._running.pop(reader)
        _, status = os.waitpid(child, 0)
        if said:
            answer(number, Verdict(said[0]), said[1:].decode())
            return
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if ended_by == signal.SIGALRM:
            answer(number, Verdict.UNDECIDED, NO_TIME)
        else:
            timed_out = ended_by in (signal.SIGXCPU, signal.SIGKILL)
            answer(number, Verdict.TOO_COMPLEX, TOO_LONG if timed_out else TOO_MUCH)


def answer(number: int, verdict: Verdict, message: str) -> None:
    data = message.encode()
    sys.stdout.buffer.write(ANSWER.pack(number, verdict, len(data)) + data)
    sys.stdout.buffer.flush()


def _try(compiled: Callable[[], object], writer: int) -> None:
    """Compile within the limits, say what came of it, and end. Never returns."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # a panic's last words
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        signal.alarm(WALL_SECONDS)
        verdict, message = Verdict.GOOD, ""
        try:
            compiled()
        except GrammarError as error:
            verdict = Verdict.TOO_COMPLEX if error.too_complex else Verdict.INVALID
            message = str(error)
        os.write(writer, bytes([verdict]) + message.encode())
    finally:
        os._exit(0)


def _read(size: int) -> bytes:
    """So many bytes of stdin, unbuffered: what is buffered no selector sees. Fewer at its end."""
    data = b""
    while len(data) < size and (part := os.read(sys.stdin.fileno(), size - len(data))):
        data += part
    return data


def main(tokenizer: str, vocab_size: str, *eos_token_ids: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the router ends first, and stdin with it
    try:
        compiler = GrammarCompiler(Path(tokenizer), int(vocab_size), [*map(int, eos_token_ids)])
    except ValueError as error:
        answer(0, Verdict.UNUSABLE, str(error))
        return
    answer(0, Verdict.GOOD, "")
    Trials(compiler).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
