"""Every kernel's time, and how near it is to what the card can do.

    python -m tests.performance.bench_kernels [--only decode_attention]

Owns the table. The lines come from tests/performance/kernels/bench_*.py.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
import traceback
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.performance.bench_server import environment
from tests.performance.kernels.line import Line

FILES = Path(__file__).parent / "kernels"
NAMES = [path.stem.removeprefix("bench_") for path in sorted(FILES.glob("bench_*.py"))]


def lines_of(name: str) -> list[Line]:
    """Run one file's benchmark, and give back the memory that it took."""
    try:
        module = importlib.import_module(f"tests.performance.kernels.bench_{name}")
        lines: list[Line] = module.lines()
        return lines
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=NAMES, help="one file; may be repeated")
    console = Console(width=150, highlight=False)
    table = Table(title="kernels", title_justify="left")
    for column in ("kernel", "shape"):
        table.add_column(column, no_wrap=True)
    for column in ("us", "rate", "of the limit"):
        table.add_column(column, justify="right", no_wrap=True)
    failed = []
    for name in parser.parse_args().only or NAMES:
        began = time.monotonic()
        try:
            lines = lines_of(name)
        except Exception:
            failed.append(name)
            traceback.print_exc()
            continue
        for line in lines:
            rate = f"{line.amount:,.0f} {line.unit}"
            times = f"{line.microseconds:,.2f}"
            table.add_row(line.kernel, line.shape, times, rate, f"{line.share:.1%}")
        table.add_section()
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    where = environment("bench_kernels")
    console.print(" · ".join(f"{key} {value}" for key, value in where.items()), markup=False)
    console.print(table)
    if failed:
        console.print(f"FAILED, see above: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
