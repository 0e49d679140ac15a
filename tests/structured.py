"""Calls with structured output, and random JSON schemas to ask for.

Owns the schemas' distribution: all of their outputs are short, so that a model that wanders comes
to an end. (A JSON number may have any number of digits: it has a test of its own.)
"""

from __future__ import annotations

import random
from typing import Any

from mili.v1 import inference_pb2 as pb

Schema = dict[str, Any]


def request(
    structured: pb.StructuredOutput,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    **fields: Any,  # noqa: ANN401
) -> pb.GenerateRequest:
    """fields: of Generation."""
    generation = pb.Generation(
        token_ids=pb.TokenIds(ids=[7 + seed % 90, 11, 13]),
        sampling=pb.SamplingParams(temperature=temperature, seed=seed),
        structured_output=structured,
        **fields,
    )
    return pb.GenerateRequest(generation=generation)


def random_schema(rng: random.Random) -> Schema:
    """A schema that a few hundred characters fulfil."""
    shared = {"leaf": _schema(rng, 1)}
    return {**_schema(rng, 3), "$defs": shared}


def _schema(rng: random.Random, depth: int) -> Schema:
    scalars = (_string, _integer, _enum, _pattern, lambda rng: {"type": "boolean"})
    if depth == 0 or rng.random() < 0.35:
        return rng.choice(scalars)(rng)
    return rng.choice((_object, _object, _array, _any_of, _pair))(rng, depth - 1)


def _string(rng: random.Random) -> Schema:
    low = rng.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(9)}


def _integer(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1000)}


def _enum(rng: random.Random) -> Schema:
    values = ["red", "größe", 'a "quote"', 7, -1.5, None, True, "line\nbreak", "\\"]
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _pattern(rng: random.Random) -> Schema:
    return {
        "type": "string",
        "pattern": rng.choice(("^[a-f]{2,6}$", "^(x|yy){1,6}z$", "^\\d{3}-\\d$")),
    }


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(("id", "name", "tags", "größe", "a b", "x"), rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: _schema(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    items = _schema(rng, depth)
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randrange(3)}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_schema(rng, depth) for _ in range(rng.randint(1, 3))]}


def _pair(rng: random.Random, depth: int) -> Schema:
    leaf = {"$ref": "#/$defs/leaf"} if depth else _schema(rng, 0)
    return {
        "type": "object",
        "properties": {"left": leaf, "right": leaf},
        "required": ["left", "right"],
        "additionalProperties": False,
    }
