"""A checkpoint's tensors: each taken once, by name and shape, and none left over.

Owns reading safetensors files and the count of what was taken. Does not know what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mili.hub.errors import ModelFolderError
from mili.hub.safetensors_file import read_header

_DTYPES = ("F32", "BF16", "F16")
_LISTED = 8


class Checkpoint:
    """The tensors of some safetensors files, converted to `dtype` as they are taken."""

    def __init__(self, files: Sequence[Path], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._file_of: dict[str, tuple[Path, Any]] = {}
        self._taken: set[str] = set()
        self.num_bytes = 0
        for path in files:
            header = read_header(path)
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelFolderError(
                    f"{path} cannot be read as safetensors ({error}): pull the model again"
                ) from error
            for name in header.names:
                if name in self._file_of:
                    raise ModelFolderError(f"{path} repeats {name} of {self._file_of[name][0]}")
                self._file_of[name] = (path, file)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Return a tensor that must exist in this shape."""
        if name not in self._file_of:
            raise ModelFolderError(f"the weight files have no {name}: is the checkpoint complete?")
        path, file = self._file_of[name]
        try:
            view = file.get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise ModelFolderError(
                    f"{name} in {path} has the shape {view.get_shape()}; "
                    f"config.json asks for {list(shape)}"
                )
            if view.get_dtype() not in _DTYPES:
                raise ModelFolderError(
                    f"{name} in {path} is {view.get_dtype()}; MILI reads {', '.join(_DTYPES)}"
                )
            tensor: torch.Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise ModelFolderError(f"{path} is damaged ({error}): pull the model again") from error
        self._taken.add(name)
        self.num_bytes += tensor.nbytes
        # A copy: the tensor itself is a view of the file, which may change under us.
        return tensor.to(self._dtype, copy=True)

    def take_derived(self, name: str, expected: torch.Tensor, source: str) -> None:
        """Take a tensor that need not exist, and must equal what it is derived from if it does."""
        if name in self and not torch.equal(
            self.take(name, *expected.shape), expected.to(self._dtype)
        ):
            raise ModelFolderError(
                f"{name} in {self._file_of[name][0]} differs from {source}, which it should equal"
            )

    def finish(self) -> None:
        """Every tensor must have been taken: one that was not means another model than we think."""
        left = sorted(self._file_of.keys() - self._taken)
        if left:
            more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
            raise ModelFolderError(
                f"the weight files have {len(left)} tensors that this architecture does not use: "
                f"{', '.join(left[:_LISTED])}{more}"
            )
