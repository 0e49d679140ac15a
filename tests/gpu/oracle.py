"""transformers on the GPU: float32 as the truth, and its own bfloat16 as the measure of an error.

Owns what counts as equal where two ways to compute the same round differently. Does not know how
the tokens that it judges came to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

DEVICE = "cuda"


class Oracle:
    """A model folder in float32. slack: what its bfloat16 logits may move one against another."""

    def __init__(self, folder: Path) -> None:
        self._model = _load(folder, torch.float32, "eager")
        rounded = _load(folder, torch.bfloat16, "sdpa")
        generator = torch.Generator().manual_seed(0)
        vocab_size = self._model.config.vocab_size
        probe = torch.randint(vocab_size, (300,), generator=generator).tolist()
        error = logits_of(rounded, probe) - self.logits(probe)
        self.slack = 2 * float(error.abs().max())

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """After each of the tokens, [tokens, vocab] float32."""
        return logits_of(self._model, token_ids)

    def head(self) -> torch.Tensor:
        """What makes logits of a final hidden state, [vocab, hidden] float32."""
        weight: torch.Tensor = self._model.get_output_embeddings().weight.detach()
        return weight

    def check_greedy(self, token_ids: Sequence[int], num_given: int, where: str) -> None:
        """Each token from num_given on must be the best after those before it, or nearly."""
        logits = self.logits(token_ids[:-1])[num_given - 1 :]  # [chosen, vocab]
        chosen = torch.tensor(token_ids[num_given:], device=logits.device)
        lost = logits.amax(dim=1) - logits.gather(1, chosen[:, None])[:, 0]
        worst = int(lost.argmax())
        assert lost[worst] <= self.slack, (
            f"{where}: output token {worst} of {len(chosen)} is {lost[worst]:.3f} below the best, "
            f"and rounding explains {self.slack:.3f}; {int((lost > self.slack).sum())} are such"
        )

    def check_same(
        self, ours: Mapping[int, Sequence[int]], others: Mapping[int, Sequence[int]], where: str
    ) -> None:
        """Rows of both must hold the same tokens up to the first near tie."""
        wrong = []
        for row in ours.keys() & others.keys():
            one, other = ours[row], others[row]
            assert len(one) == len(other), f"{where}: row {row} has {len(one)} and {len(other)}"
            pairs = enumerate(zip(one, other, strict=True))
            index = next((i for i, (a, b) in pairs if a != b), None)
            if index is not None:
                logits = self.logits(one[:index])[-1]
                gap = float(abs(logits[one[index]] - logits[other[index]]))
                if gap > self.slack:
                    wrong.append(f"row {row} at {index} of {len(one)}, gap {gap:.3f}")
        assert not wrong, (
            f"{where}: {len(wrong)} of {len(ours)} rows differ by more than rounding "
            f"({self.slack:.3f}): {'; '.join(wrong[:6])}"
        )


def _load(folder: Path, dtype: torch.dtype, attention: str) -> Any:  # noqa: ANN401
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.to(DEVICE)


@torch.inference_mode()
def logits_of(model: Any, token_ids: Sequence[int]) -> torch.Tensor:  # noqa: ANN401
    """After each of the tokens, [tokens, vocab] float32."""
    ids = torch.tensor([token_ids], device=model.device)
    logits: torch.Tensor = model(ids, use_cache=False).logits[0].float()
    return logits
