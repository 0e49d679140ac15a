"""ModelService: what is served, under which names and with which limits.

Owns the public description of the model. Does not know how it is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from mili.hub.folder import ModelFolder
from mili.router.api.engine import Engine
from mili.router.api.status import Context, NotFoundError
from mili.router.api.supported import check_supported
from mili.router.chat_template import ChatTemplate
from mili.router.errors import Reason, RequestError
from mili.router.parsers.formats import Formats, read_formats
from mili.router.tokenizer import Tokenizer
from mili.v1 import model_pb2 as pb
from mili.v1 import model_pb2_grpc

_REVISION_DIGITS = 16


@dataclass(frozen=True)
class ServedModel:
    """The one model of this router."""

    folder: ModelFolder
    name: str
    aliases: tuple[str, ...]
    tokenizer_sha256: str
    chat_template_sha256: str
    formats: Formats

    @classmethod
    def read(
        cls,
        folder: ModelFolder,
        names: tuple[str, ...],
        tokenizer: Tokenizer,
        template: ChatTemplate,
    ) -> Self:
        """Describe a folder; without names it is called as the folder is."""
        name, *aliases = names or (folder.path.resolve().name,)
        return cls(
            folder=folder,
            name=name,
            aliases=tuple(aliases),
            tokenizer_sha256=tokenizer.tokenizer_sha256,
            chat_template_sha256=template.sha256,
            formats=read_formats(folder.chat_template, tokenizer),
        )

    def capabilities(self, *, constrained: bool) -> list[str]:
        """What a caller may ask for; constrained: of the workers, structured output too."""
        named = {
            "generate": True,
            "embed": True,
            "score": True,
            "chat": self.folder.chat_template is not None,
            "structured_output": constrained,
            "parse_reasoning": self.formats.reasoning is not None,
            "parse_tool_calls": self.formats.tool_calls is not None,
        }
        return [name for name, has in named.items() if has]

    @property
    def hidden_size(self) -> int:
        """Numbers of a token's hidden state; 0 where config.json does not say."""
        return int(self.folder.config.get("hidden_size", 0))

    def check_name(self, name: str, field: str) -> None:
        """Raise NotFoundError for a name that is not this model's; empty means the only one."""
        if name and name != self.name and name not in self.aliases:
            raise NotFoundError(Reason.MODEL_NOT_FOUND, "model", name, field=field)


def revision(weights_sha256: bytes) -> str:
    """Return what callers see of the weights; empty while no worker serves any."""
    return weights_sha256.hex()[:_REVISION_DIGITS]


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Describes the one model."""

    def __init__(self, engine: Engine, model: ServedModel) -> None:
        self._engine = engine
        self._model = model

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        check_supported(request)
        # One model fits on any page, so no call was ever told of a next one.
        if request.page_token:
            raise RequestError(
                Reason.INVALID_FIELD,
                "page_token is not one that ListModels returned",
                field="page_token",
            )
        return pb.ListModelsResponse(models=[self._describe()])

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse:
        check_supported(request)
        self._model.check_name(request.name, "name")
        return pb.GetModelResponse(model=self._describe())

    def _describe(self) -> pb.Model:
        folder = self._model.folder
        return pb.Model(
            name=self._model.name,
            aliases=self._model.aliases,
            revision=revision(self._engine.weights_sha256),
            architecture=folder.architecture,
            dtype=folder.dtype,
            max_context_tokens=self._engine.context_limit,
            max_output_tokens=self._engine.context_limit - 1,
            vocab_size=folder.vocab_size,
            eos_token_ids=folder.generation.eos_token_ids,
            tokenizer_sha256=self._model.tokenizer_sha256,
            chat_template_sha256=self._model.chat_template_sha256,
            default_generation_config_json=folder.generation.raw_json,
            capabilities=self._model.capabilities(constrained=self._engine.constrains_outputs),
            kv_block_tokens=self._engine.block_size,
        )
