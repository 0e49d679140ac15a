"""GGUF metadata -> tokenizer.json, tokenizer_config.json and chat_template.jinja.

Owns the rebuilding of byte-level BPE tokenizers. What a GGUF file does not hold, the splitting of
text before BPE, it only names ("pre"): each name that MILI knows is written out here, and another
one is refused, because a wrong split gives wrong tokens without any error.
"""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from mili.hub.gguf_file import GgufFile


class TokenType(IntEnum):
    """tokenizer.ggml.token_type, as far as byte-level BPE uses it."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


def _split_pattern(max_digits: int) -> str:
    """The regular expression of the GPT-4 kind: words, numbers, punctuation, white space."""
    digits = r"\p{N}" if max_digits == 1 else rf"\p{{N}}{{1,{max_digits}}}"
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+"
    )


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer | None:
    """Return the pre-tokenizer that GGUF calls `pre`, None if MILI does not know it."""
    byte_level = pre_tokenizers.ByteLevel
    if pre == "gpt-2":
        return byte_level(add_prefix_space=False)
    if pre == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, byte_level(add_prefix_space=False)])
    if pre in ("qwen2", "llama-bpe"):
        pattern = _split_pattern(max_digits=1 if pre == "qwen2" else 3)
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        second = byte_level(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, second])
    return None


def build_tokenizer(gguf: GgufFile) -> Tokenizer:
    """Rebuild the tokenizer; raise PullError for a kind that MILI does not know."""
    kind = gguf.require("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise gguf.refusal(f"its tokenizer is of the kind {kind!r}, and MILI knows 'gpt2'")
    pre = gguf.require("tokenizer.ggml.pre", str)
    pre_tokenizer = _pre_tokenizer(pre)
    if pre_tokenizer is None:
        raise gguf.refusal(f"MILI does not know its pre-tokenizer {pre!r}")

    tokens: list[str] = gguf.require("tokenizer.ggml.tokens", list)
    types: list[int] = gguf.require("tokenizer.ggml.token_type", list)
    merges: list[str] = gguf.require("tokenizer.ggml.merges", list)
    vocabulary = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != TokenType.UNUSED
    }
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    if gguf.get("tokenizer.ggml.add_bos_token"):
        bos = gguf.require("tokenizer.ggml.bos_token_id", int)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def write_tokenizer(gguf: GgufFile, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if there is one, the chat template."""
    build_tokenizer(gguf).save(str(folder / "tokenizer.json"))
    tokens: list[str] = gguf.require("tokenizer.ggml.tokens", list)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = gguf.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int):
            config[f"{name}_token"] = tokens[index]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    template = gguf.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
