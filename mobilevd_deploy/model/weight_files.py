"""Our checkpoint format in its two containers, .safetensors and .pt, memory-mapped."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import CheckpointError, SpecError

FORMAT_VERSION = 1


FORMAT_KEY = "mobilevd_format"


SPEC_KEY = "mobilevd_spec"


# Names as safetensors writes them.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor without reading it: shape, and dtype in safetensors' spelling."""

    shape: tuple[int, ...]
    dtype: str


class WeightSource(Protocol):
    """Where tensors lie, under the names <component>.<name>."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor there is."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that was read."""
        ...

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors, memory-mapped where the file can be."""
        ...


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


def _not_ours(path: Path, lacks: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a checkpoint of ours, it lacks {lacks}",
        next_step="models/README.md shows how a training codebase writes one",
    )


class SafetensorsFiles:
    """Tensors of one or several .safetensors files, renamed."""

    def __init__(self, names: Mapping[str, tuple[Path, str]], others: Iterable[Path] = ()) -> None:
        self._names = names
        self.files = tuple(sorted({file for file, _ in names.values()} | set(others)))
        self.headers = {}
        for file in {file for file, _ in names.values()}:
            with safe_open(file, framework="pt") as opened:
                for name, (holder, key) in names.items():
                    if holder == file:
                        view = opened.get_slice(key)
                        self.headers[name] = Header(tuple(view.get_shape()), view.get_dtype())

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors, memory-mapped."""
        for file, wanted in _by_file(names, self._names).items():
            with safe_open(file, framework="pt") as opened:
                for name in wanted:
                    yield name, opened.get_tensor(self._names[name][1])


def _by_file(names: Iterable[str], where: Mapping[str, tuple[Path, str]]) -> dict[Path, list[str]]:
    grouped: dict[Path, list[str]] = {}
    for name in names:
        grouped.setdefault(where[name][0], []).append(name)
    return grouped


def safetensors_keys(path: Path) -> tuple[list[str], dict[str, str]]:
    """Return tensor names and metadata; a file that is damaged or something else is a CheckpointError."""
    try:
        with safe_open(path, framework="pt") as opened:
            return list(opened.keys()), opened.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole .safetensors file{looks_like(path)} ({error})",
            next_step="copy or download it again and compare sizes",
        ) from error


def open_safetensors(path: Path) -> tuple[ModelSpec, WeightSource]:
    """Open a .safetensors checkpoint in our format. Raises CheckpointError."""
    keys, metadata = safetensors_keys(path)
    for key in (FORMAT_KEY, SPEC_KEY):
        if key not in metadata:
            raise _not_ours(path, f"the metadata key {key!r}")
    _check_version(metadata[FORMAT_KEY], path)
    spec = _parse_spec(read_json(metadata[SPEC_KEY], f"{path}: {SPEC_KEY}"), path)
    return spec, SafetensorsFiles({key: (path, key) for key in keys})


def write_safetensors(
    path: Path,
    metadata: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    stored: Callable[[str], Tensor],
) -> None:
    # By hand because safetensors' own writer wants every tensor converted beforehand: the model twice.
    """Write tensors one at a time, so that no more than one is held.

    Args:
        path: file to write.
        metadata: strings for the header.
        shapes: shape by tensor name; this is also the order in the file.
        dtype: dtype of every tensor.
        stored: returns a tensor by name, contiguous and of that shape and dtype.
    """
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


class _TorchFile:
    """Tensors of a torch.save file."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.files = (path,)
        self.headers = {
            name: Header(tuple(t.shape), DTYPES.get(t.dtype, str(t.dtype).removeprefix("torch.")))
            for name, t in tensors.items()
        }

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        # Mapped anew, so that writing to a loaded component never shows in the next load.
        tensors = _torch_load(self.files[0])["tensors"]
        for name in names:
            yield name, tensors[name].detach()


def _torch_load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def open_torch(path: Path) -> tuple[ModelSpec, WeightSource]:
    """Open a .pt checkpoint in our format without running code. Raises CheckpointError."""
    with path.open("rb") as file:
        start = file.read(4)
    try:
        content = _torch_load(path)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or start[:1] == b"\x80":
            raise CheckpointError(
                f"{path}: refused: this pickle is damaged, or wants code to be run",
                next_step="whoever made it can load it and save plain tensors, as models/README.md shows",
            ) from error
        raise CheckpointError(f"{path}: not a .pt file{looks_like(path)}") from error
    except Exception as error:  # a damaged pickle fails anywhere inside torch
        raise CheckpointError(
            f"{path}: not a whole .pt file{looks_like(path)}", next_step="copy it again and compare sizes"
        ) from error
    if not isinstance(content, dict):
        raise _not_ours(path, "a dictionary with 'format', 'spec' and 'tensors'")
    for key in ("format", "spec", "tensors"):
        if key not in content:
            raise _not_ours(path, f"the key {key!r}")
    if unknown := sorted(map(str, set(content) - {"format", "spec", "tensors"})):
        raise CheckpointError(f"{path}: unknown key {unknown[0]!r} beside 'format', 'spec' and 'tensors'")
    _check_version(content["format"], path)
    tensors = content["tensors"]
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided and not t.is_quantized
        for name, t in tensors.items()
    ):
        raise CheckpointError(f"{path}: 'tensors' is not a dictionary of names and plain dense tensors")
    return _parse_spec(content["spec"], path), _TorchFile(path, tensors)


def write_torch(
    path: Path,
    spec: ModelSpec,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    stored: Callable[[str], Tensor],
) -> None:
    """Write a .pt checkpoint; arguments as `write_safetensors`."""

    def alone(tensor: Tensor) -> Tensor:
        # torch.save writes whole storages, so a view would bring along what it is cut from.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    values = json.loads(json.dumps(spec.to_dict()))  # lists instead of tuples, as in the other form
    tensors = {name: alone(stored(name)) for name in shapes}
    torch.save({"format": FORMAT_VERSION, "spec": values, "tensors": tensors}, path)


def read_json(text: str, where: str) -> Any:
    """Parse JSON. Raises CheckpointError that names `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error


_SIGNATURES = {
    b"": "it is empty",
    b"\x89PNG": "it is a PNG picture",
    b"\xff\xd8\xff": "it is a JPEG picture",
    b"GIF8": "it is a GIF picture",
    b"PK\x03\x04": "it starts like a zip or .pt file",
    b"\x80": "it starts like a pickle",
    b"version https://git-lfs": "it is a Git LFS pointer, the content was never fetched",
    b"<": "it is a web page or XML",
}


def looks_like(path: Path) -> str:
    """Return ": what the file really is" where its first bytes tell, else nothing."""
    with path.open("rb") as file:
        start = file.read(32)
    for signature, meaning in _SIGNATURES.items():
        if start.startswith(signature) and (signature or not start):
            return f": {meaning}"
    return ""
