"""`mili generate` and `mili chat` against a small gRPC server that echoes."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from mili.cli.main import main
from mili.v1 import inference_pb2 as pb
from mili.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc

MILI = [sys.executable, "-P", "-m", "mili.cli.main"]

# The same with standard input as its controlling terminal.
IN_TERMINAL = """
import fcntl, sys, termios
from mili.cli.main import main

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.exit(main())
"""


class EchoServer(inference_pb2_grpc.InferenceServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Answers with the last message, word by word; "forever" never ends, "refuse" is refused."""

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[pb.Generation] = []
        self.cancelled = threading.Event()

    def ListModels(  # noqa: N802
        self, request: model_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="echo")])

    def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        self.requests.append(request.generation)
        context.add_callback(self.cancelled.set)
        for event in self._events(request.generation, context):
            yield pb.GenerateStreamResponse(event=event)

    def _events(
        self, generation: pb.Generation, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamEvent]:
        messages = generation.chat.messages
        text = messages[-1].content if messages else generation.text
        if text == "refuse":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "temperature must be at least 0")
        yield pb.StreamEvent(
            started=pb.Started(request_id="r1", model="echo", prompt_tokens=3, seed=7)
        )
        for number, word in enumerate(text.split()):
            delta = pb.Delta(text=word + " ", token_ids=[number], first_token_index=number)
            yield pb.StreamEvent(delta=delta)
        if text == "forever":
            self.cancelled.wait(10)
        usage = pb.Usage(prompt_tokens=3, completion_tokens=len(text.split()))
        finished = pb.Finished(finish_reason=pb.FINISH_REASON_EOS, usage=usage)
        yield pb.StreamEvent(finished=finished)


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with ThreadPoolExecutor(8) as threads:
        servicer = EchoServer()
        grpc_server = grpc.server(threads)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, grpc_server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(servicer, grpc_server)
        servicer.address = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
        grpc_server.start()
        yield servicer
        grpc_server.stop(None).wait()


def test_a_prompt_is_one_chat_message(
    server: EchoServer, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--system", "Be brief.", "--temperature", "0", "--max-tokens", "9", "--stop", "x"]
    assert main(["generate", "hello you", "--address", server.address, *options]) == 0
    assert capsys.readouterr() == ("hello you \n", "")
    (asked,) = server.requests
    assert [(m.role, m.content) for m in asked.chat.messages] == [
        ("system", "Be brief."),
        ("user", "hello you"),
    ]
    assert asked.sampling.HasField("temperature")
    assert not asked.sampling.HasField("top_p")
    assert asked.stopping.max_tokens == 9
    assert list(asked.stopping.stop_sequences) == ["x"]


def test_raw_sends_plain_text_and_dash_reads_standard_input(
    server: EchoServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    monkeypatch.setenv("MILI_ADDRESS", server.address)
    assert main(["generate", "--raw", "-"]) == 0
    assert capsys.readouterr().out == "from a pipe \n"
    assert server.requests[0].text == "from a pipe"


def test_json_lines(server: EchoServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a b", "--json", "--verbose", "--address", server.address]) == 0
    output, error = capsys.readouterr()
    events = [json.loads(line) for line in output.splitlines()]
    assert [event["event"] for event in events] == ["started", "delta", "delta", "finished"]
    assert events[0].keys() == {
        "event",
        "request_id",
        "model",
        "prompt_tokens",
        "cached_prompt_tokens",
        "seed",
    }
    assert events[2] == {"event": "delta", "text": "b ", "token_ids": [1], "first_token_index": 1}
    assert events[3]["finish_reason"] == "eos"
    assert events[3]["usage"]["completion_tokens"] == 2
    assert "3 prompt tokens (0 cached), 2 generated, ended by eos" in error


def test_a_refusal_is_one_line(server: EchoServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "refuse", "--address", server.address]) == 1
    assert capsys.readouterr() == ("", "mili: temperature must be at least 0\n")
    assert main(["generate", "refuse", "--json", "--address", server.address]) == 1
    error = {"event": "error", "code": "INVALID_ARGUMENT", "reason": ""}
    message = {"message": "temperature must be at least 0"}
    assert json.loads(capsys.readouterr().out) == error | message


@pytest.mark.parametrize("listening", [False, True])
def test_an_unreachable_router_is_one_line_in_time(
    listening: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing listens, or something accepts the connection and says nothing."""
    with socket.socket() as quiet:
        quiet.bind(("127.0.0.1", 0))
        if listening:
            quiet.listen()
        address = f"127.0.0.1:{quiet.getsockname()[1]}"
        started = time.monotonic()
        assert main(["generate", "hi", "--address", address, "--timeout", "0.5"]) == 1
        assert time.monotonic() - started < 3
    output, error = capsys.readouterr()
    assert (output, error.count("\n")) == ("", 1)
    assert f"no router answers at {address}" in error


def test_ctrl_c_cancels(server: EchoServer) -> None:
    command = [*MILI, "generate", "forever", "--address", server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(8) == b"forever "
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert (process.stdout.read(), process.stderr.read()) == (b"\n", b"")
    assert server.cancelled.wait(5)


@pytest.mark.parametrize(
    ("where", "code", "told"), [("/dev/full", 1, "No space left on device"), (None, 1, "")]
)
def test_output_that_nobody_takes(
    server: EchoServer, where: str | None, code: int, told: str
) -> None:
    """A full disk is told in a line; a pipe that was closed is not."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(where or writer, "w") as output:
        command = [*MILI, "generate", "hi", "--address", server.address]
        ended = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == code
    assert ended.stderr.count("\n") == bool(told)
    assert told in ended.stderr


def test_chat_remembers_until_exit(server: EchoServer) -> None:
    lines = "first\nrefuse\n\nsecond\n/exit\nnever\n"
    ended = subprocess.run(
        [*MILI, "chat", "--address", server.address, "--system", "S"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert ended.returncode == 0
    assert ended.stdout == "first \nsecond \n"
    assert ended.stderr == "mili: temperature must be at least 0\n"
    roles = [(m.role, m.content) for m in server.requests[-1].chat.messages]
    assert roles == [
        ("system", "S"),
        ("user", "first"),
        ("assistant", "first "),
        ("user", "second"),
    ]


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(server: EchoServer) -> None:
    terminal, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, "chat", "--address", server.address],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    ) as process:
        os.close(slave)
        seen = b""

        def read_until(text: bytes) -> None:
            nonlocal seen
            while text not in seen:
                assert select.select([terminal], [], [], 10)[0], seen
                seen += os.read(terminal, 1024)
            seen = seen.partition(text)[2]

        read_until(b"> ")
        os.write(terminal, b"forever\n")
        read_until(b"forever ")
        os.write(terminal, b"\x03")
        assert server.cancelled.wait(5)
        read_until(b"> ")
        os.write(terminal, b"again\n")
        read_until(b"again ")
        read_until(b"> ")
        os.write(terminal, b"\x04")
        assert process.wait(10) == 0
    os.close(terminal)
    contents = [m.content for m in server.requests[-1].chat.messages]
    assert contents == ["forever", "forever ", "again"]
