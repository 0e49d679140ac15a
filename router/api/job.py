"""What one generation was asked for, checked: the same for one call and for several.

Owns request ids, and when two requests are the same. Does not know what becomes of it.
"""

from __future__ import annotations

import uuid
from hashlib import blake2b
from typing import NamedTuple

from google.protobuf.message import Message

from mili.router.api.stream_options import StreamOptions
from mili.router.errors import Reason, RequestError
from mili.router.params import Scheduling
from mili.router.quotas import Account
from mili.router.tenants import Tenant
from mili.v1 import inference_pb2 as pb

_MAX_REQUEST_ID_BYTES = 128


class Job(NamedTuple):
    """A checked request. is_kept: it may have several calls, and outlive them."""

    request_id: str
    is_kept: bool
    generation: pb.Generation
    tenant: Tenant
    account: Account
    scheduling: Scheduling
    cache_namespace: bytes
    options: StreamOptions
    whole: bool


def to_request_id(asked: str) -> str:
    """Return the caller's id, or a new one for none; raise RequestError for one that is no id."""
    if not asked:
        return uuid.uuid4().hex
    if len(asked.encode()) > _MAX_REQUEST_ID_BYTES or not asked.isprintable():
        raise RequestError(
            Reason.INVALID_FIELD,
            f"request_id is at most {_MAX_REQUEST_ID_BYTES} printable bytes",
            field="request_id",
        )
    return asked


def digest_of(request: Message) -> bytes:
    """Return what tells a request from every other one, its type included."""
    name = type(request).DESCRIPTOR.full_name.encode()
    return blake2b(request.SerializeToString(deterministic=True), person=name[-16:]).digest()
