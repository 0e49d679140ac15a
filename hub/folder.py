"""A model folder in Hugging Face's layout: read once, checked, never changed.

Owns the names of the files and what must be in them, for transformers 5 folders and older ones.
Does not know which architectures MILI runs, reads no tensor, and never touches the network.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mili.hub.errors import ModelFolderError as ModelFolderError
from mili.hub.hashing import interface_sha256 as interface_sha256
from mili.hub.hashing import random_weights_sha256 as random_weights_sha256
from mili.hub.hashing import weights_sha256 as weights_sha256
from mili.hub.safetensors_file import read_header

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the model's authors recommend; None where they say nothing.

    raw_json: generation_config.json as it is, "{}" without one.
    """

    eos_token_ids: tuple[int, ...]
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    do_sample: bool | None
    raw_json: str


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """config, tokenizer_config: the raw contents of config.json and tokenizer_config.json.

    architecture: the first of config["architectures"]. dtype: of the weights, as in "bfloat16".
    chat_template: Jinja source, None if the model has none. weight_files: all of them, checked;
    none where the folder was read without them.
    """

    path: Path
    config: dict[str, Any]
    architecture: str
    model_type: str
    vocab_size: int
    max_context_tokens: int
    dtype: str
    generation: GenerationDefaults
    chat_template: str | None
    tokenizer_config: dict[str, Any]
    tokenizer_path: Path
    weight_files: tuple[Path, ...]


def read_model_folder(path: Path, *, weights: bool = True) -> ModelFolder:
    """Read and check a model folder. Raises ModelFolderError.

    weights: whether the weight files must be there; without, nobody looks for them.
    """
    if not path.is_dir():
        raise ModelFolderError(f"{path} is not a folder: give the folder that holds config.json")
    config_path = path / "config.json"
    config = _read_json(config_path)
    tokenizer_path = path / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise ModelFolderError(
            f"{tokenizer_path} is missing: MILI needs the fast tokenizer; "
            "save it with transformers' AutoTokenizer, or pull the model again"
        )
    tokenizer_config = _read_json(path / "tokenizer_config.json", missing="{}")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ModelFolderError(f"{config_path} names no architecture under 'architectures'")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return ModelFolder(
        path=path,
        config=config,
        architecture=str(architectures[0]),
        model_type=str(config.get("model_type", "")),
        vocab_size=_positive_integer(config, "vocab_size", config_path),
        max_context_tokens=_positive_integer(config, "max_position_embeddings", config_path),
        dtype=str(dtype).removeprefix("torch."),
        generation=_read_generation(path, config),
        chat_template=_read_chat_template(path, tokenizer_config),
        tokenizer_config=tokenizer_config,
        tokenizer_path=tokenizer_path,
        weight_files=_find_weight_files(path) if weights else (),
    )


def _read_text(path: Path, missing: str | None = None) -> str:
    """Return the text of a file; `missing`, if given, in place of a file that is not there."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise ModelFolderError(
            f"{path} is missing: is this a model folder? If it was pulled, pull it again"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path, missing: str | None = None) -> dict[str, Any]:
    return _parse_json(path, _read_text(path, missing))


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    # A ValueError is one of syntax, or of an integer too long to be read.
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not valid JSON ({error}): repair it or pull") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _positive_integer(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelFolderError(f"{path}: {key!r} must be a positive integer, not {value!r}")
    return value


def _read_generation(path: Path, config: dict[str, Any]) -> GenerationDefaults:
    generation_path = path / "generation_config.json"
    raw_json = _read_text(generation_path, missing="{}")
    values = _parse_json(generation_path, raw_json)

    def number(key: str) -> float | None:
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ModelFolderError(f"{generation_path}: {key!r} must be a number, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelFolderError(f"{generation_path}: {key!r} must be finite, not {value!r}")
        return value

    top_k = number("top_k")
    eos = values.get("eos_token_id", config.get("eos_token_id"))
    eos_token_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token_id, int) for token_id in eos_token_ids):
        raise ModelFolderError(f"{generation_path}: 'eos_token_id' must be integers, not {eos!r}")
    return GenerationDefaults(
        eos_token_ids=tuple(eos_token_ids),
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
        presence_penalty=number("presence_penalty"),
        frequency_penalty=number("frequency_penalty"),
        do_sample=values.get("do_sample"),
        raw_json=raw_json,
    )


def _read_chat_template(path: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """Return chat_template.jinja, else the (default) template of tokenizer_config.json."""
    text = _read_text(path / "chat_template.jinja", missing="")
    if text:
        return text
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelFolderError(f"{path / 'tokenizer_config.json'}: 'chat_template' is no text")
    return template


def _find_weight_files(path: Path) -> tuple[Path, ...]:
    """Return the safetensors files, each as long as its header says, none missing."""
    index_path = path / INDEX_NAME
    if index_path.exists():
        return _indexed_weight_files(index_path)
    single = path / "model.safetensors"
    files = (single,) if single.exists() else tuple(sorted(path.glob("*.safetensors")))
    if not files:
        raise ModelFolderError(
            f"{path} has no *.safetensors: pull the model again, or convert its weights"
        )
    for file in files:
        read_header(file)
    return files


def _indexed_weight_files(index_path: Path) -> tuple[Path, ...]:
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{index_path} has no 'weight_map': pull the model again")
    names_in: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        names_in.setdefault(str(file_name), []).append(name)
    files = []
    for file_name, names in sorted(names_in.items()):
        file = index_path.parent / file_name
        if not file.is_file():
            raise ModelFolderError(
                f"{file} is missing, though {INDEX_NAME} lists it: pull the model again"
            )
        present = read_header(file).tensors
        for name in names:
            if name not in present:
                raise ModelFolderError(f"{file} lacks {name!r}, which {INDEX_NAME} puts there")
        files.append(file)
    return tuple(files)
