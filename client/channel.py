"""How a channel to MILI behaves: message sizes, keepalive, retries, who calls.

Knows nothing of what is sent over it.
"""

from __future__ import annotations

import json

MAX_MESSAGE_BYTES = 16 * 2**20

# gRPC retries a call only while no response header has come, which the server holds back until a
# request is admitted; it also waits as long as the server asks for (grpc-retry-pushback-ms).
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}

_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A silent server is noticed in 30 s, also by a call that has waited for its turn all the time.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # What does not fit here is never retried; the default is 256 KiB.
    ("grpc.per_rpc_retry_buffer_size", 2 * MAX_MESSAGE_BYTES),
)

_RETRIES = (("grpc.service_config", json.dumps(_SERVICE_CONFIG)),)
_NO_RETRIES = (("grpc.enable_retries", 0),)

Metadata = tuple[tuple[str, str], ...]


def channel_options(retries: bool) -> tuple[tuple[str, str | int], ...]:
    return _OPTIONS + (_RETRIES if retries else _NO_RETRIES)


def authorization(token: str | None) -> Metadata:
    """Return the headers that tell the server who calls; raise ValueError for no header's text."""
    if token is None:
        return ()
    if not token.isascii() or not token.isprintable() or " " in token or not token:
        raise ValueError("token has other characters than printable ASCII, or none")
    return (("authorization", f"Bearer {token}"),)
