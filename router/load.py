"""How busy the worker groups are, put together from where it is known.

Owns nothing but the sums.
"""

from __future__ import annotations

from collections.abc import Collection

from mili.router.dispatch import Dispatch
from mili.router.introspection import Load
from mili.router.meter import Meter
from mili.router.pipeline import Pipeline


def load_of(pipelines: Collection[Pipeline], dispatch: Dispatch, meter: Meter, now: float) -> Load:
    """The load of all groups that serve, and of those who wait, wherever they do."""
    schedulers = [pipeline.scheduler for pipeline in pipelines]
    usages = [scheduler.kv.usage() for scheduler in schedulers]
    available = sum(usage.free + usage.evictable for usage in usages)
    blocks = sum(usage.total - 1 for usage in usages)
    waiting_tokens = sum(scheduler.num_waiting_tokens for scheduler in schedulers)
    return Load(
        queued_requests=dispatch.num_queued,
        queued_prompt_tokens=waiting_tokens
        + sum(pipeline.preparation.num_tokens for pipeline in pipelines)
        + dispatch.num_homeless_tokens,
        running_sequences=sum(len(scheduler.running) for scheduler in schedulers),
        kv_utilization=1 - available / blocks if blocks else 0.0,
        prefix_hit_ratio=meter.prefix_hit_ratio(now),
        output_tokens_per_second=meter.output_tokens_per_second(now),
        estimated_queue_time=min((pipeline.backlog for pipeline in pipelines), default=0.0),
    )
