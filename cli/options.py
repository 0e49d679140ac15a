"""Commands whose flags are made from a pydantic model, so that a setting is written once.

Owns how a field looks on the command line. Does not know any setting by name, except those that
stay without a flag and the positional MODEL.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mili.cli.errors import told_os_errors
from mili.cli.settings import Given, load, to_text, value_type, variable

Config = TypeVar("Config", bound=BaseModel)

# Set by the environment or the file only: few need them, and a long --help hides the rest.
WITHOUT_FLAG = frozenset(
    {
        "admin_host",
        "allocation",
        "cache_token_limit",
        "drain_timeout",
        "eviction_policy",
        "enforce_eager",
        "health_port",
        "http_host",
        "insecure_worker_link",
        "itl_goal",
        "kv_cache_memory_bytes",
        "kv_cache_memory_fraction",
        "max_concurrent_rpcs",
        "max_queue_time",
        "log_format",
        "max_queued_requests",
        "name",
        "num_threads",
        "pipeline_depth",
        "max_unread_tokens",
        "recorded_decisions",
        "recording_folder",
        "recovery_timeout",
        "worker_timeout",
    }
)

_COMMON = (
    inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None, typer.Option("--config", help="TOML file of settings, max_num_seqs = 64.")
        ],
    ),
    inspect.Parameter(
        "print_config",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[
            bool,
            typer.Option("--print-config", help="Print each setting and its origin, and exit."),
        ],
    ),
)
# Of commands that have a MODEL.
_PULL = inspect.Parameter(
    "pull",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool, typer.Option("--pull", help="Pull the model first if it is not here.")
    ],
)


def add_command(
    app: typer.Typer,
    model: type[Config],
    run: Callable[[Config, bool], int],
    *,
    name: str,
    help: str,
    hidden: Collection[str] = (),
    shared: Collection[str] = (),
) -> None:
    """Add a command that loads `model` and calls `run(config, pull)` for its exit code.

    hidden: fields that are no settings of this command. shared: settings of other commands, which
    the file may hold.
    """
    fields = {n: field for n, field in model.model_fields.items() if n not in hidden}

    def command(context: typer.Context, **arguments: Any) -> int:  # noqa: ANN401
        flags = {
            field: Given(arguments[field], _origin(field))
            for field in fields
            if _on_command_line(context, field)
        }
        only_print = arguments["print_config"]
        settings = load(
            model,
            flags,
            arguments["config"],
            hidden=hidden,
            shared=shared,
            fallback={"model": Given("", "not set")} if only_print and "model" in fields else None,
        )
        if only_print:
            with told_os_errors():
                print(settings.table(hidden), flush=True)
            return 0
        return run(settings.config, arguments.get("pull", False))

    parameters = [_parameter(name, field) for name, field in fields.items()]
    pull = [_PULL] if "model" in fields else []
    _set_parameters(command, [*(p for p in parameters if p is not None), *_COMMON, *pull])
    app.command(name, help=help, epilog=_epilog(fields))(command)


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def _origin(name: str) -> str:
    return "argument MODEL" if name == "model" else f"flag {flag(name)}"


def _on_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _set_parameters(command: Callable[..., int], parameters: Collection[inspect.Parameter]) -> None:
    """Give the function the signature that typer reads."""
    context = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    signature = inspect.Signature([context, *parameters])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter | None:
    """Return the command line's view of a field.

    All are texts here: pydantic alone parses and checks, so that a bad value is told in the same
    words wherever it came from.
    """
    default: Any = field.get_default()
    kind: Any = str
    info: Any
    if name in WITHOUT_FLAG:
        return None
    if name == "model":
        default, kind = None, str | None
        info = typer.Argument(metavar="MODEL", help=field.description)
    elif value_type(field) is bool:
        kind = bool
        info = typer.Option(flag(name), help=field.description)
    elif get_origin(value_type(field)) is tuple:
        default, kind = list(default), list[str]
        info = typer.Option(flag(name), help=field.description, metavar="<text>")
    else:
        default = None if default is None else to_text(default)
        kind = str | None if default is None else str
        info = typer.Option(flag(name), help=field.description, metavar=_metavar(field))
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, info],
    )


def _metavar(field: FieldInfo) -> str:
    kind = value_type(field)
    if get_origin(kind) is Literal:
        return f"<{'|'.join(map(str, get_args(kind)))}>"
    return {int: "<int>", float: "<float>", Path: "<path>"}.get(kind, "<text>")


def _epilog(fields: Mapping[str, FieldInfo]) -> str:
    """Say where settings come from, and name those that have no flag."""
    without = [variable(name) for name in fields if name in WITHOUT_FLAG]
    return (
        "A setting comes from its flag, else from its environment variable (--max-num-seqs is "
        "MILI_MAX_NUM_SEQS), else from the file of --config, else it has its default. "
        f"Without a flag: {', '.join(without)}."
    )
