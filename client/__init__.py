"""Call MILI from Python: `Client`, and `AsyncClient` for asyncio.

with Client("localhost:50051") as client:
    for text in client.stream("Once upon a time"):
        print(text, end="", flush=True)
"""

from mili.client.aio import AsyncClient
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
from mili.client.options import Message, Options, StreamOptions, Tool, ToolCall
from mili.client.results import (
    Embeddings,
    Generation,
    Score,
    Scores,
    Sequence,
    Timing,
    TokenLogprob,
    Usage,
)
from mili.client.streams import AsyncTextStream, TextStream
from mili.client.sync import Client

__all__ = [
    "AsyncClient",
    "AsyncTextStream",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Embeddings",
    "Generation",
    "InvalidRequest",
    "Message",
    "MiliError",
    "NotAllowed",
    "NotFound",
    "Options",
    "Overloaded",
    "Score",
    "Scores",
    "Sequence",
    "ServerError",
    "StreamOptions",
    "TextStream",
    "Timing",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "Unavailable",
    "Usage",
]
