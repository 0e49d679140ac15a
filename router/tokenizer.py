"""Text to token ids and back, as the model's tokenizer.json says.

Owns the `tokenizers` library's object. Does not know chat templates, stop sequences or requests.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import compress
from typing import Any, NamedTuple

import tokenizers

from mili.hub.folder import ModelFolder
from mili.router.detokenizer import Detokenizer, TokenBytes, TokenPieces, read_vocabulary

# 1 for each byte that begins a UTF-8 character, 0 for each that continues one.
_BEGINS_CHARACTER = bytes(byte & 0xC0 != 0x80 for byte in range(256))


class TokenizedText(NamedTuple):
    """Token ids, and for each the bytes of the UTF-8 text that it covers: start to end - 1."""

    ids: list[int]
    start_bytes: list[int]
    end_bytes: list[int]


class Tokenizer:
    """The tokenizer of one model; threads may share it.

    vocab_size is the model's: every id below it is valid, and one that has no token decodes to
    nothing. longest_token_bytes: no token of the vocabulary is longer in UTF-8. Raises ValueError
    for a tokenizer.json that cannot be read or streamed from.
    """

    def __init__(self, folder: ModelFolder) -> None:
        data = folder.tokenizer_path.read_bytes()
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{folder.tokenizer_path} is not a tokenizer: {error}") from None
        # Training leaves limits in such files; a server must neither cut nor pad a prompt.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = folder.vocab_size
        self.tokenizer_sha256: str = hashlib.sha256(data).hexdigest()
        # A byte-level token is written in characters of one or two bytes for each byte of its own.
        self.longest_token_bytes: int = max(
            (len(token.encode()) for token in self._backend.get_vocab()), default=1
        )
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = {
            added[token_id].content: token_id for token_id in added if added[token_id].special
        }
        self._decoder: dict[str, Any] | None = json.loads(data).get("decoder")
        self._vocabulary = read_vocabulary(self._backend, self._decoder, frozenset())
        self._vocabulary_showing = lru_cache(maxsize=8)(self._read_vocabulary)
        self._vocabulary_without_special = self._vocabulary_showing(frozenset())

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of one text, with the special tokens of the file's post-processor."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of each text. Leaves the GIL to others meanwhile."""
        _check_unicode(texts)
        # Not `encode`, which holds the GIL: half a second for a megabyte.
        encodings = self._backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        results: list[list[int]] = [encoding.ids for encoding in encodings]
        for ids in results:
            self._check_range(ids)
        return results

    def encode_with_offsets(
        self, texts: Sequence[str], *, add_special_tokens: bool
    ) -> list[TokenizedText]:
        """Return the ids of each text and where in it they stand. Leaves the GIL to others."""
        _check_unicode(texts)
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        results = []
        for text, encoding in zip(texts, encodings, strict=True):
            self._check_range(encoding.ids)
            at_byte = _byte_offsets(text)
            starts = [at_byte[start] for start, _ in encoding.offsets]
            ends = [at_byte[end] for _, end in encoding.offsets]
            results.append(TokenizedText(encoding.ids, starts, ends))
        return results

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of all the ids. Raises ValueError for one out of range."""
        self._check_range(ids)
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for inside a text; none for an id without a token.

        They may be part of a UTF-8 character.
        """
        return self._vocabulary.spelled(token_id)

    def detokenizer(
        self, *, skip_special_tokens: bool, shown: frozenset[str] = frozenset()
    ) -> Detokenizer:
        """Return a new detokenizer for one output: what `decode` does, a token at a time.

        shown: special tokens that are not skipped.
        """
        if not skip_special_tokens:
            return self._vocabulary.detokenizer()
        shown &= self._special_ids.keys()
        if not shown:
            return self._vocabulary_without_special.detokenizer()
        return self._vocabulary_showing(shown).detokenizer()

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its text, None where the vocabulary has no such token."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def _read_vocabulary(self, shown: frozenset[str]) -> TokenBytes | TokenPieces:
        skipped = {self._special_ids[token] for token in self._special_ids.keys() - shown}
        return read_vocabulary(self._backend, self._decoder, frozenset(skipped))

    def _check_range(self, ids: Sequence[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(token_id for token_id in ids if not 0 <= token_id < self.vocab_size)
            raise ValueError(f"token id {wrong} is not below the vocabulary's {self.vocab_size}")


def _check_unicode(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds half of a surrogate pair") from None


def _byte_offsets(text: str) -> Sequence[int]:
    """Return, for each character of text and for its end, its offset in UTF-8.  # [len + 1]"""
    if text.isascii():
        return range(len(text) + 1)
    data = text.encode()
    offsets = array("I", compress(range(len(data)), data.translate(_BEGINS_CHARACTER)))
    offsets.append(len(data))
    return offsets
