"""Clients that are not ours against a real server: grpcurl, Node's grpc-js, k6, OpenAI's package.

They read the protos or ask the server's reflection: nothing of MILI's Python client is in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import openai
import pytest

from mili.client import Client
from tests.external_tool import run_tool
from tests.model_folders import make_model_folder
from tests.npm import node_modules
from tests.serving import STEADY, Served, free_port, serving
from tests.streams import until_quiet

ROOT = Path(__file__).parents[2]
FOREIGN = Path(__file__).parent / "foreign"
PROTOS = ROOT / "protos"
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("foreign")
    model = make_model_folder(folder / "tiny")
    flags = ("--http-port", str(free_port()))
    with serving(model, folder / "log", *flags, **STEADY) as served:
        yield served


@pytest.fixture(scope="module")
def ours(served: Served) -> str:
    """What our own client is told."""
    with Client(served.address, timeout=30) as client:
        return client.generate(messages=CHAT, max_tokens=24, temperature=0, ignore_eos=True).text


# gRPC.


def grpcurl(*arguments: str) -> str:
    return run_tool("grpcurl", "-plaintext", "-max-time", "30", *arguments)


def test_grpcurl(served: Served, ours: str) -> None:
    listed = grpcurl(served.address, "list").split()
    assert {"mili.v1.InferenceService", "mili.v1.ModelService"} <= set(listed)
    assert "rpc GenerateStream" in grpcurl(served.address, "describe", "mili.v1.InferenceService")
    described = grpcurl(served.address, "describe", "mili.v1.StopConditions")
    assert "uint32 max_tokens" in described
    asked = {
        "generation": {
            "chat": {"messages": CHAT},
            "sampling": {"temperature": 0},
            "stopping": {"max_tokens": 24, "ignore_eos": True},
        }
    }
    method = "mili.v1.InferenceService/Generate"
    answer = json.loads(grpcurl("-d", json.dumps(asked), served.address, method))
    assert answer["sequences"][0]["text"] == ours


def test_node_streams_a_chat(served: Served, ours: str) -> None:
    modules = node_modules("@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.1")
    told = json.loads(run_tool("node", FOREIGN / "stream_chat.js", modules, PROTOS, served.address))
    answer = told["answer"]
    assert (answer["code"], answer["text"]) == (0, ours)
    assert answer["events"][0] == "started"
    assert answer["events"][-1] == "finished"
    assert answer["sequences"] == list(range(1, len(answer["sequences"]) + 1))
    assert answer["finish_reason"] == "FINISH_REASON_MAX_TOKENS"
    assert answer["usage"]["completion_tokens"] == 24
    assert (told["refused"]["code"], told["refused"]["events"]) == (3, [])
    assert "top_p" in told["refused"]["details"]


def test_k6_drives_a_load_of_streams(served: Served, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    run_tool(
        "k6", "run", "--quiet", "--no-usage-report", "--no-color", "--address", "localhost:0",
        "--summary-export", summary,
        "-e", f"ADDRESS={served.address}", "-e", f"PROTOS={PROTOS}",
        FOREIGN / "stream_load.js",
    )  # fmt: skip
    metrics = json.loads(summary.read_text())["metrics"]
    assert metrics["whole_streams"]["count"] == 40
    assert metrics["checks"]["fails"] == 0


# HTTP, with OpenAI's package.


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    url = f"http://{served.http}/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=30, max_retries=0) as client:
        yield client


def test_openai_chat(client: openai.OpenAI, ours: str) -> None:
    options = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_completion_tokens": 24}
    extra = {"ignore_eos": True}
    answer = client.chat.completions.create(**options, extra_body=extra)
    assert answer.choices[0].message.content == ours
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer._request_id is not None and answer.id.endswith(answer._request_id)
    pieces = client.chat.completions.create(**options, extra_body=extra, stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in pieces]
    assert "".join(texts) == ours


def test_openai_completions_and_models(served: Served, client: openai.OpenAI) -> None:
    with Client(served.address, timeout=30) as mine:
        expected = [
            mine.generate(prompt, max_tokens=16, temperature=0).text for prompt in ("One", "Two")
        ]
    answer = client.completions.create(model="tiny", prompt=["One", "Two"], temperature=0)
    assert [choice.text for choice in answer.choices] == expected
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=CHAT)
    assert missing.value.code == "MODEL_NOT_FOUND"


def test_openai_several_choices(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "messages": CHAT, "n": 3, "seed": 5, "max_completion_tokens": 16}
    answer = client.chat.completions.create(**options)
    whole = [choice.message.content for choice in answer.choices]
    assert len(set(whole)) == 3
    usage = {"include_usage": True}
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True, stream_options=usage):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == whole
    assert chunk.usage is not None and answer.usage is not None
    assert chunk.usage.completion_tokens == answer.usage.completion_tokens
    assert chunk.usage.prompt_tokens == answer.usage.prompt_tokens


def test_openai_refusals(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", top_p=7)
    assert (caught.value.param, caught.value.code) == ("top_p", "INVALID_FIELD")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a" * 5000)
    assert caught.value.code == "CONTEXT_TOO_LONG"
    with pytest.raises(openai.BadRequestError, match="unknown or unsupported field"):
        client.completions.create(model="tiny", prompt="a", extra_body={"sufix": "b"})


async def test_a_caller_who_hangs_up_ends_its_generation(served: Served) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    connection = HTTPConnection(served.http, timeout=30)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert (response.status, response.headers["content-type"][:17]) == (200, "text/event-stream")
    assert response.readline().startswith(b"data: {")
    response.close()
    connection.close()
    await until_quiet(served.admin)
