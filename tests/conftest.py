"""What holds for every test: one that sets up logging leaves no trace of it for the next."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    hooks = sys.excepthook, threading.excepthook
    handlers = logging.root.handlers.copy()
    level = logging.root.level
    yield
    sys.excepthook, threading.excepthook = hooks
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
