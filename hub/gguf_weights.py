"""GGUF tensors -> model.safetensors with Hugging Face names.

Owns names, number formats and the order of the rows. Does not know the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from mili.hub import safetensors_file
from mili.hub.errors import PullError
from mili.hub.gguf_file import GgufFile
from mili.hub.progress import Progress
from mili.hub.safetensors_file import ITEM_SIZE, TensorSpec

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
COMMON_PARTS = {
    f"{part}.weight" for part in LAYER_NAMES if part not in ("attn_q_norm", "attn_k_norm")
}
EXTRA_PARTS = {
    "llama": set[str](),
    "qwen2": {"attn_q.bias", "attn_k.bias", "attn_v.bias"},
    "qwen3": {"attn_q_norm.weight", "attn_k_norm.weight"},
}
# Formats that stay as they are, bit for bit; everything else is dequantized to F32.
KEPT_FORMATS = ("F32", "F16", "BF16")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class WeightPlan(NamedTuple):
    """What will be written, in the order of the file. dtype: as transformers spells it."""

    specs: list[TensorSpec]
    sources: list[gguf.ReaderTensor]
    dtype: str
    vocab_size: int
    tied: bool


def plan_weights(file: GgufFile, architecture: str) -> WeightPlan:
    """Name every tensor; raise PullError if one is missing or has no place in the model."""
    num_layers = file.require(f"{architecture}.block_count", int)
    _check_names(file, architecture, num_layers)
    pairs = [(_spec(tensor), tensor) for tensor in file.tensors]
    pairs.sort(key=lambda pair: -ITEM_SIZE[pair[0].dtype])  # keeps every tensor aligned
    matrix_formats = {spec.dtype for spec, _ in pairs if len(spec.shape) > 1}
    common = matrix_formats.pop() if len(matrix_formats) == 1 else "F32"
    shapes = {spec.name: spec.shape for spec, _ in pairs}
    return WeightPlan(
        specs=[spec for spec, _ in pairs],
        sources=[tensor for _, tensor in pairs],
        dtype=DTYPES[common],
        vocab_size=shapes["model.embed_tokens.weight"][0],
        tied="lm_head.weight" not in shapes,
    )


def write_weights(plan: WeightPlan, path: Path, config: dict[str, Any], progress: Progress) -> None:
    """Write the safetensors file. config: the model's config.json."""

    def tensors() -> Iterator[memoryview]:
        total = sum(spec.size for spec in plan.specs)
        done = 0
        for spec, source in zip(plan.specs, plan.sources, strict=True):
            array = _read(source, spec)
            if config["model_type"] == "llama":
                array = _undo_permutation(array, spec.name, config)
            yield np.ascontiguousarray(array).data.cast("B")
            done += spec.size
            progress("Converting weights", done, total)

    safetensors_file.write(path, plan.specs, tensors())


def _check_names(file: GgufFile, architecture: str, num_layers: int) -> None:
    parts = COMMON_PARTS | EXTRA_PARTS[architecture]
    required = {f"blk.{layer}.{part}" for layer in range(num_layers) for part in parts}
    required |= {"token_embd.weight", "output_norm.weight"}
    present = {tensor.name for tensor in file.tensors}
    if "rope_freqs.weight" in present:
        raise file.refusal("its rotary embedding is scaled (tensor 'rope_freqs.weight')")
    if missing := sorted(required - present):
        raise file.refusal(f"tensor {missing[0]!r} is missing")
    if unknown := sorted(present - required - {"output.weight"}):
        raise file.refusal(f"tensor {unknown[0]!r} has no place in a {architecture} model")


def _spec(tensor: gguf.ReaderTensor) -> TensorSpec:
    name = OUTER_NAMES.get(tensor.name)
    if name is None:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
        assert match is not None, tensor.name
        layer, part, kind = match.groups()
        name = f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
    number_format = tensor.tensor_type.name
    dtype = number_format if number_format in KEPT_FORMATS else "F32"
    return TensorSpec(name, dtype, tuple(int(size) for size in reversed(tensor.shape)))


def _read(tensor: gguf.ReaderTensor, spec: TensorSpec) -> npt.NDArray[Any]:
    """Return the tensor in its spec's shape. BF16, which numpy lacks, comes as uint16."""
    if tensor.tensor_type.name == "BF16":
        return np.asarray(tensor.data.view(np.uint16).reshape(spec.shape))
    if tensor.tensor_type.name in KEPT_FORMATS:
        return np.asarray(tensor.data.reshape(spec.shape))
    try:
        return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError as error:
        raise PullError(
            f"{tensor.name} has the format {tensor.tensor_type.name}, which cannot be dequantized"
        ) from error


def _undo_permutation(
    array: npt.NDArray[Any], name: str, config: dict[str, Any]
) -> npt.NDArray[Any]:
    """Put the Q and K rows of a Llama GGUF back into Hugging Face's order.

    GGUF pairs neighbouring rows for the rotary embedding, (0, 1), (2, 3), ...; Hugging Face pairs
    a row of a head with the one half a head further.
    """
    if name.endswith("q_proj.weight"):
        num_heads = config["num_attention_heads"]
    elif name.endswith("k_proj.weight"):
        num_heads = config["num_key_value_heads"]
    else:
        return array
    rows, columns = array.shape
    pairs = array.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
