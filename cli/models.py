"""Model names on the command line: find the folder, pull what is missing.

Owns the wording around hub/; does not know how models are stored or downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from mili.cli.errors import CommandError
from mili.cli.serve_config import ServeConfig
from mili.router.config import RouterConfig
from mili.worker.config import WorkerConfig

Config = TypeVar("Config", ServeConfig, RouterConfig, WorkerConfig)


def with_model_folder(config: Config, pull: bool) -> Config:
    """Return the config with `model` a folder; pull it first if asked to and missing.

    A model called by name keeps that name in the API: its folder is the hub's business.
    """
    from mili.hub.errors import ModelFolderError, ModelNotFoundError
    from mili.hub.resolve import resolve

    try:
        folder = resolve(config.model)
    except ModelNotFoundError as error:
        if not pull:
            raise CommandError(str(error)) from None
        folder = pull_model(config.model)
    except ModelFolderError as error:
        raise CommandError(str(error)) from None
    return config.model_copy(update={"model": str(folder.absolute()), **_api_name(config)})


def _api_name(config: RouterConfig | WorkerConfig) -> dict[str, tuple[str, ...]]:
    if not isinstance(config, RouterConfig) or config.served_model_name:
        return {}
    if Path(config.model).expanduser().is_dir():
        return {}
    return {"served_model_name": (config.model,)}


def pull_model(name: str) -> Path:
    """Download a model unless it is here; return its folder."""
    from mili.hub.errors import ModelFolderError
    from mili.hub.pull import pull

    try:
        return pull(name)
    except ModelFolderError as error:
        raise CommandError(str(error)) from None
