"""The worker groups that serve: which of them take requests, what is pinned in them, who drains.

Owns the groups' pipelines and the choice between them. Does not know what requests are told, nor
the clock: time is monotonic seconds, passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mili.router.errors import Reason, RequestError
from mili.router.introspection import Pinned
from mili.router.params import GenerationParams
from mili.router.pinboard import Pinboard
from mili.router.pipeline import Pipeline
from mili.router.placement import Placement
from mili.router.recovery import RETRY_AFTER
from mili.router.request import Request
from mili.router.scheduler import Scheduler

# Of the capabilities that a worker may have.
GRAMMARS = "grammars"


class Fleet:
    """Worker groups by name, from their on_ready to their on_lost.

    context_limit: tokens of prompt and output together that every group that takes requests can
    hold; of the model while none does.
    """

    def __init__(self, model_context_limit: int) -> None:
        self.context_limit = self._model_context_limit = model_context_limit
        self.pipelines: dict[str, Pipeline] = {}
        self._open: dict[str, Scheduler] = {}
        # The others drain: when what runs there moves elsewhere.
        self._migrate_at: dict[str, float] = {}
        self._placement = Placement()
        self._pins = Pinboard()

    @property
    def schedulers(self) -> Sequence[Scheduler]:
        return [pipeline.scheduler for pipeline in self.pipelines.values()]

    @property
    def num_preparing(self) -> int:
        """Requests whose grammar a worker does not have ready yet."""
        return sum(len(pipeline.preparation) for pipeline in self.pipelines.values())

    @property
    def takes_requests(self) -> bool:
        """Whether a group does."""
        return bool(self._open)

    @property
    def max_running(self) -> int:
        """Sequences that run together in every group that takes requests; 0 while none does."""
        return min((scheduler.max_running for scheduler in self._open.values()), default=0)

    @property
    def constrains_outputs(self) -> bool:
        """Whether every group that takes requests can hold an output to a grammar."""
        groups = (self.pipelines[name].group for name in self._open)
        return all(GRAMMARS in group.limits.capabilities for group in groups)

    def scheduler(self, name: str) -> Scheduler:
        return self.pipelines[name].scheduler

    def is_open(self, name: str) -> bool:
        """Whether this group serves and takes requests."""
        return name in self._open

    def is_draining(self, name: str) -> bool:
        return name in self._migrate_at

    def check_capable(self, params: GenerationParams) -> None:
        """Raise RequestError for what no group could do now."""
        if not self.pipelines:
            message = "no worker serves at the moment"
            raise RequestError(Reason.NO_WORKERS, message, retry_after=RETRY_AFTER)
        if not self._open:
            message = "every worker that serves drains"
            raise RequestError(Reason.DRAINING, message, retry_after=RETRY_AFTER)
        if params.constraint and not self.constrains_outputs:
            message = "the workers cannot constrain the output of this model"
            field = "generation.structured_output"
            raise RequestError(Reason.UNSUPPORTED_FIELD, message, field=field)
        length = len(params.prompt_token_ids)
        if length >= self.context_limit:
            message = f"the prompt has {length} tokens; at most {self.context_limit - 1} fit"
            raise RequestError(Reason.CONTEXT_TOO_LONG, message, field="generation.prompt")
        most = self.max_running
        if params.num_sequences > most:
            message = f"num_sequences is {params.num_sequences}; at most {most} run together"
            field = "generation.sampling.num_sequences"
            raise RequestError(Reason.INVALID_FIELD, message, field=field)

    def place(self, request: Request) -> str | None:
        """Which group a request should go to, if one can take it."""
        return self._placement.place(request, self._open, self.context_limit)

    def changed(self, name: str) -> None:
        """Something happened in a group."""
        self._placement.changed(name)

    def join(self, pipeline: Pipeline) -> list[Request]:
        """One more group serves; returns those who wait elsewhere and may be better off there.

        That is a fair part of each queue.
        """
        name = pipeline.group.name
        others = list(self._open.values())
        self.pipelines[name] = pipeline
        self._open_door(name)
        every = len(self._open)
        return [request for other in others for request in other.withdraw(every)]

    def lose(self, name: str, *, died: bool) -> list[Request]:
        """A group is gone, and its cache with it; returns its requests."""
        self._shut_door(name)
        self._migrate_at.pop(name, None)
        self._pins.forget(name)
        return self.pipelines.pop(name).evacuate(died=died)

    def drain(self, name: str, migrate_at: float) -> Scheduler:
        """Place nothing there any more. Raises RequestError for a group that does not serve."""
        scheduler = self._served(name)
        self._shut_door(name)
        self._migrate_at[name] = migrate_at
        return scheduler

    def undrain(self, name: str) -> bool:
        """Place requests there again; whether it drained. Raises RequestError as drain does."""
        self._served(name)
        if self._migrate_at.pop(name, None) is None:
            return False
        self._open_door(name)
        return True

    def migrate(self, now: float) -> list[str]:
        """Interrupt what runs in groups whose time to drain is over, if it can go elsewhere."""
        over = [name for name, at in self._migrate_at.items() if now >= at and self._open]
        for name in over:
            self.scheduler(name).preempt_all()
            self._migrate_at[name] = math.inf
        return over

    def leaving(self, name: str) -> list[Request]:
        """Those who wait in a group that drains, and are in no step in flight: they go now."""
        return self.pipelines[name].withdraw() if name in self._migrate_at else []

    def pin(self, namespace: bytes, token_ids: Sequence[int], until: float) -> Pinned:
        """Keep what is cached of a prefix, where most of it is."""
        caches = {name: pipeline.scheduler.kv for name, pipeline in self.pipelines.items()}
        return self._pins.pin(caches, namespace, token_ids, until)

    def unpin(self, pin_id: str) -> None:
        """Release a prefix. Raises RequestError (PIN_NOT_FOUND)."""
        self._pins.unpin(pin_id)

    def expire_pins(self, now: float) -> None:
        self._pins.expire(now)

    def flush(self, tenant: bytes | None) -> int:
        """Forget what nobody holds of a tenant's prefixes, of all for None; returns the blocks."""
        return sum(scheduler.kv.flush(tenant) for scheduler in self.schedulers)

    def _served(self, name: str) -> Scheduler:
        pipeline = self.pipelines.get(name)
        if pipeline is None:
            message = f"no worker group {name!r} serves"
            raise RequestError(Reason.WORKER_NOT_FOUND, message, field="name")
        return pipeline.scheduler

    def _open_door(self, name: str) -> None:
        scheduler = self._open[name] = self.scheduler(name)
        scheduler.reopen()
        self._set_context_limit()

    def _shut_door(self, name: str) -> None:
        self.scheduler(name).close()
        self._open.pop(name, None)
        self._placement.changed(name)
        self._set_context_limit()

    def _set_context_limit(self) -> None:
        limits = (scheduler.context_limit for scheduler in self._open.values())
        self.context_limit = min(limits, default=self._model_context_limit)
