"""Whole models on the GPU against transformers, with the same bfloat16 weights.

The published Qwen3 shapes, all layers, with random weights (worker/random_weights.py); a SmolLM2
shape; the demo model itself where it was pulled. transformers in float32 is the truth, and its own
bfloat16 forward (sdpa) says how far rounding may lead. Errors are norms over the vocabulary:

- Put in order, our errors are nowhere more than 1.2 times transformers'.
- At no single position is ours further off than transformers' own two ways, sdpa and eager, are
  from each other somewhere: these alone differ by 1.4 to 2.1 times, since an error is as good as
  drawn anew by every other order of additions.

The 8B model takes 33 GB in float32, and each of the others half of that: one at a time.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("cupy")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mili.kernels.norm import rms_norm
from mili.worker.random_weights import RandomCheckpoint
from tests.gpu import oracle
from tests.gpu.oracle import logits_of
from tests.gpu.steps import GREEDY, SETTINGS
from tests.model_folders import write_tokenizer
from tests.performance.qwen3 import MODELS
from tests.step_driver import StepDriver
from tests.tokenizer_folders import smollm2_folder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

SMOLLM2_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
CONFIGS = {name: model.config() for name, model in MODELS.items() if name != "tiny"} | {
    "smollm2-shape": SMOLLM2_CONFIG
}
# The last does not fit one step of CHUNK tokens; GREEDY_FROM is the one that gives greedy tokens.
LENGTHS = (1, 40, 300, 1100)
GREEDY_FROM = 2
CHUNK = 1000
# Indexes of those that are computed one token at a time, too.
STEPWISE = (0, 1, 2)
# Rows of a step that samples; lengths of them: the sum must fit one step of 8192 tokens.
GREEDY_LENGTHS = tuple(range(2, 2 + 3 * 64, 3))
WORST_RATIO = 1.2
# Times the mean error of a logit: more than four standard deviations of two logits' difference.
GREEDY_SLACK = 6.0
# Positions whose best two logits are further apart than rounding, at least.
LEAST_DECISIVE = 0.1


class Case(NamedTuple):
    folder: Path
    load_format: str


class Truth(NamedTuple):
    """Logits of each sequence, [tokens, vocab] float32, and how far transformers' bfloat16 is.

    errors: norms, [tokens]. spread: how many times the other way to attend is further off, or less
    far, where they differ most.
    """

    sequences: list[list[int]]
    logits: list[torch.Tensor]
    errors: list[torch.Tensor]
    spread: float


@pytest.fixture(params=[*CONFIGS, "demo"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    if request.param == "demo":
        yield Case(smollm2_folder().path, "auto")
    else:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[request.param]))
        write_tokenizer(tmp_path)
        yield Case(tmp_path, write_calm_weights(tmp_path))
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def write_calm_weights(folder: Path) -> str:
    """Write weights where random ones will not do; returns the format to load.

    Without QK-norm they make attention all but pick one position: then a rounding decides which,
    and after some layers an error says nothing.
    """
    case = Case(folder, "random")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "qwen3":
        return case.load_format
    model = load_rounded(case, config)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.mul_(0.5)
    model.save_pretrained(folder)
    return "auto"


@torch.no_grad()
def ask_transformers(case: Case) -> Truth:
    config = AutoConfig.from_pretrained(case.folder)
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(config.vocab_size, (length,), generator=generator).tolist()
        for length in LENGTHS
    ]
    model = load_rounded(case, config)
    rounded = [logits_of(model, sequence) for sequence in sequences]
    model.set_attn_implementation("eager")
    other = [logits_of(model, sequence) for sequence in sequences]
    model.float()
    logits = [logits_of(model, sequence) for sequence in sequences]
    errors, others = (
        [(one - true).norm(dim=1) for one, true in zip(ways, logits, strict=True)]
        for ways in (rounded, other)
    )
    ratios = torch.cat(errors) / torch.cat(others)
    return Truth(sequences, logits, errors, float(torch.maximum(ratios, 1 / ratios).max()))


def load_rounded(case: Case, config: Any) -> Any:  # noqa: ANN401
    """transformers' model, with the bfloat16 weights that MILI takes."""
    if case.load_format == "auto":
        model = AutoModelForCausalLM.from_pretrained(
            case.folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        return model.to(oracle.DEVICE)
    device = torch.device(oracle.DEVICE)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    source = RandomCheckpoint(torch.bfloat16, device, tied=config.tie_word_embeddings)
    for name, parameter in model.named_parameters():
        parameter.copy_(source.take(name, *parameter.shape))
    return model.eval()


def our_logits(driver: StepDriver, token_ids: Sequence[int], chunk: int) -> torch.Tensor:
    """After each of the tokens, [tokens, vocab] float32, computed `chunk` at a time."""
    driver.restart()
    driver.admit(1, token_ids, GREEDY)
    parts = []
    for start in range(0, len(token_ids), chunk):
        count = min(chunk, len(token_ids) - start)
        driver.step({1: count})
        parts.append(step_logits(driver.runner, count))
    return torch.cat(parts)


@torch.inference_mode()
def step_logits(runner: Any, num_tokens: int) -> torch.Tensor:  # noqa: ANN401
    """Logits after each token of the step of one row that just ended, [num_tokens, vocab] float32.

    Takes the residual stream, which the step left behind, and gives it to what the runner itself
    has for samples, as many at a time as a step may have. A step of one token left it behind the
    last layer, one of more within.
    """
    decoder = runner._decoder
    x, attended = (
        each[:num_tokens] for each in (decoder.activations.x, decoder.activations.attended)
    )
    last_x, last_attended = decoder.activations.last_x, decoder.activations.last_attended
    parts = []
    for own_x, own_attended in zip(x.split(len(last_x)), attended.split(len(last_x)), strict=True):
        samples = len(own_x)
        last_x[:samples], last_attended[:samples] = own_x, own_attended
        if num_tokens > 1:
            decoder._layers.end(
                decoder._config.num_layers - 1, last_x[:samples], last_attended[:samples]
            )
        rms_norm(
            last_x[:samples],
            decoder.weights.norm,
            decoder.activations.sampled[:samples],
            decoder._config.norm_epsilon,
        )
        parts.append(decoder.compute_logits(samples).clone())
    torch.cuda.synchronize()
    return torch.cat(parts)


def greedy_tokens(
    driver: StepDriver, token_ids: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
    """The token after each of GREEDY_LENGTHS tokens: from one step for all, and from two, of which
    the second decodes 64 rows."""
    rows = dict(enumerate(GREEDY_LENGTHS, start=1))
    answers = []
    for decode in (False, True):
        driver.restart()
        for row, length in rows.items():
            driver.admit(row, token_ids[:length], GREEDY)
        if decode:
            driver.step({row: length - 1 for row, length in rows.items()})
        result = driver.step({row: 1 if decode else length for row, length in rows.items()})
        answers.append(list(result.token_ids))
    return answers[0], answers[1]


def test_logits_and_greedy_tokens(case: Case) -> None:
    truth = ask_transformers(case)
    gc.collect()
    torch.cuda.empty_cache()
    driver = StepDriver(case.folder, **SETTINGS | {"load_format": case.load_format})
    problems = []
    slack = torch.empty(0)
    for chunk, indexes in ((CHUNK, range(len(LENGTHS))), (1, STEPWISE)):
        ours = []
        for index in indexes:
            error = our_logits(driver, truth.sequences[index], chunk) - truth.logits[index]
            ours.append(error.norm(dim=1))
            if index == GREEDY_FROM and chunk == CHUNK:
                slack = GREEDY_SLACK * error.square().mean(dim=1).sqrt()
        theirs = [truth.errors[index] for index in indexes]
        told = compare(torch.cat(ours), torch.cat(theirs), truth.spread)
        told = f"chunks of {chunk}: {told}"
        print(told)
        if "WRONG" in told:
            problems.append(told)
    problems += wrong_tokens(driver, truth, slack)
    assert not problems, "\n".join(problems)


def compare(ours: torch.Tensor, theirs: torch.Tensor, spread: float) -> str:
    """ours, theirs: norms of errors, [positions]. Says WRONG where a limit is passed."""
    ratio = ours / theirs
    ordered = float((ours.sort().values / theirs.sort().values).max())
    limit = max(WORST_RATIO, spread)
    passed = ordered <= WORST_RATIO and float(ratio.max()) <= limit  # NaN does not pass
    return (
        f"{'' if passed else 'WRONG: '}our error over transformers': {ratio.median():.3f} "
        f"(median); {ordered:.3f} in order, at most {WORST_RATIO}; {ratio.max():.3f} at position "
        f"{int(ratio.argmax())}, at most {limit:.3f}; above {WORST_RATIO} at "
        f"{(ratio > WORST_RATIO).float().mean():.1%}; theirs {theirs.median():.3g}"
    )


def wrong_tokens(driver: StepDriver, truth: Truth, slack: torch.Tensor) -> Iterator[str]:
    """What greedy tokens say against us. slack: [tokens], how far two logits may move apart."""
    ends = torch.tensor(GREEDY_LENGTHS, device=slack.device) - 1
    best = truth.logits[GREEDY_FROM][ends].topk(2, dim=1)
    gaps = best.values[:, 0] - best.values[:, 1]
    decisive = gaps > slack[ends]
    num_decisive = int(decisive.sum())
    print(f"{num_decisive} of {len(gaps)} positions are decisive")
    if num_decisive < LEAST_DECISIVE * len(gaps):
        yield f"only {num_decisive} of {len(gaps)} positions are decisive"
    answers = greedy_tokens(driver, truth.sequences[GREEDY_FROM])
    for how, tokens in zip(("prefilled", "decoded"), answers, strict=True):
        if len(tokens) != len(gaps):
            yield f"{how}: {len(tokens)} tokens of {len(gaps)} rows"
            continue
        wrong = (torch.tensor(tokens, device=gaps.device) != best.indices[:, 0]) & decisive
        if wrong.any():
            places = ends[wrong].tolist()[:8]
            yield f"{how}: {int(wrong.sum())} of {num_decisive} wrong, after positions {places}"
