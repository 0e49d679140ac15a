"""Names, the place of the cache, folders that appear only complete, and resolve()."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mili.hub.cache import cache_folder, model_path, new_model
from mili.hub.pull import PullError, pull
from mili.hub.resolve import ModelNotFoundError, resolve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder().name == "cache"
    monkeypatch.delenv("MILI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/mili")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/mili")


def test_a_model_appears_only_complete(cache: Path) -> None:
    with new_model("m") as folder:
        assert folder is not None
        (folder / "config.json").write_text("{}")
        assert not model_path("m").exists()
    assert [path.name for path in model_path("m").iterdir()] == ["config.json"]
    with new_model("m") as folder:
        assert folder is None


def test_a_failure_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path | None) -> None:
        assert folder is not None
        (folder / "half").write_text("")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), new_model("m") as folder:
        fail(folder)
    assert [path.name for path in cache.iterdir()] == [".m.lock"]


def test_what_a_killed_pull_left_is_thrown_away(cache: Path) -> None:
    (cache / ".m.partial").mkdir(parents=True)
    (cache / ".m.partial" / "half").write_text("")
    with new_model("m") as folder:
        assert folder is not None
        assert list(folder.iterdir()) == []


def test_a_second_pull_waits_for_the_first() -> None:
    seen: list[Path | None] = []

    def second() -> None:
        with new_model("m") as folder:
            seen.append(folder)

    thread = threading.Thread(target=second)
    with new_model("m"):
        thread.start()
        thread.join(timeout=0.3)
        assert seen == []
    thread.join()
    assert seen == [None]


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file in the way")
    with pytest.raises(PullError, match="cannot be written"), new_model("m"):
        pass


def test_an_existing_folder_wins_over_names(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("m") == cache / "m"
    (tmp_path / "m").mkdir()
    assert resolve("m") == pull("m") == Path("m")


@pytest.mark.parametrize("name", ["smollm2-135m", "Qwen3-0.6B"])
def test_a_short_name_that_was_not_pulled(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"`mili pull {name}`"):
        resolve(name)


def test_a_hub_id_that_was_not_pulled() -> None:
    name = "no-such-organization/no-such-model"
    with pytest.raises(ModelNotFoundError, match=f"`mili pull {name}`"):
        resolve(name)


def test_a_gguf_file_is_no_model_folder() -> None:
    with pytest.raises(ModelNotFoundError, match=r"`mili pull models/x\.gguf`, then call it 'x'"):
        resolve("models/x.gguf")


@pytest.mark.parametrize(
    "name",
    ["", " ", "two words", "../x", "a/../b", "a..b", "/no/such", "a/b/c", "~nobody", "x\0"],
)
def test_invalid_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="not an existing folder"):
        resolve(name)
    with pytest.raises(PullError, match="names no model"):
        pull(name)


def test_an_unknown_short_name() -> None:
    with pytest.raises(PullError, match=r"no built-in model 'gpt-9', only smollm2-135m"):
        pull("gpt-9")


def test_a_second_pull_imports_nothing_heavy(cache: Path) -> None:
    (cache / "smollm2-135m").mkdir(parents=True)
    code = """
import sys
from mili.hub.pull import pull
print(pull("smollm2-135m"))
heavy = {"torch", "gguf", "numpy", "tokenizers", "huggingface_hub", "transformers"}
print(heavy & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [str(cache / "smollm2-135m"), "set()"]
