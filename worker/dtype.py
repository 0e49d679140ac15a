"""What "auto" means on this machine.

Owns the choice. Does not know torch: the router is told the dtype before the model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

# The CPU multiplies bfloat16 itself, by tiles or by vectors: half the bytes are half the time.
_BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})


def choose_dtype(
    asked: Literal["auto", "float32", "bfloat16", "float16"],
    device: Literal["cpu", "cuda"],
    *,
    cpuinfo: Path = Path("/proc/cpuinfo"),
) -> Literal["float32", "bfloat16", "float16"]:
    """auto: bfloat16 on a GPU and where the CPU multiplies it, else float32.

    Raises ValueError for what the device's kernels do not compute.
    """
    if asked == "float16" and device == "cpu":
        raise ValueError("--dtype float16 needs --device cuda: a CPU takes float32 or bfloat16")
    if asked == "float32" and device == "cuda":
        raise ValueError("--dtype float32 needs --device cpu: a GPU takes bfloat16 or float16")
    if asked != "auto":
        return asked
    if device == "cuda" or _BFLOAT16_FLAGS & _cpu_flags(cpuinfo):
        return "bfloat16"
    return "float32"


def _cpu_flags(cpuinfo: Path) -> set[str]:
    """The first core's; empty where the kernel does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    flags = (line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return set(next(flags, ()))
