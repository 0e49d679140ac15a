"""Grammars of a worker: prepared, released, and every row's place in its own."""

from __future__ import annotations

import json
import queue
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from mili.hub.grammars import GrammarCompiler, GrammarKind
from mili.internal.v1 import step_pb2 as pb
from mili.worker.grammars import Grammars, RowGrammar
from tests.model_folders import EOS_TOKEN_ID, SPECIAL_TOKENS, write_tokenizer
from tests.tokenizer_folders import model_folder

VOCAB_SIZE = 320
# Byte-level tokenizers write bytes that are no letters as other characters, behind all letters.
LINE_BREAK = sorted(pre_tokenizers.ByteLevel.alphabet()).index("Ċ")


@pytest.fixture
def grammars(tmp_path: Path) -> Grammars:
    return make_grammars(tmp_path)


def make_grammars(path: Path, eos: tuple[int, ...] = (EOS_TOKEN_ID,)) -> Grammars:
    write_tokenizer(path)
    folder = model_folder(path, vocab_size=VOCAB_SIZE)
    generation = replace(folder.generation, eos_token_ids=eos)
    return Grammars(replace(folder, generation=generation))


def ids(text: str) -> list[int]:
    """The tokenizer's letters are in the order of the characters that stand for bytes."""
    return [ord(letter) - ord("!") for letter in text]


def prepare(
    grammars: Grammars,
    source: str,
    *,
    kind: pb.GrammarKind.ValueType = pb.GRAMMAR_KIND_REGEX,
    number: int = 1,
    after: Sequence[int] = (),
) -> str:
    """Returns the error."""
    replies: queue.SimpleQueue[pb.Prepared] = queue.SimpleQueue()
    grammar = pb.Grammar(kind=kind, source=source, start_after_token_ids=after)
    grammars.prepare(pb.Prepare(id=number, grammar=grammar), replies.put)
    reply = replies.get(timeout=10)
    assert reply.id == number
    return reply.error


def test_a_library_that_breaks_down_is_answered(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it panics with is no Exception; and who waits for the answer would wait for ever."""

    class PanicError(BaseException):
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicError("the grammar's text")

    monkeypatch.setattr(GrammarCompiler, "compile", panic)
    assert prepare(grammars, "a") == "PanicError while it was prepared"


def admit(
    grammars: Grammars, known: list[int], num_prompt_tokens: int = 1, number: int = 1
) -> RowGrammar:
    admission = pb.Admission(
        row=3,
        token_ids=np.array(known, "<u4").tobytes(),
        num_prompt_tokens=num_prompt_tokens,
        grammar=number,
    )
    grammars.admit([admission])
    return grammars.rows[3]


def allowed(grammars: Grammars, row: RowGrammar) -> set[int]:
    (found,) = allowed_together(grammars, [row])
    return found


def allowed_together(grammars: Grammars, rows: Sequence[RowGrammar]) -> list[set[int]]:
    masks = np.empty((len(rows), grammars.num_words), np.int32)
    grammars.fill(masks, rows)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :VOCAB_SIZE]
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def test_masks_of_many_rows_are_those_of_each_alone(grammars: Grammars) -> None:
    """Some have not begun: all is allowed there but the end."""
    assert prepare(grammars, "(a|bc|de?)+") == prepare(grammars, "x+", number=2, after=[7]) == ""
    rows = []
    for output in ("", "a", "ab", "bcd", "d", "dea"):
        known = [9, *ids(output)]
        rows.append(admit(grammars, known))
        rows.append(admit(grammars, known, number=2))
    rows.append(admit(grammars, [9, 7], number=2))
    assert allowed_together(grammars, rows) == [allowed(grammars, row) for row in rows]
    assert allowed(grammars, rows[-1]) == {*ids("x"), LINE_BREAK}
    assert len({frozenset(allowed(grammars, row)) for row in rows}) == 6


def test_a_row_is_led_through_its_grammar_to_the_end(grammars: Grammars) -> None:
    assert prepare(grammars, "ab?") == ""
    row = admit(grammars, [9])
    assert allowed(grammars, row) == set(ids("a"))
    row.take(ids("a"))
    assert allowed(grammars, row) == {*ids("b"), EOS_TOKEN_ID}
    row.take(ids("b"))
    assert allowed(grammars, row) == {EOS_TOKEN_ID}
    row.take([EOS_TOKEN_ID])
    row.take([EOS_TOKEN_ID])  # of a step that was sent before the router knew
    row.take(ids("z"))
    assert not row.has_failed


def test_an_output_goes_on_where_it_was(grammars: Grammars) -> None:
    prepare(grammars, "a{5}b|a{3}c")
    row = admit(grammars, [9, 8, *ids("aaa")], num_prompt_tokens=2)
    assert allowed(grammars, row) == set(ids("ac"))
    assert allowed(grammars, admit(grammars, [9, 8], num_prompt_tokens=2)) == set(ids("a"))


def test_a_literal_that_reads_like_a_control_token_is_text(grammars: Grammars) -> None:
    """On several cores too, where the library asks Python what tokens a text has."""
    text = "a<|im_start|>b"
    assert prepare(grammars, f'start: "{text}"', kind=pb.GRAMMAR_KIND_LARK) == ""
    schema = json.dumps({"const": text})
    assert prepare(grammars, schema, kind=pb.GRAMMAR_KIND_JSON_SCHEMA, number=2) == ""
    plain, quoted = admit(grammars, [9]), admit(grammars, [9], number=2)
    quoted.take(ids('"'))
    for token_id in ids(text):
        assert allowed_together(grammars, [plain, quoted]) == [{token_id}] * 2
        for row in (plain, quoted):
            row.take([token_id])
    assert allowed_together(grammars, [plain, quoted]) == [{EOS_TOKEN_ID}, set(ids('"'))]


def test_a_grammar_can_ask_for_a_control_token(grammars: Grammars) -> None:
    assert prepare(grammars, 'start: <|im_start|> "b"', kind=pb.GRAMMAR_KIND_LARK) == ""
    row = admit(grammars, [9])
    assert allowed(grammars, row) == {SPECIAL_TOKENS.index("<|im_start|>") + 256}
    row.take([SPECIAL_TOKENS.index("<|im_start|>") + 256])
    assert allowed(grammars, row) == set(ids("b"))


def test_rows_of_one_grammar_do_not_disturb_each_other(grammars: Grammars) -> None:
    prepare(grammars, "ab|ba")
    first, second = admit(grammars, [9]), admit(grammars, [9])
    first.take(ids("a"))
    assert allowed(grammars, second) == set(ids("ab"))
    assert allowed(grammars, first) == set(ids("b"))


def test_a_grammar_begins_behind_the_reasoning(grammars: Grammars) -> None:
    after = ids("</r>")
    prepare(grammars, "x", after=after)
    row = admit(grammars, [9, *ids("hm</")])
    everything = set(range(VOCAB_SIZE))
    assert allowed(grammars, row) == everything - {EOS_TOKEN_ID}
    row.take(ids("r"))
    assert allowed(grammars, row) == everything - {EOS_TOKEN_ID}
    row.take(ids(">"))
    assert allowed(grammars, row) == {*ids("x"), LINE_BREAK}
    again = admit(grammars, [9, *ids("<</r>x")])
    assert allowed(grammars, again) == {EOS_TOKEN_ID}


SOURCES = {
    pb.GRAMMAR_KIND_REGEX: r"/\{+",
    pb.GRAMMAR_KIND_LARK: 'start: "/" open+\nopen: "{"',
    pb.GRAMMAR_KIND_JSON_SCHEMA: '{"const": 7, "description": "@part }"}',
}


@pytest.mark.parametrize("kind", SOURCES)
def test_line_breaks_may_stand_between(grammars: Grammars, kind: pb.GrammarKind.ValueType) -> None:
    """Two, as models write them; what fits is the same behind them."""
    assert prepare(grammars, SOURCES[kind], kind=kind, after=ids(">")) == ""
    first = set(ids("7" if kind == pb.GRAMMAR_KIND_JSON_SCHEMA else "/"))
    row = admit(grammars, [9, *ids(">")])
    assert allowed(grammars, row) == {*first, LINE_BREAK}
    row.take([LINE_BREAK])
    assert allowed(grammars, row) == {*first, LINE_BREAK}
    row.take([LINE_BREAK])
    assert allowed(grammars, row) == first
    row.take([*first])
    assert allowed(grammars, row) <= {*ids("{"), EOS_TOKEN_ID}
    assert not row.has_failed


def test_tokens_that_do_not_fit_are_a_failure(grammars: Grammars) -> None:
    prepare(grammars, "ab")
    row = admit(grammars, [9, *ids("b")])
    assert row.has_failed and grammars.has_failed(3)
    allowed(grammars, row)
    assert row.has_failed


def test_a_row_that_is_admitted_without_a_grammar_has_none(grammars: Grammars) -> None:
    prepare(grammars, "ab")
    admit(grammars, [9])
    grammars.admit([pb.Admission(row=3)])
    assert not grammars.rows


def test_any_of_the_models_ends_may_end_an_output(tmp_path: Path) -> None:
    grammars = make_grammars(tmp_path, eos=(257, EOS_TOKEN_ID))
    prepare(grammars, "a")
    row = admit(grammars, [9, *ids("a")])
    assert allowed(grammars, row) == {257, EOS_TOKEN_ID}
    row.take([257])
    assert not row.has_failed


def test_what_is_wrong_is_said_and_what_is_released_is_gone(grammars: Grammars) -> None:
    assert "unclosed" in prepare(grammars, "(a")
    with pytest.raises(KeyError):
        admit(grammars, [9])
    prepare(grammars, "a")
    row = admit(grammars, [9])
    grammars.prepare(pb.Prepare(id=1, release=True), lambda reply: pytest.fail("nobody waits"))
    prepare(grammars, "b", number=2)  # behind it
    with pytest.raises(KeyError):
        admit(grammars, [9])
    assert allowed(grammars, row) == set(ids("a"))


def test_a_new_epoch_forgets_everything(grammars: Grammars) -> None:
    prepare(grammars, "a")
    admit(grammars, [9])
    grammars.reset()
    assert not grammars.rows
    with pytest.raises(KeyError):
        admit(grammars, [9])


def test_a_model_that_nothing_ends_has_no_grammars(tmp_path: Path) -> None:
    grammars = make_grammars(tmp_path, eos=())
    assert list(grammars.capabilities) == []
    assert "ends" in prepare(grammars, "a")


def test_kinds_are_those_of_the_link() -> None:
    names = {f"GRAMMAR_KIND_{kind.name}": kind.value for kind in GrammarKind}
    assert names == {key: value for key, value in pb.GrammarKind.items() if value}
