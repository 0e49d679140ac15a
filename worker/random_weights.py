"""Random weights in place of files, for benchmarks: the same name, seed and shape, the same values.

Owns the distributions. Does not know which tensors a model has: whatever is asked for is there.

Norms are uniform in [0.5, 1.5]; every other matrix has the standard deviation 2 / sqrt(columns), so
that a layer's output is about twice its normed input and logits spread by about 2. An embedding
that is not also the head has standard deviation 1.
"""

from __future__ import annotations

import hashlib
import time

import structlog
import torch

log = structlog.get_logger()

_BIAS_STD = 0.5
_GAIN = 2.0


class RandomCheckpoint:
    """A WeightSource without files. The values depend on the kind of device that draws them."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, *, tied: bool, seed: int = 0
    ) -> None:
        """tied: the embedding is the head, too."""
        self.num_bytes = 0
        self._dtype = dtype
        self._device = device
        self._tied = tied
        self._seed = seed
        self._started = time.perf_counter()

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Draw the tensor of this name and shape."""
        return self._draw(torch.empty(shape, dtype=self._dtype, device=self._device), name)

    def take_into(self, target: torch.Tensor, name: str) -> None:
        """Draw into target, which may be a part of a larger tensor."""
        if target.is_contiguous():
            self._draw(target, name)
        else:  # where a value lands would depend on the strides
            target.copy_(self.take(name, *target.shape))

    def take_derived(self, name: str, expected: torch.Tensor, source: str) -> None:
        """A derived tensor is never stored."""

    def finish(self) -> None:
        """Wait until all is drawn."""
        torch.get_device_module(self._device).synchronize()
        log.info(
            "random weights are drawn",
            megabytes=round(self.num_bytes / 1e6),
            seconds=round(time.perf_counter() - self._started, 2),
            seed=self._seed,
        )

    def _draw(self, target: torch.Tensor, name: str) -> torch.Tensor:
        key = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator(self._device)
        generator.manual_seed(int.from_bytes(key[:7], "little"))
        self.num_bytes += target.nbytes
        if name.endswith("norm.weight"):
            return target.uniform_(0.5, 1.5, generator=generator)
        return target.normal_(std=self._standard_deviation(name, target), generator=generator)

    def _standard_deviation(self, name: str, target: torch.Tensor) -> float:
        if name.endswith(".bias"):
            return _BIAS_STD
        if name.endswith("embed_tokens.weight") and not self._tied:
            return 1.0
        return float(_GAIN / target.shape[-1] ** 0.5)
