"""Reading, checking and hashing model folders, new style and old."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mili.hub.folder import (
    ModelFolderError,
    interface_sha256,
    random_weights_sha256,
    read_model_folder,
    weights_sha256,
)

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 300,
    "max_position_embeddings": 4096,
    "eos_token_id": 7,
    "dtype": "bfloat16",
}


def safetensors(shape: list[int], begin: int, end: int) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps({"a": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(end)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", CONFIG)
    write_json(tmp_path / "tokenizer.json", {})
    save_file({"a": np.zeros(5, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def shard(folder: Path) -> None:
    """Replace the single file of the folder by two and an index."""
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, tensor in ((1, "a"), (2, "b")):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file({tensor: np.zeros(5, np.float32)}, folder / name)
        weight_map[tensor] = name
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def test_a_minimal_folder(folder: Path) -> None:
    model = read_model_folder(folder)
    assert model.config == CONFIG
    assert (model.architecture, model.model_type) == ("Qwen3ForCausalLM", "qwen3")
    assert (model.vocab_size, model.max_context_tokens, model.dtype) == (300, 4096, "bfloat16")
    assert model.generation.eos_token_ids == (7,)
    assert model.generation.temperature is None
    assert model.generation.raw_json == "{}"
    assert model.chat_template is None
    assert model.tokenizer_config == {}
    assert model.tokenizer_path == folder / "tokenizer.json"
    assert model.weight_files == (folder / "model.safetensors",)


def test_a_folder_of_transformers_5(folder: Path) -> None:
    raw = '{"eos_token_id": [2, 3], "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0,'
    raw += ' "repetition_penalty": 1.1, "do_sample": true}'
    (folder / "generation_config.json").write_text(raw)
    (folder / "chat_template.jinja").write_text("{{ new }}")
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ old }}", "bos_token": "<s>"})
    model = read_model_folder(folder)
    assert model.chat_template == "{{ new }}"
    assert model.tokenizer_config["bos_token"] == "<s>"
    generation = model.generation
    assert generation.eos_token_ids == (2, 3)
    assert (generation.temperature, generation.top_p, generation.min_p) == (0.6, 0.95, 0)
    assert (generation.top_k, generation.repetition_penalty) == (20, 1.1)
    assert generation.do_sample is True
    assert generation.raw_json == raw


def test_an_older_folder(folder: Path) -> None:
    old = {key: value for key, value in CONFIG.items() if key != "dtype"}
    write_json(folder / "config.json", old | {"torch_dtype": "float16"})
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ old }}"})
    model = read_model_folder(folder)
    assert (model.dtype, model.chat_template) == ("float16", "{{ old }}")


@pytest.mark.parametrize(("name", "expected"), [("default", "{{ it }}"), ("tool_use", None)])
def test_named_templates(folder: Path, name: str, expected: str | None) -> None:
    templates = [{"name": "rag", "template": "no"}, {"name": name, "template": "{{ it }}"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": templates})
    assert read_model_folder(folder).chat_template == expected


def test_an_indexed_folder(folder: Path) -> None:
    shard(folder)
    save_file({"c": np.zeros(5, np.float32)}, folder / "stray.safetensors")
    names = [path.name for path in read_model_folder(folder).weight_files]
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"model-00002-of-00002\.safetensors is missing"):
        read_model_folder(folder)


def test_a_tensor_that_is_not_where_the_index_says_is_named(folder: Path) -> None:
    shard(folder)
    save_file({"x": np.zeros(5, np.float32)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelFolderError, match="lacks 'b'"):
        read_model_folder(folder)


@pytest.mark.parametrize("missing", [1, 20, 40])
def test_a_truncated_file_is_an_error_with_both_sizes(folder: Path, missing: int) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-missing])
    with pytest.raises(ModelFolderError) as caught:
        read_model_folder(folder)
    text = str(caught.value)
    assert str(weights) in text
    assert f"{len(whole) - missing} bytes" in text
    header_end = 8 + int.from_bytes(whole[:8], "little")
    expected = header_end if len(whole) - missing < header_end else len(whole)
    assert str(expected) in text


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        (b"", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x02\0\0\0\0\0\0\0[]", "unreadable safetensors header"),
        (b"\x02\0\0\0\0\0\0\0{x", "unreadable safetensors header"),
        (b'\x08\0\0\0\0\0\0\0{"a": 1}', "unreadable safetensors header"),
        (safetensors([5], 0, 16), r"has 16 bytes for a, F32 \[5\]"),
        (safetensors([5], -8, 12), r"has 20 bytes for a, F32 \[5\]"),
    ],
)
def test_what_is_not_safetensors(folder: Path, contents: bytes, problem: str) -> None:
    (folder / "model.safetensors").write_bytes(contents)
    with pytest.raises(ModelFolderError, match=problem):
        read_model_folder(folder)


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("config.json", "config.json is missing"),
        ("tokenizer.json", "tokenizer.json is missing"),
        ("model.safetensors", r"no \*\.safetensors"),
    ],
)
def test_a_missing_file_is_named(folder: Path, file: str, problem: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ModelFolderError, match=problem):
        read_model_folder(folder)


def test_a_folder_without_weights_is_enough_for_who_needs_none(folder: Path) -> None:
    whole = read_model_folder(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert read_model_folder(folder, weights=False) == replace(whole, weight_files=())
    (folder / "model.safetensors").unlink()
    assert read_model_folder(folder, weights=False) == replace(whole, weight_files=())


def test_random_weights_have_a_name_too() -> None:
    names = {
        random_weights_sha256(CONFIG, "cuda"),
        random_weights_sha256(CONFIG, "cpu"),
        random_weights_sha256(CONFIG, "cpu", seed=1),
        random_weights_sha256(CONFIG | {"vocab_size": 301}, "cpu"),
    }
    assert len(names) == 4
    assert {len(name) for name in names} == {32}
    assert random_weights_sha256(dict(CONFIG), "cpu", seed=0) in names


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="not a folder"):
        read_model_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "contents", "problem"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "JSON object, not a list"),
        ("config.json", '{"architectures": []}', "'architectures'"),
        ("config.json", json.dumps(CONFIG | {"vocab_size": 0}), "'vocab_size'.* not 0"),
        ("config.json", json.dumps(CONFIG | {"max_position_embeddings": None}), "not None"),
        ("generation_config.json", '{"temperature": "hot"}', "'temperature'.* 'hot'"),
        ("generation_config.json", '{"eos_token_id": ["x"]}', "'eos_token_id'"),
        ("tokenizer_config.json", '{"chat_template": 3}', "'chat_template'"),
        ("model.safetensors.index.json", "{}", "'weight_map'"),
    ],
)
def test_a_bad_file_is_named(folder: Path, file: str, contents: str, problem: str) -> None:
    (folder / file).write_text(contents)
    with pytest.raises(ModelFolderError, match=problem) as caught:
        read_model_folder(folder)
    assert file in str(caught.value)


def test_text_that_is_not_utf8(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff{}")
    with pytest.raises(ModelFolderError, match=r"config\.json cannot be read"):
        read_model_folder(folder)


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("config.json", json.dumps(CONFIG | {"rope_theta": 5})),
        ("tokenizer.json", "{ }"),
        ("tokenizer_config.json", '{"bos_token": "<s>"}'),
        ("chat_template.jinja", "{{ x }}"),
        ("generation_config.json", '{"top_k": 1}'),
    ],
)
def test_the_interface_hash_sees_every_text_file(folder: Path, file: str, contents: str) -> None:
    before = read_model_folder(folder)
    interface, weights = interface_sha256(before), weights_sha256(before)
    assert len(interface) == len(weights) == 32
    assert interface_sha256(read_model_folder(folder)) == interface
    (folder / file).write_text(contents)
    after = read_model_folder(folder)
    assert interface_sha256(after) != interface
    assert weights_sha256(after) == weights


@pytest.mark.parametrize(("position", "seen"), [(0, True), (-1, True), (5, True), (2 << 18, False)])
def test_the_weights_hash_sees_both_ends(folder: Path, position: int, seen: bool) -> None:
    values = np.zeros(1 << 20, np.float32)  # 4 MiB
    save_file({"a": values}, folder / "model.safetensors")
    before = weights_sha256(read_model_folder(folder))
    values[position] = 1
    save_file({"a": values}, folder / "model.safetensors")
    assert (weights_sha256(read_model_folder(folder)) != before) is seen


def test_the_weights_hash_sees_names(folder: Path) -> None:
    before = weights_sha256(read_model_folder(folder))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    renamed_file = weights_sha256(read_model_folder(folder))
    save_file({"b": np.zeros(5, np.float32)}, folder / "other.safetensors")
    renamed_tensor = weights_sha256(read_model_folder(folder))
    assert len({before, renamed_file, renamed_tensor}) == 3


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("tokenizer_config.json", '{"chat_template": [null]}', "'chat_template' is no text"),
        ("tokenizer_config.json", "[" * 100_000, "is not valid JSON"),
        ("generation_config.json", '{"top_k": 1e999}', "'top_k' must be finite"),
        ("generation_config.json", '{"temperature": NaN}', "'temperature' must be finite"),
    ],
)
def test_what_only_looks_like_json_is_named(
    folder: Path, name: str, text: str, problem: str
) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ModelFolderError, match=rf"{name}.* ?{problem}"):
        read_model_folder(folder)
