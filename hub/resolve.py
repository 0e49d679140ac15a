"""The name of a model -> its folder on this machine.

Owns the order in which a name is understood: an existing folder, a pulled short name, a pulled hub
id. Never downloads anything.
"""

from __future__ import annotations

from pathlib import Path

from mili.hub.cache import existing_folder, is_hub_id, is_short_name, model_path
from mili.hub.errors import ModelNotFoundError as ModelNotFoundError
from mili.hub.huggingface import pulled_snapshot


def resolve(name: str) -> Path:
    """Return the model's folder. Raises ModelNotFoundError, whose text says how to pull it."""
    if (folder := existing_folder(name)) is not None:
        return folder
    if name.endswith(".gguf"):
        raise ModelNotFoundError(
            f"{name!r} is not a model folder: import it with `mili pull {name}`, "
            f"then call it {Path(name).stem!r}"
        )
    if is_short_name(name):
        if (pulled := model_path(name)).is_dir():
            return pulled
    elif is_hub_id(name):
        if (snapshot := pulled_snapshot(name)) is not None:
            return snapshot
    else:
        raise ModelNotFoundError(
            f"{name!r} is not an existing folder, nor the name of a model: "
            "names look like smollm2-135m or ORG/NAME"
        )
    raise ModelNotFoundError(
        f"Model {name!r} is not on this machine: `mili pull {name}` brings it here"
    )
