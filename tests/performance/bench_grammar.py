"""What holding a row to a grammar costs its worker, a token.

    python -m tests.performance.bench_grammar TOKENIZER VOCAB_SIZE EOS_TOKEN_ID...

TOKENIZER: a tokenizer.json, as Qwen3's of 151,936 tokens. Microseconds of one core, without a GPU.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import numpy as np

from mili.hub.grammars import GrammarCompiler, GrammarKind
from tests.virtual_cluster import percentile

SCHEMA = """{"type": "object", "additionalProperties": false,
  "properties": {
    "name": {"type": "string", "maxLength": 60},
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{3,10}$"}},
    "color": {"enum": ["red", "green", "blue"]},
    "place": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
      "required": ["x", "y"]}},
  "required": ["name", "age", "tags", "color", "place"]}"""
GRAMMARS = {
    "JSON schema": (GrammarKind.JSON_SCHEMA, SCHEMA),
    "any JSON object": (GrammarKind.JSON_SCHEMA, '{"type": "object"}'),
    "regex": (GrammarKind.REGEX, r"[A-Z][a-z]+( [A-Z][a-z]+){1,3}, \d{4}-\d\d-\d\d"),
    "Lark": (GrammarKind.LARK, 'start: e\ne: t ("+" t)*\nt: /[0-9]+/ | "(" e ")"'),
}
TOKENS = 3000
LONGEST = 120


def main(tokenizer: str, vocab_size: str, *eos_token_ids: str) -> None:
    begun = time.perf_counter()
    eos = [*map(int, eos_token_ids)]
    compiler = GrammarCompiler(Path(tokenizer), int(vocab_size), eos)
    print(f"tokenizer read in {time.perf_counter() - begun:.2f} s")
    for name, (kind, source) in GRAMMARS.items():
        begun = time.perf_counter()
        prepared = compiler.compile(kind, source)
        compiled = time.perf_counter() - begun
        masks, steps = walk(prepared, compiler.num_words, eos)
        median, most, mean = percentile(masks, 50), percentile(masks, 99), np.mean(masks)
        print(f"{name:16} prepared in {1e3 * compiled:6.2f} ms; ", end="")
        print(f"mask median {median:4.0f} us, p99 {most:4.0f}, mean {mean:3.0f}; ", end="")
        print(f"step {np.mean(steps):.1f} us")


def walk(prepared: object, num_words: int, eos: list[int]) -> tuple[list[float], list[float]]:
    """Random outputs; microseconds of each mask, and of taking each token."""
    source = random.Random(0)
    mask = np.zeros(num_words, np.int32)
    masks: list[float] = []
    steps: list[float] = []
    while len(masks) < TOKENS:
        matcher = prepared.deep_copy()  # type: ignore[attr-defined]
        for _ in range(LONGEST):
            begun = time.perf_counter()
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            masks.append(1e6 * (time.perf_counter() - begun))
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            token = int(allowed[source.randrange(len(allowed))])
            if token in eos:
                break
            begun = time.perf_counter()
            matcher.consume_token(token)
            steps.append(1e6 * (time.perf_counter() - begun))
    return masks, steps


if __name__ == "__main__":
    main(*sys.argv[1:])
