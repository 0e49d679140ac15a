"""The examples and `mili generate` against the built-in model, as a newcomer runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mili.hub.pull import pull
from tests.serving import MILI, STEADY, Served, free_port, serving

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "Explain in two sentences why the sky is blue."


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pull("smollm2-135m")
    log = tmp_path_factory.mktemp("examples") / "log"
    front = ("--http-port", str(free_port()))
    with serving("smollm2-135m", log, *front, **STEADY) as served:
        yield served


def run(*command: str | Path) -> list[str]:
    """The lines that a command prints; it must have nothing to complain about."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_simple_generation(served: Served) -> None:
    text, chat, ending = run(
        sys.executable, EXAMPLES / "simple_generation.py", "--address", served.address
    )
    assert text.startswith("Text: Once upon a time, a small robot")
    assert chat == "Chat: The capital of France is Paris."
    assert ending == "(8 tokens, ended by eos)"


def test_batch_processing(served: Served) -> None:
    lines = run(sys.executable, EXAMPLES / "batch_processing.py", "--address", served.address)
    questions = [line for line in lines if line.startswith("Name one thing that ")]
    assert len(questions) == 8
    assert "  One thing that Kenya is known for is its incredible biodiversity" in "\n".join(lines)
    assert " tokens in " in lines[-1]


def test_streaming_response(served: Served) -> None:
    *answer, ending, first = run(
        sys.executable, EXAMPLES / "streaming_response.py", "--address", served.address
    )
    assert len(" ".join(answer).split()) > 5
    assert " tokens, ended by " in ending
    assert first.startswith("first text after ")


def test_openai_chat(served: Served) -> None:
    url = f"http://{served.http}/v1"
    answer = run(sys.executable, EXAMPLES / "openai_chat.py", "--url", url)
    assert answer == ["The capital of France is Paris."]


def test_generate(served: Served) -> None:
    options = ("--address", served.address, "--temperature", "0", "--max-tokens", "16")
    (answer,) = run(*MILI, "generate", QUESTION, *options)
    assert answer.startswith("The sky is blue because of a process called Rayleigh scattering")


def test_generate_json(served: Served) -> None:
    options = ("--address", served.address, "--temperature", "0", "--max-tokens", "16")
    started, *deltas, finished = map(
        json.loads, run(*MILI, "generate", QUESTION, "--json", *options)
    )
    assert started["event"] == "started"
    assert started["model"] == "smollm2-135m"
    assert {delta["event"] for delta in deltas} == {"delta"}
    text = "".join(delta["text"] for delta in deltas)
    assert text.startswith("The sky is blue because of a process called Rayleigh scattering")
    assert sum(len(delta["token_ids"]) for delta in deltas) == 16
    assert (finished["event"], finished["finish_reason"]) == ("finished", "max_tokens")
    assert finished["usage"]["completion_tokens"] == 16
