"""The house rules that nobody should have to remember: layering, packaging, generated code."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("protos", "router", "worker", "kernels", "hub", "client", "cli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Which rooms of MILI a room may import; protos are mili.v1 and mili.internal.
MAY_IMPORT = {
    "protos": {"v1", "internal"},
    "kernels": {"kernels"},
    "hub": {"hub"},
    "client": {"client", "v1"},
    "router": {"router", "hub", "v1", "internal"},
    "worker": {"worker", "hub", "kernels", "internal"},
    "cli": {"cli", "router", "worker", "hub", "client", "v1"},
}
# Third-party packages and the only places that may import them, below their room.
ONLY_IN = {
    ("router", "grpc"): ("api/", "main.py"),
    ("worker", "grpc"): ("health.py",),
    ("client", "starlette"): ("http/",),
    ("client", "uvicorn"): ("http/",),
    ("router", "zmq"): ("worker_link.py", "worker_keys.py"),
    ("worker", "zmq"): ("connection.py",),
}
NEVER = {
    "router": {
        "starlette",
        "uvicorn",
        "torch",
        "cupy",
        "transformers",
        "numpy",
        "gguf",
        "safetensors",
    },
    "hub": {"torch", "cupy", "transformers"},
    "client": {"torch", "numpy", "zmq"},
    "worker": {"transformers", "tokenizers"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def sources(room: str) -> list[Path]:
    return [path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    for path in sources(room):
        for module in imports(path):
            if module == "mili" or module.startswith("mili."):
                other = module.split(".")[1] if "." in module else ""
                assert other in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("room", ROOMS)
def test_third_party_packages_stay_where_they_belong(room: str) -> None:
    for path in sources(room):
        below = str(path.relative_to(ROOT / room))
        for module in imports(path):
            package = module.split(".")[0]
            assert package not in NEVER.get(room, ()), f"{room}/{below} imports {package}"
            allowed = ONLY_IN.get((room, package))
            assert allowed is None or below.startswith(allowed), f"{room}/{below} imports {package}"


def test_kernels_is_no_package() -> None:
    """transformers probes a package named kernels: with an __init__.py it would import ours."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_generated_code_is_fresh(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "protos" / "generate.py", tmp_path], check=True)
    generated = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*")}
    committed = {
        path.relative_to(ROOT / "protos") for path in (ROOT / "protos").rglob("*_pb2*.py*")
    }
    assert generated == {path for path in committed if "__pycache__" not in path.parts}
    for path in generated:
        assert (tmp_path / path).read_text() == (ROOT / "protos" / path).read_text(), (
            f"protos/{path} is stale: run make protos"
        )


def test_every_folder_with_code_is_in_the_wheel() -> None:
    """A package missing from the list still imports in editable mode, and is not in the wheel."""
    packages = PROJECT["tool"]["setuptools"]["packages"]
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    listed = {_folder(package, folders) for package in packages}
    present = {
        str(path.parent.relative_to(ROOT))
        for room in ROOMS
        for path in sources(room)
        if path.name != "generate.py"
    }
    assert listed == present


def _folder(package: str, folders: dict[str, str]) -> str:
    name, rest = package, ""
    while name not in folders:
        name, _, last = name.rpartition(".")
        rest = f"/{last}{rest}"
    return folders[name] + rest


def test_the_router_starts_without_torch() -> None:
    """Import all of the router with the heavy packages hidden."""
    code = (
        "import sys, importlib, pkgutil\n"
        "for name in ('torch', 'cupy', 'transformers', 'numpy', 'gguf', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import mili.router, mili.router.api\n"
        "for package in (mili.router, mili.router.api):\n"
        "    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        if not module.name.endswith('__main__'):\n"
        "            importlib.import_module(module.name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
