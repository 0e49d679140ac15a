"""MILI against transformers on this CPU, with the demo model: one stream, and 16 at once.

    python -m tests.performance.bench_cpu [--runs 5] [--tokens 128]

MILI is measured through gRPC, from a client on the same machine, with the real router and one
worker process; transformers by `generate`, in float32 and bfloat16, in this process. Both get the
same prompt ids and generate the same number of tokens, greedily, without stopping at EOS. Runs
alternate, so that a machine that slows down slows both; the figure is the median. The worker takes
the dtype that "auto" means here; before anything is timed, one in float32 must give the tokens of
transformers' float32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from mili.client import Client
from mili.hub.resolve import resolve
from tests.serving import serving

PROMPT = "Explain in two sentences why the sky is blue."
STREAMS = 16


class Oracle:
    """transformers' generate, greedy."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    @torch.inference_mode()
    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return [int(token) for token in output[0, len(prompt) :]]


def generate(client: Client, prompt: list[int], tokens: int) -> list[int]:
    generation = client.generate(prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
    return list(generation.token_ids)


def measure(work: dict[str, Callable[[], int]], runs: int) -> dict[str, float]:
    """Tokens per second of each piece of work: the median over alternating runs."""
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(runs):
        for name, run in work.items():
            started = time.perf_counter()
            tokens = run()
            rates[name].append(tokens / (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    tokens: int = arguments.tokens

    folder = resolve("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    float32, bfloat16 = Oracle(folder, torch.float32), Oracle(folder, torch.bfloat16)
    with (
        tempfile.TemporaryDirectory() as log,
        serving(folder, Path(log) / "check.log", "--dtype", "float32") as served,
        Client(served.address) as client,
    ):
        equal = generate(client, prompt, tokens) == float32.generate(prompt, tokens)
    with (
        tempfile.TemporaryDirectory() as log,
        serving(folder, Path(log) / "serve.log") as served,
        Client(served.address) as client,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        # Prompts that differ in their first block: nothing comes from the prefix cache.
        prompts = [[3 + stream, *prompt] for stream in range(STREAMS)]
        work: dict[str, Callable[[], int]] = {
            "MILI, 1 stream": lambda: len(generate(client, prompt, tokens)),
            "transformers float32": lambda: len(float32.generate(prompt, tokens)),
            "transformers bfloat16": lambda: len(bfloat16.generate(prompt, tokens)),
            f"MILI, {STREAMS} streams": lambda: sum(
                len(output)
                for output in pool.map(lambda ids: generate(client, ids, tokens), prompts)
            ),
        }
        measure(work, 1)
        rates = measure(work, arguments.runs)

    one, many = rates["MILI, 1 stream"], rates[f"MILI, {STREAMS} streams"]
    best = max(rates["transformers float32"], rates["transformers bfloat16"])
    table = Table("", "tokens/s", title=f"SmolLM2-135M, {len(prompt)} + {tokens} tokens")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.1f}")
    table.add_row("one stream / the faster of transformers", f"{one / best:.2f}")
    table.add_row(f"{STREAMS} streams / one stream", f"{many / one:.2f}")
    table.add_row("float32 tokens equal to transformers", "yes" if equal else "NO")
    Console().print(table)


if __name__ == "__main__":
    main()
