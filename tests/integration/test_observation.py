"""What an operator sees of a running server: metrics of both processes, and a recording."""

from __future__ import annotations

import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from mili.client import Client
from tests.model_folders import make_model_folder
from tests.serving import MILI, STEADY, free_port, serving, wait_until
from tests.unit.test_metrics import parsed

PROMPT = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("observation") / "tiny")


def scrape(port: int) -> dict[str, dict[tuple[str, ...], float]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return parsed(answer.read().decode())


def test_metrics_and_a_recording_of_a_running_server(model: Path, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    environment = {**STEADY, "MILI_RECORDING_FOLDER": str(tmp_path)}
    with serving(model, log, "--metrics-port", str(port), **environment) as served:
        with Client(served.address) as client:
            for _ in range(3):
                client.generate(PROMPT, max_tokens=8)
        router, worker = scrape(port), scrape(port + 1)
        served.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "recording is written" in log.read_text(), 10, "the recording")
    assert sum(router["mili_request_success_total"].values()) == 3
    generated = router["mili_generation_tokens_total"]["worker-0",]
    assert 3 <= generated <= 24
    assert router["mili_time_to_first_token_seconds_count"][()] == 3
    assert router["mili_prefix_cache_hits_total"]["worker-0",] > 0
    assert worker["mili_worker_rows_total"]["worker-0",] >= generated
    (recording,) = tmp_path.glob("mili-recording-*.gz")
    replayed = subprocess.run(
        [*MILI, "replay", str(recording)], capture_output=True, text=True, check=True
    )
    assert replayed.stdout.startswith("worker-0: ")
    assert "step commands: all the same" in replayed.stdout
    recording.write_bytes(recording.read_bytes()[:-20])
    cut = subprocess.run([*MILI, "replay", str(recording)], capture_output=True, text=True)
    assert (cut.returncode, cut.stderr.count("\n")) == (2, 1), cut.stderr


def test_a_taken_metrics_port_ends_the_router_with_a_line(model: Path, tmp_path: Path) -> None:
    port = free_port()
    with serving(model, tmp_path / "log", "--metrics-port", str(port), **STEADY):
        others = ["--port", "0", "--admin-port", "0", "--worker-link", f"ipc://{tmp_path}/link"]
        command = [*MILI, "router", str(model), "--metrics-port", str(port), *others]
        second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert "cannot start" in second.stderr
