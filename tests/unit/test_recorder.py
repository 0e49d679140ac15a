"""The flight recorder: a random history, written down and replayed, gives the same decisions."""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mili.internal.v1.step_pb2 import Sampling, StepResult
from mili.router import scheduler
from mili.router.fair_share import FairShare
from mili.router.limits import Limits
from mili.router.mask import Mask
from mili.router.outcome import Finish, FinishReason
from mili.router.params import GenerationParams, Scheduling
from mili.router.recorder import Recorder, Reel, read, write
from mili.router.replay import replay
from mili.router.request import Request
from mili.router.scheduler import Scheduler
from mili.router.snapshot import Cell
from tests.scheduler_simulation import Simulation

CORE = SimpleNamespace(
    Scheduler=Scheduler,
    Limits=Limits,
    Request=Request,
    Finish=Finish,
    FinishReason=FinishReason,
)


class RecordedSimulation(Simulation):
    """Every life of the worker is a group of its own on the recorder."""

    def __init__(self, seed: int, num_requests: int, length: int) -> None:
        self.recorder = Recorder(length)
        self.lives = 0
        super().__init__(CORE, seed, num_requests)

    def _new_worker(self) -> None:
        super()._new_worker()
        self.lives += 1
        self.recorder.watch(f"life {self.lives}", self.scheduler)


def record(seed: int, path: Path, length: int = 300) -> list[Reel]:
    simulation = RecordedSimulation(seed, 130, length)
    simulation.run()
    write(path, simulation.recorder.reels())
    return list(read(path))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Reel]]:
    folder = tmp_path_factory.mktemp("recordings")
    return {seed: record(seed, folder / f"{seed}") for seed in range(8)}


def test_a_replay_makes_the_same_decisions(recordings: dict[int, list[Reel]]) -> None:
    for seed, reels in recordings.items():
        replayed = [replay(reel) for reel in reels]
        assert [each.difference for each in replayed] == [None] * len(reels), seed
        assert sum(each.commands for each in replayed) >= 50
        longest = max(reels, key=lambda reel: len(reel.calls))
        assert 300 <= len(longest.calls) <= 600, "nothing was thrown away: no state was restored"


def test_a_changed_scheduler_is_caught(
    recordings: dict[int, list[Reel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Scheduler, "_next_waiting", lambda self: next(reversed(self.waiting.values()), None)
    )
    found = [
        [replayed.difference for replayed in map(replay, reels) if replayed.difference]
        for reels in recordings.values()
    ]
    assert sum(map(bool, found)) >= len(recordings) // 2  # the others never had a choice
    first = found[[bool(each) for each in found].index(True)][0]
    assert first.name == "Scheduler.schedule" and "rows" in first.recorded


def test_another_limit_is_caught(
    recordings: dict[int, list[Reel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_ADMITTED_TOKENS", 5)
    assert any(replay(reel).difference for reels in recordings.values() for reel in reels)


def test_every_decision_is_recorded() -> None:
    """Whatever changes a scheduler from outside is on the tape, or the replay goes astray."""
    public = {name: each for name, each in vars(Scheduler).items() if not name.startswith("_")}
    methods = {name for name, value in public.items() if callable(value)} - {
        "check",
        "has_room_for",
    }
    assert {name for name in methods if not hasattr(public[name], "__wrapped__")} == set()


def test_what_other_worker_groups_serve_a_tenant_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups share the tenants' accounts: what one serves decides who is next in the other."""
    generator, shares, recorder = random.Random(1), FairShare(), Recorder(150)
    groups = [Scheduler(Limits(64, 2, 3, 8, 40, 8), shares) for _ in range(2)]
    for number, group in enumerate(groups):
        recorder.watch(f"group {number}", group)
    for number in range(400):
        group = generator.choice(groups)
        scheduling = Scheduling(tenant=generator.choice("abc"), weight=1.5)
        prompt = generator.choices((1, 2), k=generator.randint(1, 20))
        params = GenerationParams(prompt, Sampling(), max_tokens=5, scheduling=scheduling)
        group.add(Request(str(number), params, context_limit=40, arrival=number))
        for _ in range(2):
            if group.schedule():
                samples = [int(row.samples) for row in group.in_flight[0].rows]
                step = group.in_flight[0].step
                tokens = [1] * sum(samples)
                group.update(StepResult(step=step, num_new=samples, token_ids=tokens))
    write(tmp_path / "recording", recorder.reels())
    reels = list(read(tmp_path / "recording"))
    assert [replay(reel).difference for reel in reels] == [None, None]
    monkeypatch.setattr(FairShare, "restore", lambda self, balances: None)
    assert all(replay(reel).difference for reel in reels)


TWO_TOKENS = 2 * "debc0a00"


def strange_recording(path: Path) -> str:
    """Prompts of a strange token through tree, requests and commands; what the file says."""
    recorder = Recorder(10)
    core = Scheduler(Limits(64, 2, 8, 16, 40, 1 << 20))
    recorder.watch("group", core)
    for number in range(40):
        params = GenerationParams(
            [0xABCDE] * (20 + number % 10),
            Sampling(seed=0x1234567890),
            max_tokens=2,
            stop_sequences=("confidential",),
            stop_token_ids=frozenset({0xABCDF}),
        )
        core.add(Request(str(number), params, context_limit=40))
        while core.schedule():
            samples = [int(row.samples) for row in core.in_flight[0].rows]
            tokens = [0xABCDE] * sum(samples)
            core.update(StepResult(step=core.in_flight[0].step, num_new=samples, token_ids=tokens))
    reels = recorder.reels()
    write(path, reels)
    assert [replay(reel).difference for reel in read(path)] == [None]
    assert any(cell.kind == "radix_tree:Node" and cell.items for cell in reels[0].state)
    return gzip.decompress(path.read_bytes()).decode().lower()


def test_what_is_written_has_no_token_and_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = strange_recording(tmp_path / "recording")
    assert (tmp_path / "recording").stat().st_mode & 0o777 == 0o600
    # Two tokens in a row, since random digits may well spell one.
    assert TWO_TOKENS not in written
    for secret in (str(0xABCDE), str(0xABCDF), "confidential", str(0x1234567890), "1234567890"):
        assert not re.search(rf"\b{secret}\b", written)
    monkeypatch.setattr(Mask, "_extend", lambda self, state, token_ids: (state, token_ids))
    assert TWO_TOKENS in strange_recording(tmp_path / "unmasked")


def test_pins_and_flushes_are_decisions_too(tmp_path: Path) -> None:
    recorder = Recorder(30)
    core = Scheduler(Limits(64, 2, 8, 16, 40, 8))
    recorder.watch("group", core)
    for number in range(40):
        prompt = [number % 3, *[1] * 14]
        core.add(Request(str(number), GenerationParams(prompt, Sampling(), 2), context_limit=40))
        while core.schedule():
            samples = [int(row.samples) for row in core.in_flight[0].rows]
            step, tokens = core.in_flight[0].step, [1] * sum(samples)
            core.update(StepResult(step=step, num_new=samples, token_ids=tokens))
        assert core.kv.pin(f"pin {number}", b"", prompt) == 14 or number < 3
        core.kv.flush(None)
        core.kv.unpin(f"pin {number}")
    write(tmp_path / "recording", recorder.reels())
    (reel,) = read(tmp_path / "recording")
    assert {call.name for call in reel.calls} >= {"KVCacheManager.pin", "KVCacheManager.flush"}
    assert replay(reel).difference is None
    pinned = [call.arguments[2].ids.tolist() for call in reel.calls if call.name[-4:] == ".pin"]
    assert pinned and all(set(ids).isdisjoint(range(9)) for ids in pinned)


def test_equal_prefixes_stay_equal_and_others_do_not(recordings: dict[int, list[Reel]]) -> None:
    sequences = [
        tuple(tokens.ids[:4])
        for reel in recordings[3]
        for call in reel.calls
        if call.name == "Scheduler.add"
        for cell in call.arguments[0].cells
        if cell.kind == "tokens"
        for tokens in cell.items
        if tokens.length >= 4
    ]
    assert 1 < len(set(sequences)) < len(sequences)


def test_a_crash_is_the_last_decision_and_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(100)
    core = Scheduler(Limits(64, 2, 8, 16, 40, 8))
    recorder.watch("group", core)
    core.add(Request("a", GenerationParams([1] * 9, Sampling(), 3), context_limit=40))

    def broken(*_: object) -> None:
        raise LookupError("a bug of ours")

    monkeypatch.setattr(Scheduler, "_compute", broken)
    with pytest.raises(LookupError):
        core.schedule()
    write(tmp_path / "recording", recorder.reels())
    (reel,) = read(tmp_path / "recording")
    assert reel.calls[-1].outcome == "raised LookupError"
    assert replay(reel).difference is None
    monkeypatch.undo()
    difference = replay(reel).difference
    assert difference is not None and difference.call == 2


NO_RECORDINGS = {
    "empty": b"",
    "not compressed": b"no gzip",
    "no format": gzip.compress(b"{}\n"),
    "no JSON": gzip.compress(b"["),
    "no object": gzip.compress(b"[1]\n"),
}


@pytest.mark.parametrize("content", NO_RECORDINGS.values(), ids=NO_RECORDINGS)
def test_a_file_that_is_no_recording_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recording"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="recording"):
        list(read(path))


@pytest.mark.parametrize("kind", ["main:run", "scheduler:deque", "nothing:Here", "errors:Reason"])
def test_a_recording_makes_no_other_objects(kind: str) -> None:
    with pytest.raises(ValueError, match=r"damaged|begin"):
        replay(Reel("group", [Cell(kind, [], [])], []))
