"""Model folders with random weights, as transformers would save them, for tests.

Owns the shapes and the tiny tokenizer. Does not know who reads the folders.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Family = Literal["qwen3", "qwen2", "llama"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 258  # <|im_end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_FAMILIES: dict[str, tuple[type[Any], type[Any]]] = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}


def make_model_folder(
    path: Path,
    family: Family = "qwen3",
    *,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 64,
    vocab_size: int = 320,
    max_position_embeddings: int = 1024,
    tie: bool = True,
    seed: int = 0,
    rope_theta: float = 10_000.0,
    rope_scaling: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a model of random weights and a byte-level tokenizer to `path`, and return it.

    Weights are drawn wide enough that logits are far from flat and greedy output is not one token
    repeated. vocab_size may be larger than the tokenizer's 259 entries, as in real checkpoints.
    """
    assert vocab_size > EOS_TOKEN_ID
    config_class, model_class = _FAMILIES[family]
    config = config_class(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta} | (rope_scaling or {}),
        bos_token_id=None,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _draw(name, parameter)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    write_tokenizer(path)
    return path


def _draw(name: str, parameter: torch.Tensor) -> None:
    if name.endswith("norm.weight"):
        parameter.uniform_(0.5, 1.5)
    elif name.endswith("bias"):
        parameter.normal_(std=0.5)
    elif name.startswith("model.embed_tokens"):
        parameter.normal_(std=1.0)
    else:
        parameter.normal_(std=2.0 / parameter.shape[-1] ** 0.5)


def _made_up_words(alphabet: list[str], count: int) -> list[tuple[str, str]]:
    """Pairs to merge: most are words of a few letters, many of which begin with a space."""
    source = random.Random(0)
    letters = [*"etaoinshrdlucmfwypvbgkjqxz" * 4, *(piece for piece in alphabet if piece < "\x7f")]
    known, pairs = set(alphabet), []
    words = [*letters, *["Ġ"] * 30]
    while len(pairs) < count:
        pair = source.choice(words), source.choice(letters)
        word = "".join(pair)
        if word not in known and len(word) <= 12:
            known.add(word)
            words.append(word)
            pairs.append(pair)
    return pairs


def write_tokenizer(path: Path, num_merges: int = 0) -> None:
    """Write a tokenizer of the 256 bytes and three special tokens, with a ChatML template.

    num_merges: made-up words that it knows besides, each put together from two shorter ones.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _made_up_words(alphabet, num_merges)
    pieces = [*alphabet, *(one + other for one, other in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))


def add_special_tokens(path: Path, tokens: list[str]) -> list[int]:
    """Add tokens to a folder's tokenizer; return their ids, which follow those that it has."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(tokens)
    tokenizer.save(str(path / "tokenizer.json"))
    return [tokenizer.token_to_id(token) for token in tokens]
