"""The phases of a start: measured, logged, in order."""

from __future__ import annotations

import time

import pytest
from structlog.testing import capture_logs

from mili.worker.startup import Startup


def test_phases_are_measured_and_logged_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((10.0, 12.5, 13.0, 13.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    startup = Startup()
    with capture_logs() as logs:
        with startup.phase("load weights"):
            assert not startup.phases
        with startup.phase("record graphs"):
            pass
    assert [(phase.name, phase.seconds) for phase in startup.phases] == [
        ("load weights", 2.5),
        ("record graphs", 0.0),
    ]
    assert [(line["phase"], line["seconds"]) for line in logs] == [
        ("load weights", 2.5),
        ("record graphs", 0.0),
    ]


def test_a_phase_that_fails_is_none() -> None:
    startup = Startup()
    with pytest.raises(ValueError, match="no model"), startup.phase("load weights"):
        raise ValueError("no model")
    assert not startup.phases
