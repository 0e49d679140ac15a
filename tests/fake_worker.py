"""A worker without a GPU whose KV remembers its prefix.

Every slot stores a hash of all tokens up to it. A step verifies every slot that it reads, and the
"model" is a function of that hash and of the request alone. So any mistake of the router in blocks,
tables, rows, order or reuse shows as a wrong hash or a wrong token.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from mili.internal.v1.step_pb2 import (
    ROW_FAULT_KIND_NUMERIC,
    TASK_EMBED,
    TASK_GENERATE,
    Admission,
    Embedding,
    Logprobs,
    Prepare,
    Prepared,
    RowFault,
    Sampling,
    StepCommand,
    StepResult,
)

MASK = (1 << 61) - 1
# The model's vocabulary is {0, 1}, and EOS.
EOS = 2
FAULT = -1
# What the KV of a faulty row holds: no prefix has this hash.
POISON = -1


def extend_hash(prefix: int, token: int) -> int:
    return ((prefix ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & MASK


def seed_of(seed: int, namespace: bytes) -> int:
    """A sampling seed that also carries the namespace: no namespace's KV equals another's."""
    return seed | int.from_bytes(namespace) << 32


def key_of(sampling: Sampling) -> int:
    """The seed, with all else that a token depends on mixed into its lower half."""
    rest = Sampling()
    rest.CopyFrom(sampling)
    rest.seed = 0
    return sampling.seed ^ zlib.crc32(rest.SerializeToString(deterministic=True))


def first_hash(seed: int) -> int:
    """The hash of no tokens at all."""
    return seed >> 32


def read_token(prefix: int, token: int, width: int) -> tuple[list[int], list[float], list[int]]:
    """What the model says of a token after a prefix, and of width - 1 others: ids, logprobs, ranks.

    Small whole numbers, which a float32 holds exactly.
    """
    draws = [extend_hash(extend_hash(prefix, token), column) >> 20 for column in range(width)]
    columns = zip(*((draw % 3, -float(draw % 4093), draw % 89) for draw in draws), strict=True)
    ids, logprobs, ranks = map(list, columns)
    return [token, *ids[1:]], logprobs, ranks


def read_vector(prefix: int) -> list[float]:
    return [float((prefix >> shift) % 1021) for shift in (0, 20, 40)]


def held(token: int | None, index: int, grammar: str) -> int | None:
    """What a grammar makes of a token, by its place in the output: runs of equal tokens.

    grammar: how long a run is. The output may end at the end of a run only.
    """
    if token is None or (token == EOS and index % int(grammar) == 0):
        return token
    return index // int(grammar) % 2


@dataclass(frozen=True)
class FakeModel:
    """Samples from a hash: {0, 1}, sometimes EOS, rarely a fault (None)."""

    eos_every: int = 24
    fault_every: int = 400

    def sample(self, prefix: int, num_prompt_tokens: int, seed: int) -> int | None:
        draw = extend_hash(extend_hash(prefix, num_prompt_tokens), seed) >> 7
        if draw % self.fault_every == 0:
            return None
        return EOS if draw % self.eos_every == 1 else (draw >> 20) & 1

    def alone(
        self, prompt: Sequence[int], seed: int, count: int, grammar: str = ""
    ) -> list[int | None]:
        """What the model alone generates: `count` tokens; None is a fault and the last."""
        prefix = first_hash(seed)
        for token in prompt:
            prefix = extend_hash(prefix, token)
        output: list[int | None] = []
        while len(output) < count:
            token = self.sample(prefix, len(prompt), seed)
            if grammar:
                token = held(token, len(output), grammar)
            output.append(token)
            if token is None:
                break
            prefix = extend_hash(prefix, token)
        return output


@dataclass
class FakeRow:
    token_ids: array[int]
    num_prompt_tokens: int
    seed: int
    grammar: str = ""
    num_computed: int | None = None
    faulty: bool = False
    blocks: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)  # of token_ids[: i + 1]
    admission: Admission = field(default_factory=Admission)


class FakeWorker:
    """Executes step commands in order, and asserts all that a real worker would rely on."""

    def __init__(self, num_blocks: int, block_size: int, model: FakeModel) -> None:
        self.block_size = block_size
        self.model = model
        self.kv: list[int | None] = [None] * (num_blocks * block_size)
        self.rows: dict[int, FakeRow] = {}
        self.grammars: dict[int, str] = {}
        self.refused: set[int] = set()
        self.step = 0
        self.computed_tokens = 0

    def execute(self, command: StepCommand) -> StepResult:
        assert command.step == self.step + 1, "a step was lost or doubled"
        self.step += 1
        self._apply(command)
        written: dict[int, int] = {}
        result = StepResult(step=command.step)
        batch = list(zip(command.rows, command.starts, command.num_tokens, strict=True))
        assert len({row for row, _, _ in batch}) == len(batch), "a row stands in the batch twice"
        for index, (row, start, count) in enumerate(batch):
            token = self._compute(self.rows[row], start, count, written)
            if token == FAULT:
                result.faults.append(RowFault(index=index, kind=ROW_FAULT_KIND_NUMERIC))
            new = [] if token is None or token == FAULT else [token]
            if token != FAULT:
                self._read(self.rows[row], index, start, start + count, new, result)
            if self.rows[row].admission.task != TASK_GENERATE:
                new = []
            result.num_new.append(len(new))
            result.token_ids.extend(new)
        for slot, value in written.items():
            self.kv[slot] = value
        self.computed_tokens += len(written)
        return result

    def prepare(self, prepare: Prepare) -> Prepared | None:
        """Have a grammar ready at once, or release it; it refuses runs of 13."""
        if prepare.release:
            if prepare.id not in self.refused:
                del self.grammars[prepare.id]
            self.refused.discard(prepare.id)
            return None
        assert prepare.id not in self.grammars, "a grammar's number is used twice"
        if prepare.grammar.source == "13":
            self.refused.add(prepare.id)
            return Prepared(id=prepare.id, error="no luck")
        self.grammars[prepare.id] = prepare.grammar.source
        return Prepared(id=prepare.id)

    def _apply(self, command: StepCommand) -> None:
        for admission in command.admissions:
            assert admission.row != 0, "row 0 is the null row"
            tokens = array("I", admission.token_ids)
            self.rows[admission.row] = FakeRow(
                tokens,
                admission.num_prompt_tokens,
                key_of(admission.sampling),
                admission=admission,
            )
            if admission.grammar:
                self.rows[admission.row].grammar = self.grammars[admission.grammar]
        for row, block in zip(command.block_rows, command.block_ids, strict=True):
            assert block != 0, "block 0 is the null block"
            self.rows[row].blocks.append(block)

    def _compute(self, row: FakeRow, start: int, count: int, written: dict[int, int]) -> int | None:
        """The sampled token, FAULT, or None where nothing is sampled."""
        assert count > 0
        if row.num_computed is None:
            row.num_computed = start  # the cached prefix
        assert start == row.num_computed, f"drift: {start} against {row.num_computed}"
        end = start + count
        assert end <= len(row.token_ids), "computing a token that is not known"
        for token in row.token_ids[len(row.hashes) : end]:
            before = row.hashes[-1] if row.hashes else first_hash(row.seed)
            row.hashes.append(extend_hash(before, token))
        for position in range(start):
            found = self.kv[self._slot(row, position)]
            assert found == row.hashes[position] or row.faulty, "foreign KV was read"
        for position in range(start, end):
            slot = self._slot(row, position)
            assert slot not in written, "two rows write one slot"
            written[slot] = row.hashes[position]
        row.num_computed = end
        if end < len(row.token_ids):
            return None
        token = self.model.sample(row.hashes[-1], row.num_prompt_tokens, row.seed)
        if row.grammar:
            token = held(token, len(row.token_ids) - row.num_prompt_tokens, row.grammar)
        row.faulty |= token is None
        row.token_ids.append(token or 0)
        if not row.faulty:
            return token
        written.update((self._slot(row, position), POISON) for position in range(start, end))
        return FAULT

    def _read(
        self, row: FakeRow, index: int, start: int, end: int, new: list[int], result: StepResult
    ) -> None:
        """Log-probabilities of known tokens and of the new one, and the vector, as asked for."""
        asked = row.admission
        if asked.HasField("score_from"):
            assert asked.score_from > 0
            first = max(asked.score_from, start + 1)
            last = min(end, len(asked.token_ids) // 4 - 1)
            if first <= last:
                positions, width = range(first, last + 1), 1 + asked.num_scored_alternatives
                result.logprobs.append(self._logprobs(row, index, positions, width))
        if asked.HasField("num_logprobs") and new and asked.task == TASK_GENERATE:
            positions, width = range(end, end + 1), 1 + asked.num_logprobs
            result.logprobs.append(self._logprobs(row, index, positions, width))
        if asked.task == TASK_EMBED and new:
            values = array("f", read_vector(row.hashes[end - 1])).tobytes()
            result.embeddings.append(Embedding(index=index, values=values))

    def _logprobs(self, row: FakeRow, index: int, positions: range, width: int) -> Logprobs:
        ids, logprobs, ranks = array("I"), array("f"), array("I")
        for position in positions:
            read = read_token(row.hashes[position - 1], row.token_ids[position], width)
            for column, values in zip((ids, logprobs, ranks), read, strict=True):
                column.extend(values)
        return Logprobs(
            index=index,
            first_position=positions[0],
            width=width,
            token_ids=ids.tobytes(),
            logprobs=logprobs.tobytes(),
            ranks=ranks.tobytes(),
        )

    def _slot(self, row: FakeRow, position: int) -> int:
        return row.blocks[position // self.block_size] * self.block_size + (
            position % self.block_size
        )
