"""Bring a model to this machine: the built-in demo model, a GGUF file, or a hub id.

Owns which of the three a name means. A model that is here already costs no download and no work.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

from mili.hub.cache import existing_folder, is_hub_id, is_short_name, model_path, new_model
from mili.hub.demo import DEMO_MODELS, DemoModel, fetch_gguf
from mili.hub.errors import ModelFolderError
from mili.hub.errors import PullError as PullError
from mili.hub.folder import read_model_folder
from mili.hub.hashing import fingerprint
from mili.hub.huggingface import pull_snapshot
from mili.hub.progress import Progress, show_progress

SOURCE_NAME = "gguf_source.json"


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Return the model's folder, complete.

    name: an existing folder, a path that ends in .gguf, ORG/NAME on a hub, or a short name.
    progress: hears of downloads and conversions; a bar or log lines on stderr by default. Hub
    downloads show huggingface_hub's own bars. Raises PullError.
    """
    if (folder := existing_folder(name)) is not None:
        return folder
    with nullcontext(progress) if progress is not None else show_progress() as report:
        if name.endswith(".gguf"):
            return _pull_gguf(Path(name).expanduser(), report)
        if is_short_name(name):
            return _pull_short_name(name, report)
    if is_hub_id(name):
        return _pull_hub_id(name)
    raise PullError(f"{name!r} names no model: names look like smollm2-135m or ORG/NAME")


def _pull_short_name(name: str, progress: Progress) -> Path:
    final = model_path(name)
    if final.is_dir():
        return final
    if name not in DEMO_MODELS:
        raise PullError(
            f"There is no built-in model {name!r}, only {', '.join(DEMO_MODELS)}. "
            "Other models have hub ids, ORG/NAME, or are files that end in .gguf"
        )
    with new_model(name) as folder:
        if folder is not None:
            _make_demo_model(DEMO_MODELS[name], folder, progress)
    return final


def _pull_hub_id(name: str) -> Path:
    folder = pull_snapshot(name)
    try:
        read_model_folder(folder)
    except ModelFolderError as error:
        raise PullError(f"{name} was pulled, but cannot be used: {error}") from error
    return folder


def _make_demo_model(model: DemoModel, folder: Path, progress: Progress) -> None:
    download = folder / "download"
    download.mkdir()
    _convert(fetch_gguf(model, download, progress), folder, progress)
    shutil.rmtree(download)


def _pull_gguf(path: Path, progress: Progress) -> Path:
    """Import under the file's name; refuse to mistake another file of that name for it."""
    if not path.is_file():
        raise PullError(f"{path} does not exist")
    name = path.stem
    if not is_short_name(name) or name in DEMO_MODELS:
        raise PullError(f"{path}: {name!r} cannot be the name of a model here; rename the file")
    source = {"file": path.name, "fingerprint": fingerprint(path)}
    final = model_path(name)
    if not final.is_dir():
        with new_model(name) as folder:
            if folder is not None:
                _convert(path, folder, progress)
                (folder / SOURCE_NAME).write_text(json.dumps(source) + "\n")
    if json.loads((final / SOURCE_NAME).read_text()) != source:
        raise PullError(f"{final} came from another {path.name}: remove it, or rename the file")
    return final


def _convert(source: Path, folder: Path, progress: Progress) -> None:
    try:
        # Imported late: it takes most of a second, and needs packages that a router lacks.
        from mili.hub.gguf_import import import_gguf
    except ModuleNotFoundError as error:
        raise PullError(
            f"Importing GGUF needs the package {error.name!r}: pip install 'mili[router,worker]'"
        ) from error
    import_gguf(source, folder, progress)
    read_model_folder(folder)
