"""Planted bugs: mistakes that someone could make in the router, and that the simulation must show.

Owns the list, and how a wrong text gets into a module while it is imported. Those of the scheduling
core alone are in tests/unit/test_scheduler.py; these need workers that come and go, a network, or
callers who read what they are told.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROUTER = Path(__file__).parents[2] / "router"


class Plant(NamedTuple):
    """The right text, which stands in the router once, and the wrong one."""

    right: str
    wrong: str


PLANTED = {
    # The engine: who is live, where, and what callers are told.
    "cancelled while it has no worker": Plant(
        "            elif request in self._homeless:\n                self._homeless.remove",
        "            elif False:\n                self._homeless.remove",
    ),
    "given up and kept": Plant(
        "                self._homeless.remove(request)\n",
        "                pass\n",
    ),
    "given up too early": Plant(
        "            request.waiting_since = now\n            self._ledger",
        "            self._ledger",
    ),
    "who has no worker is forgotten": Plant(
        "        self._requests.clear()\n        return requests",
        "        self._requests.clear()\n        return []",
    ),
    "every loss is a death": Plant(
        "self.scheduler.evacuate(died=died)", "self.scheduler.evacuate(died=True)"
    ),
    "one strike is enough": Plant("request.strikes >= MAX_STRIKES", "request.strikes >= 1"),
    "no worker's room is looked at": Plant(
        "request.max_length = min(request.max_length, pipeline.scheduler.context_limit)",
        "pass",
    ),
    "started again after a preemption": Plant(
        "            if request.admitted_at is None:\n                request",
        "            if True:\n                request",
    ),
    "who has ended stays on the books": Plant(
        "        del self._requests[request.request_id]\n        return finished",
        "        return finished",
    ),
    "tokens are numbered from one": Plant(
        "first = len(request.token_ids) - request.num_prompt_tokens - len(token_ids)",
        "first = len(request.token_ids) - request.num_prompt_tokens",
    ),
    "what was read is told again": Plant(
        "            request.readings = None\n", "            pass\n"
    ),
    "what was read is told to nobody": Plant(
        "        readings = request.readings\n", "        readings = None\n"
    ),
    "rows that sampled nothing never sample": Plant(
        "            self._silent_rows.discard(admission.row)\n", "            pass\n"
    ),
    "a step too many in flight": Plant(
        "while len(scheduler.in_flight) < depth", "while len(scheduler.in_flight) <= depth"
    ),
    "a prompt as long as the limit": Plant(
        "if length >= self.context_limit:",
        "if length > self.context_limit:",
    ),
    # Operators: who is drained, and what is pinned.
    "a worker that drains is placed on": Plant("        self._open.pop(name, None)\n", ""),
    "who is interrupted by a drain stays": Plant(
        "        if self._fleet.is_draining(group.name):\n"
        "            self._tell(self._dispatch.move(group.name, now))\n",
        "",
    ),
    "a drain outlives its worker": Plant(
        "        self._migrate_at.pop(name, None)\n        self._pins", "        self._pins"
    ),
    "a pin never expires": Plant("        self._fleet.expire_pins(now)\n", ""),
    # Siblings: the sequences of one call.
    "siblings are twins": Plant("return seed ^ (index * _SEED_STRIDE & _SEED_BITS)", "return seed"),
    "only the first is cancelled": Plant(
        "for member in family.members if member.finish is None]",
        "for member in family.members[:1] if member.finish is None]",
    ),
    "orphans wait for ever": Plant(
        "ended = [*ended, *self._siblings.bereave(ended)]", "ended = [*ended]"
    ),
    "a leader that failed has no heir": Plant(
        "elif published or leader.finish is not None:", "elif published:"
    ),
    "a deadline is for the first alone": Plant(
        "self._deadlines.watch(sequence, *times_of(sequence))",
        "self._deadlines.watch(request, *times_of(request))",
    ),
    "who ends while waiting for a sibling still waits": Plant(
        "        self._families[request.call_id].waiting.remove(request)\n", ""
    ),
    "one success counts for nobody": Plant(
        "        self.any_succeeded |= member.finish.error is None\n", ""
    ),
    # Time: who ends when.
    "a deadline is for others": Plant("if now >= deadline:", "if now >= deadline + 1.0:"),
    "a time limit starts again": Plant(
        "request.submitted_at + scheduling.time_limit",
        "request.waiting_since + scheduling.time_limit",
    ),
    "nobody is woken twice": Plant(
        "        if self._heap:\n            self._wake_at(self.next)\n", ""
    ),
    "who has begun has waited too long": Plant(
        "now >= queued_until and request.admitted_at is None", "now >= queued_until"
    ),
    "who has begun makes way": Plant(" and lane.urgency.fresh", ""),
    # The protocol: epochs, sequences, identities.
    "an epoch never ends": Plant("            del self._epochs[rank.epoch]\n", ""),
    "a doubled frame counts": Plant("        return missing\n", "        return max(missing, 0)\n"),
    "a hole is not noticed": Plant(
        "        elif missing := peer.missing_before(frame.sequence):\n",
        "        elif (missing := peer.missing_before(frame.sequence)) < 0:\n",
    ),
    "the older instance comes back": Plant("            self._roster.fence(old)\n", ""),
    "results of every rank count": Plant(
        "        if peer.rank != 0:\n            return\n        group", "        group"
    ),
    "one rank is enough": Plant("if len(ready) < self.world_size:", "if not ready:"),
    "only the first rank is told": Plant(
        "        for peer in self.ranks.values():\n            peer.liveness.expect",
        "        for peer in list(self.ranks.values())[:1]:\n            peer.liveness.expect",
    ),
    "the largest rank decides": Plant(
        "num_blocks=min(rank.num_blocks", "num_blocks=max(rank.num_blocks"
    ),
    "steps in flight survive their epoch": Plant("        self._in_flight.clear()\n", ""),
    "a group serves on after its loss": Plant(
        "        self._limits = None\n        self._in", "        self._in"
    ),
    "a faulty row is due": Plant("samples and row not in faulty", "samples"),
    "a frame that finds no room is lost": Plant(
        "            if not send(self.routing_id, self._waiting[0]):\n"
        "                return False\n"
        "            self._waiting.popleft()\n",
        "            if not send(self.routing_id, self._waiting.popleft()):\n"
        "                return False\n",
    ),
    "sequences go on in a new epoch": Plant(
        "        self._received = self._sent = 0\n        self.queue", "        self.queue"
    ),
    "any model will do": Plant("if hello.interface_sha256 != interface_sha256:", "if False:"),
    "any version will do": Plant(
        "if not hello.protocol_min <= PROTOCOL <= hello.protocol_max:", "if False:"
    ),
    # Liveness: who is dead, who is only slow.
    "silence is not noticed": Plant(
        "if silence > timeout else None", "if silence > 60 * timeout else None"
    ),
    "nobody is heard": Plant(
        "        self.heard_at = now\n\n    def heartbeat", "        pass\n\n    def heartbeat"
    ),
    "standing still is not noticed": Plant(
        "        problem = peer.liveness.hung(timeout, now)\n", "        problem = None\n"
    ),
    "the last step is awaited for ever": Plant(
        "while self._awaited and self._awaited[0][0] <= step",
        "while self._awaited and self._awaited[0][0] < step",
    ),
    "idling counts as standing still": Plant(
        "            self._moved_at = now\n        self._awaited.append",
        "            pass\n        self._awaited.append",
    ),
    # Scheduler and cache, as far as workers and callers make them fail.
    "suspects run together": Plant(
        "return self.waiting.first(suspects=False)",
        "return request",
    ),
    "who is computed is withdrawn": Plant(
        "for request in self.waiting.values() if request.request_id not in busy]",
        "for request in self.waiting.values()]",
    ),
    "rows are not given back": Plant("        self._free_rows.append(request.row)\n", ""),
    "half a block is published": Plant(
        "num_tokens // self.block_size\n        if end",
        "-(-num_tokens // self.block_size)\n        if end",
    ),
    "the end keeps its lock": Plant(
        "        self._tree.unlock(holding.node)\n        self._pool.free(holding.private)\n",
        "        self._pool.free(holding.private)\n",
    ),
    # What the caller reads.
    "a token lifts no suspicion": Plant(
        "        self.deaths = self.strikes = 0\n        num_tokens",
        "        num_tokens",
    ),
    "text that was held back is kept": Plant(
        "self.text.finish(finish) if self.text else finish", "finish"
    ),
    "the stop sequence shows": Plant(
        "if self._include_stop_text", "if not self._include_stop_text"
    ),
    "half a stop sequence shows": Plant(
        "certain = len(seen) - automaton.open_length[node]", "certain = len(seen)"
    ),
    "placed where there is no room": Plant("if length <= scheduler.context_limit", "if length"),
}


class _PlantedLoader(SourceLoader):
    """Gives a module another source than its file's."""

    def __init__(self, path: Path, source: str) -> None:
        self._path = path
        self._source = source

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: str) -> bytes:
        return self._source.encode()


class _Gardener(MetaPathFinder):
    """Finds the one module with the bug in it."""

    def __init__(self, fullname: str, loader: _PlantedLoader) -> None:
        self._fullname = fullname
        self._loader = loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(fullname, self._loader) if fullname == self._fullname else None


def find(plant: Plant) -> Path:
    """The one file of the router that has the right text. Raises ValueError."""
    counts = {path: path.read_text().count(plant.right) for path in sorted(ROUTER.glob("*.py"))}
    found = [path for path, count in counts.items() if count]
    if len(found) != 1 or counts[found[0]] != 1:
        raise ValueError(f"stands {sum(counts.values())} times in the router: {plant.right!r}")
    return found[0]


def plant(name: str) -> None:
    """Plant a bug in the router, of which this process must not have imported anything yet."""
    path = find(PLANTED[name])
    module = f"mili.router.{path.stem}"
    assert module not in sys.modules, f"{module} is imported already"
    source = path.read_text().replace(*PLANTED[name])
    sys.meta_path.insert(0, _Gardener(module, _PlantedLoader(path, source)))
