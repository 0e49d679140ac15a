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
from typing import Any, NamedTuple

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.exceptions import UndefinedError
from jinja2.meta import find_undeclared_variables

from mili.hub.folder import ModelFolder
from mili.router.template_sandbox import (
    LimitExceededError,
    Sandbox,
    TemplateRaisedError,
    text_size,
)

MAX_SECONDS = 5.0

# Written behind the message that is to be continued, to find the place again; the space tells
# whether the template trims what a message ends with.
_PLACE = "CONTINUE-HERE-7f3a "

# The name of a function, in a call that shows what a template does with calls.
_PROBE = "probe_of_calls"

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
_MISSING_NAME = re.compile(r"'[\w. ]+' has no attribute '(\w+)'|'(\w+)' is undefined")


class CallForm(NamedTuple):
    """How a template wants a message that calls tools: models differ, and none of them says.

    no_content: what a message holds that has no content beside the calls: nothing, an empty
    content, or None for it.
    arguments_as_text: as JSON text, not as an object.
    """

    no_content: Mapping[str, str | None]
    arguments_as_text: bool


class ChatTemplate:
    """The chat template of one model, compiled; threads may share it.

    sha256: of the template, empty without one. shows_tools: whether it writes them into the prompt.
    call_form: how it wants tool calls, None where it does not write them. Raises ValueError if it
    does not compile.
    """

    def __init__(self, folder: ModelFolder) -> None:
        source = folder.chat_template
        self.sha256: str = "" if source is None else hashlib.sha256(source.encode()).hexdigest()
        self._special_tokens = dict(_special_tokens(folder.tokenizer_config))
        self._source = source or ""
        self._variables: set[str] = set()
        self._code = None if source is None else self._compile()
        self.shows_tools: bool = "tools" in self._variables
        self.call_form: CallForm | None = self._find_call_form()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Return the prompt. Takes plain JSON data; a message has only the keys that are set.

        continue_final_message: end where the content of the last message ends. variables reach the
        template by name, and hide special tokens of the same name. Raises ValueError when there is
        no template, or it refuses, fails, takes more than 5 seconds, or makes more than 4 times
        the text that it was given and 1 MiB.
        """
        if self._code is None:
            raise ValueError("the model has no chat template")
        if continue_final_message:
            *before, final = messages
            marked = {**final, "content": final["content"] + _PLACE}
            text = self.render(
                [*before, marked], tools=tools, variables=variables, add_generation_prompt=False
            )
            return _until_place(text, final["content"])
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
            tree = sandbox.parse(self._source)
            constants = tree.find_all(nodes.Const)
            self._variables = find_undeclared_variables(tree)
            self._literals = [node.value for node in constants if isinstance(node.value, str)]
            code: CodeType = sandbox.compile(self._source)
        except TemplateSyntaxError as error:
            problem = f"line {error.lineno}: {error.message}"
            raise ValueError(f"the chat template does not compile: {problem}") from None
        return code

    def _find_call_form(self) -> CallForm | None:
        if "tool_calls" not in self._source:
            return None
        contents: tuple[dict[str, str | None], ...] = ({}, {"content": ""}, {"content": None})
        forms = (CallForm(content, text) for text in (False, True) for content in contents)
        return next(filter(self._writes, forms), None)

    def _writes(self, form: CallForm) -> bool:
        """Tell whether a small conversation with a call in this form gets its call written."""
        arguments = '{"a": 1}' if form.arguments_as_text else {"a": 1}
        function = {"name": _PROBE, "arguments": arguments}
        call = {"type": "function", "id": "call00000", "function": function}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "Do."},
            {"role": "assistant", **form.no_content, "tool_calls": [call]},
        ]
        try:
            return _PROBE in self.render(messages)
        except ValueError:
            return False

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


def _until_place(text: str, content: str) -> str:
    """Return what stands before the place that the last message was marked at."""
    place = text.rfind(_PLACE.strip())
    if place < 0 or content.strip() not in text:
        raise ValueError("the chat template does not write the final message as it is")
    if text.startswith(_PLACE, place):
        return text[:place]
    return text[:place].rstrip()


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
