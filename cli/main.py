"""The `mili` command: which commands there are, and how each ends.

Owns the list and the exit codes. What a command needs is imported when it runs, so that --help
and the small commands start at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mili.cli.chat import chat
from mili.cli.errors import CommandError, ExitCode, told_os_errors
from mili.cli.generate import generate
from mili.cli.http_config import HttpConfig
from mili.cli.lifeline import tie_to_parent
from mili.cli.models import pull_model, with_model_folder
from mili.cli.options import add_command
from mili.cli.replay import replay
from mili.cli.serve_config import DECIDED_BY_SERVE, ServeConfig
from mili.router.config import RouterConfig
from mili.worker.config import WorkerConfig

app = typer.Typer(
    name="mili",
    help="LLM inference over gRPC: a router that decides, workers that compute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Rich's panels cut long flags off.
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    before = signal.getsignal(signal.SIGTERM)
    _end_on_sigterm(ExitCode.TERMINATED)
    try:
        tie_to_parent()
        exit_code = app(arguments, prog_name="mili", standalone_mode=False)
        with told_os_errors():
            sys.stdout.flush()
        return int(exit_code or ExitCode.CLEAN)
    except (CommandError, typer.TyperException) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        for line in text.splitlines():
            print(f"mili: {line}", file=sys.stderr)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    finally:
        _drop_unwritable_output()
        signal.signal(signal.SIGTERM, before)


def _end_on_sigterm(exit_code: ExitCode) -> None:
    """For the time until a server has handlers of its own, and for PID 1, which has no default."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(exit_code))


def _drop_unwritable_output() -> None:
    """Spare the interpreter, which flushes at its end, an error that was told already."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run_serve(config: ServeConfig, pull: bool) -> int:
    _end_on_sigterm(ExitCode.CLEAN)
    from mili.cli.logging import set_up_logging

    set_up_logging("serve", config.log_level, config.log_format)
    from mili.cli.serve import serve

    return serve(with_model_folder(config, pull))


def _run_router(config: RouterConfig, pull: bool) -> int:
    _end_on_sigterm(ExitCode.CLEAN)
    from mili.cli.logging import set_up_logging

    set_up_logging("router", config.log_level, config.log_format)
    from mili.router.main import run

    return run(with_model_folder(config, pull))


def _run_worker(config: WorkerConfig, pull: bool) -> int:
    _end_on_sigterm(ExitCode.CLEAN)
    from mili.cli.logging import set_up_logging

    set_up_logging(config.name or "worker", config.log_level, config.log_format)
    import structlog

    from mili.worker.main import run

    try:
        return run(with_model_folder(config, pull))
    except (ValueError, OSError) as error:
        # A model, a key or a port: the user's to mend.
        structlog.get_logger().debug("worker cannot run", exc_info=True)
        raise CommandError(str(error)) from error


def _run_http(config: HttpConfig, _: bool) -> int:
    _end_on_sigterm(ExitCode.CLEAN)
    from mili.cli.logging import set_up_logging

    set_up_logging("http", config.log_level, config.log_format)
    from mili.cli.http_front import run_front

    return run_front(config)


def pull(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Short name, hub id or GGUF file.")
    ],
) -> None:
    """Download models, unless they are here, and print their folders."""
    from mili.cli.logging import set_up_logging

    set_up_logging("pull", "info", "console")
    with told_os_errors():
        for name in names:
            print(pull_model(name), flush=True)


def keygen(
    folder: Annotated[Path, typer.Argument(help="Where to write the keys; made if missing.")],
) -> None:
    """Make the keys that a router and workers on other machines need."""
    from mili.cli.keygen import generate_keys

    try:
        paths = generate_keys(folder)
    except OSError as error:
        raise CommandError(str(error)) from None
    print(*paths, sep="\n")


def token() -> None:
    """Make a bearer token and the hash of it that the tenants file holds."""
    from mili.cli.tokens import make_token

    secret, digest = make_token()
    print(f"token   {secret}\nsha256  {digest}")


_ALL = ServeConfig.model_fields.keys()
add_command(
    app,
    ServeConfig,
    _run_serve,
    name="serve",
    help="Serve a model from this machine: a router and its workers.",
    hidden=DECIDED_BY_SERVE,
    shared=_ALL,
)
add_command(app, RouterConfig, _run_router, name="router", help="Run a router.", shared=_ALL)
add_command(app, WorkerConfig, _run_worker, name="worker", help="Run a worker.", shared=_ALL)
add_command(
    app,
    HttpConfig,
    _run_http,
    name="http",
    help="Speak OpenAI's HTTP API in front of a router.",
    shared=_ALL,
)
for _command in (pull, generate, chat, keygen, token, replay):
    app.command()(_command)


if __name__ == "__main__":
    sys.exit(main())
