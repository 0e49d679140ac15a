"""When a request runs and what it shares: SchedulingHints, CacheOptions, time_limit, the deadline.

Owns the rules for these values. Does not know what the scheduler makes of them.
"""

from __future__ import annotations

import math

from mili.router.api.durations import to_positive_seconds
from mili.router.errors import Reason, RequestError
from mili.router.params import Scheduling
from mili.router.tenants import GREATEST_PRIORITY, LEAST_PRIORITY, Tenant
from mili.v1 import inference_pb2 as pb

_MAX_SESSION_ID_BYTES = 128
_MAX_SALT_BYTES = 256

_TIME_LIMIT = "generation.stopping.time_limit"
_SALT = "generation.cache.salt"


def to_scheduling(
    generation: pb.Generation, tenant: Tenant, deadline: float, path: str = "generation."
) -> Scheduling:
    """Return when the tenant's request should run; raise RequestError for a bad value.

    deadline: of the call, by the engine's clock; infinite without one. path: of the message that
    holds the hints, with a dot at its end, or empty.
    """
    hints, stopping = generation.scheduling, generation.stopping
    path += "scheduling."
    _check_priority(hints.priority, tenant, path + "priority")
    if len(hints.session_id.encode()) > _MAX_SESSION_ID_BYTES:
        raise _invalid(f"session_id has at most {_MAX_SESSION_ID_BYTES} bytes", path + "session_id")
    max_queue_time = None
    if hints.HasField("max_queue_time"):
        max_queue_time = to_positive_seconds(hints.max_queue_time, path + "max_queue_time")
    time_limit = math.inf
    if stopping.HasField("time_limit"):
        time_limit = to_positive_seconds(stopping.time_limit, _TIME_LIMIT)
    if max_queue_time is not None and max_queue_time > time_limit:
        raise _invalid(
            "max_queue_time is longer than stopping.time_limit, which would end the request in"
            " the queue",
            path + "max_queue_time",
        )
    return Scheduling(
        tenant=tenant.name,
        weight=tenant.weight,
        # Who says nothing says 0, which a tenant's limit may be below.
        priority=min(hints.priority, tenant.max_priority),
        deadline=deadline,
        max_queue_time=max_queue_time,
        time_limit=time_limit,
        session_id=tenant.scoped(hints.session_id) if hints.session_id else "",
    )


def to_cache_namespace(cache: pb.CacheOptions, tenant: Tenant) -> bytes:
    """Return where the tenant's request shares prefixes; raise RequestError for a bad salt."""
    if len(cache.salt.encode()) > _MAX_SALT_BYTES:
        raise _invalid(f"salt has at most {_MAX_SALT_BYTES} bytes", _SALT)
    if cache.salt and cache.bypass_read and cache.bypass_write:
        raise _invalid(
            "salt says with whom to share the cache, and bypass_read and bypass_write do not use"
            " it at all",
            _SALT,
        )
    return tenant.cache_namespace(cache.salt)


def _check_priority(priority: int, tenant: Tenant, field: str) -> None:
    if not LEAST_PRIORITY <= priority <= GREATEST_PRIORITY:
        raise _invalid(f"priority must be from {LEAST_PRIORITY} to {GREATEST_PRIORITY}", field)
    if priority and priority > tenant.max_priority:
        raise RequestError(
            Reason.PERMISSION_DENIED,
            f"the tenant's priority is at most {tenant.max_priority}",
            field=field,
        )


def _invalid(message: str, field: str) -> RequestError:
    return RequestError(Reason.INVALID_FIELD, message, field=field)
