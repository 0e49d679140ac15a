"""Small tokenizers of every kind that MILI streams, each as a model folder, for tests.

Owns the vocabularies. The folders have no weights: they are never read by the hub.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mili.hub.cache import model_path
from mili.hub.folder import GenerationDefaults, ModelFolder, read_model_folder

TEXTS = ("hello world", "  two  spaces", "naïve façade", "世界 is the world", "😀😀 👍🏽", "a\n\tb")
SMOLLM2 = model_path("smollm2-135m")


def model_folder(
    path: Path,
    backend: Tokenizer | None = None,
    *,
    vocab_size: int = 0,
    chat_template: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> ModelFolder:
    """Return a folder without weights. vocab_size 0: as many ids as the tokenizer has."""
    if backend is not None:
        backend.save(str(path / "tokenizer.json"))
        vocab_size = vocab_size or backend.get_vocab_size()
    return ModelFolder(
        path=path,
        config={},
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        vocab_size=vocab_size,
        max_context_tokens=1024,
        dtype="float32",
        generation=GenerationDefaults((), *[None] * 8, "{}"),
        chat_template=chat_template,
        tokenizer_config=tokenizer_config or {},
        tokenizer_path=path / "tokenizer.json",
        weight_files=(),
    )


def smollm2_folder() -> ModelFolder:
    """Return the demo model's folder; skip the test where it was not pulled."""
    if not SMOLLM2.is_dir():
        pytest.skip("smollm2-135m is not pulled: run `mili pull smollm2-135m`")
    return read_model_folder(SMOLLM2)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: tokens are bytes, so that one may end within a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_special_tokens(["<|bos|>", "<|eos|>", "<|é 世|>"])
    backend.add_tokens([AddedToken("Ġé", normalized=False), AddedToken("été x")])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
    return backend


def byte_fallback(*, strip: bool) -> Tokenizer:
    """As Llama 2 (strip) and Gemma: pieces with ▁ for a space, and bytes for the unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdehlorwxï�", "▁a", "he", "▁he", "lo", "▁▁"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("h", "e"), ("▁", "he"), ("l", "o"), ("▁", "▁")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    prepended = [normalizers.Prepend("▁")] if strip else []
    backend.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    stripped = [decoders.Strip(" ", 1, 0)] if strip else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def metaspace() -> Tokenizer:
    """As SentencePiece's Unigram models: the first piece loses its leading space."""
    pieces = ["<unk>", "</s>", "▁", *"abcdehlorwï", "▁a", "▁hello", "lo", "▁▁", "a▁b"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


def plain_words() -> Tokenizer:
    """No decoder at all: the library then puts spaces between tokens."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "a", "b", "hello", "é"])}
    return Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))


def every_kind() -> Iterable[tuple[str, Tokenizer]]:
    yield "byte_level", byte_level()
    yield "byte_fallback_strip", byte_fallback(strip=True)
    yield "byte_fallback", byte_fallback(strip=False)
    yield "metaspace", metaspace()
    yield "plain_words", plain_words()
