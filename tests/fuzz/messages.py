"""Hypothesis strategies for every message of the API: sensible, odd, and no messages at all.

Owns what is drawn for a field. Does not know what a server makes of it. Everything comes from the
descriptors, so that a new field is drawn from the day it is there; SENSIBLE only makes it likelier
that a call gets past the door.
"""

from __future__ import annotations

import functools
import json
import random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

# Deeper messages stay empty; ours end before.
_MAX_DEPTH = 6

_IDS = st.integers(0, 258)
_WORDS = st.text(max_size=12)
_SOME_WORDS = st.text(min_size=1, max_size=12)
_SCHEMA = st.sampled_from(
    [
        "",
        "{",
        "{}",
        "[[[[",
        json.dumps({"type": "integer"}),
        json.dumps({"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "required": ["a"]}),
        json.dumps({"$ref": "#"}),
        json.dumps({"type": "string", "pattern": "(((("}),
    ]
)

# By field name: what a caller could mean, and what is next to it.
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["", "model"]),
    "name": st.sampled_from(["", "model", "f"]),
    "content": _SOME_WORDS,
    "texts": _SOME_WORDS,
    "stop_sequences": _SOME_WORDS,
    "role": st.sampled_from(["user", "assistant", "system"]),
    "request_id": st.sampled_from(["", "a", "b"]),
    "ids": _IDS,
    "allowed_token_ids": _IDS,
    "stop_token_ids": _IDS,
    "max_tokens": st.integers(1, 8),
    "min_tokens": st.just(1),
    "num_sequences": st.integers(1, 4),
    "top_logprobs": st.integers(0, 20),
    "prompt_top_logprobs": st.integers(0, 20),
    "dimensions": st.integers(1, 64),
    "truncate_prompt_tokens": st.integers(1, 40),
    "max_reasoning_tokens": st.integers(1, 4),
    "max_tokens_per_message": st.integers(1, 16),
    "priority": st.integers(-100, 0),
    "temperature": st.sampled_from([0.0, 0.5, 1.0]),
    "top_p": st.sampled_from([0.1, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.1]),
    "presence_penalty": st.sampled_from([0.0, 1.0, -2.0]),
    "frequency_penalty": st.sampled_from([0.0, 1.0, -2.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.3]),
    "logit_bias": st.sampled_from([-100.0, 0.5, 100.0]),
    "json_schema": _SCHEMA,
    "parameters_json_schema": _SCHEMA,
    "arguments_json": st.sampled_from(["{}", '{"a": 1}']),
    "template_variables_json": st.sampled_from(["", "{}", '{"a": 1}']),
    "regex": st.sampled_from(["a+", "(a|b){1,5}", r"\d{3}"]),
    "grammar": st.just('start: "a" | "b"'),
    "seconds": st.integers(1, 3),
    "nanos": st.just(0),
    "after_sequence": st.integers(0, 5),
}
ODD: dict[str, st.SearchStrategy[Any]] = {
    "name": st.sampled_from(["worker-0", "no such name", "ü", "x" * 200, "\0"]),
    "role": st.sampled_from(["", "tool", "robot"]),
    "request_id": st.sampled_from(["c/d", "\n", "x" * 129]),
    "max_tokens": st.just(0),
    "top_logprobs": st.just(21),
    "priority": st.sampled_from([-101, 1, 101]),
    "temperature": st.sampled_from([1e-6, 100.0, -1.0]),
    "presence_penalty": st.sampled_from([3.0, -2.1]),
    "arguments_json": st.sampled_from(["", "[", "1"]),
    "template_variables_json": st.sampled_from(["[", "[1]", "[" * 5000, '{"messages": 1}']),
    "regex": st.sampled_from(["", "(((a*)*)*)*", "(", "a{99999}"]),
    "grammar": st.sampled_from(["", "start: start start", "%%%"]),
    "seconds": st.sampled_from([-1, 0]),
    "nanos": st.sampled_from([-1, 1, 10**9]),
}

_GENERIC: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_STRING: _WORDS | st.just("x" * 20_000),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 9),
}


# One of these is set in each message that has any: else every call would lack it.
_NEEDED = frozenset(
    "generation text token_ids ids chat messages role context inputs texts".split()  # noqa: SIM905
)


@functools.cache
def messages(message_type: type[Message]) -> st.SearchStrategy[bytes]:
    """Messages of one type, serialized: half of them hold nothing but what makes sense alone."""
    return _filled(message_type).map(lambda message: message.SerializeToString())


def spoilt(data: bytes, source: random.Random) -> bytes:
    """A message with a few bytes cut, changed or added: it may no longer be one."""
    first = source.randint(0, len(data))
    last = min(len(data), first + source.randint(0, 3))
    middle = source.choice([b"", b"\xff", b"\x00", b"\xc3", b"\xff\xff\xff\xff"])
    tail = source.choice([b"", b"", b"\x0a", b"\xfa\x7f\x01x", b"\x0b" * 200])
    return data[:first] + middle + data[last:] + tail


@st.composite
def _filled(draw: st.DrawFn, message_type: type[Message]) -> Message:
    message = message_type()
    _fill(draw, message, 0, draw(st.booleans()))
    return message


def _fill(draw: st.DrawFn, message: Message, depth: int, sensible: bool) -> None:
    fields = message.DESCRIPTOR.fields
    if not fields or depth > _MAX_DEPTH:
        return
    for field in draw(_choices(message.DESCRIPTOR)):
        if field.is_repeated:
            _extend(draw, message, field, depth, sensible)
        elif field.message_type is not None:
            part = getattr(message, field.name)
            part.SetInParent()
            _fill(draw, part, depth + 1, sensible)
        else:
            setattr(message, field.name, draw(_values(field, sensible)))


def _extend(
    draw: st.DrawFn, message: Message, field: FieldDescriptor, depth: int, sensible: bool
) -> None:
    """Fill a list or a map."""
    items = getattr(message, field.name)
    for _ in range(draw(st.integers(1 if sensible else 0, 3))):
        if field.message_type is None:
            items.append(draw(_values(field, sensible)))
        elif field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            items[draw(_IDS)] = draw(SENSIBLE[field.name] if sensible else _values(value, False))
        else:
            _fill(draw, items.add(), depth + 1, sensible)


@functools.cache
def _choices(descriptor: Descriptor) -> st.SearchStrategy[list[FieldDescriptor]]:
    """Which fields to set: a few."""
    fields = list(descriptor.fields)
    some = st.lists(st.sampled_from(fields), max_size=2, unique_by=lambda field: field.number)
    wanted = [field for field in fields if field.name in _NEEDED]
    if not wanted:
        return some
    return st.tuples(some, st.sampled_from(wanted)).map(lambda both: [*both[0], both[1]])


@functools.cache
def _values(field: FieldDescriptor, sensible: bool) -> st.SearchStrategy[Any]:
    generic = _GENERIC[field.cpp_type]
    if field.name == "text" and field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _SOME_WORDS if sensible else generic
    meant = SENSIBLE.get(field.name, generic)
    return meant if sensible else st.one_of(meant, ODD.get(field.name, generic), generic)
