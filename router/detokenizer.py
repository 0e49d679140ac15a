"""Token ids to text, one token at a time.

Owns the rule that all deltas together equal decoding all tokens at once, character for character.
Does not know encoding, requests or stop sequences.
"""

from __future__ import annotations

from codecs import utf_8_decode
from typing import Any, Protocol

from tokenizers import Tokenizer

# Decoders under which a token, once it is not the first, always adds the same text.
_PIECEWISE = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


class Detokenizer(Protocol):
    """Tokens of one output in, text out. A partial character is held back, never shown."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that it made certain."""

    def flush(self) -> str:
        """No more tokens come: return the text that was still held back."""


class ByteLevelDetokenizer:
    """For byte-level BPE (GPT-2, Llama 3, Qwen): a token is some bytes of the UTF-8 text."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._whole_texts = token_bytes.whole_texts
        self._partial = b""  # the beginning of a character

    def push(self, token_id: int) -> str:
        if not self._partial and (text := self._whole_texts[token_id]) is not None:
            return text
        seen = self._partial + self._token_bytes[token_id]
        text, used = utf_8_decode(seen, "replace")
        self._partial = seen[used:]
        return text

    def flush(self) -> str:
        text, _ = utf_8_decode(self._partial, "replace", True)
        self._partial = b""
        return text


class PieceDetokenizer:
    """For SentencePiece vocabularies (Llama 2, Gemma): a token is a piece of text, or one byte.

    Byte tokens in a row become text only if all of them together are valid UTF-8, else each becomes
    U+FFFD. So nothing of such a run is certain before it ends.
    """

    def __init__(self, pieces: TokenPieces) -> None:
        self._pieces = pieces
        self._byte_run: list[int] = []
        self._begun = False

    def push(self, token_id: int) -> str:
        if token_id in self._pieces.byte_ids:
            self._byte_run.append(token_id)
            return ""
        piece = self._pieces[token_id]
        if piece is None:
            return ""
        if self._begun and not self._byte_run:
            return piece
        before = self.flush()
        if self._begun:
            return before + piece
        self._begun = True
        return self._pieces.decode([token_id], first=True)

    def flush(self) -> str:
        if not self._byte_run:
            return ""
        text = self._pieces.decode(self._byte_run, first=not self._begun)
        self._byte_run = []
        self._begun = True
        return text


class TokenBytes(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary, found when first asked for."""

    def __init__(self, backend: Tokenizer, dropped_ids: frozenset[int]) -> None:
        super().__init__()
        self.whole_texts = WholeTexts(self)
        self._backend = backend
        self._dropped_ids = dropped_ids

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._dropped_ids else self._backend.id_to_token(token_id)
        self[token_id] = b"" if token is None else _spelled_bytes(token)
        return self[token_id]

    def spelled(self, token_id: int) -> bytes:
        """Return what the token adds to a text."""
        return self[token_id]

    def detokenizer(self) -> Detokenizer:
        return ByteLevelDetokenizer(self)


class WholeTexts(dict[int, str | None]):
    """What each token adds where no character is unfinished; None if it leaves one so."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        super().__init__()
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        spelled = self._token_bytes[token_id]
        text, used = utf_8_decode(spelled, "replace")
        self[token_id] = text if used == len(spelled) else None
        return self[token_id]


class TokenPieces(dict[int, str | None]):
    """What each token adds when it is not the first, found when first asked for.

    None: the token is dropped before decoding, so that it does not even end a run of bytes.
    """

    def __init__(
        self, backend: Tokenizer, dropped_ids: frozenset[int], *, byte_fallback: bool
    ) -> None:
        super().__init__()
        self._backend = backend
        self._dropped_ids = dropped_ids
        vocabulary: dict[str, int] = backend.get_vocab()
        spelled = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
        byte_of = {vocabulary[t]: byte for byte, t in enumerate(spelled) if t in vocabulary}
        self._byte_of = byte_of
        self.byte_ids = byte_of.keys() - dropped_ids
        # Any token with a text of its own: what follows it is decoded as not the first.
        self._anchor = next(
            token_id
            for token_id in sorted(vocabulary.values())
            if token_id not in byte_of and self._decode([token_id])
        )
        self._anchor_text = self._decode([self._anchor])

    def __missing__(self, token_id: int) -> str | None:
        dropped = token_id in self._dropped_ids or self._backend.id_to_token(token_id) is None
        self[token_id] = None if dropped else self.decode([token_id], first=False)
        return self[token_id]

    def spelled(self, token_id: int) -> bytes:
        """Return what the token adds to a text when it is not the first."""
        if token_id in self.byte_ids:
            return bytes([self._byte_of[token_id]])
        return (self[token_id] or "").encode()

    def decode(self, ids: list[int], *, first: bool) -> str:
        """Return the text of ids at the beginning of an output, or later in it."""
        if first:
            return self._decode(ids)
        return self._decode([self._anchor, *ids]).removeprefix(self._anchor_text)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def detokenizer(self) -> Detokenizer:
        return PieceDetokenizer(self)


def read_vocabulary(
    backend: Tokenizer, decoder: dict[str, Any] | None, dropped_ids: frozenset[int]
) -> TokenBytes | TokenPieces:
    """Return what makes detokenizers that leave dropped_ids out of the text.

    decoder: the section of that name of tokenizer.json. Raises ValueError for one whose text
    depends on more than the tokens so far, or is not known.
    """
    types = _decoder_types(decoder)
    if "ByteLevel" in types and types <= {"ByteLevel", "Fuse"}:
        return TokenBytes(backend, dropped_ids)
    if types <= _PIECEWISE:
        return TokenPieces(backend, dropped_ids, byte_fallback="ByteFallback" in types)
    raise ValueError(f"cannot stream text through the decoder {' + '.join(sorted(types))}")


def _decoder_types(decoder: dict[str, Any] | None) -> frozenset[str]:
    if decoder is None:
        return frozenset()
    if decoder["type"] == "Sequence":
        return frozenset().union(*map(_decoder_types, decoder["decoders"]))
    if decoder["type"] == "Strip" and (decoder["start"] > 1 or decoder["stop"] > 0):
        raise ValueError("cannot stream text through a decoder that strips more than one character")
    return frozenset({decoder["type"]})


def _spelled_bytes(token: str) -> bytes:
    """Return the bytes that a byte-level token spells; one with other characters is itself."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _byte_characters() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 stands for itself, the rest for 256 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_characters()
