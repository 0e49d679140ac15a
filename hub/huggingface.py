"""Models from a Hugging Face hub, through huggingface_hub and its cache.

Owns which files of a repository MILI wants, and what huggingface_hub's exceptions mean to a person.
HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HOME work as they do everywhere else.
"""

from __future__ import annotations

import sys
from pathlib import Path

import structlog

from mili.hub.errors import PullError

WANTED_FILES = ["*.json", "*.safetensors", "*.jinja"]
# Subfolders hold other formats; consolidated files hold the same weights once more.
UNWANTED_FILES = ["*/*", "consolidated*"]

log = structlog.get_logger()


def pulled_snapshot(repository: str) -> Path | None:
    """Return the folder of a repository that was pulled completely, else None."""
    # Imported late: it takes half a second, and only hub ids need it.
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(repository, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def pull_snapshot(repository: str) -> Path:
    """Bring the newest version of a repository here, or stay with the one here if offline."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    log.info("Pulling from the hub", model=repository)
    try:
        return _snapshot(repository, local_files_only=False)
    except Exception as error:  # the hub's own, its HTTP library's, the operating system's
        raise PullError(f"{repository} cannot be pulled: {_explain(error)}") from error


def _snapshot(repository: str, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository,
            allow_patterns=WANTED_FILES,
            ignore_patterns=UNWANTED_FILES,
            local_files_only=local_files_only,
        )
    )


def _explain(error: Exception) -> str:
    """Say what went wrong and what to do. The order goes from special to general."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted; ask for it on {hub}, then set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} has no such model, or a private one; check the name, or set HF_TOKEN"
    not_in_cache = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if not_in_cache else error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and it is not all in the cache; unset it, or copy the cache"
    if isinstance(cause, errors.HfHubHTTPError):
        return f"{hub} answered with HTTP status {cause.response.status_code}; try again later"
    if not_in_cache:
        return f"{hub} cannot be reached ({cause}); check the network, or HF_ENDPOINT"
    return f"{type(error).__name__}: {error}"
