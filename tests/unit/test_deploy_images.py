"""Dockerfiles and the Compose file: every path, name and setting in them is real."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mili.router.config import RouterConfig
from mili.worker.config import WorkerConfig
from tests.external_tool import run_tool

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIGS = {"router": RouterConfig, "worker": WorkerConfig}
# hub/cache.py reads it; it is no setting of a process.
NO_SETTING = {"MILI_CACHE"}


def instructions(role: str) -> list[tuple[str, str]]:
    """The Dockerfile's lines, continued ones joined, as (instruction, arguments)."""
    text = (ROOT / f"Dockerfile.{role}").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]  # type: ignore[misc]


def environment(role: str) -> dict[str, str]:
    (pairs,) = (arguments for name, arguments in instructions(role) if name == "ENV")
    return dict(pair.split("=", 1) for pair in pairs.split())


def settings(variables: Mapping[str, str]) -> dict[str, str]:
    names = {name for name in variables if name.startswith("MILI_")} - NO_SETTING
    return {name.removeprefix("MILI_").lower(): variables[name] for name in names}


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def compose(request: pytest.FixtureRequest) -> Any:  # noqa: ANN401
    names = ["compose.yaml", *(["compose.gpu.yaml"] if request.param == "gpu" else [])]
    files = [yaml.safe_load((ROOT / "deploy" / name).read_text()) for name in names]
    return functools.reduce(merge, files)


def merge(base: Any, override: Any) -> Any:  # noqa: ANN401
    """What Compose makes of two files."""
    if isinstance(base, dict) and isinstance(override, dict):
        both = {key: merge(base[key], override[key]) for key in base.keys() & override.keys()}
        return base | override | both
    if isinstance(base, list) and isinstance(override, list):
        return base + override
    return override


@pytest.mark.parametrize("role", CONFIGS)
def test_dockerfile_is_clean(role: str) -> None:
    run_tool("hadolint", ROOT / f"Dockerfile.{role}")


@pytest.mark.parametrize("role", CONFIGS)
def test_copied_files_exist_and_reach_the_builder(role: str) -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    sources = set()
    for name, arguments in instructions(role):
        if name == "COPY" and not arguments.startswith("--from="):
            sources |= set(arguments.split()[:-1])
    assert sources == kept
    assert [source for source in sources if not (ROOT / source).exists()] == []
    rooms = {folder.split("/")[0] for folder in _package_folders()}
    assert rooms <= sources


def _package_folders() -> list[str]:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return list(tool["package-dir"].values())


@pytest.mark.parametrize("role", CONFIGS)
def test_image(role: str) -> None:
    lines = instructions(role)
    last = dict(lines)
    bases = {arguments.split()[0] for name, arguments in lines if name == "FROM"}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.12\.\d+-slim-\w+", bases.pop())
    assert last["USER"] == "10001:10001"
    assert (last["ENTRYPOINT"], last["CMD"]) == ('["mili"]', f'["{role}"]')
    assert environment(role)["PYTHONSAFEPATH"] == "1"
    CONFIGS[role].model_validate({"model": "m", **settings(environment(role))})
    ports = {value.rpartition(":")[2] for name, value in environment(role).items()}
    assert set(last["EXPOSE"].split()) <= ports


def test_worker_image_takes_the_same_torch() -> None:
    (wanted,) = (r for r in PROJECT["optional-dependencies"]["worker"] if r.startswith("torch>"))
    runs = [arguments for name, arguments in instructions("worker") if name == "RUN"]
    assert any(f"'{wanted}'" in arguments for arguments in runs)
    assert ("ARG", "EXTRAS=worker") in instructions("worker")


@pytest.mark.parametrize("role", CONFIGS)
def test_compose_settings_are_real(role: str, compose: Any) -> None:  # noqa: ANN401
    given = {**environment(role), **compose["services"][role]["environment"]}
    config = CONFIGS[role].model_validate(settings(given))
    assert config.model == "${MILI_MODEL:-smollm2-135m}"


def test_compose_refers_to_what_exists(compose: Any) -> None:  # noqa: ANN401
    services = compose["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= services.keys()
        for volume in service["volumes"]:
            assert volume.split(":")[0] in compose["volumes"]
        build = service["build"]
        dockerfile = (ROOT / "deploy" / build["context"] / build["dockerfile"]).resolve()
        assert dockerfile.parent == ROOT
        role = dockerfile.suffix.removeprefix(".")
        build_args = build.get("args", {})
        name = f"mili-{role}" + ("-cuda13" if "EXTRAS" in build_args else "")
        assert service["image"] == f"{name}:{PROJECT['version']}"
        arguments = {text.split("=")[0] for name, text in instructions(role) if name == "ARG"}
        assert set(build_args) <= arguments
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
    link = services["worker"]["environment"]["MILI_ROUTER"]
    assert link == environment("router")["MILI_WORKER_LINK"].replace("0.0.0.0", "router")
    drain = float(services["router"]["environment"]["MILI_DRAIN_TIMEOUT"])
    assert drain < float(services["router"]["stop_grace_period"].removesuffix("s"))


def test_compose_gives_a_gpu_to_what_needs_one() -> None:
    override = yaml.safe_load((ROOT / "deploy/compose.gpu.yaml").read_text())
    model, worker = override["services"]["model"], override["services"]["worker"]
    assert model["build"] == worker["build"]
    assert model["image"] == worker["image"]
    extras = worker["build"]["args"]["EXTRAS"].split(",")
    assert set(extras) == {"worker", "cuda13"} <= PROJECT["optional-dependencies"].keys()
    config = WorkerConfig.model_validate({"model": "m", **settings(worker["environment"])})
    assert config.device == "cuda"
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "deploy" not in model
    (cache,) = worker["volumes"]
    assert cache.split(":")[1] == environment("worker")["CUPY_CACHE_DIR"]


def test_worker_image_asks_for_what_cuda_needs() -> None:
    """And for no GPU: that is for whoever starts the container to say."""
    given = environment("worker")
    assert given["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "NVIDIA_VISIBLE_DEVICES" not in given
    (made,) = (text for name, text in instructions("worker") if "install --directory" in text)
    assert given["CUPY_CACHE_DIR"] in made.split()


@pytest.fixture
def health_port() -> Iterator[tuple[health.HealthServicer, int]]:
    with ThreadPoolExecutor(2) as threads:
        servicer, server = health.HealthServicer(), grpc.server(threads)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield servicer, port
        server.stop(None).wait()


def test_healthcheck(health_port: tuple[health.HealthServicer, int]) -> None:
    servicer, port = health_port

    def check(port: int) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, ROOT / "deploy/healthcheck.py", "MILI_PORT"],
            env={"MILI_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.returncode, done.stderr.strip()

    servicer.set("readiness", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert check(port) == (1, "not ready")
    servicer.set("readiness", health_pb2.HealthCheckResponse.SERVING)
    assert check(port) == (0, "")
    assert check(1) == (1, "no answer: UNAVAILABLE")


@pytest.mark.parametrize("role", CONFIGS)
def test_healthcheck_asks_the_port_that_is_set(role: str) -> None:
    check = dict(instructions(role))["HEALTHCHECK"]
    (variable,) = re.findall(r'"(MILI_\w+)"', check)
    assert variable in environment(role)
    (port,) = settings({variable: environment(role)[variable]})
    assert port in CONFIGS[role].model_fields


def test_router_needs_no_torch() -> None:
    """What `pip install '.[router]'` brings, all the way down."""
    found: set[str] = set()
    waiting = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["router"]]
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not wanted or name in found:
            continue
        found.add(name)
        assert not requirement.extras, f"{requirement}: follow its extras here"
        waiting += metadata.requires(name) or []
    assert {"grpcio", "tokenizers", "pyzmq", "jinja2"} <= found
    heavy = {"torch", "transformers", "numpy", "gguf", "safetensors"}
    assert {name for name in found if name in heavy or name.startswith("cupy")} == set()


def test_prometheus_scrapes_the_ports_that_are_set() -> None:
    override = yaml.safe_load((ROOT / "deploy/compose.metrics.yaml").read_text())
    scraping = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    router, worker = scraping["scrape_configs"]
    port = {
        role: override["services"][role]["environment"]["MILI_METRICS_PORT"] for role in CONFIGS
    }
    assert router["static_configs"] == [{"targets": [f"router:{port['router']}"]}]
    assert str(worker["dns_sd_configs"][0]["port"]) == port["worker"]
    assert worker["dns_sd_configs"][0]["names"] == ["worker"]
    for file in scraping["rule_files"]:
        assert (ROOT / "deploy/prometheus" / file).exists()


def test_grafana_finds_its_dashboard_and_the_dashboard_its_prometheus() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.metrics.yaml").read_text())
    grafana = compose["services"]["grafana"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in grafana["volumes"])
    inside = {there: ROOT / "deploy" / here for here, there in mounts.items()}
    provisioning = inside["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert compose["services"][host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/mili.yml").read_text())["providers"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    dashboard = json.loads((inside[str(home.parent)] / home.name).read_text())
    drawn = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    targets = [target for panel in drawn for target in panel["targets"]]
    assert len(targets) > len(drawn) > 10
    assert {target["datasource"]["uid"] for target in targets} == {source["uid"]}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
