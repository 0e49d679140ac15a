"""Text work stays off the event loop, and it is bounded: how much waits, and how long a text is."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mili.hub.folder import read_model_folder
from mili.router import stop
from mili.router.api.prompt import _FEW_IDS, PromptReader, TextThreads
from mili.router.chat_template import ChatTemplate
from mili.router.errors import Reason, RequestError
from mili.router.stop import MAX_STOP_SEQUENCES, StopMatcher
from mili.router.tokenizer import Tokenizer
from mili.v1 import inference_pb2 as pb
from tests.fake_engine import CONTEXT_LIMIT, make_folder

# Of a context of 64 tokens and of one of 1 Mi tokens, for tokens of 2 bytes; and when truncated.
SMALLEST, OF_MANY, TRUNCATED = 64 * 1024, 4 * 2 * 2**20, 1024 * 1024


def reader(tmp_path: Path, longest: int = 2) -> tuple[PromptReader, list[int]]:
    """Return a reader, and the lengths of the texts that its tokenizer gets."""
    lengths: list[int] = []

    def encode(text: str, **_: Any) -> list[int]:  # noqa: ANN401
        lengths.append(len(text.encode()))
        return [1]

    tokenizer = SimpleNamespace(longest_token_bytes=longest, encode=encode)
    template = ChatTemplate(make_folder(tmp_path / "m"))
    return PromptReader(cast(Tokenizer, tokenizer), template), lengths


def chat(content: str, **fields: str) -> pb.Generation:
    messages = [pb.ChatMessage(role="user", content=content)]
    return pb.Generation(chat=pb.ChatPrompt(messages=messages, **fields))


async def test_slow_text_work_does_not_stop_the_loop() -> None:
    threads = TextThreads(max_pending=8)
    go = threading.Event()
    work = asyncio.create_task(threads.run(go.wait, 10))
    await asyncio.sleep(0)
    assert not work.done()  # and we are here
    go.set()
    assert await work
    threads.close()


async def test_waiting_text_work_is_bounded() -> None:
    threads = TextThreads(max_pending=2)
    go = threading.Event()
    first = [asyncio.create_task(threads.run(go.wait, 10)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(RequestError) as caught:
        await threads.run(go.wait)
    assert caught.value.reason is Reason.QUEUE_FULL
    go.set()
    assert await asyncio.gather(*first) == [True, True]
    assert await threads.run(go.wait)
    threads.close()


async def test_work_whose_caller_is_gone_counts_until_a_thread_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # one thread for text
    threads = TextThreads(max_pending=2)
    begun, go, second = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        go.wait(10)

    calls = [asyncio.create_task(threads.run(work)) for work in (hold, second.set)]
    assert await asyncio.to_thread(begun.wait, 10)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    with pytest.raises(RequestError, match="too many"):
        await threads.run(int)
    go.set()
    async with asyncio.timeout(10):
        while True:
            try:
                assert await threads.run(int) == 0
                break
            except RequestError:
                await asyncio.sleep(0)
    assert not second.is_set()  # nobody waited for it when its turn came
    threads.close()


async def test_errors_of_text_work_come_back() -> None:
    threads = TextThreads(max_pending=2)
    with pytest.raises(ValueError, match="invalid literal"):
        await threads.run(int, "x")
    threads.close()


def test_only_a_few_token_ids_are_read_on_the_loop_itself(tmp_path: Path) -> None:
    prompts, _ = reader(tmp_path)

    def ids(count: int, *stop: str) -> pb.Generation:
        stopping = pb.StopConditions(stop_sequences=stop)
        return pb.Generation(token_ids=pb.TokenIds(ids=[1] * count), stopping=stopping)

    assert prompts.is_quick(ids(1)) and prompts.is_quick(ids(_FEW_IDS))
    assert not prompts.is_quick(ids(_FEW_IDS + 1))
    assert not prompts.is_quick(ids(1, "a stop sequence takes its time"))
    assert not prompts.is_quick(pb.Generation(text="text is tokenized"))
    assert not prompts.is_quick(chat("x"))
    assert not prompts.is_quick(ids(0)) and not prompts.is_quick(pb.Generation())


@pytest.mark.parametrize(
    ("limit", "longest", "most"),
    [(CONTEXT_LIMIT, 2, SMALLEST), (2**20, 2, OF_MANY), (2**15, 256, 2**15 * 64)],
)
def test_a_text_that_cannot_fit_is_not_tokenized(
    tmp_path: Path, limit: int, longest: int, most: int
) -> None:
    prompts, lengths = reader(tmp_path, longest)
    prompts.read(pb.Generation(text="ä" * (most // 2)), limit)
    with pytest.raises(RequestError, match=f"at most {most} are") as caught:
        prompts.read(pb.Generation(text="ä" * (most // 2) + "x"), limit)
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG
    assert caught.value.field == "generation.text"
    assert lengths == [most]


def test_a_text_to_be_truncated_may_be_longer(tmp_path: Path) -> None:
    prompts, lengths = reader(tmp_path)
    for limit, most in ((CONTEXT_LIMIT, TRUNCATED), (2**20, OF_MANY)):
        prompts.read(pb.Generation(text="x" * most, truncate_prompt_tokens=1), limit)
        with pytest.raises(RequestError, match=f"at most {most} are"):
            prompts.read(pb.Generation(text="x" * (most + 1), truncate_prompt_tokens=1), limit)
    assert lengths == [TRUNCATED, OF_MANY]


def test_a_chat_that_cannot_fit_is_not_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, lengths = reader(tmp_path)
    monkeypatch.setattr(ChatTemplate, "render", lambda *_, **__: pytest.fail("rendered"))
    with pytest.raises(RequestError) as caught:
        prompts.read(chat("x" * SMALLEST), CONTEXT_LIMIT)
    assert (caught.value.reason, caught.value.field) == (Reason.CONTEXT_TOO_LONG, "generation.chat")
    assert not lengths


def test_a_rendered_chat_that_cannot_fit_is_not_tokenized(tmp_path: Path) -> None:
    prompts, lengths = reader(tmp_path)
    with pytest.raises(RequestError) as caught:  # the template adds more than the role
        prompts.read(chat("x" * (SMALLEST - 10)), CONTEXT_LIMIT)
    assert (caught.value.reason, caught.value.field) == (Reason.CONTEXT_TOO_LONG, "generation.chat")
    assert not lengths


def test_a_variable_that_is_no_unicode_is_the_callers_fault(tmp_path: Path) -> None:
    make_folder(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ date_string }}")
    folder = read_model_folder(tmp_path / "m")
    prompts = PromptReader(Tokenizer(folder), ChatTemplate(folder))
    generation = chat("x", template_variables_json='{"date_string": "\\ud800"}')
    with pytest.raises(RequestError, match="surrogate") as caught:
        prompts.read(generation, CONTEXT_LIMIT)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "generation.chat")


def test_stop_sequences_are_prepared_with_the_prompt(tmp_path: Path) -> None:
    prompts, _ = reader(tmp_path)
    texts = ["prepared", "with the prompt"]
    stopping = pb.StopConditions(stop_sequences=texts)
    prompts.read(pb.Generation(text="x", stopping=stopping), CONTEXT_LIMIT)
    misses = stop._automaton.cache_info().misses
    StopMatcher(tuple(texts))
    assert stop._automaton.cache_info().misses == misses
    stopping = pb.StopConditions(stop_sequences=["x"] * (MAX_STOP_SEQUENCES + 1))
    with pytest.raises(RequestError, match="at most") as caught:
        prompts.read(pb.Generation(text="x", stopping=stopping), CONTEXT_LIMIT)
    assert caught.value.field == "generation.stopping.stop_sequences"


CALLS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments }}){% endfor %};{% endfor %}"
    "{{ tools | tojson }}"
)


def rendered(tmp_path: Path, prompt: pb.ChatPrompt, template: str = CALLS) -> str:
    make_folder(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    tokenizer = SimpleNamespace(longest_token_bytes=2, encode=lambda text, **_: [1])
    chat_template = ChatTemplate(read_model_folder(tmp_path / "m"))
    return PromptReader(cast(Tokenizer, tokenizer), chat_template).render(prompt, "chat", 4096)[0]


def asked(*more: pb.ChatMessage, **fields: Any) -> pb.ChatPrompt:  # noqa: ANN401
    return pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Hi"), *more], **fields)


def call(name: str = "f", arguments: str = "", **fields: str) -> pb.ChatMessage:
    called = pb.ToolCall(name=name, arguments_json=arguments)
    return pb.ChatMessage(role="assistant", tool_calls=[called], **fields)


def test_tools_and_calls_reach_the_template(tmp_path: Path) -> None:
    tool = pb.ToolDefinition(name="f", description="d", parameters_json_schema='{"b": 1, "a": 2.0}')
    text = rendered(tmp_path, asked(call(arguments='{"x": [1, "é"]}'), call(), tools=[tool]))
    assert text == (
        "user:Hi;assistant:f({'x': [1, 'é']});assistant:f({});"
        '[{"type": "function", "function": {"name": "f", "description": "d", '
        '"parameters": {"b": 1, "a": 2.0}}}]'
    )


def test_names_and_ids_reach_the_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}/{{ m.name | default('-') }}/"
        "{{ m.tool_call_id | default('-') }}"
        "{% for c in m.tool_calls or [] %}/{{ c.function.name }}={{ c.id | default('-') }}"
        "{% endfor %};{% endfor %}"
    )
    calls = [pb.ToolCall(id="call_7", name="f"), pb.ToolCall(name="g")]
    prompt = asked(
        pb.ChatMessage(role="assistant", tool_calls=calls),
        pb.ChatMessage(role="tool", tool_call_id="call_7", name="f", content="1"),
        pb.ChatMessage(role="user", name="Ada", content="And?"),
    )
    text = rendered(tmp_path, prompt, template)
    assert text == "user/-/-;assistant/-/-/f=call_7/g=-;tool/f/call_7;user/Ada/-;"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ c.arguments.a }}", "1"),
        ("{{ c.arguments | tojson }}", '{"a": 1}'),
        ("{{ '' + c.arguments }}", '{"a":1}'),  # the caller's own text
        ("{{ m.content + '/' + c.name }}", "/f"),
        ("{{ 'none' if m.content is none else 1 / 0 }}", "none"),
    ],
)
def test_calls_are_written_as_the_template_wants_them(
    tmp_path: Path, template: str, expected: str
) -> None:
    loop = "{% for m in messages[1:] %}{% for t in m.tool_calls %}{% set c = t.function %}"
    name = "{{ c.name if c.name != 'f' }}"  # the probe wants to see its own
    source = f"{loop}{name}{template}{{% endfor %}}{{% endfor %}}"
    assert rendered(tmp_path, asked(call(arguments='{"a":1}')), source) == expected


@pytest.mark.parametrize(
    ("prompt", "field", "problem"),
    [
        (asked(call(name="")), "chat.messages[1].tool_calls[0].name", "missing"),
        (asked(call(arguments="{")), "chat.messages[1].tool_calls[0].arguments_json", "JSON"),
        (asked(call(arguments="[1]")), "chat.messages[1].tool_calls[0].arguments_json", "object"),
        (
            asked(call(arguments='{"a": NaN}')),
            "chat.messages[1].tool_calls[0].arguments_json",
            "JSON",
        ),
        (asked(tools=[pb.ToolDefinition()]), "chat.tools[0].name", "missing"),
        (
            asked(tools=[pb.ToolDefinition(name="f", parameters_json_schema="x")]),
            "chat.tools[0].parameters_json_schema",
            "JSON",
        ),
        (asked(continue_final_message=True), "chat.continue_final_message", "assistant"),
        (asked(call(), continue_final_message=True), "chat.continue_final_message", "content"),
        (asked(template_variables_json='{"a": Infinity}'), "chat.template_variables_json", "JSON"),
        (asked(template_variables_json="[" * 9000), "chat.template_variables_json", "JSON"),
    ],
)
def test_a_bad_chat_is_named(
    tmp_path: Path, prompt: pb.ChatPrompt, field: str, problem: str
) -> None:
    with pytest.raises(RequestError, match=problem) as caught:
        rendered(tmp_path, prompt)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, field)


def test_what_a_template_does_not_show_is_refused(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match="does not show tools"):
        rendered(tmp_path, asked(tools=[pb.ToolDefinition(name="f")]), plain)
    with pytest.raises(RequestError, match="does not show tool calls"):
        rendered(tmp_path, asked(call()), plain)


def test_the_final_message_goes_on(tmp_path: Path) -> None:
    final = pb.ChatMessage(role="assistant", content="Well, ")
    prompt = asked(final, continue_final_message=True)
    plain = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ add_generation_prompt }}"
    assert rendered(tmp_path, prompt, plain) == "[Hi][Well, "
    trimmed = plain.replace("m.content", "m.content | trim")
    assert rendered(tmp_path, prompt, trimmed) == "[Hi][Well,"
    for template in ("{{ messages[0].content }}", plain.replace("m.content", "m.content | upper")):
        with pytest.raises(RequestError, match="does not write the final message as it is"):
            rendered(tmp_path, prompt, template)
