"""Text of an output against a brute-force model: decode everything, then cut."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mili.router.outcome import Finish, FinishReason
from mili.router.output import DetokenizedOutput
from mili.router.tokenizer import Tokenizer
from tests.tokenizer_folders import byte_level, every_kind, model_folder, smollm2_folder

KINDS = dict(every_kind())
ENDED = Finish(FinishReason.MAX_TOKENS)
SLOW_SETUP = [HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer(model_folder(tmp_path_factory.mktemp("model"), KINDS[request.param]))


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(model_folder(tmp_path_factory.mktemp("model"), byte_level()))


def output(
    tokenizer: Tokenizer, *stop_sequences: str, include: bool = False, skip: bool = True
) -> DetokenizedOutput:
    return DetokenizedOutput(
        tokenizer,
        skip_special_tokens=skip,
        stop_sequences=stop_sequences,
        include_stop_text=include,
    )


def run(
    text_output: DetokenizedOutput, ids: list[int], min_tokens: int = 0
) -> tuple[str, str | None]:
    """Return all text, and the match if a push reported one."""
    shown, matched = "", None
    for count, token_id in enumerate(ids, start=1):
        matched = text_output.push(token_id, may_stop=count > min_tokens)
        shown += text_output.take()
        if matched is not None:
            break
    text_output.finish(ENDED)
    return shown + text_output.take(), matched


def cut(text: str, stop_sequences: list[str], include: bool, allowed_from: int = 0) -> str:
    """Cut at the match that ends first after allowed_from characters, the longest of those."""
    for end in range(allowed_from + 1, len(text) + 1):
        ending = [stop for stop in stop_sequences if text[:end].endswith(stop)]
        if ending:
            return text[:end] if include else text[: end - max(map(len, ending))]
    return text


# Few ids and short sequences of the same characters, so that many match.
def some_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    known = tokenizer.encode("a 世界hello é😀 ab", add_special_tokens=False)
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    return data.draw(st.lists(st.sampled_from(known) | any_id, max_size=25))


def some_stops(data: st.DataObject, text: str) -> list[str]:
    """Return sequences that are in the text, and others."""
    stops = data.draw(st.lists(st.text("alo世 �", min_size=1, max_size=3), max_size=3))
    if text:
        begin = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[begin : begin + data.draw(st.integers(1, 6))])
    return stops


@given(data=st.data(), include=st.booleans(), skip=st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=SLOW_SETUP)
def test_text_is_the_decoded_text_cut_at_the_stop(
    tokenizer: Tokenizer, data: st.DataObject, include: bool, skip: bool
) -> None:
    ids = some_ids(data, tokenizer)
    text = tokenizer.decode(ids, skip_special_tokens=skip)
    stops = some_stops(data, text)
    shown, matched = run(output(tokenizer, *stops, include=include, skip=skip), ids)
    assert shown == cut(text, stops, include)
    assert matched is None or matched in stops


@given(data=st.data(), min_tokens=st.integers(0, 12))
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW_SETUP)
def test_a_stop_counts_only_if_a_token_past_the_minimum_completes_it(
    bytewise: Tokenizer, data: st.DataObject, min_tokens: int
) -> None:
    ids = some_ids(data, bytewise)
    text = bytewise.decode(ids, skip_special_tokens=True)
    stops = some_stops(data, text)
    shown, _ = run(output(bytewise, *stops), ids, min_tokens)

    detokenizer = bytewise.detokenizer(skip_special_tokens=True)
    before = "".join(detokenizer.push(token_id) for token_id in ids[:min_tokens])
    allowed_from = len(text) if min_tokens >= len(ids) else len(before)
    assert shown == cut(text, stops, include=False, allowed_from=allowed_from)


def test_text_is_held_only_while_a_stop_may_be_in_it(bytewise: Tokenizer) -> None:
    text_output = output(bytewise, "hello!")
    shown = []
    for character in "a hello hello! b":
        matched = text_output.push(
            *bytewise.encode(character, add_special_tokens=False), may_stop=True
        )
        shown.append(text_output.take())
        if matched:
            break
    assert shown == ["a", " ", *[""] * 5, "hello ", *[""] * 6]
    text_output.finish(ENDED)
    assert text_output.take() == ""


def test_the_rest_of_the_token_that_completes_a_stop_is_dropped(bytewise: Tokenizer) -> None:
    token_id = KINDS["byte_level"].token_to_id("été x")
    for include, expected in ((False, "é"), (True, "ét")):
        text_output = output(bytewise, "t", include=include)
        assert text_output.push(token_id, may_stop=True) == "t"
        text_output.finish(ENDED)
        assert text_output.take() == expected


def test_a_stop_that_straddles_the_minimum_counts(bytewise: Tokenizer) -> None:
    a, b = (bytewise.encode(c, add_special_tokens=False)[0] for c in "ab")
    assert run(output(bytewise, "ab"), [a, b, a, b], min_tokens=2) == ("ab", "ab")
    assert run(output(bytewise, "ab"), [a, b, a, b], min_tokens=1) == ("", "ab")


def test_a_stop_may_be_the_text_of_a_special_token(bytewise: Tokenizer) -> None:
    ids = bytewise.encode("a<|eos|>b", add_special_tokens=False)
    assert run(output(bytewise, "<|eos|>", skip=False), ids) == ("a", "<|eos|>")
    assert run(output(bytewise, "<|eos|>", skip=True), ids) == ("ab", None)


def test_a_push_takes_well_under_ten_microseconds() -> None:
    tokenizer = Tokenizer(smollm2_folder())
    text = "The quick brown 狐狸 jumps over the lazy dog.\n" * 500
    ids = tokenizer.encode(text, add_special_tokens=False)
    stops = ("\n\nUser:", "</answer>", "the lazy cat", "<|im_end|>")
    run(output(tokenizer, *stops), ids)
    begin = time.perf_counter()
    shown, _ = run(output(tokenizer, *stops), ids)
    per_token = (time.perf_counter() - begin) / len(ids)
    print(f"{per_token * 1e6:.2f} us a token, with 4 stop sequences")
    assert shown == text
    assert per_token < 10e-6
