"""Jinja for chat templates: what transformers offers them, within limits on time and memory.

Owns the limits. Jinja's own sandbox keeps a template from reaching the interpreter, but lets it
build gigabytes from a line; here every operation whose result may be much larger than its operands
is weighed first, and every turn of a loop looks at the clock. Does not know messages or models.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import partial
from types import BuiltinMethodType
from typing import Any, TypeAlias

from jinja2 import nodes, pass_environment
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.filters import do_center, do_indent, do_round, do_sum, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

Value: TypeAlias = Any  # whatever a template computes with

# No chat template needs these, and each can make much out of little in its own way.
_REMOVED_FILTERS = ("batch", "pprint", "slice", "urlize", "wordwrap", "xmlattr")
_REMOVED_METHODS = frozenset({"encode", "expandtabs", "maketrans", "to_bytes", "translate"})

# A width of four digits or more, or one taken from the arguments.
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{4})|\{[^{}]*(\{|:[^{}]*\d{4})")

# A field that names its argument, and so may use it more than once.
_REUSING_FIELD = re.compile(r"%\(|\{\w")

_MAX_INTEGER_BITS = 4096
_MAX_INDENT = 16
_OPERATIONS_PER_RESULT = 64


class LimitExceededError(Exception):
    """A template went past its time or its memory."""


class TemplateRaisedError(TemplateError):
    """A template called raise_exception."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering.

    max_chars: the size of the largest value; all of them together may be 64 times that.
    max_seconds: how long loops may go on, from now.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, max_chars: float, max_seconds: float) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self.weighed,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
        )
        self.max_chars = max_chars
        self._chars_left = max_chars * _OPERATIONS_PER_RESULT
        self._deadline = time.monotonic() + max_seconds
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        for name, function in (("center", do_center), ("indent", do_indent), ("round", do_round)):
            self.filters[name] = partial(self._widen, function)
        self.filters |= {
            "format": self._format,
            "join": self._join,
            "replace": self._replace,
            "string": lambda value: str(self.weighed(value)),
            "sum": _sum,
            "tojson": self._tojson,
        }
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": self._strftime_now}

    def charge(self, chars: float) -> None:
        """Account for a value of about that many characters. Raises LimitExceededError."""
        self._chars_left -= chars
        if chars > self.max_chars or self._chars_left < 0:
            raise LimitExceededError("its text grows too large")

    def check_time(self) -> None:
        """Raise LimitExceededError when the time is over."""
        if time.monotonic() > self._deadline:
            raise LimitExceededError("it takes too long")

    def weighed(self, value: Value) -> Value:
        """Return value, which is about to become text. Raises LimitExceededError."""
        self.charge(text_size(value, self.max_chars))
        return value

    # What Jinja calls instead of its own.

    def _generate(self, source: nodes.Template, *args: Value, **kwargs: Value) -> str:
        return super()._generate(_WithLimits().visit(source), *args, **kwargs)

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a macro or a block has put out."""
        parts = list(parts)
        self.charge(sum(map(len, parts)))
        return "".join(parts)

    def concat_values(self, *values: Value) -> str:
        """Do what the operator ~ does."""
        return "".join(str(self.weighed(value)) for value in values)

    def call_binop(self, context: Context, operator: str, left: Value, right: Value) -> Value:
        if operator == "%" and isinstance(left, str):
            self._check_format(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits, other = left.bit_length(), right.bit_length()
            if {"*": bits + other, "**": bits * abs(right)}.get(operator, 0) > _MAX_INTEGER_BITS:
                raise LimitExceededError("a number grows too large")
        elif operator == "*":
            self.charge(_length(left) * abs(right) if isinstance(right, int) else 0)
            self.charge(_length(right) * abs(left) if isinstance(left, int) else 0)
        elif operator == "+":
            self.charge(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Value, *args: Value, **kwargs: Value) -> Value:  # noqa: N805
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped
        if isinstance(method, BuiltinMethodType) and isinstance(method.__self__, str):
            args = __self._checked_arguments(method.__self__, method.__name__, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Value, attr: str, value: Value) -> bool:
        return attr not in _REMOVED_METHODS and super().is_safe_attribute(obj, attr, value)

    # Filters and functions.

    def _checked_arguments(
        self, text: str, method: str, args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> tuple[Value, ...]:
        """Account for a call of a string's method; return its arguments."""
        if method == "join":
            parts: list[Value] = list(*args)  # may be a generator
            self._charge_join(text, parts)
            return (parts,)
        if method == "replace":
            self._charge_replace(text, *args)
        elif method in ("format", "format_map"):
            self._check_format(text, [args, kwargs])
        else:
            self._charge_width(text, args)
        return args

    def _widen(self, function: Value, value: Value, *args: Value, **kwargs: Value) -> Value:
        self._charge_width(str(self.weighed(value)), [*args, *kwargs.values()])
        return function(value, *args, **kwargs)

    def _charge_width(self, text: str, widths: Iterable[Value]) -> None:
        for width in widths:
            size = abs(width) if isinstance(width, int) else _length(width)
            self.charge(size * (1 + text.count("\n")))

    def _format(self, value: Value, *args: Value, **kwargs: Value) -> Value:
        text = str(self.weighed(value))
        self._check_format(text, [args, kwargs])
        return text % (kwargs or args)

    def _check_format(self, text: str, values: Value) -> None:
        if _WIDE_FORMAT.search(text):
            raise LimitExceededError("a format is too wide")
        uses = max(1, len(_REUSING_FIELD.findall(text)))
        self.charge(len(text) + uses * text_size(values, self.max_chars))

    def _replace(self, value: Value, old: Value, new: Value, count: int | None = None) -> str:
        text, old, new = (str(self.weighed(part)) for part in (value, old, new))
        self._charge_replace(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _charge_replace(self, text: str, old: str, new: str, count: int = -1) -> None:
        self.charge(len(text) + text.count(old) * len(new))

    def _join(self, values: Iterable[Value], separator: str = "", attribute: Value = None) -> str:
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        parts = [str(self.weighed(value)) for value in values]
        self._charge_join(separator, parts)
        return separator.join(parts)

    def _charge_join(self, separator: str, parts: Sequence[Value]) -> None:
        self.charge(text_size(parts, self.max_chars) + len(parts) * len(separator))

    def _tojson(
        self,
        value: Value,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and indent > _MAX_INDENT:
            raise LimitExceededError("an indent is too wide")
        return json.dumps(
            self.weighed(value),
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def _strftime_now(self, text: str) -> str:
        self._check_format(text, ())
        return datetime.now().strftime(text)


class GenerationTag(Extension):
    """{% generation %}: marks what transformers trains on; here its body is just a body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _WithLimits(NodeTransformer):
    """Puts the checks into a template's syntax tree that Jinja has no hook for."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("concat_values", node.nodes, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("check_time", [], node.lineno)))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("check_time", [], node.lineno)))
        return node


def text_size(value: object, limit: float) -> int:
    """Return about how many characters a value is as text; stop counting past the limit."""
    size, waiting = 0, [value]
    while waiting and size <= limit:
        item = waiting.pop()
        size += 2 + _length(item) if isinstance(item, str) else 8
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
    return size


def _call(method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None, lineno=line)


def _length(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


@pass_environment
def _sum(environment: Sandbox, values: Value, attribute: Value = None, start: Value = 0) -> Value:
    if isinstance(start, list | tuple):
        raise LimitExceededError("it adds up lists")
    return do_sum(environment, values, attribute, start)


def _raise(message: str) -> None:
    raise TemplateRaisedError(message)
