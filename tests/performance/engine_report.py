"""The benchmark's tables: each figure beside its floor, vLLM's, and what is asked for.

Owns how figures look, and the specification's own targets. Does not measure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tests.performance.qwen3 import Known, Model

# The step and the clients' gap must agree so far.
_GAP_TOLERANCE = 0.05


class Row(NamedTuple):
    """All in seconds. gap: median between tokens. tokens: of a row that is told in tokens/s."""

    what: str
    samples: list[float]
    floor: float | None
    known: Known | None
    gap: float | None = None
    tokens: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


class Target(NamedTuple):
    """What the specification asks for. models: those it is meant for; empty for all."""

    what: str
    form: str
    limit: str
    met: Callable[[float], bool]
    models: tuple[str, ...] = ()


_TARGETS = (
    Target(
        "prefill",
        "{:,.0f} tokens/s",
        "> 100,000",
        lambda rate: rate > 100e3,
        ("qwen3-0.6b", "qwen3-1.7b"),
    ),
    Target("512-token prompt", "{:.1f} ms", "< 100 ms", lambda ms: ms < 100),
    Target("single stream", "{:.0f} tokens/s", "> 50", lambda rate: rate > 50),
    Target("batch of 64", "{:,.0f} tokens/s", "> 5,000", lambda rate: rate > 5e3),
    Target("per token, batch 256", "{:.2f} ms", "< 20 ms", lambda ms: ms < 20),
    Target("512 + 128 tokens", "{:.2f} s", "< 1 s", lambda seconds: seconds < 1, ("qwen3-8b",)),
    Target("memory at batch 64", "{:.1f} %", "< 90 %", lambda percent: percent < 90),
    Target("concurrent requests", "{:.0f}", "256", lambda count: count >= 256),
    Target("prompt", "{:,.0f} tokens", "32,768", lambda tokens: tokens >= 32_768),
    Target("tensor parallelism", "{:.0f} GPUs", "> 1", lambda gpus: gpus > 1),
)


def print_table(console: Console, model: Model, rows: Sequence[Row]) -> None:
    table = Table(title=f"{model.name}, random weights", title_justify="left")
    table.add_column("what", no_wrap=True)
    for name in ("ours", "floor", "ours / floor", "vLLM 0.26.0", "entry", "met", "gap", "runs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        known = row.known or Known()
        met = "" if known.entry is None else "yes" if row.median <= known.entry else "NO"
        table.add_row(
            row.what,
            _time(row.median, row.tokens),
            _time(row.floor),
            f"{row.median / row.floor:.2f}" if row.floor else "",
            _time(known.vllm, row.tokens),
            _time(known.entry, row.tokens),
            met,
            _gap(row),
            str(len(row.samples)),
        )
    console.print(table)


def print_targets(console: Console, model: Model, figures: Mapping[str, float]) -> None:
    """figures: by the names of the targets, in the targets' units."""
    table = Table(title=f"{model.name}, the specification's targets", title_justify="left")
    for name in ("what", "ours", "target", "met"):
        table.add_column(name, no_wrap=True)
    for target in _TARGETS:
        figure = figures.get(target.what)
        if figure is None:
            shown, met = "", "not measured"
        else:
            shown, met = target.form.format(figure), "yes" if target.met(figure) else "NO"
        if target.models and model.name not in target.models:
            met = f"meant for {' and '.join(target.models)}"
        table.add_row(target.what, shown, target.limit, met)
    console.print(table)


def _time(seconds: float | None, tokens: int | None = None) -> str:
    if seconds is None:
        return ""
    text = f"{seconds:.1f} s" if seconds >= 10 else f"{seconds * 1e3:.4g} ms"
    return f"{text} ({tokens / seconds / 1e3:.4g}K tok/s)" if tokens else text


def _gap(row: Row) -> str:
    if row.gap is None:
        return ""
    if math.isnan(row.gap):
        return "none !"
    agrees = abs(row.gap - row.median) <= _GAP_TOLERANCE * row.median
    return _time(row.gap) + ("" if agrees else " !")
