"""Generate the committed Python code of every .proto, with the pinned grpcio-tools.

`python protos/generate.py [target folder]`; the default target is this folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent


def generate(target: Path) -> None:
    """Write *_pb2.py, *_pb2_grpc.py and their .pyi stubs below `target`; raise on failure."""
    well_known = Path(protoc.__file__).parent / "_proto"
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    public = [source for source in sources if source.startswith("mili/v1/")]
    plugins = Path(sys.executable).parent
    include = [
        f"-I{PROTOS}",
        f"-I{well_known}",
        *(f"--plugin={plugins / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
    ]
    messages = [f"--python_out={target}", f"--mypy_out=quiet:{target}"]
    services = [f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}"]
    for outputs, names in ((messages, sources), (services, public)):
        if protoc.main(["protoc", *include, *outputs, *names]) != 0:
            raise SystemExit("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS)
