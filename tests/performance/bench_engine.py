"""The speed of `mili serve` with random weights, seen from clients: the table of performance.md.

    python -m tests.performance.bench_engine --model qwen3-8b [--model qwen3-0.6b] [--quick]
        [--only decode,prefill,structured,start] [--cold] [--runs N] [--out FOLDER]
        [flags of mili serve]

Prompts are random ids, drawn afresh for every run; greedy, ignore_eos; token ids in and out over
gRPC, from four client processes on the same machine (one stream: one of them).

"step" is (time for 129 tokens - time for 1 token) / 128, all sequences started together; "gap"
beside it is the median time between tokens that a client sees while all sequences decode, and must
agree within 5 %. "structured" is such gaps, in turns: of 64 free streams, of 63 beside one that is
held to a JSON schema, and of 64 that are held. Each figure is the median of its runs after one that
does not count; slow rows stop at fewer than 5, when their share of the time is used up, and the
table says at how many.

Owns what is run, and the check that goes with it. Does not know the kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from tests.performance.bench_server import Server, device_memory, environment, serving
from tests.performance.engine_report import Row, print_table, print_targets
from tests.performance.load_clients import (
    ClientsError,
    Prompt,
    Stream,
    duration,
    median_gap,
    time_to,
)
from tests.performance.qwen3 import MODELS, Model, write_folder

PARTS = ("decode", "prefill", "structured", "start")
# Streams, and seconds for all of their runs: together about 40 s for the 8B model.
BATCHES = {1: 5.0, 8: 6.0, 64: 9.0, 256: 15.0}
SECONDS_OF_PREFILL = 4.0
QUICK = 0.5
RUNS = 5
SECONDS_OF_STRUCTURED = 12.0
# All outputs are longer than any that is measured.
JSON_SCHEMA = json.dumps(
    {
        "type": "array",
        "minItems": 500,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 30},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "color": {"enum": ["red", "green", "blue"]},
            },
            "required": ["name", "age", "color"],
            "additionalProperties": False,
        },
    }
)
# Of the check. Prompts of less than a block are never cached, the others are the second time.
CHECKED_LENGTHS = (15, 300) * 4
CHECKED_TOKENS = 16
CHECKED_BATCH = 64
# Random weights make near-ties, which another order of additions decides otherwise.
LEAST_AGREEMENT = 0.5


class Effort(NamedTuple):
    """runs: exactly so many if given, else RUNS at most, in `share` of a row's seconds."""

    runs: int | None
    share: float

    def repeat(self, run: Callable[[], float], seconds: float) -> list[float]:
        """Results of the runs: one at least, and none that would pass the time."""
        results: list[float] = []
        began = time.monotonic()
        while len(results) < (self.runs or RUNS):
            spent = time.monotonic() - began
            if not self.runs and results and spent + spent / len(results) > seconds * self.share:
                break
            results.append(run())
        return results


class Bench:
    """One served model. rows, figures and verdict come by and by: a failure leaves what was before.

    figures: see `print_targets`. agreement: share of the first tokens on which one stream and a
    full batch agree.
    """

    def __init__(self, model: Model, effort: Effort) -> None:
        self._model = model
        self._effort = effort
        self._seeds = itertools.count()
        self.rows: list[Row] = []
        self.figures: dict[str, float] = {}
        self.agreement: float | None = None

    def measure_start(self, server: Server, name: str) -> None:
        first = self._run(server, 1, self._model.workload.prompt, 1)[0]
        seconds = first.times[-1] - server.spawned
        known = self._model.known.get("start to first token")
        what = f"{name}, {server.compiled} compiled"
        self.rows.append(Row(what, [seconds], None, known))

    def measure_decode(self, server: Server) -> None:
        for batch, seconds in BATCHES.items():
            self._add_step(server, batch, seconds)
        self.agreement = self._compare(server)

    def measure_prefill(self, server: Server) -> None:
        work = self._model.workload
        one = self._add_prefill(server, f"one {work.prompt}-token prompt", 1, work.prompt)
        self.figures["512-token prompt"] = one * 1e3
        many = self._add_prefill(server, f"16 prompts of {work.many}", 16, work.many)
        self.figures["prefill"] = 16 * work.many / many
        self._add_prefill(server, f"one prompt of {work.long}", 1, work.long)
        self.figures["prompt"] = work.long

    def measure_structured(self, server: Server) -> None:
        """What streams that must fit a schema cost the others, and each other."""
        work, batch = self._model.workload, CHECKED_BATCH
        gaps: dict[int, list[float]] = {0: [], 1: [], batch: []}

        def run() -> float:
            began = time.monotonic()
            for num_held, samples in gaps.items():
                streams = self._run(server, batch, work.prompt, 1 + work.steps, num_held=num_held)
                samples.append(median_gap(streams[num_held:] or streams))
            return time.monotonic() - began

        run()
        for samples in gaps.values():
            samples.clear()
        self._effort.repeat(run, SECONDS_OF_STRUCTURED)
        for num_held, samples in gaps.items():
            others = f", {num_held} held" if num_held else ""
            name = f"{batch} held" if num_held == batch else f"{batch - num_held} free{others}"
            self.rows.append(Row(f"gap, {name}", samples, None, None))

    def _run(
        self, server: Server, batch: int, length: int, max_tokens: int, *, num_held: int = 0
    ) -> list[Stream]:
        schemas = [JSON_SCHEMA] * num_held + [""] * (batch - num_held)
        prompts = [Prompt(next(self._seeds), length, schema) for schema in schemas]
        streams = server.clients.run(prompts, max_tokens)
        assert not any(stream.cached for stream in streams), "a prompt was not fresh"
        return streams

    def _add_step(self, server: Server, batch: int, seconds: float) -> None:
        work = self._model.workload
        gaps, answers = [], []

        def run() -> float:
            one = duration(self._run(server, batch, work.prompt, 1))
            streams = self._run(server, batch, work.prompt, 1 + work.steps)
            gaps.append(median_gap(streams))
            answers.append(max(time_to(stream, work.steps) for stream in streams))
            return (duration(streams) - one) / work.steps

        # The largest batch warms up on short prompts, or it would take too long.
        self._run(server, batch, work.prompt if batch < max(BATCHES) else 15, 8)
        name = f"step, batch {batch}"
        row = Row(
            name,
            self._effort.repeat(run, seconds),
            self._model.decode_floor(batch),
            self._model.known.get(name),
            gap=statistics.median(gaps),
        )
        self.rows.append(row)
        match batch:
            case 1:
                self.figures["single stream"] = 1 / row.median
                self.figures["512 + 128 tokens"] = statistics.median(answers)
            case 64:
                self.figures["batch of 64"] = 64 / row.median
                if memory := device_memory():
                    self.figures["memory at batch 64"] = 100 * memory.used / memory.total
            case 256:
                self.figures["per token, batch 256"] = row.median * 1e3
                self.figures["concurrent requests"] = 256

    def _add_prefill(self, server: Server, name: str, prompts: int, length: int) -> float:
        def run() -> float:
            return duration(self._run(server, prompts, length, 1))

        run()
        row = Row(
            name,
            self._effort.repeat(run, SECONDS_OF_PREFILL),
            self._model.prefill_floor(prompts, length),
            self._model.known.get(name),
            tokens=prompts * length if prompts > 1 else None,
        )
        self.rows.append(row)
        return row.median

    def _compare(self, server: Server) -> float:
        """Let the same prompts run alone and among others."""
        prompts = [Prompt(next(self._seeds), length) for length in CHECKED_LENGTHS]
        others = [Prompt(next(self._seeds), 20 + i) for i in range(CHECKED_BATCH - len(prompts))]
        run = server.clients.run
        alone = [run([prompt], CHECKED_TOKENS)[0] for prompt in prompts]
        among = run([*others, *prompts], CHECKED_TOKENS)[len(others) :]
        equal = (
            common_prefix(one.token_ids, other.token_ids)
            for one, other in zip(alone, among, strict=True)
        )
        return sum(equal) / (len(prompts) * CHECKED_TOKENS)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def run_model(
    model: Model, arguments: argparse.Namespace, out: Path, console: Console
) -> dict[str, Any]:
    """Measure and print one model; returns what goes into the JSON file."""
    bench = Bench(model, Effort(arguments.runs, QUICK if arguments.quick else 1.0))
    log = out / f"serve-{model.name}.log"
    error = None
    with tempfile.TemporaryDirectory() as work:
        folder, cache = Path(work) / model.name, Path(work) / "cupy" if arguments.cold else None
        flags = [*write_folder(folder, model), "--device", arguments.device, *arguments.serve]
        try:
            if cache:
                with serving(model, folder, log, flags, cache) as server:
                    bench.measure_start(server, "cold start")
            with serving(model, folder, log, flags, cache) as server:
                bench.measure_start(server, "start to first token")
                if "decode" in arguments.only:
                    bench.measure_decode(server)
                if "prefill" in arguments.only:
                    bench.measure_prefill(server)
                if "structured" in arguments.only:
                    bench.measure_structured(server)
        except (ClientsError, AssertionError, OSError, subprocess.SubprocessError) as caught:
            error = traceback.format_exception_only(caught)[0].splitlines()[0]
            traceback.print_tb(caught.__traceback__, limit=-3)
            tail = log.read_text().splitlines()[-60:] if log.exists() else []
            console.print("\n".join([error, f"end of {log.name}:", *tail]), markup=False)
    print_table(console, model, bench.rows)
    print_targets(console, model, bench.figures)
    agrees = bench.agreement is None or bench.agreement >= LEAST_AGREEMENT
    if bench.agreement is not None:
        told = "agree" if agrees else "DO NOT AGREE"
        console.print(
            f"check: one stream and a batch of {CHECKED_BATCH} {told} on {bench.agreement:.0%} of "
            f"{CHECKED_TOKENS} tokens; every stream delivered the tokens that were asked for"
        )
    return {
        "passed": error is None and agrees,
        "error": error,
        "rows": [row._asdict() for row in bench.rows],
        "figures": bench.figures,
        "agreement": bench.agreement,
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Other flags go to mili serve.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--model", action="append", choices=MODELS, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="half the time, fewer runs")
    parser.add_argument("--cold", action="store_true", help="start with nothing compiled, too")
    parser.add_argument("--runs", type=int, help="so many of each, however long it takes")
    parser.add_argument("--out", type=Path, help="folder for bench_engine.json and the logs")
    arguments, rest = parser.parse_known_args(words)
    arguments.serve = rest
    if unknown := set(arguments.only) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    return arguments


def main() -> int:
    arguments = parse()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="bench-"))
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=150, highlight=False)
    where = environment("bench_engine")
    console.print(" · ".join(f"{key} {value}" for key, value in where.items()), markup=False)
    results = {}
    for name in arguments.model:
        results[name] = run_model(MODELS[name], arguments, out, console)
        (out / "bench_engine.json").write_text(json.dumps(where | {"models": results}, indent=1))
    console.print(f"figures and logs: {out}", markup=False)
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
