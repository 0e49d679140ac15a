"""StructuredOutput: from what the caller wants the output to be to the grammar that holds it there.

Owns the meaning of the message's fields. Does not know how grammars are checked or kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from mili.hub.folder import ModelFolder
from mili.internal.v1.step_pb2 import (
    GRAMMAR_KIND_JSON_SCHEMA,
    GRAMMAR_KIND_LARK,
    GRAMMAR_KIND_REGEX,
)
from mili.router.errors import Reason, RequestError
from mili.router.grammar_checker import GrammarChecker
from mili.router.params import Constraint
from mili.router.parsers.formats import Formats
from mili.router.parsers.prompt import Block, PromptReasoning
from mili.router.tokenizer import Tokenizer
from mili.v1 import inference_pb2 as pb

_PATH = "generation.structured_output"
_MAX_SOURCE_BYTES = 128 * 1024
_MAX_CHOICES = 1024


def check_structured_output(generation: pb.Generation) -> None:
    """Raise RequestError for what cannot be meant, before any work."""
    asked = generation.structured_output
    kind = asked.WhichOneof("constraint")
    if kind is None:
        _require(not asked.after_reasoning, f"{_PATH}.constraint", "is missing")
        return
    if kind == "choices":
        field, count = f"{_PATH}.choices.values", len(asked.choices.values)
        _require(0 < count <= _MAX_CHOICES, field, f"must have from 1 to {_MAX_CHOICES} entries")
        _require(all(asked.choices.values), field, "has an empty entry")
    size = len(_source(asked).encode())
    _require(size > 0, f"{_PATH}.{kind}", "is empty")
    rule = f"has {size} bytes, and at most {_MAX_SOURCE_BYTES} are taken"
    _require(size <= _MAX_SOURCE_BYTES, f"{_PATH}.{kind}", rule)
    clash = "cannot be used with structured_output: the grammar alone says "
    stopping = generation.stopping
    path = "generation.stopping."
    _require(not stopping.min_tokens, path + "min_tokens", clash + "when the output may end")
    _require(not stopping.ignore_eos, path + "ignore_eos", clash + "when the output ends")
    _require(
        not generation.sampling.allowed_token_ids,
        "generation.sampling.allowed_token_ids",
        clash + "which tokens may come",
    )


class StructuredOutputs:
    """Reads the messages for one model."""

    def __init__(self, folder: ModelFolder, tokenizer: Tokenizer, formats: Formats) -> None:
        self._checker = GrammarChecker(folder)
        turn_ends = folder.generation.eos_token_ids
        self._reasoning = PromptReasoning(formats.reasoning, tokenizer, turn_ends)

    async def read(self, asked: pb.StructuredOutput, prompt: Sequence[int]) -> Constraint | None:
        """Return the constraint of a checked message, None for none; raise RequestError.

        prompt: behind which the output begins, perhaps within a reasoning block.
        """
        kind = asked.WhichOneof("constraint")
        if kind is None:
            return None
        start_after = self._start_after(prompt) if asked.after_reasoning else ()
        constraint = Constraint(_KINDS[kind], _source(asked), start_after)
        await self._checker.check(constraint, f"{_PATH}.{kind}")
        return constraint

    async def close(self) -> None:
        await self._checker.close()

    def _start_after(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The token that ends the reasoning; none where the prompt has ended it already."""
        if self._reasoning.block(prompt) is Block.CLOSED:
            return ()
        assert self._reasoning.close_id is not None, "check_parsing refuses what has none"
        return (self._reasoning.close_id,)


_KINDS = {
    "json_schema": GRAMMAR_KIND_JSON_SCHEMA,
    "json_object": GRAMMAR_KIND_JSON_SCHEMA,
    "regex": GRAMMAR_KIND_REGEX,
    "grammar": GRAMMAR_KIND_LARK,
    "choices": GRAMMAR_KIND_LARK,
}


def _source(asked: pb.StructuredOutput) -> str:
    match asked.WhichOneof("constraint"):
        case "json_schema":
            return asked.json_schema
        case "json_object":
            return '{"type": "object"}'
        case "regex":
            return asked.regex
        case "grammar":
            return asked.grammar
    choices = (json.dumps(value, ensure_ascii=False) for value in asked.choices.values)
    return "start: " + " | ".join(choices)


def _require(condition: bool, field: str, rule: str) -> None:
    if not condition:
        name = field.rsplit(".", 1)[-1]
        raise RequestError(Reason.INVALID_FIELD, f"{name} {rule}", field=field)
