"""Chats as prompts, equal to transformers' over a corpus and the templates of real models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mili.hub.pull import pull
from mili.router.api.prompt import PromptReader
from mili.router.chat_template import ChatTemplate
from mili.router.errors import RequestError
from mili.router.tokenizer import Tokenizer
from tests.conversations import Conversation, corpus
from tests.real_templates import FAMILIES, tokenizer_config
from tests.tokenizer_folders import model_folder, read_model_folder

MAX_BYTES = 1 << 20


class Form(NamedTuple):
    """How a caller of transformers must write tool calls for a template, found by reading it."""

    calls: bool = False
    tools: bool = False
    no_content: str | None = ""  # transformers itself drops None: not for such a template
    arguments_as_text: bool = False


FORMS = {
    "qwen3": Form(calls=True, tools=True),
    "deepseek_v3": Form(calls=True, no_content=None, arguments_as_text=True),
}


@pytest.fixture(scope="module", params=[*FAMILIES, "smollm2"])
def family(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A model's name, and its tokenizer_config.json."""
    if request.param != "smollm2":
        return request.param, tokenizer_config(request.config, request.param)
    folder = read_model_folder(pull("smollm2-135m"))
    return request.param, {**folder.tokenizer_config, "chat_template": folder.chat_template}


def mili_prompt(config: dict[str, Any], conversation: Conversation) -> str | None:
    """What the API makes of a conversation; None if it refuses."""
    folder = model_folder(Path(), chat_template=config["chat_template"], tokenizer_config=config)
    tokenizer = cast(Tokenizer, SimpleNamespace(encode=lambda text, **_: []))
    reader = PromptReader(tokenizer, ChatTemplate(folder))
    try:
        return reader.render(conversation.prompt(), "chat", MAX_BYTES)[0]
    except RequestError:
        return None


def transformers_prompt(
    config: dict[str, Any], conversation: Conversation, form: Form
) -> str | None:
    """What transformers makes of it; None if the template refuses."""
    messages = copy.deepcopy(conversation.messages)
    for message in messages:
        if message.get("tool_calls") and message["content"] is None:
            message["content"] = form.no_content
        for call in message.get("tool_calls", ()) if form.arguments_as_text else ():
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            call["function"]["arguments"] = arguments
    backend = Backend(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    special = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    special = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in special.items()
        if token is not None
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if form.no_content is None:
        return rendered_with_none(config, conversation, messages, special)
    try:
        rendered = tokenizer.apply_chat_template(
            messages,
            tools=conversation.tools,
            chat_template=config["chat_template"],
            tokenize=False,
            add_generation_prompt=not conversation.continued,
            continue_final_message=conversation.continued,
            **conversation.variables,
        )
    except Exception:  # a template can raise anything
        return None
    assert isinstance(rendered, str)
    return rendered


def rendered_with_none(
    config: dict[str, Any],
    conversation: Conversation,
    messages: list[dict[str, Any]],
    special: dict[str, str],
) -> str | None:
    """What transformers' templates give, past its door: it would drop a content of None there."""
    try:
        texts, _ = render_jinja_template(
            [messages],
            conversation.tools,
            chat_template=config["chat_template"],
            add_generation_prompt=not conversation.continued,
            continue_final_message=conversation.continued,
            **special,
            **conversation.variables,
        )
    except Exception:  # a template can raise anything
        return None
    return str(texts[0])


def test_every_conversation_gives_the_prompt_that_transformers_gives(
    family: tuple[str, dict[str, Any]],
) -> None:
    """Where a template silently leaves out tools or calls, transformers does too; MILI refuses."""
    name, config = family
    form = FORMS.get(name, Form())
    equal = refused = left_out = 0
    for conversation in corpus():
        prompt = mili_prompt(config, conversation)
        has_calls = any("tool_calls" in message for message in conversation.messages)
        if (conversation.tools and not form.tools) or (has_calls and not form.calls):
            assert prompt is None, conversation
            left_out += 1
            continue
        expected = transformers_prompt(config, conversation, form)
        assert prompt == expected, conversation
        equal += prompt is not None
        refused += prompt is None
    print(f"{name}: {equal} equal, {refused} refused by both, {left_out} by us alone")
    assert equal >= 60
