"""The examples run and say what they got. That a real server answers is tested elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mili.v1 import inference_pb2 as pb
from tests.scripted_server import delta, finished, running_server, started

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "calls", "expected"),
    [
        ("simple_generation.py", 2, "Chat: Hello\n(2 tokens, ended by stop_sequence)"),
        ("batch_processing.py", 8, "16 tokens in "),
        ("streaming_response.py", 1, "Hello\n\n2 tokens, ended by stop_sequence\nfirst text after"),
    ],
)
def test_example(script: str, calls: int, expected: str) -> None:
    with running_server() as server:
        done = subprocess.run(
            [sys.executable, EXAMPLES / script, "--address", server.address],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout
        assert server.calls == calls


def test_structured_output() -> None:
    country = {"name": "Norway", "capital": "Oslo", "continent": "Europe"}
    with running_server() as server:
        server.events = lambda _: iter([started(), delta(json.dumps(country)), finished()])
        done = subprocess.run(
            [sys.executable, EXAMPLES / "structured_output.py", "--address", server.address],
            capture_output=True,
            text=True,
            timeout=60,
        )
        (request,) = server.requests
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Norway is in Europe; its capital is Oslo.\n"
    assert isinstance(request, pb.GenerateRequest)
    schema = json.loads(request.generation.structured_output.json_schema)
    assert schema["properties"].keys() == country.keys()
