"""What "auto" chooses, by what the kernel says of the CPU; what a device cannot compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from mili.worker.dtype import choose_dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx2 avx512f", "float32"),
        ("fpu avx512f avx512_bf16", "bfloat16"),
        ("fpu avx512f amx_tile amx_bf16 amx_int8", "bfloat16"),
        ("", "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(
    tmp_path: Path, flags: str, dtype: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: amx_bf16\n"
    )
    assert choose_dtype("auto", "cpu", cpuinfo=cpuinfo) == dtype
    assert choose_dtype("float32", "cpu", cpuinfo=cpuinfo) == "float32"
    assert choose_dtype("bfloat16", "cpu", cpuinfo=cpuinfo) == "bfloat16"
    assert choose_dtype("auto", "cuda", cpuinfo=cpuinfo) == "bfloat16"


def test_auto_is_float32_where_nothing_is_known(tmp_path: Path) -> None:
    assert choose_dtype("auto", "cpu", cpuinfo=tmp_path / "missing") == "float32"


def test_a_device_that_cannot_compute_it_says_which_can() -> None:
    assert choose_dtype("float16", "cuda") == "float16"
    with pytest.raises(ValueError, match="float16 needs --device cuda"):
        choose_dtype("float16", "cpu")
    with pytest.raises(ValueError, match="float32 needs --device cpu"):
        choose_dtype("float32", "cuda")
