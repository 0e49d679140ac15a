"""EmbeddingService: not served yet, and says so.

Owns nothing.
"""

from __future__ import annotations

from mili.router.api.status import Context, unsupported_method
from mili.v1 import embedding_pb2 as pb
from mili.v1 import embedding_pb2_grpc


class EmbeddingService(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Refuses every call."""

    async def Embed(  # noqa: N802
        self, request: pb.EmbedRequest, context: Context
    ) -> pb.EmbedResponse:
        raise unsupported_method("EmbeddingService.Embed")

    async def Score(  # noqa: N802
        self, request: pb.ScoreRequest, context: Context
    ) -> pb.ScoreResponse:
        raise unsupported_method("EmbeddingService.Score")
