"""Errors in OpenAI's shape, with HTTP's codes.

Owns the table of codes. What went wrong is said by the server, or by the check of a body.
"""

from __future__ import annotations

import json
import math
from typing import Any

import grpc
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mili.client.errors import InvalidRequest, MiliError

_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: (404, "invalid_request_error"),
    grpc.StatusCode.ALREADY_EXISTS: (409, "invalid_request_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    grpc.StatusCode.CANCELLED: (499, "cancelled"),
    grpc.StatusCode.UNIMPLEMENTED: (501, "invalid_request_error"),
    grpc.StatusCode.UNAVAILABLE: (503, "server_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "server_error"),
}
_TOO_LARGE = 413
# Where OpenAI has another name for the last part of a field's path.
_PARAMS = {
    "num_sequences": "n",
    "stop_sequences": "stop",
    "structured_output": "response_format",
    "json_schema": "response_format",
    "include_stop_text": "include_stop_str_in_output",
    "template_variables_json": "chat_template_kwargs",
    "parse_reasoning": "include_reasoning",
    "parse_tool_calls": "tools",
    "inputs": "input",
}


class BodyError(Exception):
    """A body that cannot be read. param: the offending field."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status


def error_object(error: MiliError) -> dict[str, Any]:
    """What goes into the body, or into the middle of a stream."""
    kind = _code(error)[1]
    if error.reason == "TENANT_QUOTA":
        kind = "insufficient_quota"
    return _object(error.message, kind, _param(error.field), error.reason or None)


async def on_mili_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, MiliError)
    status = _code(error)[0]
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))
    elif status in (429, 503) and error.reason:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_object(error), status, headers)


async def on_body_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, BodyError)
    content = _object(error.message, "invalid_request_error", error.param, None)
    return JSONResponse(content, error.status)


async def on_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    content = _object(error.detail, "invalid_request_error", None, None)
    return JSONResponse(content, error.status_code, error.headers)


async def on_failure(_: Request, error: Exception) -> Response:
    return JSONResponse(_object("internal error", "server_error", None, "INTERNAL"), 500)


def from_validation(error: ValidationError) -> BodyError:
    """Name one problem: the deepest, for a union tells of every member that did not fit."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    problem = max(problems, key=lambda each: len(each["loc"]))
    # Unions and their tags are pydantic's, not the caller's.
    param = ".".join(
        str(part) for part in problem["loc"] if isinstance(part, int) or part.isidentifier()
    )
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "unknown or unsupported field"
    return BodyError(f"{param}: {message}" if param else message, param=param or None)


def event_of_error(error: MiliError) -> str:
    return f"data: {json.dumps(error_object(error))}\n\n"


def _code(error: MiliError) -> tuple[int, str]:
    # Refused by gRPC itself, whose code does not tell it from an overload.
    if isinstance(error, InvalidRequest) and error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _TOO_LARGE, "invalid_request_error"
    return _CODES.get(error.code, (500, "server_error"))


def _param(field: str) -> str | None:
    last = field.rpartition(".")[2]
    return _PARAMS.get(last, last) or None


def _object(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
