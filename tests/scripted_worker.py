"""A router's view of workers, scripted: frames in by hand, frames out on record."""

from __future__ import annotations

from mili.internal.v1 import step_pb2 as pb
from mili.router.workers import WorkerGroup, Workers

INTERFACE = b"i" * 32
WEIGHTS = b"w" * 32

READY = pb.Ready(
    num_blocks=100, block_size=16, max_rows=8, max_step_tokens=64, max_model_len=512, vocab_size=99
)


def make_hello(name: str = "w", instance: str = "1", **fields: object) -> pb.Hello:
    hello = pb.Hello(
        protocol_min=1,
        protocol_max=1,
        worker=name,
        instance=instance,
        world_size=1,
        interface_sha256=INTERFACE,
        weights_sha256=WEIGHTS,
    )
    for field, value in fields.items():
        setattr(hello, field, value)
    return hello


def make_command(step: int, num_rows: int = 1) -> pb.StepCommand:
    rows = range(1, num_rows + 1)
    return pb.StepCommand(step=step, rows=rows, starts=[0] * num_rows, num_tokens=[1] * num_rows)


def make_result(step: int, num_rows: int = 1) -> pb.StepResult:
    return pb.StepResult(step=step, num_new=[1] * num_rows, token_ids=[7] * num_rows)


class Recorder:
    """The engine's ears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, ...]] = []

    def on_ready(self, group: WorkerGroup) -> None:
        self.heard.append(("ready", group.name))

    def on_result(self, group: WorkerGroup, result: pb.StepResult) -> None:
        self.heard.append(("result", group.name, str(result.step)))

    def on_prepared(self, group: WorkerGroup, prepared: pb.Prepared) -> None:
        self.heard.append(("prepared", group.name, f"{prepared.id} {prepared.error}".strip()))

    def on_lost(self, group: WorkerGroup, reason: str, *, died: bool) -> None:
        self.heard.append(("died" if died else "lost", group.name, reason))

    def take(self) -> list[tuple[str, ...]]:
        heard, self.heard = self.heard, []
        return heard


class Link:
    """Workers over a transport that records, and that refuses frames to those in `full`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.events = Recorder()
        self.workers = Workers(self.events, interface_sha256=INTERFACE)
        self.workers.connect(self._send)
        self.full: set[bytes] = set()
        self._sent: list[tuple[bytes, pb.RouterFrame]] = []

    def _send(self, routing_id: bytes, frame: bytes) -> bool:
        if routing_id in self.full:
            return False
        self._sent.append((routing_id, pb.RouterFrame.FromString(frame)))
        return True

    def sent_to(self, routing_id: bytes) -> list[pb.RouterFrame]:
        """Take what was sent to a peer since the last call."""
        frames = [frame for target, frame in self._sent if target == routing_id]
        self._sent = [entry for entry in self._sent if entry[0] != routing_id]
        return frames

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        self.workers.tick(self.now)


class ScriptedWorker:
    """One worker process on a Link."""

    def __init__(self, link: Link, hello: pb.Hello | None = None, routing_id: bytes = b"") -> None:
        self.link = link
        self.hello = hello or make_hello()
        self.routing_id = routing_id or f"{self.hello.worker}/{self.hello.instance}".encode()
        self.epoch = 0
        self.sequence = 0

    def send(
        self, *, epoch: int | None = None, sequence: int | None = None, **body: object
    ) -> None:
        """Send a frame, by default the next one of the epoch."""
        if sequence is None:
            self.sequence += 1
        frame = pb.WorkerFrame(
            epoch=self.epoch if epoch is None else epoch,
            sequence=self.sequence if sequence is None else sequence,
            **body,  # type: ignore[arg-type]
        )
        self.link.workers.receive(self.routing_id, frame.SerializeToString(), self.link.now)

    def say_hello(self) -> pb.RouterFrame:
        """Say Hello and return the answer, entering its epoch if it is a Welcome."""
        self.send(epoch=0, sequence=0, hello=self.hello)
        answer = self.received()[-1]
        if answer.HasField("welcome"):
            self.enter(answer)
        return answer

    def enter(self, welcome: pb.RouterFrame) -> None:
        assert welcome.HasField("welcome")
        assert welcome.sequence == 1
        self.epoch = welcome.epoch
        self.sequence = 0

    def join(self) -> ScriptedWorker:
        """Say Hello, be welcome, and be ready."""
        self.say_hello()
        self.send(ready=READY)
        return self

    def beat(self, finished: int = 0, phase: int = pb.WORKER_PHASE_IDLE) -> None:
        self.send(heartbeat=pb.Heartbeat(finished_step=finished, phase=phase))  # type: ignore[arg-type]

    def received(self) -> list[pb.RouterFrame]:
        return self.link.sent_to(self.routing_id)
