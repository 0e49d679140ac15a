"""The door for grammars: verdicts from a process that may be broken, and none that blocks."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from mili.hub.folder import ModelFolder
from mili.internal.v1.step_pb2 import GRAMMAR_KIND_LARK, GRAMMAR_KIND_REGEX
from mili.router import grammar_checker
from mili.router.errors import Reason, RequestError
from mili.router.grammar_checker import Answer, GrammarChecker
from mili.router.grammar_process import ANSWER, QUESTION, Verdict
from mili.router.params import Constraint
from tests.fake_engine import make_folder

FIELD = "generation.structured_output.regex"
BOMB = Constraint(
    GRAMMAR_KIND_LARK, "start: A\nA: /.*a.{30}/ & /.*b.{29}/ & ~/.*c.{28}.*/"
)  # more than a second of CPU


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return make_folder(tmp_path / "model")


@pytest_asyncio.fixture
async def checker(folder: ModelFolder) -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(folder)
    yield made
    await made.close()


def regex(source: str) -> Constraint:
    return Constraint(GRAMMAR_KIND_REGEX, source)


def helpers() -> list[psutil.Process]:
    """The processes that try grammars out."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "mili.router.grammar_process" in child.cmdline()]


async def refused(checker: GrammarChecker, constraint: Constraint) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await checker.check(constraint, FIELD)
    assert caught.value.field in (FIELD, "")
    return caught.value


async def test_good_ones_pass_and_wrong_ones_are_refused_with_the_cause(
    checker: GrammarChecker,
) -> None:
    await checker.check(regex("a+"), FIELD)
    error = await refused(checker, regex("(a"))
    assert (error.reason, error.field) == (Reason.GRAMMAR_INVALID, FIELD)
    assert "unclosed group" in error.message


@pytest.mark.parametrize("source", [r"[^\s\S]", "(a"])
async def test_what_is_wrong_alone_is_wrong_behind_reasoning_too(
    checker: GrammarChecker, source: str
) -> None:
    error = await refused(checker, regex(source)._replace(start_after_token_ids=(7,)))
    assert error.reason == Reason.GRAMMAR_INVALID


async def test_no_grammar_can_name_what_it_becomes_a_part_of(checker: GrammarChecker) -> None:
    grammar = Constraint(GRAMMAR_KIND_LARK, 'start: "a" | @part', (7,))
    assert (await refused(checker, grammar)).reason == Reason.GRAMMAR_INVALID


async def test_behind_reasoning_it_is_another_question(checker: GrammarChecker) -> None:
    for after in ((), (7,), (8,)):
        await checker.check(regex("x")._replace(start_after_token_ids=after), FIELD)
    assert checker._num_asked == 2


async def test_a_bomb_is_refused_and_holds_up_neither_the_loop_nor_others(
    checker: GrammarChecker,
) -> None:
    await checker.check(regex("a"), FIELD)
    bomb = asyncio.create_task(refused(checker, BOMB))
    longest, before = 0.0, time.monotonic()
    for number in range(20):
        await checker.check(regex(f"b{{{number}}}c"), FIELD)
        longest, before = max(longest, time.monotonic() - before), time.monotonic()
    assert longest < 1.0 and not bomb.done()
    error = await bomb
    assert error.reason == Reason.GRAMMAR_TOO_COMPLEX
    assert "more than 1 s" in error.message


def answer_of(patch: str, folder: ModelFolder, source: bytes, *, after_breaks: bool) -> Answer:
    """What a process says, at whose beginning a line of code is run."""
    code = (
        "from mili.router import grammar_process as process\n"
        f"{patch}\n"
        f"process.main({str(folder.tokenizer_path)!r}, {str(folder.vocab_size)!r}, '258')"
    )
    question = QUESTION.pack(7, GRAMMAR_KIND_REGEX, after_breaks, len(source)) + source
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(question)
        process.stdin.flush()
        assert ANSWER.unpack(process.stdout.read(ANSWER.size)) == (0, Verdict.GOOD, 0)
        number, verdict, size = ANSWER.unpack(process.stdout.read(ANSWER.size))
        assert number == 7
        message = process.stdout.read(size).decode()
        process.stdin.close()
        assert process.wait(10) == 0
    return Verdict(verdict), message


def test_what_takes_too_much_memory_is_too_complex(folder: ModelFolder) -> None:
    source = b"(((a{1000}){1000}){1000})"
    patch = "process.MEMORY_BYTES = 4 << 20"
    verdict, message = answer_of(patch, folder, source, after_breaks=False)
    assert verdict is Verdict.TOO_COMPLEX and "MiB" in message


def test_what_the_machine_had_no_time_for_is_undecided(folder: ModelFolder) -> None:
    """The trial uses no CPU, as where others have it all."""
    patch = (
        "import time\n"
        "process.GrammarCompiler.compile = lambda *_, **__: time.sleep(60)\n"
        "process.WALL_SECONDS = 1"
    )
    verdict, message = answer_of(patch, folder, b"a", after_breaks=False)
    assert verdict is Verdict.UNDECIDED and "too busy" in message


async def test_what_is_undecided_is_asked_again(checker: GrammarChecker) -> None:
    take = checker._take
    checker._take = lambda number, answer: take(  # type: ignore[method-assign]
        number, (Verdict.UNDECIDED, "busy") if number else answer
    )
    assert (await refused(checker, regex("a"))).reason == Reason.QUEUE_FULL
    del checker._take
    await checker.check(regex("a"), FIELD)


@pytest.mark.parametrize("after_breaks", [False, True])
def test_what_is_tried_is_what_the_worker_prepares(folder: ModelFolder, after_breaks: bool) -> None:
    """With the line breaks that may come before an answer, where they may."""
    patch = (
        "from mili.hub.grammars import GrammarError\n"
        "def compile(self, kind, source, *, after_breaks=False):\n"
        "    raise GrammarError(f'{source} {after_breaks}', too_complex=False)\n"
        "process.GrammarCompiler.compile = compile"
    )
    answer = answer_of(patch, folder, b"a+", after_breaks=after_breaks)
    assert answer == (Verdict.INVALID, f"a+ {after_breaks}")


async def test_the_same_question_is_asked_once(checker: GrammarChecker) -> None:
    await asyncio.gather(*(checker.check(regex("x"), FIELD) for _ in range(20)))
    await checker.check(regex("x"), FIELD)
    assert checker._num_asked == 1


async def test_a_caller_that_leaves_takes_no_answer_with_it(checker: GrammarChecker) -> None:
    first = asyncio.create_task(checker.check(regex("x"), FIELD))
    await asyncio.sleep(0)
    second = asyncio.create_task(checker.check(regex("x"), FIELD))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait_for(second, 20)


async def test_too_many_questions_are_refused(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_checker, "MAX_PENDING", 2)
    asked = [asyncio.create_task(checker.check(regex(f"x{n}"), FIELD)) for n in range(2)]
    await asyncio.sleep(0)
    assert (await refused(checker, regex("y"))).reason == Reason.QUEUE_FULL
    await asyncio.gather(*asked)


async def test_a_process_that_dies_is_told_of_and_replaced(checker: GrammarChecker) -> None:
    await checker.check(regex("a"), FIELD)
    (process,) = helpers()
    bomb = asyncio.create_task(refused(checker, BOMB))
    await asyncio.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    assert (await bomb).reason == Reason.INTERNAL
    await checker.check(regex("b"), FIELD)
    assert len(helpers()) == 1


async def test_a_question_that_was_on_its_way_when_the_process_died_hurts_nobody(
    checker: GrammarChecker,
) -> None:
    first = asyncio.create_task(refused(checker, regex("x")))
    await asyncio.sleep(0)  # it will ask, and has not yet
    checker._lose("the process has ended")
    assert (await first).reason == Reason.INTERNAL
    again = [checker.check(regex(source), FIELD) for source in "xyz"]
    await asyncio.wait_for(asyncio.gather(*again), 20)


async def test_the_process_starts_with_the_first_question_and_ends_with_the_router(
    folder: ModelFolder,
) -> None:
    checker = GrammarChecker(folder)
    assert not helpers()
    await checker.check(regex("a"), FIELD)
    assert len(helpers()) == 1
    await checker.close()
    assert not helpers()


async def test_a_tokenizer_that_cannot_be_used_refuses_all(folder: ModelFolder) -> None:
    folder.tokenizer_path.write_text("{}")
    checker = GrammarChecker(folder)
    for _ in range(2):
        error = await refused(checker, regex("a"))
        assert error.reason == Reason.UNSUPPORTED_FIELD
        assert "tokenizer" in error.message
    await checker.close()
