"""Grammars of a worker: prepared off the step loop, one state for each row that is held to one.

Owns the grammars that are ready and every row's place in its own. Does not know what is sampled, or
how a mask gets to where it is applied. A mask is [num_words] int32: token t is bit t % 32 of word
t // 32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog
from llguidance import LLExecutor, LLMatcher

from mili.hub.folder import ModelFolder
from mili.hub.grammars import GrammarCompiler, GrammarError, GrammarKind
from mili.internal.v1.step_pb2 import Admission, Grammar, Prepare, Prepared

log = structlog.get_logger()

# In Ready.capabilities.
CAPABILITY = "grammars"

Masks = npt.NDArray[np.int32]  # [rows, num_words], contiguous
Reply = Callable[[Prepared], None]


class _Ready(NamedTuple):
    matcher: LLMatcher
    start_after: tuple[int, ...]


class RowGrammar:
    """A row's place in its grammar.

    has_failed: the grammar came to a place where nothing fits, or its limits did. Until the tokens
    of `start_after` were generated everything is allowed but the end of the output.
    """

    def __init__(self, ready: _Ready, eos_token_ids: frozenset[int]) -> None:
        self.has_failed = False
        self._matcher = ready.matcher.deep_copy()
        self._start_after = ready.start_after
        self._last: deque[int] = deque(maxlen=len(ready.start_after))
        self._has_begun = not ready.start_after
        self._eos_token_ids = eos_token_ids
        self._has_ended = False

    def take(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens of the output. What is sampled after its end means nothing."""
        for index, token_id in enumerate(token_ids):
            if self._has_begun:
                self._consume(token_ids[index:])
                return
            self._last.append(token_id)
            self._has_begun = tuple(self._last) == self._start_after

    @property
    def matcher(self) -> LLMatcher | None:
        """What knows which tokens may come next; None before the grammar begins."""
        return self._matcher if self._has_begun else None

    def check(self) -> None:
        """See whether the grammar failed when its mask was computed."""
        matcher = self._matcher
        stuck = matcher.is_stopped() and not matcher.is_accepting()
        self.has_failed = self.has_failed or matcher.is_error() or stuck

    def _consume(self, token_ids: Sequence[int]) -> None:
        self._has_ended = self._has_ended or token_ids[-1] in self._eos_token_ids
        if not (self._has_ended or self.has_failed):
            self.has_failed = not self._matcher.consume_tokens(list(token_ids))


class Grammars:
    """Of one model. `rows` has the state of each row that is held to a grammar.

    Begins to read the tokenizer when it is made, which takes a second where there are 150,000
    tokens. With one that llguidance cannot use no grammar is ever ready, and `capabilities` is
    empty.
    """

    def __init__(self, folder: ModelFolder) -> None:
        eos_token_ids = folder.generation.eos_token_ids
        self._cores = LLExecutor()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._compiler = self._thread.submit(
            _make_compiler, folder.tokenizer_path, folder.vocab_size, eos_token_ids
        )
        self.num_words = -(-folder.vocab_size // 32)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._open_mask = np.full(self.num_words, -1, np.int32)
        for token_id in eos_token_ids:
            self._open_mask.view(np.uint32)[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        self.reset()

    def wait(self) -> None:
        """Until the tokenizer is read."""
        self._compiler.result()

    @property
    def capabilities(self) -> Sequence[str]:
        """Waits, too."""
        return [CAPABILITY] if isinstance(self._compiler.result(), GrammarCompiler) else []

    def reset(self) -> None:
        """Forget everything: a new epoch begins, and gives its own numbers."""
        self._ready: dict[int, _Ready] = {}
        self.rows: dict[int, RowGrammar] = {}

    def prepare(self, prepare: Prepare, reply: Reply) -> None:
        """Make a grammar ready, on a thread of its own that then replies; or release one."""
        if prepare.release:
            # Behind its preparation, if that is still under way.
            self._thread.submit(self._ready.pop, prepare.id, None)
        elif not prepare.HasField("grammar"):
            reply(Prepared(id=prepare.id, error="this worker has no adapters"))
        else:
            arguments = (self._compiler.result(), self._ready, prepare.id, prepare.grammar, reply)
            self._thread.submit(_prepare, *arguments)

    def admit(self, admissions: Iterable[Admission]) -> None:
        """Rows start, those with a grammar behind the output that they bring along.

        Raises KeyError for a grammar that is not ready.
        """
        for admission in admissions:
            if not admission.grammar:
                self.rows.pop(admission.row, None)
                continue
            grammar = RowGrammar(self._ready[admission.grammar], self._eos_token_ids)
            tokens = np.frombuffer(admission.token_ids, "<u4")
            grammar.take(tokens[admission.num_prompt_tokens :].tolist())
            self.rows[admission.row] = grammar

    def fill(self, masks: Masks, grammars: Sequence[RowGrammar]) -> None:
        """Write which tokens may come next; on several cores where there are several masks."""
        begun = []
        for index, grammar in enumerate(grammars):
            if grammar.matcher is None:
                masks[index] = self._open_mask
            else:
                begun.append((grammar.matcher, index))
        address, num_bytes = masks.ctypes.data, masks.shape[1] * masks.itemsize
        if len(begun) == 1:
            matcher, index = begun[0]
            matcher.unsafe_compute_mask_ptr(address + index * num_bytes, num_bytes)
        elif begun:
            self._cores.unsafe_compute_mask_ptr(begun, address, num_bytes, len(masks))
        for _, index in begun:
            grammars[index].check()

    def has_failed(self, row: int) -> bool:
        return row in self.rows and self.rows[row].has_failed


def _make_compiler(
    tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]
) -> GrammarCompiler | ValueError:
    """Return why there is none where there can be none."""
    try:
        return GrammarCompiler(tokenizer, vocab_size, eos_token_ids)
    except ValueError as error:
        log.warning("outputs cannot be held to a grammar", reason=str(error))
        return error


def _prepare(
    compiler: GrammarCompiler | ValueError,
    ready: dict[int, _Ready],
    number: int,
    grammar: Grammar,
    reply: Reply,
) -> None:
    """ready: of the epoch that asked; nobody looks into that of another."""
    error = ""
    try:
        if isinstance(compiler, ValueError):
            raise compiler
        start_after = tuple(grammar.start_after_token_ids)
        matcher = compiler.compile(
            GrammarKind(grammar.kind), grammar.source, after_breaks=bool(start_after)
        )
        ready[number] = _Ready(matcher, start_after)
    except (GrammarError, ValueError) as problem:
        error = str(problem)
    except BaseException as problem:  # the library panics with one; an answer must come
        log.exception("a grammar could not be prepared")
        error = f"{type(problem).__name__} while it was prepared"
    reply(Prepared(id=number, error=error))
