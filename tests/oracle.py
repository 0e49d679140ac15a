"""transformers as the oracle of greedy tokens, and many requests at once to ask MILI for them.

Owns the comparison. Does not know which model or which prompts are compared.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import gguf
import torch
import transformers
from tokenizers import Tokenizer

from mili.client import AsyncClient, AsyncTextStream, Generation, Options
from mili.hub.demo import DEMO_MODELS, fetch_gguf

# Two ways to compute the same float32 logits may rank those this close either way.
NEAR_TIE = 1e-4


class Ask(NamedTuple):
    """prompt: None where the options have messages."""

    prompt: Sequence[int] | None
    options: Options


async def ask(address: str, asks: Sequence[Ask]) -> list[Generation]:
    """Stream the answers to all requests at once."""
    async with AsyncClient(address) as client:
        streams = [client.stream(prompt, **options) for prompt, options in asks]
        await asyncio.gather(*map(_read, streams))
        return [stream.generation for stream in streams]


async def _read(stream: AsyncTextStream) -> None:
    async for _ in stream:
        pass


def load_oracle(folder: Path, gguf_file: str | None = None) -> transformers.PreTrainedModel:
    """Load a model folder, or only the GGUF file in it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file, dtype=torch.float32
    )


def load_demo_oracle(folder: Path) -> transformers.PreTrainedModel:
    """Load SmolLM2 from its GGUF file, downloaded into `folder`: nothing that MILI converted."""
    path = fetch_gguf(DEMO_MODELS["smollm2-135m"], folder, lambda what, done, total: None)
    # transformers parses the file twice and builds the same map for every module: 20 s in all.
    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        return load_oracle(folder, path.name)


def check_greedy(model: transformers.PreTrainedModel, *turns: Sequence[int]) -> None:
    """Each generated token must be the best one after all that stands before it.

    turns: given and generated tokens by turns, given first. One forward pass over MILI's own
    output, so that a near-tie is excused and no token after it is.
    """
    token_ids = list(chain.from_iterable(turns))
    logits = _logits(model, token_ids, len(token_ids) - len(turns[0]))
    for turn in range(1, len(turns), 2):
        start = sum(map(len, turns[1:turn]))
        for index, token_id in enumerate(turns[turn]):
            best = int(logits[start + index].argmax())
            _check_choice(logits[start + index], token_id, best, f"turn {turn}, token {index}")


def check_generate(
    model: transformers.PreTrainedModel, prompt: Sequence[int], output: Sequence[int]
) -> None:
    """The output must be what transformers generates, up to the first near-tie."""
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=len(output),
    )
    expected = generated[0, len(prompt) :].tolist()
    for index, (ours, theirs) in enumerate(zip(output, expected, strict=True)):
        if ours != theirs:
            logits = _logits(model, [*prompt, *output[: index + 1]], 1)[0]
            _check_choice(logits, ours, theirs, f"token {index}")
            return


def _logits(
    model: transformers.PreTrainedModel, token_ids: Sequence[int], count: int
) -> torch.Tensor:
    """The logits by which the last `count` of the tokens should be chosen, [count, vocab]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids[:-1]]), logits_to_keep=count).logits
    return logits[0]


def _check_choice(logits: torch.Tensor, token_id: int, best: int, where: str) -> None:
    """logits: [vocab]."""
    if token_id != best:
        gap = float(abs(logits[best] - logits[token_id]))
        place = f"{where}: {token_id}, where {best} is better by {gap:.1e}"
        assert gap <= NEAR_TIE, place
        # pytest prints it at the end of the run, unlike the output of a test that passes.
        warnings.warn(f"near tie at {place}", stacklevel=3)


def check_answer(
    generation: Generation, tokenizer: Tokenizer, *, max_tokens: int, eos_token_id: int
) -> None:
    """The streamed text must be what the tokens decode to at once, and the end where it should."""
    *before, last = generation.token_ids
    assert eos_token_id not in before
    ended = last == eos_token_id
    assert generation.finish_reason == ("eos" if ended else "max_tokens")
    assert ended or len(generation.token_ids) == max_tokens
    assert generation.usage.completion_tokens == len(generation.token_ids)
    assert generation.text == tokenizer.decode(generation.token_ids)
