"""The stop matcher against a brute-force model, however the text is cut into pieces."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mili.router.stop import StopMatcher

sequences_of_ab = st.lists(st.text("ab", min_size=1, max_size=6), max_size=5).map(tuple)


def run(sequences: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(sequences)
    shown = ""
    for piece in pieces:
        certain, matched = matcher.push(piece)
        shown += certain
        if matched is not None:
            return shown, matched
    return shown + matcher.flush(), None


def model(sequences: tuple[str, ...], text: str) -> tuple[str, str | None]:
    """The match that ends first, the longest of those."""
    for end in range(len(text) + 1):
        ending = [sequence for sequence in sequences if text[:end].endswith(sequence)]
        if ending:
            matched = max(ending, key=len)
            return text[: end - len(matched)], matched
    return text, None


@given(sequences_of_ab, st.lists(st.text("ab", max_size=5), max_size=12))
@example(("abb", "bb", "b"), ["ab", "b"])
@settings(max_examples=1000, deadline=None)
def test_matches_the_model_for_every_chunking(
    sequences: tuple[str, ...], pieces: list[str]
) -> None:
    text = "".join(pieces)
    expected = model(sequences, text)
    assert run(sequences, pieces) == expected
    assert run(sequences, list(text)) == expected
    assert run(sequences, [text]) == expected


@given(sequences_of_ab, st.text("ab", max_size=20))
@settings(max_examples=500, deadline=None)
def test_holds_back_exactly_what_can_still_become_a_match(
    sequences: tuple[str, ...], text: str
) -> None:
    matcher = StopMatcher(sequences)
    shown = ""
    for end in range(1, len(text) + 1):
        certain, matched = matcher.push(text[end - 1])
        shown += certain
        if matched is not None:
            return
        seen = text[:end]
        prefixes = {s[:n] for s in sequences for n in range(len(s))}
        held = max((p for p in prefixes if seen.endswith(p)), key=len, default="")
        assert shown == seen.removesuffix(held)


@given(sequences_of_ab, st.text("ab", max_size=20), st.integers(0, 20))
@settings(max_examples=500, deadline=None)
def test_a_match_counts_only_if_it_ends_where_stopping_is_allowed(
    sequences: tuple[str, ...], text: str, allowed_from: int
) -> None:
    matcher = StopMatcher(sequences)
    shown, matched = "", None
    for index, character in enumerate(text):
        certain, matched = matcher.push(character, may_stop=index >= allowed_from)
        shown += certain
        if matched is not None:
            break
        seen = text[: index + 1]
        prefixes = {s[:n] for s in sequences for n in range(len(s))}
        held = max((p for p in prefixes if seen.endswith(p)), key=len, default="")
        assert shown == seen.removesuffix(held)
    if matched is None:
        shown += matcher.flush()

    for end in range(allowed_from + 1, len(text) + 1):
        ending = [sequence for sequence in sequences if text[:end].endswith(sequence)]
        if ending:
            longest = max(ending, key=len)
            assert (shown, matched) == (text[: end - len(longest)], longest)
            return
    assert (shown, matched) == (text, None)


def test_text_that_cannot_match_is_released_at_once() -> None:
    matcher = StopMatcher(("<stop>", "END"))
    assert matcher.push("all of this") == ("all of this", None)
    assert matcher.push("a <st") == ("a ", None)
    assert matcher.push("ep") == ("<step", None)
    assert matcher.push("E") == ("", None)
    assert matcher.push("END of it") == ("E", "END")


@pytest.mark.parametrize("characters", ["a]b", "^-\\", "\n\0 ", "é😀\u0301"])
def test_any_character_may_begin_a_sequence(characters: str) -> None:
    for character in characters:
        assert run((character, "x-y"), ["012", f"34{character}56"]) == (
            "01234",
            character,
        )


@pytest.mark.parametrize(
    "sequences", [("a", ""), ("é" * 513,), tuple(str(number) for number in range(65))]
)
def test_impossible_sequences_are_refused(sequences: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="stop sequence"):
        StopMatcher(sequences)


def test_time_is_linear_for_the_worst_sequences() -> None:
    """64 sequences of 1 KiB that agree to the last character, and a text that nearly matches."""
    sequences = tuple(chr(0x100 + i) + "a" * 1021 for i in range(32))
    sequences += tuple("a" * 1000 + chr(0x100 + i) for i in range(32))
    begin = time.perf_counter()
    matcher = StopMatcher(sequences)
    prepared = time.perf_counter() - begin
    text = ("a" * 999 + "b") * 200
    begin = time.perf_counter()
    for start in range(0, len(text), 4):
        _, matched = matcher.push(text[start : start + 4])
        assert matched is None
    spent = time.perf_counter() - begin
    print(f"prepared in {prepared * 1e3:.0f} ms, {spent / len(text) * 1e9:.0f} ns a character")
    # A matcher that tries every sequence or every start would take minutes.
    assert prepared < 2
    assert spent < 4


def test_one_set_of_sequences_is_prepared_once() -> None:
    sequences = tuple(chr(0x200 + i) * 300 for i in range(64))
    StopMatcher(sequences)
    begin = time.perf_counter()
    for _ in range(1000):
        StopMatcher(sequences)
    assert time.perf_counter() - begin < 0.5
