"""Is this grammar one that a worker can be asked to use? Asked of a process that may break.

Owns that process (router/grammar_process.py), which starts with the first question, and the
verdicts so far. Does not know requests or workers. Lives on the asyncio thread, and never holds it.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from contextlib import suppress

from mili.hub.folder import ModelFolder
from mili.router.errors import Reason, RequestError
from mili.router.grammar_process import ANSWER, QUESTION, Verdict
from mili.router.params import Constraint

MAX_VERDICTS = 1024
# Questions that have no answer yet.
MAX_PENDING = 64

_REASONS = {
    Verdict.INVALID: Reason.GRAMMAR_INVALID,
    Verdict.TOO_COMPLEX: Reason.GRAMMAR_TOO_COMPLEX,
    Verdict.UNUSABLE: Reason.UNSUPPORTED_FIELD,
    Verdict.UNDECIDED: Reason.QUEUE_FULL,
}

Answer = tuple[Verdict, str]


class GrammarChecker:
    """Answers for one model. close() ends the process."""

    def __init__(self, folder: ModelFolder) -> None:
        self._arguments = (
            str(folder.tokenizer_path),
            str(folder.vocab_size),
            *map(str, folder.generation.eos_token_ids),
        )
        self._verdicts: OrderedDict[bytes, Answer] = OrderedDict()
        self._pending: dict[bytes, asyncio.Future[Answer]] = {}
        self._asked: dict[int, bytes] = {}
        self._num_asked = 0
        self._asking: set[asyncio.Task[None]] = set()
        # What the process said when it started, if no grammar works with this model.
        self._unusable: Answer | None = None
        self._process: asyncio.Task[Process] | None = None
        self._listener: asyncio.Task[None] | None = None

    async def check(self, constraint: Constraint, field: str) -> None:
        """Return if the grammar can be used; raise RequestError, which names `field`, if not."""
        verdict, message = await self._verdict(constraint)
        if verdict is not Verdict.GOOD:
            name = field.rsplit(".", 1)[-1]
            raise RequestError(_REASONS[verdict], f"{name}: {message}", field=field)

    async def close(self) -> None:
        """End the process; questions without an answer end with it."""
        if self._process is None:
            return
        process = await self._process
        with suppress(ProcessLookupError):
            process.kill()
        if self._listener is not None:
            await self._listener

    async def _verdict(self, constraint: Constraint) -> Answer:
        if self._unusable:
            return self._unusable
        question = f"{constraint.kind} {constraint.after_breaks} {constraint.source}"
        key = hashlib.sha256(question.encode()).digest()
        if known := self._verdicts.get(key):
            self._verdicts.move_to_end(key)
            return known
        # Whoever asks the same meanwhile waits for the same answer, whoever of them stays.
        future = self._pending.get(key)
        if future is None:
            if len(self._pending) >= MAX_PENDING:
                raise RequestError(Reason.QUEUE_FULL, "too many grammars wait to be checked")
            future = self._pending[key] = asyncio.get_running_loop().create_future()
            asking = asyncio.create_task(self._ask(key, constraint))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
        return await asyncio.shield(future)

    async def _ask(self, key: bytes, constraint: Constraint) -> None:
        if self._process is None:
            self._process = asyncio.create_task(self._start())
        try:
            process = await self._process
        except OSError as error:
            self._lose(str(error))
            return
        source = constraint.source.encode()
        self._num_asked += 1
        self._asked[self._num_asked] = key
        assert process.stdin is not None
        header = QUESTION.pack(
            self._num_asked, constraint.kind, constraint.after_breaks, len(source)
        )
        process.stdin.write(header + source)

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "mili.router.grammar_process"),
            *self._arguments,
            stdin=PIPE,
            stdout=PIPE,
        )
        self._listener = asyncio.create_task(self._listen(process))
        return process

    async def _listen(self, process: Process) -> None:
        """Take answers until the process ends."""
        assert process.stdout is not None
        with suppress(asyncio.IncompleteReadError):
            while True:
                header = await process.stdout.readexactly(ANSWER.size)
                number, verdict, size = ANSWER.unpack(header)
                message = (await process.stdout.readexactly(size)).decode()
                self._take(number, (Verdict(verdict), message))
        await process.wait()
        self._lose("the process that checks grammars has ended")

    def _take(self, number: int, answer: Answer) -> None:
        if number == 0:
            if answer[0] is not Verdict.GOOD:
                self._unusable = answer
            return
        key = self._asked.pop(number)
        if answer[0] is not Verdict.UNDECIDED:
            self._verdicts[key] = answer
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        # Nobody waits for it where an earlier process was lost while this was on its way to it.
        if future := self._pending.pop(key, None):
            future.set_result(answer)

    def _lose(self, cause: str) -> None:
        """The process is gone: who waits is told so, and the next question starts another."""
        for future in self._pending.values():
            if self._unusable:
                future.set_result(self._unusable)
            else:
                future.set_exception(RequestError(Reason.INTERNAL, cause))
                future.exception()  # perhaps nobody waits any more
        self._pending.clear()
        self._asked.clear()
        self._process = self._listener = None
