"""A JSON Schema and the reader beside it, held together on every small change of a valid example."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jsonschema

from mobilevd_deploy.errors import ArtifactError

Change = Callable[[Any, Any], object]
OTHERS = (None, True, "x", "", -1, 1.5, [], {}, ["x"], {"x": "y"})


def same_verdicts(
    original: Any, read: Callable[[Any], object], validator: jsonschema.Validator, beyond: Sequence[str]
) -> tuple[int, int]:
    """Assert that reader and schema accept and refuse the same; return how many of both.

    `read` raises ArtifactError. `beyond`: parts of its messages that a schema cannot say; those are left out.
    """
    read(original)
    accepted = refused = 0
    for path, change in _mutations(original):
        values = copy.deepcopy(original)
        change(functools.reduce(operator.getitem, path[:-1], values), path[-1])
        reason = _refusal(read, values)
        if reason is None or not any(part in reason for part in beyond):
            assert validator.is_valid(values) == (reason is None), (path, values, reason)
            accepted += reason is None
            refused += reason is not None
    return accepted, refused


def _refusal(read: Callable[[Any], object], values: Any) -> str | None:
    try:
        read(values)
    except ArtifactError as error:
        return error.what
    return None


def _mutations(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Change]]:
    """Yield (path, do) for every way to remove, add or replace one thing in nested JSON values."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key), lambda parent, key: parent.pop(key)
        yield from _mutations(value[key], (*path, key))
    if isinstance(value, dict):
        yield (*path, "surprise"), lambda parent, key: parent.update({key: 1})
    if path:
        for other in OTHERS:
            yield path, lambda parent, key, other=other: parent.__setitem__(key, other)
