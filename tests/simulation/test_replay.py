"""One seed drives all: the same seed gives the same trace, to the byte, in any process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def simulate(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    """Run `python -m tests.simulation` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_same_seed_gives_the_same_trace_whatever_the_hash_seed() -> None:
    first = simulate("--seed", "11", "-v", hash_seed="1")
    second = simulate("--seed", "11", "-v", hash_seed="2")
    assert first.returncode == 0, first.stdout[-2000:]
    assert len(first.stdout.splitlines()) > 1000
    assert first.stdout == second.stdout


def test_another_seed_gives_another_trace() -> None:
    digests = {simulate("--seed", seed).stdout.split()[-1] for seed in ("11", "12")}
    assert len(digests) == 2


def test_many_processes_give_what_one_gives() -> None:
    runs = [simulate("--seeds", "6", "--jobs", jobs) for jobs in ("1", "2")]
    digests = [run.stdout.split()[-1] for run in runs]
    assert digests[0] == digests[1], runs
    assert [run.returncode for run in runs] == [0, 0]
