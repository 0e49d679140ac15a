"""A generation while its events arrive.

Owns the folding of a stream's events into one result. Does not know how messages travel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from mili.client.errors import ServerError
from mili.client.options import ToolCall
from mili.client.responses import (
    reason_name,
    to_error,
    to_logprob,
    to_matched,
    to_prompt_logprobs,
    to_timing,
    to_usage,
    whole,
)
from mili.client.results import Generation, Sequence, TokenLogprob, Usage
from mili.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from pydantic import BaseModel


class PartialSequence:
    """One answer while its pieces arrive."""

    def __init__(self) -> None:
        self.finished: pb.Finished | None = None
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        # By position: id, name and the pieces of the arguments.
        self._tool_calls: dict[int, tuple[str, str, list[str]]] = {}

    def push(self, delta: pb.Delta) -> None:
        self._texts.append(delta.text)
        self._reasoning.append(delta.reasoning_text)
        self._token_ids.extend(delta.token_ids)
        self._logprobs.extend(map(to_logprob, delta.logprobs.tokens))
        for piece in delta.tool_calls:
            call_id, name, arguments = self._tool_calls.get(piece.position, ("", "", []))
            arguments.append(piece.arguments_json_fragment)
            self._tool_calls[piece.position] = (piece.id or call_id, piece.name or name, arguments)

    @property
    def sequence(self) -> Sequence:
        """What there is, when it is finished."""
        assert self.finished is not None
        return Sequence(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=reason_name(self.finished.finish_reason),
            matched=to_matched(self.finished),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(
                ToolCall(call_id, name, "".join(arguments))
                for _, (call_id, name, arguments) in sorted(self._tool_calls.items())
            ),
            logprobs=tuple(self._logprobs),
            error=to_error(self.finished),
        )


class PartialGeneration:
    """All answers while their events arrive. response_model: as in Generation."""

    def __init__(self, response_model: type[BaseModel] | None = None) -> None:
        self._response_model = response_model
        self._started = pb.Started()
        self._sequences: dict[int, PartialSequence] = {}
        self._prompt_logprobs: list[TokenLogprob] = []
        self._last: pb.Finished | None = None
        self._ended = False

    def push(self, event: pb.StreamEvent) -> None:
        """Take the next event."""
        match event.WhichOneof("event"):
            case "started":
                self._started = event.started
            case "delta":
                self._sequence(event.delta.index).push(event.delta)
            case "prompt_logprobs":
                self._prompt_logprobs.extend(to_prompt_logprobs(event.prompt_logprobs))
            case "finished":
                self._sequence(event.finished.index).finished = self._last = event.finished

    def end(self) -> None:
        """No more events come. Raises ServerError for a text without its end, and MiliError where
        every sequence failed."""
        self._ended = bool(self._sequences) and all(s.finished for s in self._sequences.values())
        if not self._ended:
            raise ServerError(grpc.StatusCode.INTERNAL, "the stream ended without a result")
        whole(self.generation)

    @property
    def generation(self) -> Generation:
        """The whole result. Raises RuntimeError until the stream has been read to its end."""
        if not self._ended or self._last is None:
            raise RuntimeError("the stream has not been read to its end")
        return Generation(
            sequences=tuple(partial.sequence for _, partial in sorted(self._sequences.items())),
            usage=to_usage(self._last.usage),
            timing=to_timing(self._last.timing),
            seed=self._started.seed,
            model=self._started.model,
            model_revision=self._started.model_revision,
            request_id=self._started.request_id,
            prompt_logprobs=tuple(self._prompt_logprobs),
            response_model=self._response_model,
        )

    @property
    def request_id(self) -> str:
        """What `cancel` takes; empty until the first event."""
        return self._started.request_id

    @property
    def finish_reason(self) -> str:
        return self.generation.finish_reason

    @property
    def usage(self) -> Usage:
        return self.generation.usage

    def _sequence(self, index: int) -> PartialSequence:
        return self._sequences.setdefault(index, PartialSequence())
