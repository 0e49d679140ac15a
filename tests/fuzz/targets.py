"""What is fuzzed with bytes: each target takes any, and fails where a promise is broken.

Owns how bytes become a case, and what must hold of it. Does not know who makes the bytes:
tests/fuzz/__main__.py lets coverage guide them, tests/unit/test_fuzz_targets.py draws them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from mili.internal.v1 import step_pb2 as pb
from mili.router.stop import MAX_STOP_SEQUENCES, StopMatcher
from mili.router.tokenizer import Tokenizer
from mili.worker.session import Session
from tests.scripted_worker import Link, ScriptedWorker, make_hello
from tests.tokenizer_folders import every_kind, model_folder
from tests.unit.test_parsers import BEGIN, CALL, END, ENDS, SEP, SYNTAXES, parse

_Told = TypeVar("_Told")


def detokenizer(data: bytes) -> None:
    """All deltas together are the text of all tokens."""
    kinds = _tokenizers()
    kind, skip = divmod(data[0] if data else 0, 2)
    tokenizer = kinds[kind % len(kinds)]
    ids = [number % tokenizer.vocab_size for number in _numbers(data[1:])]
    stream = tokenizer.detokenizer(skip_special_tokens=bool(skip))
    deltas = [stream.push(token_id) for token_id in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=bool(skip))
    assert "".join(deltas) + stream.flush() == whole


def stop_matcher(data: bytes) -> None:
    """It finds what trying every place finds, however the text is cut."""
    *sequences, text = data.decode("latin-1").split("\n")
    stops = tuple(filter(None, sequences))[:MAX_STOP_SEQUENCES]
    stops = tuple(stop[:500] for stop in stops)
    assert _stopped([text], stops) == _by_trying(text, stops)
    check_cuts(lambda pieces: _stopped(pieces, stops), text, data)


def step_decoder(data: bytes) -> None:
    """A frame of any bytes raises nothing, at the router or at a worker, in its epoch or not."""
    link = Link()
    worker = ScriptedWorker(link).join()
    link.workers.receive(worker.routing_id, data, link.now)
    if frame := _parsed(pb.WorkerFrame(), data):
        frame.epoch, frame.sequence = worker.epoch, worker.sequence + 1
        link.workers.receive(worker.routing_id, frame.SerializeToString(), link.now)
    link.tick()

    session = Session(make_hello(), 0.0)
    session.receive(data, 0.1)
    welcome = pb.RouterFrame(epoch=7, sequence=1, welcome=pb.Welcome())
    session.receive(welcome.SerializeToString(), 0.2)
    if frame := _parsed(pb.RouterFrame(), data):
        frame.epoch, frame.sequence = 7, 2
        session.receive(frame.SerializeToString(), 0.3)
    session.tick(pb.Heartbeat(), 5.0)


def tool_calls(data: bytes) -> None:
    """What is told of reasoning and calls is the same however the text is cut."""
    text = "".join(map(_fragment, data[:64]))
    for syntax in SYNTAXES.values():
        check_cuts(lambda pieces, syntax=syntax: parse(pieces, syntax), text, data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "detokenizer": detokenizer,
    "stop_matcher": stop_matcher,
    "step_decoder": step_decoder,
    "tool_calls": tool_calls,
}


# What texts with calls are made of: bytes would hardly ever spell a tag.
_FRAGMENTS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", BEGIN, CALL, SEP, END,
    ENDS, '{"name": "f", "arguments": ', '{"name": "f", "parameters": ', '{"a": [1, "x"]}', "}",
    "{", '"', "\\", "```json\n", "\n```", "function", "\n", "f", " ", "<", "</", "1", ",", ":", "ü",
)  # fmt: skip


def _fragment(byte: int) -> str:
    return _FRAGMENTS[byte] if byte < len(_FRAGMENTS) else chr(byte)


def check_cuts(read: Callable[[Sequence[str]], _Told], text: str, source: bytes) -> None:
    """What a parser tells of a text must not depend on how it comes in: for any `push(str)`.

    read: pushes the pieces, ends, and returns all that was told. source: where to cut.
    """
    pieces = []
    for step in source:
        pieces.append(text[: step % 7])
        text = text[step % 7 :]
    pieces.append(text)
    assert read(pieces) == read(["".join(pieces)]) == read(list("".join(pieces)))


def _stopped(pieces: Sequence[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = []
    for piece in pieces:
        certain, matched = matcher.push(piece)
        shown.append(certain)
        if matched is not None:
            return "".join(shown), matched
    return "".join(shown) + matcher.flush(), None


def _by_trying(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text.endswith(stop, 0, end)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@cache
def _tokenizers() -> list[Tokenizer]:
    made = []
    for _, backend in every_kind():
        with tempfile.TemporaryDirectory() as folder:
            made.append(Tokenizer(model_folder(Path(folder), backend)))
    return made


def _numbers(data: bytes) -> Iterator[int]:
    """Two bytes each."""
    for index in range(0, len(data) - 1, 2):
        yield int.from_bytes(data[index : index + 2])


_Frame = TypeVar("_Frame", bound=Message)


def _parsed(frame: _Frame, data: bytes) -> _Frame | None:
    try:
        frame.ParseFromString(data)
    except DecodeError:
        return None
    return frame
