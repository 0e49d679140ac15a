"""Rotary position embedding: read from config.json, and turned into frequencies.

Owns both layouts of the settings and the formulas of the scalings, which are those of transformers.
Does not rotate anything.
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
class YarnScaling:
    """Slow frequencies are divided by factor, fast ones kept, those between blended by their index.

    Fast is more than beta_fast turns in the original context, slow less than beta_slow. truncate:
    the blend begins and ends at whole indices. attention_factor multiplies queries and keys, which
    sharpens attention. Peng et al. 2023.
    """

    factor: float
    original_max_position_embeddings: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None


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
    if kind == "yarn":
        return Rope(_positive(theta, "rope_theta"), _read_yarn(settings, key))
    if kind == "llama3":
        names = (field.name for field in fields(Llama3Scaling))
        values = {name: _positive(settings.get(name), f"{key}.{name}") for name in names}
        return Rope(_positive(theta, "rope_theta"), Llama3Scaling(**values))
    raise ModelFolderError(
        f"{key}.rope_type {kind!r} in config.json is not supported: "
        "MILI knows 'default', 'linear', 'llama3' and 'yarn'"
    )


def _read_yarn(settings: Mapping[str, Any], key: str) -> YarnScaling:
    def number(name: str, default: float | None = None) -> float:
        value = settings.get(name)
        return _positive(default if value is None else value, f"{key}.{name}")

    factor = number("factor")
    # Only together do these two mean anything.
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        scales = [_sharpening(factor, number(name)) for name in ("mscale", "mscale_all_dim")]
        inferred = scales[0] / scales[1]
    else:
        inferred = _sharpening(factor, 1.0)
    truncate = settings.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ModelFolderError(f"{key}.truncate in config.json must be a bool, not {truncate!r}")
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=number("original_max_position_embeddings"),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=truncate,
        attention_factor=number("attention_factor", inferred),
    )


def _sharpening(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


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
        case YarnScaling():
            kept = 1 - _yarn_ramp(rope.theta, rope.scaling, head_dim)
            return (1 - kept) * inverse / rope.scaling.factor + kept * inverse
    return inverse


def attention_factor(rope: Rope) -> float:
    """Return what cosines and sines are multiplied by."""
    return rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0


def _yarn_ramp(theta: float, scaling: YarnScaling, head_dim: int) -> torch.Tensor:
    """Return 0 for fast frequencies, 1 for slow ones, [head_dim / 2]."""

    def index(turns: float) -> float:
        """The frequency that turns so often in the original context, as a real index."""
        wavelength = scaling.original_max_position_embeddings / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)


def _positive(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelFolderError(f"{name} in config.json must be a positive number, not {value!r}")
    return float(value)
