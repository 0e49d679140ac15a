"""Prometheus metrics of a router: its meters and its state, read when somebody scrapes.

Owns names, units and labels, and the port. Does not know how anything is counted. Where vLLM has a
metric for the same, its name and unit are used, with mili_ in front. Labels are bounded: one model,
the worker groups that are known, the tenants of the file, the reasons of the contract.

The server has threads of its own. What they read are numbers that the loop writes; nothing is
locked, and the loop waits for nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mili.router.kv_cache import Usage
from mili.router.meters import Distribution, Meters
from mili.router.scheduler import Scheduler


class Observed(Protocol):
    """What of the engine is shown as it is at the moment."""

    @property
    def meters(self) -> Meters:
        """What was counted."""

    @property
    def schedulers(self) -> Mapping[str, Scheduler]:
        """Of the worker groups that serve, by name: for looking, not for changing."""

    @property
    def num_queued(self) -> int:
        """Requests that wait, those without a worker group included."""


class RouterCollector(Collector):
    """Reads the engine anew for each scrape."""

    def __init__(self, engine: Observed, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """Every metric, with its samples."""
        meters, schedulers = self._engine.meters, dict(self._engine.schedulers)
        yield from self._state(schedulers)
        yield from self._requests(meters)
        yield from self._latencies(meters)
        yield from self._groups(meters)

    def _state(self, schedulers: Mapping[str, Scheduler]) -> Iterator[Metric]:
        waiting = {name: len(each.waiting) for name, each in schedulers.items()}
        unplaced = {"": max(0, self._engine.num_queued - sum(waiting.values()))}
        usages = {name: each.kv.usage() for name, each in schedulers.items()}
        used = {name: _used(usage) for name, usage in usages.items()}
        yield self._gauge(
            "num_requests_running",
            "Requests in a worker group's steps.",
            {name: len(each.running) for name, each in schedulers.items()},
        )
        yield self._gauge(
            "num_requests_waiting",
            "Requests that wait for a row; without a worker: for one that serves.",
            waiting | unplaced,
        )
        yield self._gauge(
            "kv_cache_usage_perc",
            "Blocks that requests hold or use, of all; 1 is 100 percent.",
            used,
        )
        for state in ("free", "cached", "held", "evictable"):
            yield self._gauge(
                f"kv_blocks_{state}",
                f"KV blocks that are {state}.",
                {name: getattr(usage, state) for name, usage in usages.items()},
            )
        yield self._counter(
            "num_preemptions",
            "Requests that lost their row for want of blocks, since the worker group serves.",
            ("worker",),
            {(name,): each.num_preemptions for name, each in schedulers.items()},
        )

        counters = {name: each.kv.counters for name, each in schedulers.items()}
        yield self._counter(
            "prefix_cache_evicted_blocks",
            "Cached blocks that had to go, since the worker group serves.",
            ("worker",),
            {(name,): each.blocks_evicted for name, each in counters.items()},
        )
        yield self._counter(
            "prefix_cache_misses",
            "Prompts that came from the cache only so far, by why, since the worker group serves.",
            ("worker", "reason"),
            {
                (name, miss.value): count
                for name, each in counters.items()
                for miss, count in each.misses.items()
            },
        )

    def _requests(self, meters: Meters) -> Iterator[Metric]:
        ended = meters.ended.copy()
        yield self._counter(
            "request_success",
            "Requests that ended, by how.",
            ("tenant", "finished_reason"),
            {(tenant, reason.name.lower()): count for (tenant, reason), count in ended.items()},
        )
        yield self._counter(
            "request_failure",
            "Calls that ended with an error, refused ones included, by the reason they were told.",
            ("reason",),
            {(reason.value,): count for reason, count in meters.failures.copy().items()},
        )
        for kind, by_tenant in (
            ("prompt", meters.prompt_tokens.copy()),
            ("generation", meters.generation_tokens.copy()),
        ):
            yield self._counter(
                f"tenant_{kind}_tokens",
                f"{kind.capitalize()} tokens of the requests that have ended.",
                ("tenant",),
                {(tenant,): count for tenant, count in by_tenant.items()},
            )

    def _latencies(self, meters: Meters) -> Iterator[Metric]:
        for name, documentation, values in (
            ("time_to_first_token_seconds", "From submission.", meters.time_to_first_token),
            ("inter_token_latency_seconds", "Between two tokens of a stream.", meters.inter_token),
            ("e2e_request_latency_seconds", "From submission to the end.", meters.end_to_end),
            ("request_queue_time_seconds", "From submission to a row.", meters.queue),
            ("request_prefill_time_seconds", "From a row to the first token.", meters.prefill),
            ("request_decode_time_seconds", "From the first token to the end.", meters.decode),
            ("request_prompt_tokens", "Of a request.", meters.request_prompt_tokens),
            ("request_generation_tokens", "Of a request.", meters.request_generation_tokens),
        ):
            yield self._histogram(name, documentation, {"": values})

    def _groups(self, meters: Meters) -> Iterator[Metric]:
        groups = dict(meters.groups)
        for name, documentation, field in (
            ("prompt_tokens", "Prompt tokens of admitted requests.", "prompt_tokens"),
            ("generation_tokens", "Sampled tokens.", "generation_tokens"),
            ("prefix_cache_queries", "Prompt tokens asked of the cache.", "prompt_tokens"),
            ("prefix_cache_hits", "Prompt tokens from the cache.", "cached_prompt_tokens"),
            ("worker_lost", "Times that the worker group was lost.", "times_lost"),
            ("recoveries", "Requests that its loss moved elsewhere.", "requests_recovered"),
        ):
            counts: dict[tuple[str, ...], int] = {
                (group,): getattr(each, field) for group, each in groups.items()
            }
            yield self._counter(name, documentation, ("worker",), counts)
        for name, documentation, field in (
            ("step_seconds", "Time of a step on the device.", "step_seconds"),
            ("step_rows", "Requests in a step.", "step_rows"),
            ("iteration_tokens_total", "Tokens computed in a step.", "step_tokens"),
        ):
            by_group = {group: getattr(each, field) for group, each in groups.items()}
            yield self._histogram(name, documentation, by_group)

    def _gauge(self, name: str, documentation: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(f"mili_{name}", documentation, labels=("model_name", "worker"))
        for worker, value in values.items():
            family.add_metric((self._model, worker), value)
        return family

    def _counter(
        self,
        name: str,
        documentation: str,
        labels: Iterable[str],
        values: Mapping[tuple[str, ...], int],
    ) -> Metric:
        family = CounterMetricFamily(f"mili_{name}", documentation, labels=("model_name", *labels))
        for of, value in values.items():
            family.add_metric((self._model, *of), value)
        return family

    def _histogram(
        self, name: str, documentation: str, values: Mapping[str, Distribution]
    ) -> Metric:
        """By worker group, or "" for a distribution of the whole router."""
        labels = ("model_name",) if "" in values else ("model_name", "worker")
        family = HistogramMetricFamily(f"mili_{name}", documentation, labels=labels)
        for worker, each in values.items():
            sums = list(accumulate(each.counts))
            bounds = [*map(str, each.bounds), "+Inf"]
            buckets = list(zip(bounds, sums, strict=True))
            family.add_metric((self._model, worker)[: len(labels)], buckets, each.total)
        return family


def serve_metrics(host: str, port: int, collector: Collector) -> WSGIServer:
    """Answer scrapes from now on, on threads of its own. Raises OSError if the port is taken."""
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    server, _ = start_http_server(port, host, registry)
    return server


def _used(usage: Usage) -> float:
    return 1 - (usage.free + usage.evictable) / (usage.total - 1)
