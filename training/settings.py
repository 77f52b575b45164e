"""Read settings from YAML into dataclasses that pydantic checks; an error is one line."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid")
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class ConfigError(ValueError):
    """A configuration has an unknown key or an invalid value; the message names it, and what is allowed."""


def require(condition: Any, message: str) -> None:
    """Raise a ``ValueError`` with ``message`` unless ``condition`` is true; for validators."""
    if not condition:
        raise ValueError(message)


def read_settings(kind: type[T], path: Path, overrides: Mapping[str, Any]) -> T:
    """Read a YAML file.

    Args:
        kind: a pydantic dataclass; its nested dataclasses may have a ``name``, which messages give.
        path: the file.
        overrides: top-level values that replace those of the file, unless ``None``.

    Raises:
        ConfigError: the file is not a YAML mapping, or a key or value is invalid.
        FileNotFoundError: there is no such file.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a mapping of settings to values")
    both = [*values.items(), *overrides.items()]
    values = {key: value for key, value in both if value is not None}
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{path}{_message(error.errors()[0], kind, values, overrides)}") from None


def _message(error: ErrorDetails, kind: Any, values: Any, overrides: Mapping[str, Any]) -> str:
    """What is wrong with which key, and what is allowed."""
    where, loc = "", [*error["loc"]]
    if len(loc) > 1 and isinstance(loc[1], int):  # one of a list, such as a stage
        one = values[loc[0]][loc[1]]
        name = one.get("name", loc[1] + 1) if isinstance(one, dict) else loc[1] + 1
        where, loc = f", {str(loc[0]).removesuffix('s')} {name}", loc[2:]
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    key = ".".join(part for part in (loc[:-2] if loc[-1:] == ["[key]"] else loc) if isinstance(part, str))
    if error["type"] == "missing":
        return f"{where}: {key} is missing; set it there{f', or give --{key}' if key in overrides else ''}"
    if error["type"] == "unexpected_keyword_argument":
        known = ", ".join(sorted(field.name for field in fields(_kind_at(kind, error["loc"][:-1]))))
        return f"{where}: unknown key {loc[-1]!r}; known: {known}"
    allowed = error["msg"].replace("Input should", "it should").replace("tuple", "list")
    return f"{where}{f': {key}' if key else ''}: {error['input']!r} is not allowed; {allowed}"


def _kind_at(kind: Any, loc: tuple[int | str, ...]) -> Any:
    """The dataclass of nested settings."""
    for name in [part for part in loc if isinstance(part, str)]:
        hint = get_type_hints(kind)[name]
        kind = next(one for one in (hint, *get_args(hint)) if is_dataclass(one))
    return kind
