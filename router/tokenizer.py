"""Text to token ids and back, as the model's tokenizer.json says.

Owns the `tokenizers` library's object. Does not know chat templates, stop sequences or requests.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import compress
from typing import Any, NamedTuple, TypeVar

import tokenizers

from mili.hub.folder import ModelFolder
from mili.router.detokenizer import Detokenizer, TokenBytes, TokenPieces, read_vocabulary

_T = TypeVar("_T")

# 1 for each byte that begins a UTF-8 character, 0 for each that continues one.
_BEGINS_CHARACTER = bytes(byte & 0xC0 != 0x80 for byte in range(256))


# What one operation of C may go through: others wait for the interpreter meanwhile, about 0.1 ms.
PIECE = 8192


class TokenizedText(NamedTuple):
    """Token ids, and for each the bytes of the UTF-8 text that it covers: start to end - 1.

    Characters are whole: tokens that share one have all of it each. A token that stands for none
    of the text, as BOS, has start == end.
    """

    ids: Sequence[int]
    start_bytes: Sequence[int]
    end_bytes: Sequence[int]


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
        encodings = self._backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [
            self._as_spelled(text, encoding)
            or self._as_normalized(text, add_special_tokens=add_special_tokens)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of all the ids. Raises ValueError for one out of range.

        Leaves the GIL to others, which the library's plain `decode` does not: 0.1 s at most.
        """
        self._check_range(ids)
        texts = self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        text: str = texts[0]
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
        special = shown.intersection(self._special_ids)
        if not special:
            return self._vocabulary_without_special.detokenizer()
        return self._vocabulary_showing(special).detokenizer()

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its text, None where the vocabulary has no such token."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def _read_vocabulary(self, shown: frozenset[str]) -> TokenBytes | TokenPieces:
        skipped = {self._special_ids[token] for token in self._special_ids.keys() - shown}
        return read_vocabulary(self._backend, self._decoder, frozenset(skipped))

    def _as_spelled(self, text: str, encoding: tokenizers.Encoding) -> TokenizedText | None:
        """Return where each token stands if the bytes of all, one after the other, are the text.

        None if they are not: a normalizer changed the text, or tokens do not tell their bytes.
        """
        data, ids, spelled_bytes = text.encode(), encoding.ids, self._vocabulary.spelled
        self._check_range(ids)
        starts, ends = array("I"), array("I")
        end = 0
        for some, added in zip(pieces(ids), pieces(encoding.special_tokens_mask), strict=True):
            spelled = [
                b"" if by_template else spelled_bytes(token_id)
                for token_id, by_template in zip(some, added, strict=True)
            ]
            if not data.startswith(b"".join(spelled), end):
                return None
            for token in spelled:
                starts.append(end)
                end += len(token)
                ends.append(end)
        if end < len(data):
            return None
        if not text.isascii():
            _widen_to_characters(data, starts, ends)
        return TokenizedText(ids, starts, ends)

    def _as_normalized(self, text: str, *, add_special_tokens: bool) -> TokenizedText:
        """Return where each token stands as the library followed it through the normalizer.

        Dropping what it wrote down for that keeps the interpreter from others: 20 ms for 1 MB.
        """
        [encoding] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        self._check_range(ids)
        at_byte = _byte_offsets(text)
        starts, ends = array("I"), array("I")
        # Not `offsets`, which makes a pair for each token in one go: 0.1 s for a million of them.
        span_of = encoding.token_to_chars
        end = 0
        for index in range(len(ids)):
            start, end = span_of(index) or (end, end)
            starts.append(at_byte[start])
            ends.append(at_byte[end])
        return TokenizedText(ids, starts, ends)

    def _check_range(self, ids: Sequence[int]) -> None:
        for piece in pieces(ids):
            if not 0 <= min(piece) <= max(piece) < self.vocab_size:
                wrong = next(token_id for token_id in piece if not 0 <= token_id < self.vocab_size)
                limit = self.vocab_size
                raise ValueError(f"token id {wrong} is not below the vocabulary's {limit}")


def pieces(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Cut a sequence so that work on one piece does not keep the interpreter from others."""
    return (values[start : start + PIECE] for start in range(0, len(values), PIECE))


def _check_unicode(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds half of a surrogate pair") from None


def _widen_to_characters(data: bytes, starts: array[int], ends: array[int]) -> None:
    """Move starts back and ends on to where characters of the UTF-8 data begin, in place."""
    begins = data.translate(_BEGINS_CHARACTER) + b"\x01"
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not begins[start]:
            starts[index] = begins.rindex(1, 0, start)
        if not begins[end]:
            ends[index] = begins.index(1, end)


def _byte_offsets(text: str) -> Sequence[int]:
    """Return, for each character of text and for its end, its offset in UTF-8.  # [len + 1]"""
    if text.isascii():
        return range(len(text) + 1)
    data = text.encode()
    positions, begins = range(len(data)), data.translate(_BEGINS_CHARACTER)
    offsets = array("I")
    for some, mask in zip(pieces(positions), pieces(begins), strict=True):
        offsets.extend(compress(some, mask))
    offsets.append(len(data))
    return offsets
