"""A profiler's trace of the steps that a worker computed.

Owns the file. Does not know what a step does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

log = structlog.get_logger()


@contextmanager
def write_trace(folder: Path) -> Iterator[None]:
    """Record what runs within, on CPU and GPU, to a file in `folder` for chrome://tracing."""
    # Takes seconds to import, which no worker without a profile need wait for.
    from torch.profiler import ProfilerActivity, profile, supported_activities

    wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()  # type: ignore[no-untyped-call]
    with profile(activities=sorted(wanted, key=str)) as profiler:
        yield
    path = folder / f"trace-{os.getpid()}.json.gz"
    profiler.export_chrome_trace(str(path))
    log.info("trace is written", path=str(path))
