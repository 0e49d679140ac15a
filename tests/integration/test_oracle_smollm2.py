"""Greedy tokens over gRPC are those of transformers: SmolLM2, whose weights it reads from GGUF."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel

from mili.client import Message, Options
from mili.hub.pull import pull
from tests.oracle import (
    Ask,
    ask,
    check_answer,
    check_generate,
    check_greedy,
    load_demo_oracle,
)
from tests.serving import Served, serving

EOS_TOKEN_ID = 2
MAX_TOKENS = 20
GREEDY: Options = {"temperature": 0, "max_tokens": MAX_TOKENS}
LICENSE = Path(__file__).parents[2] / "LICENSE"
LENGTHS = (1, 15, 16, 17, 100, 128, 129, 900)
TEXTS = (
    "def fibonacci(n: int) -> int:\n    ",
    "In 2024, the price rose from 1,250 to",
    "Die Hauptstadt von Frankreich ist",
    "今日はとても",
    "To be, or not to be, that is the question: 🎭",
    "\n\n",
)
QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Italy?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about rain.",
    "What is 12 times 12?",
    "Name three emoji and say what they mean.",
)
SAMPLED: tuple[Options, ...] = (
    {"seed": 1, "max_tokens": 12, "temperature": 0.7},
    {"seed": 2, "max_tokens": 12, "temperature": 1.0, "top_k": 50},
    {"seed": 3, "max_tokens": 12, "temperature": 1.0, "top_p": 0.9},
    {"seed": 4, "max_tokens": 12, "temperature": 1.2, "min_p": 0.05},
    {"seed": 5, "max_tokens": 12, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1},
    {"seed": 2**64 - 1, "max_tokens": 12, "temperature": 1.0, "top_k": 50},
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two OpenMP threads beside a busy core are ten times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder() -> Path:
    return pull("smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_demo_oracle(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_in_float32(folder, tmp_path_factory.mktemp("serve") / "log") as served:
        yield served


def serving_in_float32(
    folder: Path, log: Path, *flags: str
) -> contextlib.AbstractContextManager[Served]:
    return serving(folder, log, "--dtype", "float32", *flags, MILI_NUM_THREADS="1")


@pytest.fixture(scope="module")
def chats(folder: Path) -> list[list[int]]:
    """The questions as transformers renders them: they share the model's system prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            [_message(question)], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]


def _message(question: str) -> Message:
    return {"role": "user", "content": question}


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer, chats: list[list[int]]) -> list[list[int]]:
    """Beginnings of one text, other texts, and chats: 20 in all."""
    text = tokenizer.encode(LICENSE.read_text()).ids
    others = [tokenizer.encode(other).ids for other in TEXTS]
    return [*(text[:length] for length in LENGTHS), *others, *chats]


async def test_two_waves_of_prompts(
    served: Served, oracle: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    """All at once; then each goes on after its answer, of which the server has most cached."""
    first = await ask(served.address, [Ask(prompt, GREEDY) for prompt in prompts])
    more = tokenizer.encode(" And then?").ids
    longer = [
        [*prompt, *answer.token_ids, *more] for prompt, answer in zip(prompts, first, strict=True)
    ]
    second = await ask(served.address, [Ask(prompt, GREEDY) for prompt in longer])
    for prompt, answer, next_answer in zip(prompts, first, second, strict=True):
        known = len(prompt) + len(answer.token_ids) - 1
        assert next_answer.usage.cached_prompt_tokens >= known // 16 * 16
        check_greedy(oracle, prompt, answer.token_ids, more, next_answer.token_ids)
    for answer in (*first, *second):
        check_answer(answer, tokenizer, max_tokens=MAX_TOKENS, eos_token_id=EOS_TOKEN_ID)


async def test_preemption(
    folder: Path,
    oracle: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    """With too few blocks for all, requests are thrown out and computed again."""
    short = [prompt for prompt in prompts if len(prompt) < 20]
    flags = ("--block-size", "2", "--num-gpu-blocks-override", "40")
    with serving_in_float32(folder, tmp_path / "log", *flags) as served:
        answers = await ask(served.address, [Ask(prompt, GREEDY) for prompt in short])
    assert any(answer.timing.preemptions for answer in answers)
    assert any(answer.usage.recomputed_tokens for answer in answers)
    for prompt, answer in zip(short, answers, strict=True):
        check_greedy(oracle, prompt, answer.token_ids)
        check_answer(answer, tokenizer, max_tokens=MAX_TOKENS, eos_token_id=EOS_TOKEN_ID)


async def test_chats_rendered_by_the_server(
    served: Served, oracle: PreTrainedModel, chats: list[list[int]]
) -> None:
    """Against what transformers generates by itself, from the chat to the end of the answer."""
    asks = [Ask(None, {**GREEDY, "messages": [_message(text)]}) for text in QUESTIONS[:3]]
    for prompt, answer in zip(chats, await ask(served.address, asks), strict=False):
        assert answer.usage.prompt_tokens == len(prompt)
        check_generate(oracle, prompt, answer.token_ids)


async def test_a_seed_gives_the_same_text_in_any_company(
    served: Served, prompts: list[list[int]], chats: list[list[int]]
) -> None:
    """These seeds were looked at: errors of 1e-2 in all logits do not change a token."""
    asks = [Ask(chat, options) for chat, options in zip(chats, SAMPLED, strict=True)]
    alone = [(await ask(served.address, [one]))[0] for one in asks]
    company = [Ask(prompt, GREEDY) for prompt in prompts[:8]]
    other_seed = Ask(chats[0], {**SAMPLED[0], "seed": 6})
    other, *others = await ask(served.address, [other_seed, *company, *reversed(asks)])
    together = others[: -len(asks) - 1 : -1]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert other.token_ids != alone[0].token_ids
