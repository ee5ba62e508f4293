"""Our checkpoint format in its two containers; models/README.md specifies it.

.safetensors    configuration in the metadata, tensors named <component>.<name>
torch.save      {"format": 1, "spec": configuration, "tensors": {<component>.<name>: tensor}}
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import CheckpointError, SpecError
from mobilevd_deploy.model.weight_files import DTYPES, Entry, Stored, read_json

FORMAT_VERSION = 1
FORMAT_KEY = "mobilevd_format"
SPEC_KEY = "mobilevd_spec"
_TORCH_KEYS = ("format", "spec", "tensors")


def is_ours(stored: Stored) -> bool:
    """Tell whether a file has the keys of our format, or some of them."""
    if stored.is_safetensors:
        return FORMAT_KEY in stored.content or SPEC_KEY in stored.content
    return "format" in stored.content and "spec" in stored.content


def read_ours(stored: Stored, notice: Callable[[str], None]) -> tuple[ModelSpec, dict[str, Entry]]:
    """Return configuration and tensors of a file in our format. Raises CheckpointError."""
    path, content = stored.path, stored.content
    format_key, spec_key = (FORMAT_KEY, SPEC_KEY) if stored.is_safetensors else ("format", "spec")
    for key in (format_key, spec_key) if stored.is_safetensors else _TORCH_KEYS:
        if key not in content:
            raise CheckpointError(
                f"{path}: not a checkpoint of ours, it lacks the key {key!r}",
                next_step="models/README.md shows how a training codebase writes one",
            )
    _check_version(content[format_key], path)
    values = content[spec_key]
    if isinstance(values, str):
        values = read_json(values, f"{path}: {spec_key}")
    entries = stored.entries
    if not stored.is_safetensors:
        tensors = content["tensors"]
        dense = {
            name.removeprefix("tensors."): e for name, e in entries.items() if name.startswith("tensors.")
        }
        if not isinstance(tensors, dict) or set(dense) != set(tensors):
            raise CheckpointError(f"{path}: 'tensors' is not a dictionary of names and plain dense tensors")
        if others := sorted(map(str, set(content) - set(_TORCH_KEYS))):
            notice(f"{path.name}: ignored beside 'format', 'spec' and 'tensors': {', '.join(others)}")
        entries = dense
    return _parse_spec(values, path), entries


def _parse_spec(values: object, path: Path) -> ModelSpec:
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: its configuration is not a table but {type(values).__name__}")
    try:
        return from_dict(ModelSpec, values)
    except SpecError as error:
        raise CheckpointError(f"{path}: its configuration does not fit: {error.what}") from error


def _check_version(version: object, path: Path) -> None:
    if isinstance(version, str) and version.isdecimal():
        version = int(version)
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: format version {version!r} is not a positive number")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format {version}, this version reads up to {FORMAT_VERSION}",
            next_step="update mobilevd-deploy",
        )


def write_safetensors(
    path: Path,
    metadata: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    stored: Callable[[str], Tensor],
) -> None:
    """Write tensors one at a time, so that no more than one is held.

    Args:
        path: file to write.
        metadata: strings for the header.
        shapes: shape by tensor name; this is also the order in the file.
        dtype: dtype of every tensor.
        stored: returns a tensor by name, contiguous and of that shape and dtype.
    """
    # Not by safetensors' own writer, which needs every tensor converted beforehand: the model twice.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in shapes:
            file.write(stored(name).reshape(-1).view(torch.uint8).numpy().data)


def write_torch(
    path: Path,
    spec: ModelSpec,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    stored: Callable[[str], Tensor],
) -> None:
    """Write a .pt checkpoint; arguments as `write_safetensors`."""

    def alone(tensor: Tensor) -> Tensor:
        # torch.save writes whole storages: a view would add everything that it is cut from.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    values = json.loads(json.dumps(spec.to_dict()))  # lists instead of tuples, as in the other container
    tensors = {name: alone(stored(name)) for name in shapes}
    torch.save({"format": FORMAT_VERSION, "spec": values, "tensors": tensors}, path)
