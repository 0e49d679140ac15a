"""What Prometheus is told: every metric by its name, true, and cheap to count."""

from __future__ import annotations

import math
import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mili.internal.v1.step_pb2 import WORKER_PHASE_IDLE, RowFault, StepCommand, StepResult
from mili.router.errors import Reason
from mili.router.meters import MAX_GROUPS, Distribution, Meters
from mili.router.metrics import RouterCollector, serve_metrics
from mili.worker.metrics import WorkerMetrics
from mili.worker.progress import Progress
from tests.serving import free_port
from tests.unit.test_engine import LONG, Harness, params

ROOT = Path(__file__).parents[2]

# vLLM's metrics that mean the same here: their names, without the prefix.
AS_IN_VLLM = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions",
    "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits",
    "request_success", "request_prompt_tokens", "request_generation_tokens",
    "iteration_tokens_total", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds",
}  # fmt: skip


def scrape(harness: Harness) -> dict[str, dict[tuple[str, ...], float]]:
    """By sample name: values by labels other than the model, in the order of the labels' names."""
    registry = CollectorRegistry()
    registry.register(RouterCollector(harness.engine, "tiny"))
    return parsed(generate_latest(registry).decode())


def parsed(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            found.setdefault(sample.name, {})[tuple(labels.values())] = sample.value
    return found


@pytest.fixture
def harness() -> Harness:
    harness = Harness(2)
    for group in harness.groups:
        harness.engine.on_ready(group)
    return harness


def test_a_request_is_counted_from_its_start_to_its_end(harness: Harness) -> None:
    harness.engine.submit("a", params(LONG, max_tokens=5))
    at_work = scrape(harness)
    assert at_work["mili_num_requests_running"] == {("worker-0",): 1, ("worker-1",): 0}
    assert at_work["mili_kv_cache_usage_perc"]["worker-0",] == 4 / 23
    for now in (0.5, 1.0, 1.25, 1.5, 1.75):
        harness.now = now
        harness.answer(harness.groups[0])
    told = scrape(harness)
    assert told["mili_num_requests_running"]["worker-0",] == 0
    assert told["mili_request_success_total"] == {("max_tokens", ""): 1}
    assert told["mili_prompt_tokens_total"]["worker-0",] == len(LONG)
    assert told["mili_generation_tokens_total"]["worker-0",] == 5
    assert told["mili_tenant_generation_tokens_total"]["",] == 5
    assert told["mili_time_to_first_token_seconds_sum"][()] == 0.5
    assert told["mili_inter_token_latency_seconds_count"][()] == 4
    assert told["mili_inter_token_latency_seconds_sum"][()] == 1.25
    assert told["mili_e2e_request_latency_seconds_sum"][()] == 1.75
    assert told["mili_inter_token_latency_seconds_bucket"]["0.2",] == 0
    assert told["mili_inter_token_latency_seconds_bucket"]["0.3",] == 3
    assert told["mili_inter_token_latency_seconds_bucket"]["+Inf",] == 4


def test_names_are_those_of_vllm_where_it_has_one(harness: Harness) -> None:
    harness.engine.submit("a", params(LONG))
    harness.finish()
    names = scrape(harness)
    for name in AS_IN_VLLM:
        variants = {f"mili_{name}{end}" for end in ("", "_total", "_sum")}
        assert variants & names.keys(), name


def test_the_cache_is_asked_for_every_prompt_token_and_its_hits_count(harness: Harness) -> None:
    for request_id in ("a", "b"):
        harness.engine.submit(request_id, params(LONG))
        harness.finish()
    told = scrape(harness)
    assert sum(told["mili_prefix_cache_queries_total"].values()) == 2 * len(LONG)
    assert sum(told["mili_prefix_cache_hits_total"].values()) == 4
    assert told["mili_prefix_cache_misses_total"]["never seen", "worker-0"] == 1
    assert told["mili_prefix_cache_misses_total"]["not full block", "worker-0"] == 1
    assert told["mili_prefix_cache_evicted_blocks_total"]["worker-0",] == 0


def test_a_lost_worker_and_what_it_moved_are_counted(harness: Harness) -> None:
    harness.engine.submit("a", params(LONG))
    (group,) = [group for group in harness.groups if group.sent]
    harness.engine.on_lost(group, "test", died=True)
    told = scrape(harness)
    assert told["mili_worker_lost_total"][group.name,] == 1
    assert told["mili_recoveries_total"][group.name,] == 1
    (other,) = [other for other in harness.groups if other is not group]
    harness.engine.on_lost(other, "test", died=False)
    assert scrape(harness)["mili_num_requests_waiting"] == {("",): 1}


def test_preemptions_and_failures_are_counted() -> None:
    harness = Harness(1)
    harness.groups[0].limits = harness.groups[0].limits._replace(num_blocks=21)
    harness.groups[0].restart()
    harness.engine.on_ready(harness.groups[0])
    for number in range(6):
        harness.engine.submit(str(number), params([*LONG, number % 2], max_tokens=30))
    harness.finish()
    harness.engine.meters.failed(Reason.QUEUE_FULL)
    told = scrape(harness)
    assert told["mili_num_preemptions_total"]["worker-0",] > 0
    assert told["mili_request_failure_total"]["QUEUE_FULL",] == 1


def test_a_distribution_counts_as_prometheus_does() -> None:
    values = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        values.add(value)
    values.add(math.inf, 0)
    assert values.counts == [2, 2, 1]


def test_worker_groups_that_come_and_go_are_bounded() -> None:
    meters = Meters()
    for number in range(2 * MAX_GROUPS):
        meters.group(f"pod-{number}")
    assert len(meters.groups) == MAX_GROUPS
    assert f"pod-{2 * MAX_GROUPS - 1}" in meters.groups


def test_a_router_answers_a_scrape(harness: Harness) -> None:
    port = free_port()
    server = serve_metrics("127.0.0.1", port, RouterCollector(harness.engine, "tiny"))
    try:
        with pytest.raises(OSError, match="in use"):
            serve_metrics("127.0.0.1", port, RouterCollector(harness.engine, "tiny"))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            told = parsed(answer.read().decode())
    finally:
        server.shutdown()
        server.server_close()
    assert told["mili_num_requests_running"]["worker-0",] == 0
    assert told["process_resident_memory_bytes"][()] > 0


def test_a_worker_counts_its_steps() -> None:
    port = free_port()
    progress = Progress()
    metrics = WorkerMetrics(port, "worker-7", progress)
    try:
        progress.enter(WORKER_PHASE_IDLE)
        command = StepCommand(step=1, rows=[1, 2], starts=[0, 0], num_tokens=[3, 4])
        metrics.stepped(command, StepResult(step=1, device_microseconds=1500, faults=[RowFault()]))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            told = parsed(answer.read().decode())
    finally:
        metrics.close()
    assert told["mili_worker_step_seconds_sum"]["worker-7",] == 0.0015
    assert told["mili_worker_step_seconds_bucket"]["0.002", "worker-7"] == 1
    assert told["mili_worker_rows_total"]["worker-7",] == 2
    assert told["mili_worker_computed_tokens_total"]["worker-7",] == 7
    assert told["mili_worker_row_faults_total"]["worker-7",] == 1
    phases = {labels[0]: value for labels, value in told["mili_worker_phase"].items()}
    assert phases == dict.fromkeys(phases, 0) | {"idle": 1}


def test_documents_and_alerts_name_only_metrics_that_there_are(harness: Harness) -> None:
    harness.engine.submit("a", params(LONG))
    harness.finish()
    harness.engine.meters.failed(Reason.INTERNAL)
    told = set(scrape(harness))
    worker = (ROOT / "worker" / "metrics.py").read_text()
    told |= {
        each + end
        for each in re.findall(r'"(mili_\w+)"', worker)
        for end in ("", "_total", "_bucket")
    }
    told |= {name.removesuffix("_sum") for name in told}
    for file in (
        "docs/metrics.md",
        "deploy/prometheus/alerts.yml",
        "deploy/grafana/dashboards/mili.json",
    ):
        path = ROOT / file
        named = set(re.findall(r"\bmili_\w+", path.read_text()))
        assert named - {"mili_"} <= told, path.name
        assert len(named) >= 4
