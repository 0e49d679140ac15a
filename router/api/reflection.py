"""Server reflection: a client without our .proto files can ask for them.

Owns which files are shown. Does not know what the services do.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from mili.router.api import health


def add_reflection(server: aio.Server, files: Sequence[FileDescriptor]) -> None:
    """Show the services of `files`, health and reflection itself.

    The pool is our own, because the health.proto that is served has a method more than the
    one in the default pool.
    """
    pool = DescriptorPool()
    pool.Add(health.health_file())
    known = {health_pb2.DESCRIPTOR.name}
    for file in files:
        _add(pool, file, known)
    _add(pool, reflection_pb2.DESCRIPTOR, known)  # type: ignore[arg-type]  # two names of one type
    names = [service.full_name for file in files for service in file.services_by_name.values()]
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server, pool=pool
    )


def _add(pool: DescriptorPool, file: FileDescriptor, known: set[str]) -> None:
    """Add a file after the files that it imports."""
    if file.name in known:
        return
    known.add(file.name)
    for imported in file.dependencies:
        _add(pool, imported, known)
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    pool.Add(proto)
