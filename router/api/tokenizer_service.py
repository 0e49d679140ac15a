"""TokenizerService: text tools on the CPU; they never wait for a worker.

Owns the limits of these calls. Does not know sampling or streams.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

from google.protobuf.message import Message

from mili.router.api.model import ServedModel
from mili.router.api.prompt import PromptReader, TextThreads, check_bytes
from mili.router.api.sampling import check_token_ids
from mili.router.api.status import Context
from mili.router.api.supported import check_supported
from mili.router.errors import Reason, RequestError
from mili.router.tokenizer import TokenizedText, Tokenizer, pieces
from mili.v1 import model_pb2 as pb
from mili.v1 import model_pb2_grpc

_MAX_TEXTS = 8192
# At worst every byte is a token: an id takes 3 bytes of the answer, and each of two offsets too.
_MAX_TOKENIZED_BYTES = 4 * 1024 * 1024
_MAX_TOKENIZED_BYTES_WITH_OFFSETS = 1024 * 1024
_MAX_RENDERED_BYTES = 3 * 1024 * 1024
_MAX_DETOKENIZED_IDS = 256 * 1024
_MAX_DETOKENIZED_BYTES = 8 * 1024 * 1024


class TokenizerService(model_pb2_grpc.TokenizerServiceServicer):
    """Encodes, decodes and renders with the one model's tokenizer and template."""

    def __init__(
        self,
        model: ServedModel,
        tokenizer: Tokenizer,
        prompts: PromptReader,
        threads: TextThreads,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._threads = threads

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context
    ) -> Any:  # noqa: ANN401 - the bytes of a TokenizeResponse, which the Guard takes as well
        self._check(request, request.model)
        if len(request.texts) > _MAX_TEXTS:
            raise RequestError(
                Reason.INVALID_FIELD, f"texts has at most {_MAX_TEXTS} entries", field="texts"
            )
        return await self._threads.run(self._tokenize, request)

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        self._check(request, request.model)
        if sum(len(item.ids) for item in request.token_ids) > _MAX_DETOKENIZED_IDS:
            raise RequestError(
                Reason.INVALID_FIELD,
                f"token_ids has at most {_MAX_DETOKENIZED_IDS} ids in all",
                field="token_ids",
            )
        return await self._threads.run(self._detokenize, request)

    async def RenderChat(  # noqa: N802
        self, request: pb.RenderChatRequest, context: Context
    ) -> pb.RenderChatResponse:
        self._check(request, request.model)
        text, ids = await self._threads.run(
            self._prompts.render,
            request.chat,
            "chat",
            _MAX_RENDERED_BYTES,
            too_long=Reason.INVALID_FIELD,
        )
        return pb.RenderChatResponse(text=text, token_ids=ids)

    def _check(self, request: Message, model: str) -> None:
        check_supported(request)
        self._model.check_name(model, "model")

    def _tokenize(self, request: pb.TokenizeRequest) -> bytes:
        limit = _MAX_TOKENIZED_BYTES
        if request.return_offsets:
            limit = _MAX_TOKENIZED_BYTES_WITH_OFFSETS
        check_bytes(request.texts, "texts", limit, Reason.INVALID_FIELD)
        special = True
        if request.HasField("add_special_tokens"):
            special = request.add_special_tokens
        if not request.return_offsets:
            batch = self._tokenizer.encode_batch(request.texts, add_special_tokens=special)
            return _response(TokenizedText(ids, (), ()) for ids in batch)
        return _response(
            self._tokenizer.encode_with_offsets(request.texts, add_special_tokens=special)
        )

    def _detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        skip = True
        if request.HasField("skip_special_tokens"):
            skip = request.skip_special_tokens
        texts = []
        for index, item in enumerate(request.token_ids):
            check_token_ids(item.ids, self._tokenizer.vocab_size, f"token_ids[{index}].ids")
            texts.append(self._tokenizer.decode(list(item.ids), skip_special_tokens=skip))
        check_bytes(texts, "token_ids", _MAX_DETOKENIZED_BYTES, Reason.INVALID_FIELD)
        return pb.DetokenizeResponse(texts=texts)


def _response(texts: Iterable[TokenizedText]) -> bytes:
    """Return the bytes of a TokenizeResponse.

    A message of a million numbers takes protobuf 0.1 s to make and to write, in which nothing else
    would run. But a message's bytes may be made in pieces: what reads them puts lists together.
    """
    tag = bytes([pb.TokenizeResponse.RESULTS_FIELD_NUMBER << 3 | 2])
    parts = []
    for text in texts:
        body = [
            pb.TokenizedText(ids=ids, start_bytes=starts, end_bytes=ends).SerializeToString()
            for ids, starts, ends in zip_longest(*map(pieces, text), fillvalue=())
        ]
        parts += [tag, _varint(sum(map(len, body))), *body]
    return b"".join(parts)


def _varint(number: int) -> bytes:
    """Return a length as protobuf writes it: 7 bits a byte, the lowest first."""
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)
