"""Log set-up of the long-running processes: structlog and stdlib logging, one format, to stderr.

Owns the format. Does not know what is logged; values of local variables are never printed, for
they may hold prompts or secrets.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import TracebackType
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

# Libraries whose informational lines are noise in a server's log.
_QUIET = ("asyncio", "filelock", "grpc", "httpcore", "httpx", "huggingface_hub", "urllib3")


def set_up_logging(
    process: str,
    level: Literal["debug", "info", "warning", "error"],
    log_format: Literal["console", "json"],
) -> None:
    """Print events of `level` and above to stderr, each with a timestamp and `process`."""
    # What grpc's C core would print past every format is told by statuses and exceptions too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    def add_process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {"process": process, **event}

    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_process,
    ]
    rendering = _rendering(log_format)
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*common, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=common,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(handlers=[handler], level=threshold, force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))
    _log_uncaught()


def _rendering(log_format: Literal["console", "json"]) -> list[Processor]:
    if log_format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            sort_keys=False,
            # The prettier formatters print local variables.
            exception_formatter=structlog.dev.plain_traceback,
        )
    ]


def _log_uncaught() -> None:
    log = structlog.get_logger()

    def log_exception(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            log.critical("uncaught exception", exc_info=(kind, error, trace))

    def log_thread_exception(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
            log_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)

    sys.excepthook = log_exception
    threading.excepthook = log_thread_exception
