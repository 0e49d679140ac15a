"""Grammars over a model's tokens: what llguidance makes of a schema, a regex or a Lark grammar.

Owns how a source becomes a matcher, and the limits on that. Router and worker both use it: what
passes at the door of the one is what the other computes. Does not know requests or processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# A mask must not take long, nor a grammar's automaton much memory: 1 to 2 KB a state. Roughly,
# 50,000 units of fuel for a grammar's expressions are a millisecond, and 14,000 of a mask's.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,  # they would tell the grammar and the output
)
# A model that is not sure of itself could write white space for ever: so much of it in one place.
_JSON: JsonCompileOptions = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \t\r\n]{1,16}",
}
_COMPLEX = re.compile(r"too (complex|large|many)|fuel|limit|exhausted", re.IGNORECASE)
_MAX_CAUSE = 300
_DEAD_END = "no text fits it"


class GrammarKind(IntEnum):
    """Equal in number to mili.internal.v1.GrammarKind (a test proves it)."""

    JSON_SCHEMA = 1
    REGEX = 2
    LARK = 3


class GrammarError(ValueError):
    """A grammar that cannot be used: it is wrong, or asks for too much work."""

    def __init__(self, message: str, *, too_complex: bool) -> None:
        super().__init__(message)
        self.too_complex = too_complex


class GrammarCompiler:
    """Makes matchers over one model's tokenizer; threads may share it.

    vocab_size: the model's; ids that have no text are never allowed. Raises ValueError for a
    tokenizer whose tokens llguidance cannot spell, and for a model that no token ends.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        if not eos_token_ids:
            raise ValueError("the model names no token that ends its output")
        try:
            plain = LLTokenizer(str(tokenizer), n_vocab=vocab_size, eos_token=list(eos_token_ids))
            self._tokenizer = LLTokenizer(
                TokenizerWrapper(_LiteralTokens(plain, eos_token_ids[0])),
                n_vocab=vocab_size,
                eos_token=list(eos_token_ids),
            )
        except Exception as error:  # the library raises nothing narrower
            cause = str(error).partition("\n")[0][:_MAX_CAUSE]
            raise ValueError(f"llguidance cannot use the tokenizer: {cause}") from None

    @property
    def num_words(self) -> int:
        """32-bit words of a mask: bit t % 32 of word t // 32 is token t."""
        return -(-self._tokenizer.vocab_size // 32)

    def compile(self, kind: GrammarKind, source: str, *, after_breaks: bool = False) -> LLMatcher:
        """Return a matcher at its beginning, whose first mask is known to allow something.

        after_breaks: up to two line breaks may come before what fits, as models write them behind
        their reasoning; what is wrong without them is wrong with them. A copy of the matcher,
        deep_copy(), costs microseconds. Raises GrammarError. Leaves the GIL to others for most of
        the time.
        """
        grammar = _to_llguidance(kind, source)
        matcher = self._begin(grammar)
        return self._begin(_after_breaks(kind, grammar)) if after_breaks else matcher

    def _begin(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        _check(matcher)
        matcher.compute_bitmask()
        _check(matcher)
        if matcher.is_stopped() and not matcher.is_accepting():
            raise GrammarError(_DEAD_END, too_complex=False)
        return matcher


class _LiteralTokens:
    """A tokenizer as llguidance reads it from a file, but that text never becomes a control token.

    The library asks which tokens a text has that the grammar forces. A tokenizer.json would have
    the literal "</think>" be the control token of that name, which the grammar then refuses: only
    </think> without quotes means that.
    """

    bos_token_id = None

    def __init__(self, plain: LLTokenizer, eos_token_id: int) -> None:
        ids = range(plain.vocab_size)
        self._plain = plain
        self.eos_token_id = eos_token_id
        # The byte 0xFF, with which the library marks control tokens, is one by itself.
        self.tokens = [plain.decode_bytes([token_id]) or b"\xff" for token_id in ids]
        self.special_token_ids = [
            token_id
            for token_id in ids
            if plain.is_special_token(token_id) and self.tokens[token_id] != b"\xff"
        ]
        self._special = frozenset(self.special_token_ids)

    def __call__(self, text: bytes) -> list[int]:
        token_ids = self._plain.tokenize_bytes(text)
        if self._special.isdisjoint(token_ids):
            return token_ids
        return self._plain.greedy_tokenize(text.decode(errors="replace"))


def _to_llguidance(kind: GrammarKind, source: str) -> str:
    if kind == GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(source)
    if kind == GrammarKind.LARK:
        return LLMatcher.grammar_from_lark(source)
    try:
        return LLMatcher.grammar_from_json_schema(source, defaults=_JSON)
    except ValueError as error:
        raise GrammarError(str(error)[:_MAX_CAUSE], too_complex=False) from None


def _after_breaks(kind: GrammarKind, grammar: str) -> str:
    """Return a grammar that has another one, made by _to_llguidance, as a part."""
    is_lark = kind == GrammarKind.LARK
    (part,) = [{"lark_grammar": grammar}] if is_lark else json.loads(grammar)["grammars"]
    whole = {"lark_grammar": r"start: /\n{0,2}/ @part"}
    return json.dumps({"grammars": [whole, {**part, "name": "part"}]})


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        cause = matcher.get_error().partition("\n<")[0].strip()[:_MAX_CAUSE]
        if cause.startswith("NoExtension"):
            raise GrammarError(_DEAD_END, too_complex=False)
        raise GrammarError(cause, too_complex=_COMPLEX.search(cause) is not None)
