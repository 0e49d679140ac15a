"""The GEMV on each projection, and a model's whole chain of them beside cuBLAS's.

Weights of many layers are read in turn, so that the L2 cache does not help. The bytes that count
are the weights'.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from mili.kernels.gemv import VECTOR_ROWS, gemv, gemv_logits, gemv_swiglu
from tests.performance.kernels.line import Line, line, timed

ROWS = (1, 2, 4, 8)
EPSILON = 1e-6
_DEVICE = torch.device("cuda")

Call = Callable[[], object]


class Model(NamedTuple):
    name: str
    hidden: int
    intermediate: int
    layers: int
    qkv: int  # rows of the projection
    attended: int  # heads * head_dim
    vocab: int


MODELS = (
    Model("8B", 4096, 12288, 36, 6144, 4096, 151936),
    Model("0.6B", 1024, 3072, 28, 4096, 2048, 151936),
)


class Layer(NamedTuple):
    norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Step:
    """A model's weights, and the activations of a step of a few rows."""

    def __init__(self, model: Model, layers: list[Layer], head: torch.Tensor, rows: int) -> None:
        self._layers, self._head = layers, head
        self._x, self._qkv = _random(rows, model.hidden), _random(rows, model.qkv)
        self._attended = _random(rows, model.attended)
        self._gate_up = _random(rows, 2 * model.intermediate)
        self._activated = _random(rows, model.intermediate)
        self._logits = torch.empty(rows, model.vocab, dtype=torch.float32, device=_DEVICE)
        self._rounded_logits = _random(rows, model.vocab)

    def calls(self, *, overlap: bool) -> dict[str, list[Call]]:
        """By projection, one for each layer."""
        norm = [{"norm_weight": one.norm, "epsilon": EPSILON} for one in self._layers]
        add = {"residual": self._x, "overlap": overlap}
        pairs = list(zip(self._layers, norm, strict=True))
        return {
            "qkv": [
                partial(gemv, self._x, one.qkv, self._qkv, **of, overlap=overlap)
                for one, of in pairs
            ],
            "o": [partial(gemv, self._attended, one.output, self._x, **add) for one, _ in pairs],
            "gate_up": [
                partial(gemv_swiglu, self._x, one.gate_up, self._activated, **of, overlap=overlap)
                for one, of in pairs
            ],
            "down": [partial(gemv, self._activated, one.down, self._x, **add) for one, _ in pairs],
            "head": [
                partial(gemv_logits, self._x, self._head, self._logits, overlap=overlap)
                if len(self._x) <= VECTOR_ROWS
                else self._product(self._x, self._head, self._rounded_logits)
            ],
        }

    def chain(self, *, overlap: bool) -> None:
        self._run(self.calls(overlap=overlap))

    def cublas_chain(self) -> None:
        """The products alone, without norms, residuals and activation."""
        self._run(
            {
                "qkv": [self._product(self._x, one.qkv, self._qkv) for one in self._layers],
                "o": [self._product(self._attended, one.output, self._x) for one in self._layers],
                "gate_up": [
                    self._product(self._x, one.gate_up, self._gate_up) for one in self._layers
                ],
                "down": [self._product(self._activated, one.down, self._x) for one in self._layers],
                "head": [self._product(self._x, self._head, self._rounded_logits)],
            }
        )

    @staticmethod
    def _run(calls: dict[str, list[Call]]) -> None:
        *layered, head = calls.values()
        for layer in zip(*layered, strict=True):
            for call in layer:
                call()
        head[0]()

    @staticmethod
    def _product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Call:
        return partial(torch.mm, x, weight.T, out=out)


def lines() -> list[Line]:
    return [one for model in MODELS for one in _lines_of(model)]


def _lines_of(model: Model) -> list[Line]:
    layers, head = [_layer(model) for _ in range(model.layers)], _random(model.vocab, model.hidden)
    of_layer = {
        "qkv": model.qkv * model.hidden,
        "o": model.hidden * model.attended,
        "gate_up": 2 * model.intermediate * model.hidden,
        "down": model.hidden * model.intermediate,
    }
    weights = {name: 2 * size for name, size in of_layer.items()} | {"head": 2 * head.numel()}
    whole = 2 * (sum(of_layer.values()) * model.layers + head.numel())
    result = []
    for rows in ROWS:
        step, shape = Step(model, layers, head, rows), f"{model.name}, {rows} rows"
        for name, calls in step.calls(overlap=False).items():
            seconds = timed(calls, repeat=20 if name == "head" else 2)
            result.append(line(f"gemv {name}", shape, seconds, weights[name], "GB/s"))
        chains: dict[str, Call] = {
            "gemv chain": partial(step.chain, overlap=False),
            "gemv chain, overlap": partial(step.chain, overlap=True),
            "cuBLAS chain": step.cublas_chain,
        }
        for name, chain in chains.items():
            result.append(line(name, shape, timed([chain], repeat=5), whole, "GB/s"))
    return result


def _layer(model: Model) -> Layer:
    def weight(n: int, k: int) -> torch.Tensor:
        return _random(n, k).mul_(k**-0.5)

    return Layer(
        norm=_random(model.hidden),
        qkv=weight(model.qkv, model.hidden),
        output=weight(model.hidden, model.attended),
        gate_up=weight(2 * model.intermediate, model.hidden),
        down=weight(model.hidden, model.intermediate),
    )


def _random(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=_DEVICE).normal_()
