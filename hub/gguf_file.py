"""A GGUF file: its metadata by key and its tensors, with clear errors for what is missing.

Owns the opening of the file. Does not know what the keys mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import gguf

from mili.hub.errors import PullError

T = TypeVar("T")


class GgufFile:
    """An open GGUF file. `tensors` are gguf's own ReaderTensors, memory-mapped.

    Raises PullError when the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, LookupError) as error:
            raise PullError(
                f"{path} is not a readable GGUF file, or was cut short ({error}): get it again"
            ) from error
        self.tensors: list[gguf.ReaderTensor] = reader.tensors
        self.keys = list(reader.fields)
        self._fields: dict[str, gguf.ReaderField] = reader.fields

    def get(self, key: str) -> object:
        """Return the value of a metadata key, None if the file lacks it."""
        field = self._fields.get(key)
        return None if field is None else field.contents()

    def require(self, key: str, kind: type[T]) -> T:
        """Return the value of a key that must be there, and of that type."""
        value = self.get(key)
        if not isinstance(value, kind):
            problem = "missing" if value is None else f"{value!r}"
            raise self.refusal(f"{key} must be of type {kind.__name__}, and is {problem}")
        return value

    def refusal(self, problem: str) -> PullError:
        return PullError(
            f"{self.path} cannot be imported: {problem}. "
            "If the model is on a hub in safetensors, pull it by its id, as in mili pull ORG/NAME"
        )
