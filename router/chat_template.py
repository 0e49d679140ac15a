"""Chat messages to the prompt's text, through the model's own chat template.

Owns what a template is given, and how its errors read: they never quote what the caller sent. Does
not know token ids, nor what a role or a tool is.
"""

from __future__ import annotations

import hashlib
import math
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.exceptions import UndefinedError

from mili.hub.folder import ModelFolder
from mili.router.template_sandbox import (
    LimitExceededError,
    Sandbox,
    TemplateRaisedError,
    text_size,
)

MAX_SECONDS = 5.0

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
_MISSING_NAME = re.compile(r"'[\w. ]+' has no attribute '(\w+)'|'(\w+)' is undefined")


class ChatTemplate:
    """The chat template of one model, compiled; threads may share it.

    sha256: of the template, empty without one. Raises ValueError if it does not compile.
    """

    def __init__(self, folder: ModelFolder) -> None:
        source = folder.chat_template
        self.sha256: str = "" if source is None else hashlib.sha256(source.encode()).hexdigest()
        self._special_tokens = dict(_special_tokens(folder.tokenizer_config))
        self._source = source or ""
        self._code = None if source is None else self._compile()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt. Takes plain JSON data; a message has only the keys that are set.

        variables reach the template by name, and hide special tokens of the same name. Raises
        ValueError when there is no template, or it refuses, fails, takes more than 5 seconds, or
        makes more than 4 times the text that it was given and 1 MiB.
        """
        if self._code is None:
            raise ValueError("the model has no chat template")
        variables = variables or {}
        for name in sorted(_RESERVED & variables.keys()):
            raise ValueError(f"{name!r} is not a variable: it is made of the request itself")
        given = {
            "documents": None,
            **self._special_tokens,
            **variables,
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        sandbox = Sandbox(
            max_chars=4 * text_size(given, math.inf) + (1 << 20), max_seconds=MAX_SECONDS
        )
        try:
            return "".join(_generate(sandbox, self._code, given))
        except LimitExceededError as error:
            raise ValueError(f"the chat template was stopped: {error}") from None
        except TemplateRaisedError as error:
            raise ValueError(f"the chat template refuses{self._own_words(error)}") from None
        except Exception as error:  # a template can raise anything
            raise ValueError(f"the chat template fails{self._problem(error)}") from None

    def _compile(self) -> CodeType:
        sandbox = Sandbox(max_chars=1 << 20, max_seconds=math.inf)
        try:
            constants = sandbox.parse(self._source).find_all(nodes.Const)
            self._literals = [node.value for node in constants if isinstance(node.value, str)]
            code: CodeType = sandbox.compile(self._source)
        except TemplateSyntaxError as error:
            problem = f"line {error.lineno}: {error.message}"
            raise ValueError(f"the chat template does not compile: {problem}") from None
        return code

    def _own_words(self, error: TemplateRaisedError) -> str:
        """Return the message of raise_exception as far as the template itself holds it."""
        message = str(error)
        known = max(
            (text for text in self._literals if message.startswith(text)), key=len, default=""
        )
        if not known:
            return " these messages"
        return f": {known}" if known == message else f": {known}..."

    def _problem(self, error: Exception) -> str:
        """Say what went wrong and where, in names that stand in the template."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
        where = f" at line {lines[-1]}" if lines else ""
        missing = _MISSING_NAME.fullmatch(str(error)) if isinstance(error, UndefinedError) else None
        name = next(filter(None, missing.groups())) if missing else ""
        if name and re.search(rf"\b{name}\b", self._source):
            return f"{where}: {name!r} is undefined"
        return f"{where}: {type(error).__name__}"


def _generate(sandbox: Sandbox, code: CodeType, given: dict[str, Any]) -> Iterator[str]:
    """Yield the prompt in parts, within the sandbox's limits."""
    template = Template.from_code(sandbox, code, sandbox.make_globals(None))
    left = sandbox.max_chars
    for part in template.generate(given):
        sandbox.check_time()
        left -= len(part)
        if left < 0:
            raise LimitExceededError("its text grows too large")
        yield part


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield bos_token and its like, which a file may write as text or as an object."""
    for name, value in tokenizer_config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            yield name, token
