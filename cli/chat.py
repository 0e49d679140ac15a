"""`mili chat`: a conversation at the terminal.

Owns the loop and the history. Does not know how an answer is made or printed (generate.py).
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from mili.cli.errors import CommandError
from mili.cli.generate import (
    DEFAULT_MAX_TOKENS,
    Address,
    MaxTokens,
    Model,
    Seed,
    System,
    Temperature,
    Timeout,
    TopK,
    TopP,
    connected,
    opening,
    print_text,
    told_errors,
)

if TYPE_CHECKING:
    from mili.client import Client, Message, Options


def chat(
    address: Address = "localhost:50051",
    model: Model = "",
    system: System = None,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    timeout: Timeout = 5.0,
) -> None:
    """Talk with a model. Ctrl-C stops an answer; /exit or Ctrl-D ends.

    A bearer token is read from MILI_TOKEN.
    """
    options: Options = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    # Line editing and recall, where Python has it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    with connected(address, timeout) as client:
        _converse(client, opening(system), options)


def _converse(client: Client, history: list[Message], options: Options) -> None:
    while (line := _ask()) is not None:
        if not line:
            continue
        history.append({"role": "user", "content": line})
        try:
            with told_errors():
                answer = _answer(client, history, options)
        except CommandError as error:
            print(f"mili: {error}", file=sys.stderr)
            answer = ""
        if answer:
            history.append({"role": "assistant", "content": answer})
        else:
            history.pop()


def _ask() -> str | None:
    """Return the next line without the spaces around it; None at the end."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
    except UnicodeDecodeError as error:
        print(f"mili: the line is not UTF-8: {error}", file=sys.stderr)
        return ""
    except KeyboardInterrupt:
        print("\n(/exit or Ctrl-D ends)")
        return ""
    return None if line == "/exit" else line


def _answer(client: Client, history: list[Message], options: Options) -> str:
    """Print the answer; return what there was of it when Ctrl-C stopped it."""
    asked: Options = {**options, "messages": history}
    pieces: list[str] = []
    with contextlib.suppress(KeyboardInterrupt), client.stream(**asked) as stream:
        print_text(stream, pieces)
    return "".join(pieces)
