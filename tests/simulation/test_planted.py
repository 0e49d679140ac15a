"""Every bug that is planted in the router is shown by the simulation."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.planted import PLANTED, find

ROOT = Path(__file__).parents[2]


def hunt(name: str, seeds: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.simulation", "--plant", name, "--seeds", str(seeds)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)


def test_every_right_text_stands_in_the_router_once() -> None:
    assert len(PLANTED) >= 30
    for name, plant in PLANTED.items():
        assert find(plant), name
        assert plant.right != plant.wrong


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str) -> None:
    found = hunt(name, seeds=60)
    assert found.returncode == 1, found.stdout
    # By an assertion of the router or of ours, or by a fault of Python's; not by a typing mistake.
    assert "SyntaxError" not in found.stdout and "NameError" not in found.stdout, found.stdout
    assert "fails: Traceback" in found.stdout


def test_a_failing_seed_says_how_to_replay_it() -> None:
    name = "tokens are numbered from one"
    found = hunt(name, seeds=1)
    (line,) = (line for line in found.stdout.splitlines() if line.startswith("replay it: python "))
    command = [sys.executable, *shlex.split(line.removeprefix("replay it: python "))]
    replayed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert replayed.returncode == 1
    assert replayed.stdout.count("\n") > 100, "the trace is printed"
    assert "AssertionError: I1: a hole" in replayed.stdout
