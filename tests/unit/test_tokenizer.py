"""Encoding, offsets, and the detokenizer's equality with decoding all at once."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, processors

from mili.router.tokenizer import Tokenizer
from tests.tokenizer_folders import (
    TEXTS,
    byte_fallback,
    byte_level,
    every_kind,
    model_folder,
    smollm2_folder,
)

KINDS = dict(every_kind())
UNUSED_IDS = 7  # ids of the model that have no token, as in Qwen3


@pytest.fixture(scope="module")
def tokenizers_by_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    by_kind = {}
    for kind, backend in KINDS.items():
        vocab_size = backend.get_vocab_size() + UNUSED_IDS
        folder = model_folder(tmp_path_factory.mktemp("model"), backend, vocab_size=vocab_size)
        by_kind[kind] = Tokenizer(folder)
    return by_kind


@pytest.fixture(params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tokenizers_by_kind: dict[str, Tokenizer]
) -> Tokenizer:
    return tokenizers_by_kind[request.param]


@pytest.fixture
def bytewise(tmp_path: Path) -> Tokenizer:
    return Tokenizer(model_folder(tmp_path, byte_level()))


def stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> list[str]:
    """Return the delta of each token, and last the flush."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(data=st.data(), skip=st.booleans())
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_deltas_equal_decoding_at_once(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(any_id, max_size=30))
    assert "".join(stream(tokenizer, ids, skip=skip)) == tokenizer.decode(
        ids, skip_special_tokens=skip
    )


@pytest.mark.parametrize("skip", [True, False])
def test_deltas_equal_decoding_at_once_for_bytes_of_text(tokenizer: Tokenizer, skip: bool) -> None:
    """Random ids are rarely valid UTF-8: here whole texts are damaged in a few places."""
    generator = random.Random(0)
    partial = 0
    for _ in range(2000):
        texts = generator.choices(TEXTS, k=3)
        ids = tokenizer.encode("".join(texts), add_special_tokens=True)
        for _ in range(generator.randrange(3)):
            position = generator.randrange(len(ids) + 1)
            ids[position : position + generator.randrange(3)] = [
                generator.randrange(tokenizer.vocab_size)
            ]
        deltas = stream(tokenizer, ids, skip=skip)
        assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)
        partial += deltas[-1] != ""
    print(f"{partial} of 2000 had text left to flush")


def test_the_same_for_the_demo_model() -> None:
    tokenizer = Tokenizer(smollm2_folder())
    generator = random.Random(0)
    text = "The sky is blue: 世界, naïve 😀👍🏽 – <|im_end|>\n    x = 12345\t"
    for skip in (True, False):
        for _ in range(2000):
            ids = tokenizer.encode(text, add_special_tokens=True)
            for _ in range(generator.randrange(5)):
                ids[generator.randrange(len(ids))] = generator.randrange(tokenizer.vocab_size)
            assert "".join(stream(tokenizer, ids, skip=skip)) == tokenizer.decode(
                ids, skip_special_tokens=skip
            )


def test_special_tokens_may_be_shown_though_others_are_skipped(bytewise: Tokenizer) -> None:
    ids = [bytewise.token_id(token) for token in ("<|bos|>", "<|é 世|>", "<|eos|>")]
    shown = frozenset(["<|é 世|>", "no token"])
    detokenizer = bytewise.detokenizer(skip_special_tokens=True, shown=shown)
    text = "".join(detokenizer.push(token_id) for token_id in ids if token_id is not None)
    assert text + detokenizer.flush() == "<|é 世|>"


def test_a_character_is_shown_when_its_last_byte_comes(bytewise: Tokenizer) -> None:
    ids = [bytewise.encode(c, add_special_tokens=False) for c in "aé"]
    assert stream(bytewise, ids[0], skip=False) == ["a", ""]
    emoji = [KINDS["byte_level"].token_to_id(c) for c in "ðŁĳį"]  # four bytes of one thumb
    assert stream(bytewise, emoji, skip=False) == ["", "", "", "👍", ""]
    assert stream(bytewise, emoji[:3], skip=False) == ["", "", "", "�"]
    assert stream(bytewise, [*emoji[:2], *ids[0]], skip=False) == ["", "", "�a", ""]


def test_a_run_of_byte_tokens_is_shown_when_it_ends(tmp_path: Path) -> None:
    backend = byte_fallback(strip=False)
    tokenizer = Tokenizer(model_folder(tmp_path, backend))
    thumb = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "👍".encode()]
    he, end = backend.token_to_id("▁he"), backend.token_to_id("</s>")
    assert stream(tokenizer, [*thumb, he], skip=False) == ["", "", "", "", "👍 he", ""]
    assert stream(tokenizer, [*thumb, thumb[0], he], skip=False)[-2:] == ["�����" + " he", ""]
    # A special token that is left out does not end the run.
    assert stream(tokenizer, [*thumb[:2], end, *thumb[2:]], skip=True)[-1] == "👍"


def test_a_true_replacement_character_is_shown_at_once(tmp_path: Path) -> None:
    backend = byte_fallback(strip=True)
    tokenizer = Tokenizer(model_folder(tmp_path, backend))
    ids = [backend.token_to_id(piece) for piece in ("▁he", "�", "▁a")]
    assert stream(tokenizer, ids, skip=True) == ["he", "�", " a", ""]


def test_a_push_takes_well_under_ten_microseconds() -> None:
    tokenizer = Tokenizer(smollm2_folder())
    ids = tokenizer.encode(
        "The quick brown 狐狸 jumps over the lazy dog. " * 500, add_special_tokens=False
    )
    stream(tokenizer, ids, skip=True)
    begin = time.perf_counter()
    stream(tokenizer, ids, skip=True)
    per_token = (time.perf_counter() - begin) / len(ids)
    print(f"{per_token * 1e6:.2f} us a token")
    assert per_token < 10e-6


def test_encode_follows_the_post_processor(bytewise: Tokenizer) -> None:
    bos = KINDS["byte_level"].token_to_id("<|bos|>")
    without = bytewise.encode("hello", add_special_tokens=False)
    assert bytewise.encode("hello", add_special_tokens=True) == [bos, *without]
    assert bytewise.encode("", add_special_tokens=False) == []
    assert bytewise.encode_batch(["hello", ""], add_special_tokens=True) == [[bos, *without], [bos]]


def test_limits_left_by_training_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer(model_folder(tmp_path, backend))
    ids = tokenizer.encode("hello world, hello", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello world, hello"


@given(text=st.text("aé世😀 \n", max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_offsets_are_bytes_of_the_text(bytewise: Tokenizer, text: str) -> None:
    [plain] = bytewise.encode_with_offsets([text], add_special_tokens=False)
    data = text.encode()
    assert plain.ids == bytewise.encode(text, add_special_tokens=False)
    covered = set()
    for start, end in zip(plain.start_bytes, plain.end_bytes, strict=True):
        assert data[start:end].decode()  # whole characters
        covered |= {*range(start, end)}
    assert covered == {*range(len(data))}


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text("aéñ世😀 \n", max_size=20), special=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_offsets_are_those_of_the_library(
    tokenizers_by_kind: dict[str, Tokenizer], kind: str, text: str, special: bool
) -> None:
    """Whether they come from the tokens' bytes or, behind a normalizer, from its alignment."""
    encoding = KINDS[kind].encode(text, add_special_tokens=special)
    at_byte = [len(text[:index].encode()) for index in range(len(text) + 1)]
    [result] = tokenizers_by_kind[kind].encode_with_offsets([text], add_special_tokens=special)
    assert list(result.ids) == encoding.ids
    covering = [index for index in range(len(encoding.ids)) if encoding.token_to_chars(index)]
    assert [(result.start_bytes[i], result.end_bytes[i]) for i in covering] == [
        (at_byte[start], at_byte[end]) for start, end in map(encoding.token_to_chars, covering)
    ]


def test_offsets_keep_the_spaces_that_a_post_processor_trims(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    [plain] = Tokenizer(model_folder(tmp_path, backend)).encode_with_offsets(
        ["a  wor"], add_special_tokens=True
    )
    assert plain.start_bytes[1:] == plain.end_bytes[:-1]


def test_offsets_of_a_batch(bytewise: Tokenizer) -> None:
    ascii_text, other = bytewise.encode_with_offsets(["hello", "é!"], add_special_tokens=True)
    assert (ascii_text.start_bytes[0], ascii_text.end_bytes[0]) == (0, 0)  # BOS
    assert ascii_text.end_bytes[-1] == 5
    assert (other.start_bytes[-1], other.end_bytes[-1]) == (2, 3)


@pytest.mark.parametrize("ids", [[-1], [5, 10**6], [1 << 40]])
def test_ids_out_of_range_are_refused(bytewise: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token id"):
        bytewise.decode(ids, skip_special_tokens=True)


def test_text_that_needs_an_id_the_model_lacks_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(model_folder(tmp_path, byte_level(), vocab_size=200))
    with pytest.raises(ValueError, match="token id"):
        tokenizer.encode("<|bos|>", add_special_tokens=False)


def test_half_a_surrogate_pair_is_refused(bytewise: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        bytewise.encode("a\ud800", add_special_tokens=False)


def test_a_decoder_that_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.CTC()
    with pytest.raises(ValueError, match="CTC"):
        Tokenizer(model_folder(tmp_path, backend))


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    folder.tokenizer_path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer(folder)


def test_sha256_is_of_the_file(bytewise: Tokenizer, tmp_path: Path) -> None:
    data = (tmp_path / "tokenizer.json").read_bytes()
    assert bytewise.tokenizer_sha256 == hashlib.sha256(data).hexdigest()


def test_no_token_is_longer_than_the_longest(tokenizer: Tokenizer) -> None:
    texts = [
        tokenizer.decode([token_id], skip_special_tokens=False)
        for token_id in range(tokenizer.vocab_size)
    ]
    # What is no UTF-8 of its own decodes to U+FFFD.
    lengths = [len(text.replace("\ufffd", "").encode()) for text in texts]
    assert max(lengths) <= tokenizer.longest_token_bytes < 100
