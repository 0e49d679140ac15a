"""GGUF files, made here from small random models, become the model folders they came from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from mili.hub.folder import read_model_folder
from mili.hub.gguf_weights import LAYER_NAMES, OUTER_NAMES
from mili.hub.pull import PullError, pull
from mili.hub.resolve import resolve

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = "<think>"
MERGED = ["he", "12", "123", "Ġhe"]
MERGES = ["h e", "1 2", "12 3", "Ġ he"]
UNUSED = "[PAD264]"
TOKENS = [*SPECIAL, *pre_tokenizers.ByteLevel.alphabet(), *MERGED, USER_DEFINED, UNUSED]
TYPES = [3] * 3 + [1] * 260 + [4, 5]
CONFIG_CLASSES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILI_CACHE", str(tmp_path / "cache"))


def random_model(architecture: str, tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_CLASSES[architecture](
        vocab_size=len(TOKENS),
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16 if architecture != "qwen3" else 32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter)
    return model


def gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Name and permute as a GGUF file has it."""
    outer = {new: old for old, new in OUTER_NAMES.items()}
    inner = {new: old for old, new in LAYER_NAMES.items()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(\w+)", name)
        array = tensor.numpy()
        if match and model.config.model_type == "llama" and "norm" not in name:
            heads = {"q_proj": 6, "k_proj": 2}.get(match[2].split(".")[1])
            if heads:
                halves = array.reshape(heads, 2, -1, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        key = f"blk.{match[1]}.{inner[match[2]]}.{match[3]}" if match else outer[name]
        tensors[key] = np.ascontiguousarray(array)
    return tensors


def metadata(model: PreTrainedModel) -> dict[str, Any]:
    config, name = model.config, model.config.model_type
    return {
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": model.model.layers[0].self_attn.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE[name],
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    values: dict[str, Any],
    *,
    architecture: str = "llama",
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(key, value)
    for name, array in tensors.items():
        kind = matrices if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return random_model("llama", tied=True)


def llama_gguf(path: Path, llama: PreTrainedModel, changes: dict[str, Any] | None = None) -> Path:
    return write_gguf(path, gguf_tensors(llama), metadata(llama) | (changes or {}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_folder_is_the_model_again(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = random_model(architecture, tied)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, gguf_tensors(model), metadata(model), architecture=architecture)
    folder = pull(str(path))
    assert folder == resolve("tiny")
    assert read_model_folder(folder).dtype == "float32"
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    token_ids = torch.arange(40).view(1, -1)
    assert torch.equal(model(token_ids).logits, loaded(token_ids).logits)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")]
)
def test_half_formats_are_kept_and_others_dequantized(
    tmp_path: Path, llama: PreTrainedModel, kind: str, dtype: str
) -> None:
    number_format = gguf.GGMLQuantizationType[kind]
    tensors = gguf_tensors(llama)
    path = write_gguf(tmp_path / "x.gguf", tensors, metadata(llama), matrices=number_format)
    folder = pull(str(path))
    assert read_model_folder(folder).dtype == dtype
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    down = tensors["blk.1.ffn_down.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(down, number_format), number_format)
    assert np.array_equal(loaded["model.layers.1.mlp.down_proj.weight"].numpy(), expected)
    norm = loaded["model.layers.1.input_layernorm.weight"].numpy()
    assert np.array_equal(norm, tensors["blk.1.attn_norm.weight"])


def test_generation_config_and_template(tmp_path: Path, llama: PreTrainedModel) -> None:
    changes = {
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
        "tokenizer.ggml.eot_token_id": 0,
    }
    path = llama_gguf(tmp_path / "x.gguf", llama, changes)
    model = read_model_folder(pull(str(path)))
    assert model.generation.eos_token_ids == (2, 0)
    assert (model.generation.temperature, model.generation.top_k) == (0.7, 20)
    assert model.chat_template == "{{ messages[0].content }}"
    assert model.config["rms_norm_eps"] == 1e-5
    assert model.config["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("smollm", ["1", "2", "3", "Ġhe"]),
        ("qwen2", ["1", "2", "3", "Ġhe"]),
        ("llama-bpe", ["123", "Ġhe"]),
        ("gpt-2", ["123", "Ġhe"]),
    ],
)
def test_how_text_is_split(
    tmp_path: Path, llama: PreTrainedModel, pre: str, tokens: list[str]
) -> None:
    path = llama_gguf(tmp_path / "x.gguf", llama, {"tokenizer.ggml.pre": pre})
    folder = pull(str(path))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("123 he").tokens == tokens
    special = tokenizer.encode("<|im_start|><think>\n<|im_end|>")
    assert special.tokens == ["<|im_start|>", "<think>", "Ċ", "<|im_end|>"]
    assert tokenizer.decode(special.ids) == "<think>\n"
    assert tokenizer.token_to_id(UNUSED) is None
    text = "Grüße, 世界! 🎉\r\n\t x² “q” "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert AutoTokenizer.from_pretrained(folder)("123 he").tokens() == tokens


def test_a_beginning_of_text_token(tmp_path: Path, llama: PreTrainedModel) -> None:
    path = llama_gguf(tmp_path / "x.gguf", llama, {"tokenizer.ggml.add_bos_token": True})
    tokenizer = Tokenizer.from_file(str(pull(str(path)) / "tokenizer.json"))
    assert tokenizer.encode("he").tokens == ["<|im_start|>", "he"]
    assert tokenizer.encode("he", add_special_tokens=False).tokens == ["he"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"general.architecture": "gemma3"}, "architecture is 'gemma3'"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type = 'yarn'"),
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window = 4096"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is not the head size 16"),
        ({"llama.attention.head_count": [6, 6]}, "head_count is .*6, 6.*, not a positive integer"),
        ({"llama.block_count": 3}, r"tensor 'blk\.2\..*' is missing"),
        ({"llama.block_count": 1}, r"tensor 'blk\.1\..*' has no place in a llama model"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer is of the kind 'llama'"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"split.count": 2}, "one part of a split file"),
    ],
)
def test_what_mili_cannot_run_is_refused_by_name(
    tmp_path: Path, llama: PreTrainedModel, changes: dict[str, Any], problem: str
) -> None:
    changes = dict(changes)
    architecture = changes.pop("general.architecture", "llama")
    path = tmp_path / "x.gguf"
    write_gguf(path, gguf_tensors(llama), metadata(llama) | changes, architecture=architecture)
    with pytest.raises(PullError, match=problem) as caught:
        pull(str(path))
    assert str(path) in str(caught.value)
    assert not list((tmp_path / "cache" / "models").glob("[!.]*"))


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [("rope_freqs.weight", "rotary embedding is scaled"), ("blk.0.odd.weight", "no place")],
)
def test_an_unknown_tensor_is_named(
    tmp_path: Path, llama: PreTrainedModel, tensor: str, problem: str
) -> None:
    tensors = gguf_tensors(llama) | {tensor: np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "x.gguf", tensors, metadata(llama))
    with pytest.raises(PullError, match=problem) as caught:
        pull(str(path))
    assert tensor in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 100, 5000, 100_000])
def test_a_gguf_file_cut_short(tmp_path: Path, llama: PreTrainedModel, size: int) -> None:
    path = llama_gguf(tmp_path / "x.gguf", llama)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(PullError, match=r"x\.gguf is not a readable GGUF file"):
        pull(str(path))


def test_another_file_of_the_same_name_is_not_mistaken(
    tmp_path: Path, llama: PreTrainedModel
) -> None:
    path = llama_gguf(tmp_path / "x.gguf", llama)
    assert pull(str(path)) == pull(str(path))
    llama_gguf(path, llama, {"llama.rope.freq_base": 10000.0})
    with pytest.raises(PullError, match=r"came from another x\.gguf"):
        pull(str(path))


@pytest.mark.parametrize("name", ["two words.gguf", "smollm2-135m.gguf"])
def test_a_name_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(PullError, match="rename the file"):
        pull(str(tmp_path / name))


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"x\.gguf does not exist"):
        pull(str(tmp_path / "x.gguf"))
