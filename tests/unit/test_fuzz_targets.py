"""The fuzz targets: on drawn bytes everywhere, and guided by coverage where atheris is."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mili.internal.v1 import step_pb2 as pb
from mili.router.stop import StopMatcher
from tests.fuzz.targets import TARGETS, check_cuts

ROOT = Path(__file__).parents[2]
SECONDS = int(os.environ.get("MILI_FUZZ_SECONDS", "3"))
# What random bytes would not come to by themselves.
SEEDS = {
    "detokenizer": [bytes([kind]) + bytes(range(64)) for kind in range(10)],
    "stop_matcher": [b"ab\nabc\nxabab" * 3, b"aa\na\naaa", b"stop\n\ntop\nstostop"],
    "tool_calls": [bytes([0, 21, 1, 2, 10, 12, 13, 3]), bytes([5, 6, 19, 7, 21, 17, 12, 18, 8, 9])],
    "step_decoder": [
        frame.SerializeToString()
        for frame in (
            pb.WorkerFrame(result=pb.StepResult(step=1, num_new=[1], token_ids=[7])),
            pb.WorkerFrame(heartbeat=pb.Heartbeat(finished_step=3)),
            pb.WorkerFrame(ready=pb.Ready(num_blocks=1)),
            pb.WorkerFrame(failure=pb.Failure()),
            pb.RouterFrame(step=pb.StepCommand(step=1, rows=[1], starts=[0], num_tokens=[1])),
            pb.RouterFrame(goodbye=pb.Goodbye(reason="x")),
        )
    ],
}


@pytest.mark.parametrize("name", TARGETS)
def test_on_drawn_bytes(name: str) -> None:
    source = random.Random(name)
    for _ in range(300):
        seed = bytearray(source.choice(SEEDS[name]))
        for _ in range(source.randint(0, 4)):
            seed[source.randrange(len(seed))] = source.randrange(256)
        TARGETS[name](bytes(seed))
        TARGETS[name](source.randbytes(source.randint(0, 64)))
        TARGETS[name](bytes(source.choices(b"ab\n", k=30)))


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("name", TARGETS)
def test_guided_by_coverage(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris has no wheel for this Python or machine")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(SECONDS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS + 60,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done " in done.stderr


def test_a_parser_that_minds_the_cuts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        check_cuts(lambda pieces: [len(piece) > 3 for piece in pieces], "abcdefgh", b"\2")
    honest = StopMatcher.push

    def forgetful(self: StopMatcher, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        self._node, self._held = 0, ""
        return honest(self, text, may_stop=may_stop)

    monkeypatch.setattr(StopMatcher, "push", forgetful)
    with pytest.raises(AssertionError):
        TARGETS["stop_matcher"](b"ab\nxxaby")
