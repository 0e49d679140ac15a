"""The documents' tables: complete, and true where a machine can tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import Descriptor

from mili.router.api import status
from mili.router.errors import Reason
from mili.v1 import admin_pb2, embedding_pb2, inference_pb2, model_pb2

ROOT = Path(__file__).parents[2]
FILES = [module.DESCRIPTOR for module in (inference_pb2, model_pb2, embedding_pb2, admin_pb2)]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of every table, without the heads."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0].startswith("`"):
            yield [cells[0].strip("`"), *cells[1:]]


def sections() -> dict[str, list[list[str]]]:
    """docs/api.md's rows by headline."""
    _, *parts = (ROOT / "docs/api.md").read_text().split("\n## ")
    return {part.partition("\n")[0]: list(rows(part)) for part in parts}


def messages() -> list[Descriptor]:
    """All that have fields; map entries are fields of their owners."""
    found = [message for file in FILES for message in file.message_types_by_name.values()]
    return [message for message in found if message.fields]


def test_every_rpc_has_its_row() -> None:
    services = [service for file in FILES for service in file.services_by_name.values()]
    expected = [f"{service.name}.{rpc.name}" for service in services for rpc in service.methods]
    assert [name for name, *_ in sections()["RPCs"]] == expected


def test_every_field_has_its_row() -> None:
    told = {name: [row[0] for row in table] for name, table in sections().items()}
    del told["RPCs"]
    assert told == {
        message.name: [field.name for field in message.fields] for message in messages()
    }


def test_every_row_says_something_and_names_a_test_that_exists() -> None:
    sources: dict[str, str] = {}
    for table in sections().values():
        for name, text, shown_by in table:
            assert len(text) >= 4, name
            file, _, function = shown_by.partition("::")
            if file not in sources:
                sources[file] = (ROOT / "tests" / file).read_text()
            assert re.search(rf"def {function}\(", sources[file]), f"{name}: {shown_by}"


def errors() -> dict[str, list[str]]:
    return {name: cells for name, *cells in rows((ROOT / "docs/errors.md").read_text())}


def test_every_reason_is_explained() -> None:
    assert list(errors()) == list(Reason.__members__)
    assert all(cause and advice for _, cause, advice, _ in errors().values())


class Context:
    """Remembers how a call ended."""

    async def abort(
        self, code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, str | bytes], ...]
    ) -> None:
        self.code = code
        self.trailers = dict(trailers)


@pytest.mark.parametrize("reason", Reason)
async def test_status_and_retry_are_as_explained(reason: Reason) -> None:
    context = Context()
    await status.abort(context, status.RequestError(reason, "for the test"))  # type: ignore[arg-type]
    code, _, _, retry = errors()[reason]
    pushback = context.trailers.get("grpc-retry-pushback-ms")
    told = {"1000": "yes", "-1": "never", None: "no"}[pushback]  # type: ignore[index]
    assert (context.code.name, told) == (code, retry)
