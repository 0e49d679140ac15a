"""Coverage-guided fuzzing of one target, with atheris.

    python -m tests.fuzz detokenizer [--seconds 60]

Exits 0 when the time is over, else with atheris's code, the trace and the bytes that led there,
which are written to a file crash-... in this folder. atheris has wheels for Linux on x86-64 and for
Python 3.11 to 3.13; elsewhere tests/unit/test_fuzz_targets.py still draws bytes, without a guide.
"""

from __future__ import annotations

import argparse
import sys

import atheris

with atheris.instrument_imports(include=["mili.router", "mili.worker"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    flags = [f"-max_total_time={options.seconds}", "-max_len=512", "-timeout=10"]
    atheris.Setup([sys.argv[0], *flags, "-rss_limit_mb=2048"], TARGETS[options.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
