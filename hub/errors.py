"""What can be wrong with a model: the errors that hub raises, and nothing else.

Every text names the file or name, the problem, and what to do about it.
"""

from __future__ import annotations


class ModelFolderError(ValueError):
    """A model folder cannot be used as it is."""


class ModelNotFoundError(ModelFolderError):
    """No folder, pulled model or hub id of that name is on this machine."""


class PullError(ModelFolderError):
    """A model could not be brought to this machine. Nothing half-made is left behind."""
