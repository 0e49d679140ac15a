"""CUDA sources, compiled for this device once and kept on disk, and how a kernel is launched.

Owns the choice of architecture, the cache key and the launch. Does not know what any kernel
computes: its wrapper checks shapes and names the arguments.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cupy
import torch
from cuda.bindings import driver

SOURCES = Path(__file__).parent / "cuda"

Constant = int | str
Argument = torch.Tensor | ctypes._SimpleCData | ctypes.Array | int | float  # type: ignore[type-arg]


class KernelError(RuntimeError):
    """A kernel could not be launched, or an earlier one broke the device's context."""

    def __init__(self, message: str, kernel: str = "") -> None:
        super().__init__(message)
        self.kernel = kernel


class Grid(NamedTuple):
    """Thread blocks and threads of a launch; shared: dynamic shared memory in bytes.

    overlap: the kernel may begin before its predecessor on the stream has ended (programmatic
    dependent launch); it must call `griddepcontrol.wait` before it reads what that one wrote. It
    changes nothing before Hopper.
    """

    blocks: tuple[int, int, int]
    threads: int
    shared: int = 0
    overlap: bool = False


class Launch:
    """A kernel with its grid, its stream and its arguments."""

    def __init__(
        self,
        name: str,
        function: driver.CUfunction,
        config: driver.CUlaunchConfig,
        arguments: tuple[Argument, ...],
    ) -> None:
        self._name, self._function, self._config = name, function, config
        # The values that the pointers point to, and the tensors that the values point to.
        self._arguments = arguments
        self._values = [_to_ctypes(argument) for argument in arguments]
        self._pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, self._values))
        self._address = ctypes.addressof(self._pointers)

    def __call__(self) -> None:
        """Launch. Raises KernelError."""
        (status,) = driver.cuLaunchKernelEx(self._config, self._function, self._address, 0)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise KernelError(f"kernel {self._name}: {status.name}", self._name)


class Kernel:
    """One `extern "C" __global__` function of a compiled module."""

    def __init__(self, name: str, compiled: cupy.RawKernel) -> None:
        self.name = name
        # Keeps the code loaded.
        self._compiled = compiled
        self._function = driver.CUfunction(compiled.kernel.ptr)
        overlap = driver.CUlaunchAttribute()
        overlap.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        overlap.value.programmaticStreamSerializationAllowed = 1
        hopper = torch.cuda.get_device_capability()[0] >= 9
        self._overlap = [overlap] if hopper else []
        # What static shared memory leaves of 48 KiB is free without asking; ask in any case.
        self._shared_limit = 0
        # By grid and stream: making one costs more than the launch.
        self._configs: dict[tuple[Grid, int], driver.CUlaunchConfig] = {}

    def launch(self, grid: Grid, *arguments: Argument) -> None:
        """Launch on torch's current stream. Raises KernelError.

        A tensor passes its address, an int an int32, a float a float32, a ctypes value or array
        (a struct) itself.
        """
        self.bind(grid, *arguments)()

    def bind(self, grid: Grid, *arguments: Argument) -> Launch:
        """The same, to be launched later and again: calling it costs no more than the driver's."""
        key = (grid, torch.cuda.current_stream().cuda_stream)
        config = self._configs.get(key)
        if config is None:
            config = self._configs[key] = self._configure(*key)
        return Launch(self.name, self._function, config, arguments)

    def _configure(self, grid: Grid, stream: int) -> driver.CUlaunchConfig:
        if grid.shared > self._shared_limit:
            self._compiled.max_dynamic_shared_size_bytes = grid.shared
            self._shared_limit = grid.shared
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid.blocks
        config.blockDimX, config.blockDimY, config.blockDimZ = grid.threads, 1, 1
        config.sharedMemBytes = grid.shared
        config.hStream = stream
        if grid.overlap:
            config.attrs = self._overlap
            config.numAttrs = len(self._overlap)
        return config


class Module:
    """A compiled source."""

    def __init__(self, raw: cupy.RawModule) -> None:
        self._raw = raw
        self._kernels: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = Kernel(name, self._raw.get_function(name))
        return self._kernels[name]


def load(name: str, **constants: Constant) -> Module:
    """Return cuda/<name>.cu compiled for the current device, with -D for each constant.

    Compiled code is kept in memory, and on disk by CuPy (CUPY_CACHE_DIR).
    """
    return _load(torch.cuda.current_device(), name, tuple(sorted(constants.items())))


def load_all(wanted: Iterable[tuple[str, dict[str, Constant]]]) -> None:
    """Compile or load several at once, on all cores, so that later `load`s return at once."""
    device = torch.cuda.current_device()
    # One that is named twice is compiled once.
    distinct = {(name, *sorted(constants.items())): (name, constants) for name, constants in wanted}

    def load_one(one: tuple[str, dict[str, Constant]]) -> None:
        with torch.cuda.device(device):
            load(one[0], **one[1])

    with ThreadPoolExecutor() as pool:
        list(pool.map(load_one, distinct.values()))


def dtype_name(dtype: torch.dtype) -> str:
    """The CUDA type of a tensor's elements, for the constant SCALAR. Raises ValueError."""
    names = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
    if dtype not in names:
        raise ValueError(f"kernels take bfloat16 and float16, not {dtype}")
    return names[dtype]


def architecture(capability: tuple[int, int]) -> str:
    """What NVRTC compiles for. On Hopper the code that only Hopper runs (wgmma) is allowed."""
    return "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"


def compile_options(arch: str, constants: Iterable[tuple[str, Constant]]) -> tuple[str, ...]:
    return (
        f"-arch={arch}",
        "-std=c++17",
        "-lineinfo",
        f"-I{SOURCES}",
        *(f"-D{key}={value}" for key, value in constants),
    )


@functools.cache
def _load(device: int, name: str, constants: tuple[tuple[str, Constant], ...]) -> Module:
    arch = architecture(torch.cuda.get_device_capability(device))
    # CuPy's key does not cover included headers.
    options = (*compile_options(arch, constants), f"-DMILI_HEADERS=0x{_headers_hash()}ull")
    raw = cupy.RawModule(code=(SOURCES / f"{name}.cu").read_text(), options=options)
    raw.compile()
    return Module(raw)


@functools.cache
def _headers_hash() -> str:
    digest = hashlib.sha256()
    for header in sorted(SOURCES.glob("*.cuh")):
        digest.update(header.name.encode() + b"\0" + header.read_bytes())
    return digest.hexdigest()[:16]


def _to_ctypes(argument: Argument) -> ctypes._SimpleCData | ctypes.Array:  # type: ignore[type-arg]
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bool):
        raise TypeError("pass 0 or 1")
    if isinstance(argument, int):
        assert -(2**31) <= argument < 2**31, argument
        return ctypes.c_int32(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return argument
