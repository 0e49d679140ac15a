"""Rotary position embedding: read from config.json, and turned into frequencies.

Owns both layouts of the settings and the formulas of the scalings. Does not rotate anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from mili.hub.errors import ModelFolderError


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Slow frequencies are divided by factor, fast ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All frequencies are divided by factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    scaling: Llama3Scaling | LinearScaling | None


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (older)."""
    new = config.get("rope_parameters")
    key = "rope_scaling" if new is None else "rope_parameters"
    settings = dict(new or config.get("rope_scaling") or {})
    theta = settings.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ModelFolderError("config.json has no 'rope_theta'")
    for name, neutral in (("partial_rotary_factor", 1), ("rope_interleaved", False)):
        value = settings.get(name, config.get(name, neutral))
        if value != neutral:
            raise ModelFolderError(f"{name} {value!r} in config.json is not supported")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return Rope(_positive(theta, "rope_theta"), None)
    if kind == "linear":
        factor = _positive(settings.get("factor"), f"{key}.factor")
        return Rope(_positive(theta, "rope_theta"), LinearScaling(factor))
    if kind == "llama3":
        names = (field.name for field in fields(Llama3Scaling))
        values = {name: _positive(settings.get(name), f"{key}.{name}") for name in names}
        return Rope(_positive(theta, "rope_theta"), Llama3Scaling(**values))
    raise ModelFolderError(
        f"{key}.rope_type {kind!r} in config.json is not supported: "
        "MILI knows 'default', 'linear' and 'llama3'"
    )


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Return radians per position of each pair of elements, [head_dim / 2] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / rope.theta**exponents
    match rope.scaling:
        case LinearScaling(factor):
            return inverse / factor
        case Llama3Scaling(factor, low, high, length):
            turns = length * inverse / (2 * math.pi)  # over the original context
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return (1 - kept) * inverse / factor + kept * inverse
    return inverse


def _positive(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelFolderError(f"{name} in config.json must be a positive number, not {value!r}")
    return float(value)
