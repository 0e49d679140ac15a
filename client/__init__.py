"""Call MILI from Python: `Client`, and `AsyncClient` for asyncio.

with Client("localhost:50051") as client:
    for text in client.stream("Once upon a time"):
        print(text, end="", flush=True)
"""

from mili.client.aio import AsyncClient, AsyncTextStream
from mili.client.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    MiliError,
    NotAllowed,
    NotFound,
    Overloaded,
    ServerError,
    Unavailable,
)
from mili.client.requests import Message, Options
from mili.client.results import Generation, Timing, Usage
from mili.client.sync import Client, TextStream

__all__ = [
    "AsyncClient",
    "AsyncTextStream",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Generation",
    "InvalidRequest",
    "Message",
    "MiliError",
    "NotAllowed",
    "NotFound",
    "Options",
    "Overloaded",
    "ServerError",
    "TextStream",
    "Timing",
    "Unavailable",
    "Usage",
]
