"""The kustomize folders: valid, locked down, true to the settings and ports of the processes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mili.cli.keygen import generate_keys
from mili.router.config import RouterConfig
from mili.router.worker_keys import read_router_keys
from mili.worker.config import WorkerConfig
from tests.external_tool import run_tool

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
# Those that run a router and workers, and the one that makes a model.
SERVING = ("base", "gpu")
FOLDERS = (*SERVING, "model")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


class Manifests:
    """The objects of the kustomize folders together, by kind and name."""

    def __init__(self, text: str) -> None:
        self.objects = [item for item in yaml.safe_load_all(text) if item]

    def get(self, kind: str, name: str) -> Any:  # noqa: ANN401
        wanted = (kind, name)
        (found,) = (o for o in self.objects if (o["kind"], o["metadata"]["name"]) == wanted)
        return found

    def pods(self) -> Iterator[Any]:
        for item in self.objects:
            if item["kind"] in ("Deployment", "Job"):
                yield item["spec"]["template"]

    def pod(self, role: str) -> Any:  # noqa: ANN401
        return self.get("Deployment", f"mili-{role}")["spec"]["template"]

    def container(self, role: str) -> Any:  # noqa: ANN401
        (container,) = self.pod(role)["spec"]["containers"]
        return container

    def settings(self, role: str) -> dict[str, str]:
        """What the container's environment sets, as the command line would read it."""
        container = self.container(role)
        variables: dict[str, str] = {}
        for source in container["envFrom"]:
            variables |= self.get("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container.get("env", ()):
            field = variable["valueFrom"]["resourceFieldRef"]["resource"]
            variables[variable["name"]] = container["resources"]["limits"][field.split(".")[1]]
        assert all(name.startswith("MILI_") for name in variables)
        return {name.removeprefix("MILI_").lower(): value for name, value in variables.items()}


def build(folder: str) -> str:
    return run_tool("kubectl", "kustomize", KUBERNETES / folder)


@pytest.fixture(scope="module", params=SERVING)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return Manifests("---\n".join(build(folder) for folder in (request.param, "model")))


@pytest.mark.parametrize("folder", FOLDERS)
def test_valid(folder: str, tmp_path: Path) -> None:
    built = tmp_path / "built.yaml"
    built.write_text(build(folder))
    run_tool("kubernetes-validate", "--strict", built)


def test_settings_are_real(manifests: Manifests) -> None:
    router = RouterConfig.model_validate(manifests.settings("router"))
    worker = WorkerConfig.model_validate(manifests.settings("worker"))
    assert router.model == worker.model
    (pull,) = manifests.get("Job", "mili-pull-model")["spec"]["template"]["spec"]["containers"]
    assert pull["args"] == ["pull", router.model]
    grace = manifests.pod("router")["spec"]["terminationGracePeriodSeconds"]
    assert router.drain_timeout < grace


def test_services_lead_to_the_router(manifests: Manifests) -> None:
    config = RouterConfig.model_validate(manifests.settings("router"))
    labels = manifests.pod("router")["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in manifests.container("router")["ports"]}
    for name in ("mili-router", "mili-router-link"):
        service = manifests.get("Service", name)["spec"]
        assert service["selector"].items() <= labels.items()
        (port,) = service["ports"]
        assert port["port"] == ports[port["targetPort"]]
    assert ports["grpc"] == config.port
    assert config.worker_link == f"tcp://0.0.0.0:{ports['worker-link']}"
    worker = WorkerConfig.model_validate(manifests.settings("worker"))
    assert worker.router == f"tcp://mili-router-link:{ports['worker-link']}"
    link = manifests.get("Service", "mili-router-link")["spec"]
    assert (link["clusterIP"], link["publishNotReadyAddresses"]) == ("None", True)


@pytest.mark.parametrize(("role", "setting"), [("router", "port"), ("worker", "health_port")])
def test_probes_ask_the_port_that_is_set(manifests: Manifests, role: str, setting: str) -> None:
    port = int(manifests.settings(role)[setting])
    container = manifests.container(role)
    assert container["livenessProbe"]["grpc"] == {"port": port, "service": "liveness"}
    assert container["startupProbe"]["grpc"] == {"port": port, "service": "liveness"}
    assert container["readinessProbe"]["grpc"] == {"port": port, "service": "readiness"}


@pytest.mark.parametrize("role", ["router", "worker"])
def test_metrics_are_on_the_port_that_is_set(manifests: Manifests, role: str) -> None:
    ports = {port["name"]: port["containerPort"] for port in manifests.container(role)["ports"]}
    assert ports["metrics"] == int(manifests.settings(role)["metrics_port"])


def test_network_policies_and_budget_select_pods(manifests: Manifests) -> None:
    for role in ("router", "worker"):
        labels = manifests.pod(role)["metadata"]["labels"].items()
        policy = manifests.get("NetworkPolicy", f"mili-{role}")["spec"]
        assert policy["podSelector"]["matchLabels"].items() <= labels
    budget = manifests.get("PodDisruptionBudget", "mili-worker")["spec"]
    assert budget["selector"]["matchLabels"].items() <= labels
    callers, workers, metrics = manifests.get("NetworkPolicy", "mili-router")["spec"]["ingress"]
    assert callers == {"ports": [{"port": "grpc"}]}
    assert manifests.get("NetworkPolicy", "mili-worker")["spec"]["ingress"] == [metrics]
    assert metrics["ports"] == [{"port": "metrics"}]
    assert workers["from"][0]["podSelector"]["matchLabels"].items() <= labels


def test_pods_are_locked_down(manifests: Manifests) -> None:
    pods = list(manifests.pods())
    assert len(pods) == 3
    for pod in pods:
        spec = pod["spec"]
        assert spec["enableServiceLinks"] is False
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            name, _, tag = container["image"].partition(":")
            assert name in ("mili-router", "mili-worker", "mili-worker-cuda13")
            assert tag == VERSION
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_a_gpu_worker_differs_in_its_gpu_alone() -> None:
    base, gpu = Manifests(build("base")), Manifests(build("gpu"))
    assert gpu.container("router") == base.container("router")
    cpu_settings, gpu_settings = base.settings("worker"), gpu.settings("worker")
    assert gpu_settings.pop("device") == "cuda"
    # A default that fits the container: all that the GPU has left.
    del cpu_settings["kv_cache_memory_bytes"]
    del cpu_settings["num_threads"], gpu_settings["num_threads"]
    assert gpu_settings == cpu_settings
    container = gpu.container("worker")
    assert container["image"].startswith("mili-worker-cuda13:")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    # Where all GPUs are in use, a pod more than there were would wait for ever.
    update = gpu.get("Deployment", "mili-worker")["spec"]["strategy"]["rollingUpdate"]
    assert update == {"maxSurge": 0, "maxUnavailable": 1}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    cache = mounts[cupy_cache_folder()]
    assert not cache.get("readOnly")
    assert {"name": cache["name"], "emptyDir": {}} in gpu.pod("worker")["spec"]["volumes"]


def cupy_cache_folder() -> str:
    """Where the image keeps compiled kernels."""
    (folder,) = re.findall(r"CUPY_CACHE_DIR=(\S+)", (ROOT / "Dockerfile.worker").read_text())
    return str(folder)


def test_no_secret_is_committed(manifests: Manifests) -> None:
    assert "Secret" not in {item["kind"] for item in manifests.objects}


def test_mounted_keys_are_what_keygen_makes(manifests: Manifests, tmp_path: Path) -> None:
    made = tmp_path / "made"
    generate_keys(made)
    guide = (ROOT / "deploy/README.md").read_text()
    for role in ("router", "worker"):
        (secret,) = (v["secret"] for v in manifests.pod(role)["spec"]["volumes"] if "secret" in v)
        assert f"secret generic {secret['secretName']}" in guide
        for item in secret["items"]:
            assert f"--from-file=keys/{item['path']}" in guide
            assert Path(item["path"]).name == item["key"]
            mounted = tmp_path / role / item["path"]
            mounted.parent.mkdir(parents=True, exist_ok=True)
            mounted.write_bytes((made / item["path"]).read_bytes())
            mounted.chmod(secret["defaultMode"])
    keys = read_router_keys(tmp_path / "router")
    assert (tmp_path / "worker/router.pub").read_bytes().strip() == keys.public
