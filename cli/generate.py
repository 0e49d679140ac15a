"""`mili generate`: one answer, streamed to the terminal or as JSON lines.

Owns how events are printed, and the options that generate and chat share. The calls themselves are
mili.client's, which is imported when a command runs, for grpc takes a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mili.cli.errors import CommandError, ExitCode, told_os_errors

if TYPE_CHECKING:
    from mili.client import Client, Generation, Message, TextStream
    from mili.v1.inference_pb2 import StreamEvent

Address = Annotated[str, typer.Option(envvar="MILI_ADDRESS", help="The router's host:port.")]
# No flag: other users of the machine can read a command line.
TOKEN_VARIABLE = "MILI_TOKEN"
Model = Annotated[str, typer.Option(help="Name of the model. Default: the only one served.")]
System = Annotated[str | None, typer.Option(help="System message of the chat.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest, up to this sum.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample from this many likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for the router to be reached.")]
DEFAULT_MAX_TOKENS = 512


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    address: Address = "localhost:50051",
    model: Model = "",
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue PROMPT as plain text, without chat template.")
    ] = False,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per event.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print token counts and times to stderr.")
    ] = False,
    timeout: Timeout = 5.0,
) -> None:
    """Ask a running router, and print the answer as it comes.

    PROMPT is one user message of a chat, unless --raw is given. A bearer token is read from
    MILI_TOKEN.
    """
    if raw and system is not None:
        raise CommandError("--system is a part of the chat that --raw turns off: give one of them")
    text = _read(prompt)
    with connected(address, timeout) as client, told_errors(as_json):
        stream = client.stream(
            text if raw else None,
            messages=None if raw else [*opening(system), {"role": "user", "content": text}],
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop or (),
        )
        with stream:
            if as_json:
                _print_json(stream)
            else:
                print_text(stream, [])
        if verbose:
            print(_summary(stream.generation), file=sys.stderr)


def _read(prompt: str) -> str:
    """Return the text of the argument."""
    try:
        with told_os_errors():
            text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise CommandError(f"the prompt is not UTF-8: {error}") from None
    if not text.strip():
        raise CommandError("the prompt is empty: give some text, or - to read standard input")
    return text


def opening(system: str | None) -> list[Message]:
    """The messages before the first question."""
    return [] if system is None else [{"role": "system", "content": system}]


@contextlib.contextmanager
def connected(address: str, timeout: float) -> Iterator[Client]:
    """Yield a client whose server has answered within `timeout` seconds.

    Its bearer token comes from the environment.
    """
    from mili.client import Client, DeadlineExceeded, MiliError, NotAllowed, Unavailable

    if not address:
        raise CommandError("the address is empty: give --address HOST:PORT")
    token = os.environ.get(TOKEN_VARIABLE) or None
    with Client(address, timeout=timeout, token=token) as probe:
        try:
            probe.models()
        except (Unavailable, DeadlineExceeded):
            raise CommandError(
                f"no router answers at {address}: is `mili serve` running there?", ExitCode.CRASH
            ) from None
        except NotAllowed as error:
            raise CommandError(
                f"the router at {address} lets nobody in without a tenant's token: {error.message};"
                f" set {TOKEN_VARIABLE}",
                ExitCode.CRASH,
            ) from None
        except MiliError as error:
            raise CommandError(
                f"what answers at {address} is no router's public port: {error.message}",
                ExitCode.CRASH,
            ) from None
    with told_os_errors(), Client(address, token=token) as client:
        yield client


@contextlib.contextmanager
def told_errors(as_json: bool = False) -> Iterator[None]:
    """Turn what the server refuses, or what no request can hold, into the command's error."""
    from mili.client import MiliError

    try:
        yield
    except MiliError as error:
        if as_json:
            _print_event("error", code=error.code.name, reason=error.reason, message=error.message)
        reason = f" ({error.reason})" if error.reason else ""
        raise CommandError(f"{error.message}{reason}", ExitCode.CRASH) from None
    except ValueError as error:
        raise CommandError(str(error)) from None


def print_text(stream: TextStream, pieces: list[str]) -> None:
    """Print pieces and collect them as they come; at the end, whatever ends it, a line feed."""
    try:
        for piece in stream:
            # First, so that what Ctrl-C leaves on the screen is never missing here.
            pieces.append(piece)
            print(piece, end="", flush=True)
    finally:
        if pieces and not pieces[-1].endswith("\n"):
            print(flush=True)


def _print_json(stream: TextStream) -> None:
    for event in stream.events():
        _print_stream_event(event)
    result = stream.generation
    _print_event(
        "finished",
        finish_reason=result.finish_reason,
        matched=result.matched,
        usage=result.usage._asdict(),
        timing=result.timing._asdict(),
    )


def _print_stream_event(event: StreamEvent) -> None:
    match event.WhichOneof("event"):
        case "started":
            _print_event(
                "started",
                request_id=event.started.request_id,
                model=event.started.model,
                prompt_tokens=event.started.prompt_tokens,
                cached_prompt_tokens=event.started.cached_prompt_tokens,
                seed=event.started.seed,
            )
        case "delta":
            _print_event(
                "delta",
                text=event.delta.text,
                token_ids=list(event.delta.token_ids),
                first_token_index=event.delta.first_token_index,
            )


def _print_event(event: str, **values: Any) -> None:  # noqa: ANN401
    print(json.dumps({"event": event, **values}, ensure_ascii=False), flush=True)


def _summary(result: Generation) -> str:
    usage, timing = result.usage, result.timing
    speed = (usage.completion_tokens - 1) / timing.decode if timing.decode > 0 else 0.0
    return (
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_prompt_tokens} cached), "
        f"{usage.completion_tokens} generated, ended by {result.finish_reason}; first token after "
        f"{timing.time_to_first_token:.2f} s, then {speed:.1f} tokens/s"
    )
