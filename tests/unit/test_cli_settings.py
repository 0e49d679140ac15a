"""Where a setting comes from, what a bad one is told, and how flags are made from the models."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer.main

from mili.cli.errors import CommandError
from mili.cli.main import app, main
from mili.cli.options import WITHOUT_FLAG
from mili.cli.serve_config import DECIDED_BY_SERVE, ServeConfig
from mili.cli.settings import Given, load, to_environment, validated, variable
from mili.router.config import RouterConfig
from mili.worker.config import WorkerConfig


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServeConfig.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mili.toml"
    path.write_text('port = 1001\nhost = "file-host"\nadmin_port = 1002\nworkers = 2\n')
    return path


def printed_origins(output: str) -> dict[str, tuple[str, ...]]:
    rows = (line.split(maxsplit=2) for line in output.splitlines())
    return {row[0]: tuple(row[1:]) for row in rows}


def test_flag_beats_environment_beats_file_beats_default(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILI_PORT", "2001")
    monkeypatch.setenv("MILI_HOST", "env-host")
    arguments = ["router", "m", "--port", "3001", "--config", str(file), "--print-config"]
    assert main(arguments) == 0
    rows = printed_origins(capsys.readouterr().out)
    assert rows["model"] == ("m", "argument MODEL")
    assert rows["port"] == ("3001", "flag --port")
    assert rows["host"] == ("env-host", "environment MILI_HOST")
    assert rows["admin_port"] == ("1002", f"file {file}")
    assert rows["worker_timeout"] == ("1.0", "default")


def test_a_flag_with_the_default_value_is_still_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILI_PORT", "2001")
    main(["router", "--port", "50051", "--print-config"])
    rows = printed_origins(capsys.readouterr().out)
    assert rows["port"] == ("50051", "flag --port")
    assert rows["model"] == ("not", "set")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILI_PORT", "")
    settings = load(RouterConfig, {"model": Given("m", "argument MODEL")}, None)
    assert settings.config.port == 50051
    assert "port" not in settings.origins


def test_lists_come_from_repeated_flags_commas_and_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.toml"
    path.write_text('served_model_name = ["a", "b"]\n')
    model = {"model": Given("m", "")}
    assert load(RouterConfig, model, path).config.served_model_name == ("a", "b")
    monkeypatch.setenv("MILI_SERVED_MODEL_NAME", "c, d")
    assert load(RouterConfig, model, path).config.served_model_name == ("c", "d")
    main(["router", "--served-model-name", "e", "--served-model-name", "f", "--print-config"])
    assert printed_origins(capsys.readouterr().out)["served_model_name"][0] == "e,f"


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (
            ["router", "m", "--port", "99999"],
            {},
            "port = 99999 (from flag --port): must be an integer from 0 to 65535",
        ),
        (
            ["worker", "m"],
            {"MILI_DTYPE": "int4"},
            "dtype = int4 (from environment MILI_DTYPE): must be auto, float32, bfloat16 or",
        ),
        (
            ["router", "m"],
            {"MILI_WORKER_TIMEOUT": "nan"},
            "worker_timeout = nan (from environment MILI_WORKER_TIMEOUT): must be a number",
        ),
        (["serve"], {}, "model is not set: give MODEL, or MILI_MODEL, or model in a file"),
        (
            ["serve", "m", "--port", "7", "--admin-port", "7"],
            {},
            "port and admin_port are both 7 on 127.0.0.1: they must differ",
        ),
        (["router", "m", "--portt", "1"], {}, "No such option: --portt"),
        (["serve", "no-such-model"], {}, "`mili pull no-such-model`"),
        (["generate", "--raw", "--system", "x", "hi"], {}, "--system is a part of the chat"),
        (["generate", "hi", "--seed", "-1"], {}, "Invalid value for '--seed'"),
        (["generate", " "], {}, "the prompt is empty"),
        (["generate", "\udcff"], {}, "the prompt is not UTF-8"),
        (["generate", "hi", "--address", ""], {}, "the address is empty"),
        (
            ["router", "m"],
            {"MILI_DRAIN_TIMEOUT": "inf"},
            "drain_timeout = inf (from environment MILI_DRAIN_TIMEOUT): must be a number at least",
        ),
        (["router", "m", "--served-model-name", "a,b"], {}, "served_model_name 'a,b'"),
        (["router", "m", "--config", "/nowhere.toml"], {}, "/nowhere.toml: No such file"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    arguments: list[str],
    environment: dict[str, str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MILI_CACHE", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("mili: ")
    assert error.count("\n") == 1
    assert line in error


def test_an_unknown_key_in_the_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("prot = 1\n")
    with pytest.raises(CommandError, match=r"unknown setting prot in .*s\.toml; did you mean port"):
        load(RouterConfig, {}, path)


def test_true_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("port = true\n")
    with pytest.raises(CommandError, match=r"port = true .*: must be an integer from 0 to 65535"):
        load(RouterConfig, {"model": Given("m", "")}, path)


def test_one_file_serves_every_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "router", "worker"):
        assert main([command, "m", "--config", str(file), "--print-config"]) == 0
        rows = printed_origins(capsys.readouterr().out)
        assert ("workers" in rows) == (command == "serve")
        assert ("port" in rows) == (command != "worker")


@pytest.mark.parametrize("model", [RouterConfig, WorkerConfig])
def test_a_childs_environment_gives_the_same_config(
    model: type[RouterConfig | WorkerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {
        "model": "m",
        "served_model_name": "a,b",
        "worker_keys": "/keys",
        "insecure_worker_link": "true",
        "drain_timeout": "0.5",
        "log_format": "json",
        "num_threads": "3",
    }
    given = {name: Given(v, "") for name, v in changed.items() if name in model.model_fields}
    config = validated(model, given)
    for name, value in to_environment(config).items():
        monkeypatch.setenv(name, value)
    assert load(model, {}, None).config == config


def test_there_are_fewer_than_40_flags() -> None:
    commands = vars(typer.main.get_command(app))["commands"].values()
    flags = {
        option
        for command in commands
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("-")
    }
    assert "--max-num-seqs" in flags
    assert len(flags | {"--help"}) < 40, sorted(flags)


def test_every_setting_has_a_flag_or_is_listed_as_without() -> None:
    assert ServeConfig.model_fields.keys() >= WITHOUT_FLAG | DECIDED_BY_SERVE
    commands = vars(typer.main.get_command(app))["commands"]
    for name, model in (("router", RouterConfig), ("worker", WorkerConfig)):
        options = {option for p in commands[name].params for option in p.opts}
        for field in model.model_fields.keys() - WITHOUT_FLAG - {"model"}:
            assert "--" + field.replace("_", "-") in options


@pytest.mark.parametrize(
    "command", ["serve", "router", "worker", "http", "pull", "generate", "chat", "keygen", "replay"]
)
def test_help_describes_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    output = capsys.readouterr().out
    assert f"Usage: mili {command}" in output
    for parameter in vars(typer.main.get_command(app))["commands"][command].params:
        assert parameter.help, parameter.name
