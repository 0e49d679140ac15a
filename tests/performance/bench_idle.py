"""How long the GPU idles between decode steps, from the trace of a worker that serves one stream.

    python -m tests.performance.bench_idle --model qwen3-8b [--tokens 96]

Serves random weights of a published shape with `--profile`, streams one answer through gRPC, and
reads the trace that the worker leaves: the share of time in which no kernel and no copy ran, from
the first to the last whole decode step of the second half. Tracing itself costs a little, so the
true share is smaller.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from mili.client import Client
from tests.performance.qwen3 import MODELS, write_folder
from tests.serving import serving

# The first kernel of every step.
_FIRST_KERNEL = "make_batch"


class Span(NamedTuple):
    """Microseconds."""

    start: float
    end: float


class Idle(NamedTuple):
    steps: int
    microseconds_per_step: float
    share: float


def read_spans(trace: Path) -> tuple[list[Span], list[float]]:
    """What ran on the GPU, in order, and when each step began."""
    with gzip.open(trace) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans = sorted(Span(e["ts"], e["ts"] + e["dur"]) for e in on_gpu)
    begins = sorted(e["ts"] for e in on_gpu if e["name"].startswith(_FIRST_KERNEL))
    return spans, begins


def measure_idle(spans: Iterable[Span], begins: Sequence[float]) -> Idle:
    """The share of time without anything on the GPU, over the second half of the steps."""
    window = Span(begins[len(begins) // 2], begins[-1])
    busy, end = 0.0, window.start
    for span in spans:
        start = max(span.start, end)
        stop = min(span.end, window.end)
        if stop > start:
            busy += stop - start
            end = stop
    steps = len(begins) - 1 - len(begins) // 2
    total = window.end - window.start
    return Idle(steps, total / steps, 1 - busy / total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--tokens", type=int, default=96)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = write_folder(folder / "model", MODELS[arguments.model])
        flags = (*flags, "--device", "cuda", "--profile", str(folder / "traces"))
        with (
            serving(folder / "model", folder / "serve.log", *flags) as served,
            Client(served.address) as client,
        ):
            client.generate(
                list(range(512)), max_tokens=arguments.tokens, temperature=0, ignore_eos=True
            )
        (trace,) = (folder / "traces").iterdir()
        idle = measure_idle(*read_spans(trace))
    Console().print(
        f"{arguments.model}, batch 1: {idle.steps} steps of {idle.microseconds_per_step:.0f} us, "
        f"the GPU idle in {100 * idle.share:.2f} % of the time"
    )


if __name__ == "__main__":
    main()
