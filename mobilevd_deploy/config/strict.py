"""Strict readers: they turn dictionaries and TOML files into dataclasses; errors name the key."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from mobilevd_deploy.config.data import data_dir
from mobilevd_deploy.errors import SpecError

T = TypeVar("T")


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Build dataclass `cls` from TOML or JSON values.

    `where` is the key path of the values in error messages. Raises SpecError, naming the key, for an unknown
    or missing key, a wrong type, or a value that the dataclass refuses.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    label = where or cls.__name__
    if not isinstance(values, dict):
        raise SpecError(f"{label}: expected a table, found {values!r}")
    if unknown := sorted(set(values) - known):
        raise SpecError(f"{label}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    converted = {
        key: _convert(hints[key], value, f"{where}.{key}" if where else key) for key, value in values.items()
    }
    try:
        return cls(**converted)
    except TypeError as error:
        raise SpecError(f"{label}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):  # True == 1
            raise SpecError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SpecError(f"{where}: expected a list, found {value!r}")
        hints = args[:1] * len(value) if args[1:] == (Ellipsis,) else args
        if len(hints) != len(value):
            raise SpecError(f"{where}: expected {len(hints)} values, found {len(value)}")
        return tuple(
            _convert(h, item, f"{where}[{i}]") for i, (h, item) in enumerate(zip(hints, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise SpecError(f"{where}: expected a table, found {value!r}")
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise SpecError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value


def shipped_names(kind: str) -> list[str]:
    """Return the names of the shipped TOML files of `kind` ("models" or "export")."""
    return sorted(path.stem for path in data_dir(kind).glob("*.toml"))


def read_named_toml(kind: str, what: str, name_or_path: str | Path) -> dict[str, Any]:
    """Read a shipped TOML file of `kind` by its name, or any TOML file by a path that ends in .toml.

    `what` ("preset", "recipe") is the noun in error messages. Raises SpecError for an unknown name or
    unreadable TOML.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = data_dir(kind) / f"{name_or_path}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SpecError(
            f"no {what} {str(name_or_path)!r}", next_step=f"shipped {what}s: {', '.join(shipped_names(kind))}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SpecError(f"{path}: {error}") from error


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def require_match(pattern: re.Pattern[str], value: str, what: str) -> None:
    """Raise SpecError unless the pattern matches the whole value."""
    if not pattern.fullmatch(value):
        raise SpecError(f"{what}: {value!r} is not allowed")


def require_unique(names: Iterable[str], what: str) -> None:
    """Raise SpecError if a name occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SpecError(f"{what} {name!r} is listed twice")
        seen.add(name)
