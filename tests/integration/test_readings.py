"""Log-probabilities, scores and vectors of a served model, over gRPC, equal transformers'."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from mili.v1 import embedding_pb2, embedding_pb2_grpc, inference_pb2_grpc
from mili.v1 import inference_pb2 as pb
from tests.model_folders import make_model_folder
from tests.serving import STEADY, serving

VOCAB_SIZE = 320
END_TOKEN_ID = 256  # <|endoftext|>
CLOSE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding_folder(tmp_path_factory.mktemp("models") / "tiny")


def embedding_folder(path: Path) -> Path:
    """As Qwen3-Embedding is published: tensors without a prefix, texts that end in a token."""
    make_model_folder(path, "qwen3", hidden_size=96, layers=3, heads=4, kv_heads=2)
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, path / "model.safetensors", {"format": "pt"})
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", END_TOKEN_ID)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedModel:
    """The body, with the embedding as its head."""
    torch.set_num_threads(1)
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)


@torch.inference_mode()
def states(oracle: transformers.PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Final hidden states, [tokens, hidden]."""
    return oracle(torch.tensor([list(token_ids)])).last_hidden_state[0]


@torch.inference_mode()
def logprobs(oracle: transformers.PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """After each token, [tokens, vocab] float64."""
    head = oracle.get_input_embeddings().weight
    return (states(oracle, token_ids) @ head.t()).double().log_softmax(dim=-1)


@pytest.fixture(scope="module")
def channel(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    log = tmp_path_factory.mktemp("log") / "log"
    flags = ("--max-num-batched-tokens", "48", "--max-num-seqs", "16")
    with (
        serving(folder, log, *flags, **STEADY) as served,
        grpc.insecure_channel(served.address) as channel,
    ):
        yield channel


def random_ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


def asking(prompt: Sequence[int], **output: int) -> pb.Generation:
    return pb.Generation(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(temperature=0.8, top_k=9, repetition_penalty=1.2, seed=3),
        stopping=pb.StopConditions(max_tokens=12, ignore_eos=True),
        output=pb.OutputOptions(token_ids=True, **output),
    )


def check_tokens(
    oracle: transformers.PreTrainedModel,
    token_ids: Sequence[int],
    first: int,
    told: Sequence[pb.TokenLogprob],
    alternatives: int,
) -> None:
    exact = logprobs(oracle, token_ids)
    for position, token in enumerate(told, start=first):
        row = exact[position - 1]
        assert token.token_id == token_ids[position]
        assert token.token == (bytes_of(token.token_id))
        assert abs(token.logprob - row[token.token_id]) < CLOSE
        check_rank(row, token.token_id, token.rank)
        assert [each.rank for each in token.top] == list(range(1, alternatives + 1))
        best = row.topk(alternatives).values if alternatives else torch.empty(0)
        for each, value in zip(token.top, best, strict=True):
            assert abs(each.logprob - value) < CLOSE and not each.top
            assert abs(row[each.token_id] - value) < 1e-4


def check_rank(row: torch.Tensor, token_id: int, rank: int) -> None:
    own = row[token_id]
    assert int((row > own + 1e-4).sum()) < rank <= int((row > own - 1e-4).sum())


def bytes_of(token_id: int) -> bytes:
    """Of the tests' tokenizer: 256 characters for bytes, in the alphabet's order."""
    if token_id >= 259:
        return b""
    if token_id >= 256:
        return ("<|endoftext|>", "<|im_start|>", "<|im_end|>")[token_id - 256].encode()
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return bytes([(printable + hidden)[token_id]])


@pytest.mark.parametrize("alternatives", [0, 20])
def test_a_streams_logprobs(
    channel: grpc.Channel, oracle: transformers.PreTrainedModel, alternatives: int
) -> None:
    prompt = random_ids(130, 1)
    request = pb.GenerateStreamRequest(generation=asking(prompt, top_logprobs=alternatives))
    token_ids, told = list(prompt), []
    for response in inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request):
        delta = response.event.delta
        assert len(delta.logprobs.tokens) == len(delta.token_ids)
        token_ids += delta.token_ids
        told += delta.logprobs.tokens
    assert len(told) == 12
    check_tokens(oracle, token_ids, 130, told, alternatives)


def test_a_prompts_logprobs_whole_and_in_pieces(
    channel: grpc.Channel, oracle: transformers.PreTrainedModel
) -> None:
    """Also where the prompt is cached, and computed in chunks."""
    prompt = random_ids(1000, 2)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    generation = asking(prompt, prompt_top_logprobs=2)
    generation.stopping.max_tokens = 1
    for _ in range(2):
        whole = stub.Generate(pb.GenerateRequest(generation=generation))
        assert whole.usage.cached_prompt_tokens == 0
    exact = logprobs(oracle, prompt)
    columns = whole.prompt_logprobs
    assert (columns.first_position, columns.width, len(columns.ranks)) == (1, 3, 999 * 3)
    for index in range(999):
        own, *best = range(index * 3, index * 3 + 3)
        row = exact[index]
        assert columns.token_ids[own] == prompt[index + 1]
        check_rank(row, prompt[index + 1], columns.ranks[own])
        assert [columns.ranks[each] for each in best] == [1, 2]
        for column in (own, *best):
            assert abs(columns.logprobs[column] - row[columns.token_ids[column]]) < CLOSE
        assert torch.allclose(row[[columns.token_ids[each] for each in best]], row.topk(2).values)
    position = 1
    events = [
        response.event
        for response in stub.GenerateStream(pb.GenerateStreamRequest(generation=generation))
    ]
    pieces = [each.prompt_logprobs for each in events if each.HasField("prompt_logprobs")]
    for piece in pieces:
        assert piece.first_position == position and len(piece.ranks) <= 1024 * 3
        position += len(piece.ranks) // 3
    assert position == 1000
    assert events[0].HasField("started") and events[1].HasField("prompt_logprobs")
    ids = [token for piece in pieces for token in piece.token_ids]
    assert ids == list(columns.token_ids)


def test_logprobs_change_no_token(channel: grpc.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    prompt = random_ids(70, 3)
    outputs = [
        stub.Generate(pb.GenerateRequest(generation=asking(prompt, **asked))).sequences[0]
        for asked in ({}, {"top_logprobs": 5, "prompt_top_logprobs": 0})
    ]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert not outputs[0].HasField("logprobs")
    assert len(outputs[1].logprobs.tokens) == 12


def test_vectors(channel: grpc.Channel, oracle: transformers.PreTrainedModel) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
    texts = ["A cat sat.", "x", "The river runs to the sea. " * 5]
    ids = [random_ids(count, 4) for count in (1, 200)]
    inputs = [embedding_pb2.EmbedInput(text=text) for text in texts]
    inputs += [embedding_pb2.EmbedInput(token_ids=pb.TokenIds(ids=each)) for each in ids]
    tokens = [[*encode(text), END_TOKEN_ID] for text in texts] + ids
    plain = stub.Embed(embedding_pb2.EmbedRequest(inputs=inputs, normalize=False))
    unit = stub.Embed(embedding_pb2.EmbedRequest(inputs=inputs))
    short = stub.Embed(embedding_pb2.EmbedRequest(inputs=inputs, dimensions=32))
    assert plain.usage.prompt_tokens == sum(map(len, tokens))
    assert plain.usage.completion_tokens == 0
    for index, token_ids in enumerate(tokens):
        state = states(oracle, token_ids)[-1]
        for response, expected in (
            (plain, state),
            (unit, state / state.norm()),
            (short, state[:32] / state[:32].norm()),
        ):
            values = torch.tensor(response.embeddings[index].values)
            assert values.shape == expected.shape
            assert (values - expected).abs().max() < CLOSE


def encode(text: str) -> list[int]:
    of_byte = {bytes_of(token_id): token_id for token_id in range(256)}
    return [of_byte[bytes([byte])] for byte in text.encode()]


def test_scores(channel: grpc.Channel, oracle: transformers.PreTrainedModel) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
    context = random_ids(100, 5)
    greedy = list(context)
    for _ in range(4):
        greedy.append(int(logprobs(oracle, greedy)[-1].argmax()))
    continuations = [random_ids(1, 6), random_ids(60, 7), greedy[100:], [*greedy[100:], 5]]
    response = stub.Score(
        embedding_pb2.ScoreRequest(
            context=embedding_pb2.EmbedInput(token_ids=pb.TokenIds(ids=context)),
            continuations=[
                embedding_pb2.EmbedInput(token_ids=pb.TokenIds(ids=ids)) for ids in continuations
            ],
        )
    )
    for ids, score in zip(continuations, response.scores, strict=True):
        exact = logprobs(oracle, context + ids)
        expected = sum(float(exact[100 + at - 1][token]) for at, token in enumerate(ids))
        assert score.num_tokens == len(ids)
        assert math.isclose(score.logprob, expected, abs_tol=CLOSE * len(ids))
    assert [score.is_greedy for score in response.scores] == [False, False, True, False]
    assert response.usage.prompt_tokens == 100 + 1 + 60 + 4 + 5
    assert response.usage.cached_prompt_tokens == 0
    text = embedding_pb2.ScoreRequest(
        context=embedding_pb2.EmbedInput(text="Water "),
        continuations=[embedding_pb2.EmbedInput(text="runs")],
    )
    (score,) = stub.Score(text).scores
    ids = [*encode("Water "), END_TOKEN_ID, *encode("runs")]
    exact = logprobs(oracle, ids)
    expected = sum(float(exact[at - 1][ids[at]]) for at in range(len(ids) - 4, len(ids)))
    assert math.isclose(score.logprob, expected, abs_tol=4 * CLOSE)
