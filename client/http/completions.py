"""POST /v1/completions: the answer to one prompt or several, whole or in chunks.

Owns this translation only. The choices of prompt p are numbers p * n to p * n + n - 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from mili.client.http.answers import FINISH_REASONS, Json, completion_logprobs, usage_object
from mili.client.http.bodies import CompletionBody
from mili.client.responses import reason_name, to_logprob
from mili.client.results import Generation, Usage
from mili.v1 import inference_pb2 as pb


def completion_answer(results: Sequence[Generation], body: CompletionBody) -> Json:
    choices: list[Json] = []
    for sequence in (sequence for result in results for sequence in result.sequences):
        logprobs, _ = completion_logprobs(sequence.logprobs, 0)
        choices.append(
            {
                "index": len(choices),
                "text": sequence.text,
                "logprobs": None if body.logprobs is None else logprobs,
                "finish_reason": FINISH_REASONS[sequence.finish_reason],
            }
        )
    return {
        "id": f"cmpl-{results[0].request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": results[0].model,
        "system_fingerprint": results[0].model_revision,
        "choices": choices,
        "usage": usage_object(result.usage for result in results),
    }


class CompletionChunks:
    """The chunks of one streamed answer."""

    def __init__(self, body: CompletionBody) -> None:
        self._body = body
        self._created = int(time.time())
        self._started = pb.Started()
        # Characters that the tokens of each choice had so far.
        self._offsets: dict[int, int] = {}

    def of(self, number: int, event: pb.StreamEvent) -> Iterator[Json]:
        """The chunks that an event of the number-th prompt becomes."""
        first = number * (self._body.n or 1)
        match event.WhichOneof("event"):
            case "started":
                # All prompts' choices are one answer, which has one id.
                self._started = event.started if number == 0 else self._started
            case "delta":
                index = first + event.delta.index
                logprobs = self._logprobs(index, event.delta)
                if event.delta.text or logprobs:
                    yield self._choice(index, event.delta.text, logprobs)
            case "finished":
                reason = FINISH_REASONS[reason_name(event.finished.finish_reason)]
                yield self._choice(first + event.finished.index, "", None, reason)

    def end(self, usages: list[Usage]) -> Json:
        return self._chunk([], usage_object(usages))

    def _logprobs(self, index: int, delta: pb.Delta) -> Json | None:
        if self._body.logprobs is None or not delta.logprobs.tokens:
            return None
        tokens = map(to_logprob, delta.logprobs.tokens)
        built, self._offsets[index] = completion_logprobs(tokens, self._offsets.get(index, 0))
        return built

    def _choice(
        self, index: int, text: str, logprobs: Json | None, reason: str | None = None
    ) -> Json:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk([choice])

    def _chunk(self, choices: list[Json], usage: Json | None = None) -> Json:
        chunk = {
            "id": f"cmpl-{self._started.request_id}",
            "object": "text_completion",
            "created": self._created,
            "model": self._started.model,
            "system_fingerprint": self._started.model_revision,
            "choices": choices,
        }
        return {**chunk, "usage": usage} if self._body.include_usage else chunk
