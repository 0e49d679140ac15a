"""Reasoning and tool calls out of text, the same however the text was cut into pieces."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mili.router.parsers.formats import DEEPSEEK, HERMES, LLAMA, Formats
from mili.router.parsers.json_value import JsonValue
from mili.router.parsers.output import OutputParser, ParsedText
from mili.router.parsers.reasoning import ReasoningTags
from mili.router.parsers.tool_calls import CallSyntax

THINK = ReasoningTags("<think>", "</think>")
SYNTAXES = {syntax.name: syntax for syntax in (HERMES, LLAMA, DEEPSEEK)}
BEGIN, CALL, SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
END, ENDS = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"


class Told(NamedTuple):
    """What a caller has in the end; a call is its name and its arguments."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def tell(parts: Iterable[ParsedText]) -> Told:
    """Join the pieces as a caller does; a call's name and id come first, and once."""
    content = reasoning = ""
    calls: list[list[str]] = []
    ids = set()
    for part in parts:
        content += part.content
        reasoning += part.reasoning
        for call in part.tool_calls:
            if call.position == len(calls):
                assert call.id and call.name and call.id not in ids
                ids.add(call.id)
                calls.append([call.name, ""])
            else:
                assert call.position == len(calls) - 1 and not call.id and not call.name
            calls[-1][1] += call.arguments
    return Told(content, reasoning, tuple((name, arguments) for name, arguments in calls))


def parse(
    pieces: Sequence[str],
    syntax: CallSyntax | None = HERMES,
    *,
    think: bool = True,
    reasoning: bool = True,
    opened: bool = False,
) -> Told:
    formats = Formats(THINK if think else None, syntax)
    parser = OutputParser(
        formats, reasoning=reasoning, tool_calls=syntax is not None, reasoning_open=opened
    )
    parts = []
    for piece in pieces:
        parser.push(piece)
        parts.append(parser.take())
    parser.flush()
    return tell([*parts, parser.take()])


ARGUMENTS = '{"city": "Zü}rich\\"", "n": [1, -2.5e3, true, null, {"a": "</tool_call>"}]}'
OBJECT = f'{{"name": "get", "arguments": {ARGUMENTS}}}'
ONE = ("get", ARGUMENTS)
# Text, and what a caller is told of it.
CASES: dict[str, list[tuple[str, Told]]] = {
    "hermes": [
        ("", Told()),
        ("Hello", Told("Hello")),
        ("Hello\n\n", Told("Hello\n\n")),
        ("<think>\nhm\n\nso\n</think>\n\nYes", Told("Yes", "hm\n\nso")),
        ("\n<think></think>", Told()),
        ("<think>\n\n</think>\n\nYes\n", Told("Yes\n")),
        ("<think>never closed\n", Told("", "never closed\n")),
        ("<think>a </thin k> b</think>c", Told("c", "a </thin k> b")),
        ("Say <think>x</think>", Told("Say <think>x</think>")),
        ("<thin", Told("<thin")),
        (f"<tool_call>\n{OBJECT}\n</tool_call>", Told(calls=(ONE,))),
        (f"<tool_call>{OBJECT}</tool_call>\n\nDone", Told("Done", calls=(ONE,))),
        (
            f"Let me.\n<tool_call>\n{OBJECT}\n</tool_call>\n<tool_call>\n{OBJECT}\n</tool_call>\n",
            Told("Let me.", calls=(ONE, ONE)),
        ),
        (
            f"<think>\n<tool_call>{OBJECT}\n</think>\n\n<tool_call>{OBJECT}",
            Told("", f"<tool_call>{OBJECT}", (ONE,)),
        ),
        (f"<tool_call>{OBJECT} and more", Told(" and more", calls=(ONE,))),
        ('<tool_call>{"name": "f"}</tool_call>', Told(calls=(("f", "{}"),))),
        (
            '<tool_call>{"arguments": {"a":1}, "id": [1, "x"], "name": "f"}</tool_call>',
            Told(calls=(("f", '{"a":1}'),)),
        ),
        (
            '<tool_call>{"n\\u0061me": "\\u0066", "arguments": {}}</tool_call>',
            Told(calls=(("f", "{}"),)),
        ),
        # Broken off, and broken, after it was told.
        ('<tool_call>{"name": "f", "arguments": {"a": "x', Told(calls=(("f", '{"a": "x'),))),
        ('<tool_call>{"name": "f", "arguments": {"a" 1}}', Told("1}}", calls=(("f", '{"a" '),))),
    ],
    "llama": [
        ("Hello", Told("Hello")),
        ('{"name": "f", "parameters": {"a": 1}}', Told(calls=(("f", '{"a": 1}'),))),
        (' \n{"type": "function", "name": "f", "parameters": {}}\n', Told(calls=(("f", "{}"),))),
        (
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
            Told(calls=(("f", "{}"), ("g", "{}"))),
        ),
        (
            'Well.\n<|python_tag|>{"name": "f", "parameters": {}}',
            Told("Well.", calls=(("f", "{}"),)),
        ),
        ('{"name": "Bob", "age": 3}', Told('{"name": "Bob", "age": 3}')),
        ('{"a": {"name": "f", "parameters": {}}}', Told('{"a": {"name": "f", "parameters": {}}}')),
        ('So {"name": "f", "parameters": {}}', Told('So {"name": "f", "parameters": {}}')),
        ('<|python_tag|>search.call(query="x")', Told('<|python_tag|>search.call(query="x")')),
        ("  ", Told("  ")),
        (
            '<think>{"name": "f", "parameters": {}}</think>{}',
            Told("{}", '{"name": "f", "parameters": {}}'),
        ),
    ],
    "deepseek": [
        ("Hello\n", Told("Hello\n")),
        (
            f"{BEGIN}{CALL}function{SEP}get\n```json\n{ARGUMENTS}\n```{END}{ENDS}",
            Told(calls=(ONE,)),
        ),
        (
            f"See.\n\n{BEGIN}{CALL}function{SEP}get\n```json\n{ARGUMENTS}\n```{END}\n"
            f"{CALL}function{SEP}f\n```json\n{{}}\n```{END}{ENDS}",
            Told("See.", calls=(ONE, ("f", "{}"))),
        ),
        (
            f"{BEGIN}{CALL}get{SEP}{ARGUMENTS}{END}{CALL}f{SEP}{{}}{END}{ENDS}",
            Told(calls=(ONE, ("f", "{}"))),
        ),
    ],
}
GARBAGE = {
    "hermes": [
        "Hi\n<tool_call>\nnot json\n</tool_call>\nx",
        "<tool_call><tool_call>",
        '\n\n<tool_call>\n{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}',
        '<tool_call>{"name": "f", "arguments": "{}"}',
        '<tool_call>{"name": "f", "name": "g", "arguments": {}}',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}',
        '<tool_call>{"name": "f\n", "arguments": {}}',
        "<tool_call>{'name': 'f'}</tool_call>",
        '<tool_call>{"name": "f",}</tool_call>',
        '<tool_call>[{"name": "f"}]</tool_call>',
        '<tool_call>{"name": "f", "argu',
        "<tool_call>\n\n",
        "</tool_call></think>",
    ],
    "llama": ["{", '{"name": "f"}', "{}\n{}", "<|python_tag|>", "<|python_tag|>{}", "\n{\n"],
    "deepseek": [
        BEGIN,
        f"x\n{BEGIN}\n",
        f"{BEGIN}{CALL}function{SEP}\n```json\n{{}}",
        f"{BEGIN}{CALL}{{}}{END}",
        f"{CALL}function{SEP}f\n```python\n{{}}",
        f"{CALL}{'f' * 2000}{SEP}{{}}",
        f"{END}{ENDS}",
    ],
}
ALL = [(name, text) for name in SYNTAXES for text in (*[t for t, _ in CASES[name]], *GARBAGE[name])]


@pytest.mark.parametrize(
    ("name", "text", "told"), [(name, *case) for name in CASES for case in CASES[name]]
)
def test_what_is_told(name: str, text: str, told: Told) -> None:
    assert parse([text], SYNTAXES[name]) == told
    for call in told.calls:
        if call[1].endswith("}"):
            json.loads(call[1])


@pytest.mark.parametrize(("name", "text"), [(n, text) for n in GARBAGE for text in GARBAGE[n]])
def test_garbage_stays_text(name: str, text: str) -> None:
    assert parse([text], SYNTAXES[name]) == Told(text)


@pytest.mark.parametrize(("name", "text"), ALL)
def test_every_cut_in_two_and_every_character_alone(name: str, text: str) -> None:
    whole = parse([text], SYNTAXES[name])
    assert parse(list(text), SYNTAXES[name]) == whole
    for cut in range(1, min(len(text), 200)):
        assert parse([text[:cut], text[cut:]], SYNTAXES[name]) == whole, cut


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_split_tells_the_same(data: st.DataObject) -> None:
    """Of texts of the corpus, joined, and of what can be made of their parts."""
    name = data.draw(st.sampled_from(sorted(SYNTAXES)))
    corpus = [text for text, _ in CASES[name]] + GARBAGE[name]
    bits = [
        "<think>",
        "</think>",
        "\n",
        " ",
        "{",
        "}",
        '"name"',
        '"',
        ":",
        ",",
        "f",
        "[",
        "1",
        "\\",
    ]
    bits += [
        "\n" * 9,
        " " * 60,
        *SYNTAXES[name].tags,
        *SYNTAXES[name].closing,
        '{"name": "f", "parameters": {',
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(corpus + bits * 3), max_size=12)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]
    reasoning, opened = data.draw(st.booleans()), data.draw(st.booleans())
    whole = parse([text], SYNTAXES[name], reasoning=reasoning, opened=opened)
    assert parse(pieces, SYNTAXES[name], reasoning=reasoning, opened=opened) == whole
    assert parse(list(text), SYNTAXES[name], reasoning=reasoning, opened=opened) == whole


@given(st.text(alphabet="ab<{\n \"'thinkol_c|>/}", max_size=60))
def test_without_a_tag_nothing_changes(text: str) -> None:
    for tag in ("<think>", "<tool_call>"):
        text = text.replace(tag, "")
    assert parse(list(text)).content == text or text.strip().startswith("<think>")


def test_what_is_not_asked_for_stays_text() -> None:
    text = (
        f"<think>\n<tool_call>{OBJECT}</tool_call>\n</think>\n\nHm\n<tool_call>{OBJECT}</tool_call>"
    )
    assert parse([text], None, reasoning=False) == Told(text)
    thought = text[: text.index("Hm")]
    assert parse([text], reasoning=False) == Told(thought + "Hm", calls=(ONE,))
    assert parse(list(text), reasoning=False) == Told(thought + "Hm", calls=(ONE,))


def test_a_block_that_the_prompt_opened() -> None:
    for pieces in (["hm\n</think>\n\nYes"], list("\nhm</think>Yes")):
        assert parse(pieces, opened=True) == Told("Yes", "hm")


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
    ),
    st.booleans(),
    st.data(),
)
def test_json_is_taken_to_its_end(value: object, ascii_only: bool, data: st.DataObject) -> None:
    text = json.dumps(
        [value], ensure_ascii=ascii_only, indent=data.draw(st.sampled_from([None, 1]))
    )
    reader = JsonValue()
    assert reader.take(text + "]", 0) == len(text)
    assert reader.done and not reader.broken
    place = data.draw(st.integers(1, len(text) - 1))
    damage = data.draw(st.sampled_from('{}[]:,"\\ 0ae\n'))
    damaged = f"{text[:place]}{damage}{text[place + 1 :]}]"
    reader = JsonValue()
    end = reader.take(damaged, 0)
    try:
        whole = json.JSONDecoder().raw_decode(damaged)[1]
    except ValueError:
        assert not reader.done
    else:
        assert (reader.done and end == whole) or damage == "0"  # 0x is no number, but begins as one


def test_arguments_are_told_as_they_are_written() -> None:
    parser = OutputParser(
        Formats(THINK, HERMES), reasoning=True, tool_calls=True, reasoning_open=False
    )
    told = []
    for piece in ("Hm\n<tool_call>\n", '{"name": "f", "argu', 'ments": {"a', '": 1', "}", "}\n"):
        parser.push(piece)
        told.append(parser.take())
    assert [part.content for part in told] == ["Hm", "", "", "", "", ""]
    fragments = [[call.arguments for call in part.tool_calls] for part in told]
    assert fragments == [[], [], ['{"a'], ['": 1'], ["}"], []]


def test_parsing_is_linear() -> None:
    """A flood of what might become a tag costs no more than any other."""
    for flood in ("<tool_cal", "\n", " ", "<", '{"name":', "<think>\n", "</think", "<tool_call>{"):
        pieces = [flood] * 5_000
        begin = time.perf_counter()
        parse(pieces)
        parse(pieces, LLAMA, opened=True)
        spent = time.perf_counter() - begin
        print(f"{flood!r}: {spent / 10_000 * 1e6:.1f} us a piece")
        assert spent < 2
