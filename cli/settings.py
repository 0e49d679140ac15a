"""Where a setting's value comes from: flag, environment, TOML file or default, in this order.

Owns precedence, origins, and the wording of a bad value. Does not know flags' spelling or what any
setting means: names, types, defaults, help and limits are read from the pydantic models.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mili.cli.errors import CommandError

Config = TypeVar("Config", bound=BaseModel)

_PREFIX = "MILI_"


class Given(NamedTuple):
    """A value as it was written, and where."""

    value: object
    origin: str


class Settings(NamedTuple, Generic[Config]):
    config: Config
    # By name: every setting that is not a default.
    origins: Mapping[str, str]

    def table(self, hidden: Collection[str] = ()) -> str:
        """Return lines of name, value and origin."""
        rows = [
            (name, to_text(value), self.origins.get(name, "default"))
            for name, value in self.config
            if name not in hidden
        ]
        names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
        return "\n".join(f"{n:<{names}}  {v:<{values}}  {origin}" for n, v, origin in rows)


def load(
    model: type[Config],
    flags: Mapping[str, Given],
    file: Path | None,
    *,
    hidden: Collection[str] = (),
    shared: Collection[str] = (),
    fallback: Mapping[str, Given] | None = None,
) -> Settings[Config]:
    """Merge the sources and validate; CommandError has one line for each problem.

    hidden: fields of `model` that no source may set. shared: names that the file may hold besides,
    because one file serves several commands. fallback: values weaker than every source.
    """
    names = [name for name in model.model_fields if name not in hidden]
    given = {
        **(fallback or {}),
        **(from_file(file, names, {*names, *shared}) if file is not None else {}),
        **from_environment(names),
        **flags,
    }
    return Settings(validated(model, given), {name: origin for name, (_, origin) in given.items()})


def validated(model: type[Config], given: Mapping[str, Given]) -> Config:
    """Make the config; CommandError has one line for each problem."""
    values = {name: _plain(model.model_fields[name], value) for name, (value, _) in given.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            if not problem["loc"]:
                lines.append(problem["msg"].removeprefix("Value error, "))
                continue
            name = str(problem["loc"][0])
            lines.append(_complaint(name, model.model_fields[name], given.get(name)))
        raise CommandError("\n".join(dict.fromkeys(lines))) from None


def _complaint(name: str, field: FieldInfo, given: Given | None) -> str:
    if given is None:
        return f"{name} is not set: give {name.upper()}, or {variable(name)}, or {name} in a file"
    return f"{name} = {to_text(given.value)} (from {given.origin}): must be {allowed(field)}"


def from_environment(names: Collection[str]) -> dict[str, Given]:
    """Read MILI_*; an empty variable counts as unset, as Compose files and shells leave them."""
    return {
        name: Given(value, f"environment {variable(name)}")
        for name in names
        if (value := os.environ.get(variable(name)))
    }


def from_file(path: Path, names: Collection[str], known: Collection[str]) -> dict[str, Given]:
    """Read a flat TOML file; a key that is not `known` is an error."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"cannot read the settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"the settings file {path} is not TOML: {error}") from None
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise CommandError(f"unknown setting {key} in {path}{hint}")
    return {name: Given(value, f"file {path}") for name, value in content.items() if name in names}


def variable(name: str) -> str:
    """Return the name of a setting's environment variable."""
    return _PREFIX + name.upper()


def to_environment(config: BaseModel) -> dict[str, str]:
    """Write every value that is not the default as from_environment would read it."""
    return {
        variable(name): to_text(value)
        for name, value in config
        if value != type(config).model_fields[name].get_default()
    }


def without_settings(
    environment: Mapping[str, str], models: Collection[type[BaseModel]]
) -> dict[str, str]:
    """Return the environment without any variable that sets a field of the models."""
    ours = {variable(name) for model in models for name in model.model_fields}
    return {key: value for key, value in environment.items() if key not in ours}


def to_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value)


def value_type(field: FieldInfo) -> Any:  # noqa: ANN401 (a typing form has no type of its own)
    """Return the field's annotation without `| None`."""
    if get_origin(field.annotation) is UnionType:
        (kind,) = (k for k in get_args(field.annotation) if k is not NoneType)
        return kind
    return field.annotation


def allowed(field: FieldInfo) -> str:
    """Say in words which values the field takes."""
    kind = value_type(field)
    if get_origin(kind) is Literal:
        choices = list(map(str, get_args(kind)))
        return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    words = {int: "an integer", float: "a number", bool: "true or false", Path: "a path"}
    if get_origin(kind) is tuple:
        return "a list of texts"
    return " ".join(filter(None, [words.get(kind, "a text"), _limits(field)]))


def _limits(field: FieldInfo) -> str:
    bounds = {
        bound: getattr(limit, bound)
        for limit in field.metadata
        for bound in ("ge", "gt", "le", "lt")
        if getattr(limit, bound, None) is not None
    }
    if bounds.keys() == {"ge", "le"}:
        return f"from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[bound]} {value}" for bound, value in bounds.items())


def _plain(field: FieldInfo, value: object) -> object:
    if get_origin(value_type(field)) is tuple and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, bool) and value_type(field) in (int, float):
        # Pydantic would take it for 0 or 1, but not its text.
        return to_text(value)
    return value
