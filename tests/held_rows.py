"""Rows that are held to a grammar beside rows that are not, driven on any device.

Owns the check that both give what they must. Needs a model with tests/model_folders.py's tokenizer.
"""

from __future__ import annotations

import queue
import re

from mili.internal.v1.step_pb2 import GRAMMAR_KIND_REGEX, Grammar, Prepare, Prepared, Sampling
from tests.model_folders import EOS_TOKEN_ID
from tests.step_driver import StepDriver

# What each row's grammar is, and of what its output is where it is cut.
PATTERNS = {1: "[a-f]{40}", 2: "(xy|z){30}", 3: "[0-9]{5}"}
CUT = {1: "[a-f]{24}", 2: "(xy|z)*x?", 3: "[0-9]{5}"}
FREE = (4, 5)
OUTPUT_TOKENS = 24


def check_held_rows(driver: StepDriver, depth: int) -> None:
    """Outputs fit their grammars, also when steps are in flight; free rows are as without them."""
    driver.restart()
    alone = _run(driver, FREE, depth)
    driver.restart()
    _prepare(driver)
    together = _run(driver, (*PATTERNS, *FREE), depth)
    for row, pattern in CUT.items():
        # The tokenizer's letters are in the order of the characters that stand for bytes.
        text = "".join(chr(token + ord("!")) for token in together[row] if token != EOS_TOKEN_ID)
        assert re.fullmatch(pattern, text[:5] if row == 3 else text), (row, text)
    assert together[3][5] == EOS_TOKEN_ID
    for row in FREE:
        assert together[row] == alone[row], f"row {row} heard of its neighbours"


def _prepare(driver: StepDriver) -> None:
    replies: queue.SimpleQueue[Prepared] = queue.SimpleQueue()
    for number, pattern in PATTERNS.items():
        grammar = Grammar(kind=GRAMMAR_KIND_REGEX, source=pattern)
        driver.runner.prepare(Prepare(id=number, grammar=grammar), replies.put)
        assert not replies.get(timeout=30).error


def _run(driver: StepDriver, rows: tuple[int, ...], depth: int) -> dict[int, list[int]]:
    prompts = {row: [3 * row + offset for offset in range(7 + row)] for row in rows}
    for row, prompt in prompts.items():
        sampling = Sampling(temperature=1.0, seed=row)
        driver.admit(row, prompt, sampling, grammar=row if row in PATTERNS else 0)
    driver.run(rows, OUTPUT_TOKENS, depth=depth)
    return {row: driver.tokens[row][len(prompt) :] for row, prompt in prompts.items()}
