"""Tensors in the files of any writer: found by content, described without reading them, memory-mapped.

A file is a .safetensors file or what `torch.save` wrote, whatever its name says. `read_stored` lists its
tensors as `Entry` values; `Weights` holds entries under the names <component>.<name> and reads them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobilevd_deploy.errors import CheckpointError

# Names as safetensors writes them.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Change = Callable[[Tensor], Tensor]
"""How a stored tensor becomes the one we need. Must be picklable, and must work on meta tensors.

A change that reads tensors of its own lists their entries as `reads`.
"""


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor without reading it: shape, and dtype in safetensors' spelling."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Entry:
    """One tensor: the file that holds it, its name there, and the changes that reading applies.

    `header` is that of the result, after all changes.
    """

    file: Path
    key: str
    header: Header
    changes: tuple[Change, ...] = ()

    def changed(self, change: Change) -> Entry:
        """Return this entry with one more change. Raises RuntimeError: it does not fit the shape."""
        shape = tuple(change(torch.empty(self.header.shape, device="meta")).shape)
        return dataclasses.replace(
            self, header=Header(shape, self.header.dtype), changes=(*self.changes, change)
        )


@dataclass(frozen=True)
class Weights:
    """Tensors under the names <component>.<name>, in any number of files.

    `others` are files that were read beside the weights: configurations and indices of shards.
    """

    entries: Mapping[str, Entry]
    others: tuple[Path, ...] = ()

    @cached_property
    def headers(self) -> Mapping[str, Header]:
        """Shape and dtype of every tensor."""
        return {name: entry.header for name, entry in self.entries.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds a tensor or was read beside them, sorted."""
        return tuple(sorted({entry.file for entry in self.entries.values()} | set(self.others)))

    def stored(self) -> Iterator[tuple[str, Entry]]:
        """Yield every entry that is read, with the name of the tensor that it becomes or is part of."""
        for name, entry in self.entries.items():
            yield name, entry
            for change in entry.changes:
                yield from ((name, part) for part in getattr(change, "reads", ()))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors, memory-mapped where the file can be and nothing changes the values."""
        grouped: dict[Path, list[str]] = {}
        for name in names:
            grouped.setdefault(self.entries[name].file, []).append(name)
        for file, wanted in grouped.items():
            with opened_tensors(file) as tensor:
                for name in wanted:
                    entry = self.entries[name]
                    value = tensor(entry.key)
                    for change in entry.changes:
                        value = change(value)
                    yield name, value


@dataclass(frozen=True)
class Stored:
    """What one file holds: its tensors by name, and everything else.

    Names of nested dictionaries are joined with a dot. `content` is the metadata of a .safetensors file, or
    the object that `torch.save` wrote (dictionaries only).
    """

    path: Path
    entries: dict[str, Entry]
    content: dict[str, Any] = field(repr=False)
    is_safetensors: bool


def read_stored(path: Path) -> Stored:
    """List the tensors of a file.

    Raises CheckpointError: not a file of weights, damaged, or code would have to be run. OSError.
    """
    if is_safetensors(path):
        return _read_safetensors(path)
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80" or start == b"PK":
        return _read_torch(path)
    raise CheckpointError(
        f"{path}: not a checkpoint by its content{looks_like(path)}", next_step=_copy_again(path)
    )


def is_safetensors(path: Path) -> bool:
    """Tell whether a file begins as .safetensors does: a length, and a JSON table."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and struct.unpack("<Q", start[:8])[0] < 1 << 27 and start[8:] == b"{"


@contextlib.contextmanager
def opened_tensors(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Open a file of weights; yield a function that returns a tensor by its name there."""
    if is_safetensors(path):
        with safe_open(path, framework="pt") as opened:
            yield opened.get_tensor
    else:
        # Mapped again each time, so that writing to a loaded component does not show in the next load.
        tensors = dict(_flattened(_torch_load(path)))
        yield lambda key: tensors[key].detach().contiguous()


def finite_chunks(path: Path, keys: Iterable[str], size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the values of tensors in flat pieces of at most `size` elements; only one is held at a time."""
    if not is_safetensors(path):
        with opened_tensors(path) as tensor:
            for key in keys:
                for piece in torch.split(tensor(key).reshape(-1), size):
                    yield key, piece
        return
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    # Plain reads: pages of a memory-mapped file would count as this process's memory.
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        table = json.loads(file.read(length))
        for key in sorted(keys, key=lambda key: table[key]["data_offsets"][0]):
            dtype = dtypes[table[key]["dtype"]]
            begin, end = table[key]["data_offsets"]
            file.seek(8 + length + begin)
            for at in range(begin, end, size * dtype.itemsize):
                data = bytearray(file.read(min(size * dtype.itemsize, end - at)))
                yield key, torch.frombuffer(data, dtype=dtype)


# ---- .safetensors ----


def _read_safetensors(path: Path) -> Stored:
    try:
        with safe_open(path, framework="pt") as opened:
            entries = {}
            for key in opened.keys():  # noqa: SIM118
                view = opened.get_slice(key)
                entries[key] = Entry(path, key, Header(tuple(view.get_shape()), view.get_dtype()))
            return Stored(path, entries, opened.metadata() or {}, True)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole .safetensors file{looks_like(path)} ({error})", next_step=_copy_again(path)
        ) from error


# ---- torch.save ----


# numpy's numbers, which configurations and training states often hold.
_NUMPY_SCALARS: list[Any] = [
    np.float64(0).__reduce__()[0],
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "?")),
]


def _torch_load(path: Path) -> Any:
    with torch.serialization.safe_globals(_NUMPY_SCALARS):
        if path.suffix == ".safetensors":  # torch believes the ending of a path, so it gets an open file
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _read_torch(path: Path) -> Stored:
    try:
        if (names := _archived(path)) and not any(name.endswith("data.pkl") for name in names):
            raise CheckpointError(
                f"{path}: a zip archive that holds {', '.join(names[:3])}", next_step="unpack it first"
            )
        content = _torch_load(path)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            is_pickle = file.read(1) == b"\x80" or zipfile.is_zipfile(path)
        if is_pickle:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f" (it holds a {named[1]})" if named else ""
            raise CheckpointError(
                f"{path}: wants code to be run when it is read, which is refused{what}",
                next_step="save tensors and plain values only: torch.save(model.state_dict(), path)",
            ) from error
        raise _not_whole(path) from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle fails anywhere
        raise _not_whole(path) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: not a checkpoint, it lacks a dictionary: it holds a {type(content).__name__}",
            next_step="save a dictionary of names and tensors, such as model.state_dict()",
        )
    entries = {}
    for key, tensor in _flattened(content):
        dtype = DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        entries[key] = Entry(path, key, Header(tuple(tensor.shape), dtype))
    return Stored(path, entries, content, False)


def _flattened(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if not isinstance(key, str):  # an optimiser numbers its states
            continue
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            yield prefix + key, value
        elif isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")


def _archived(path: Path) -> list[str]:
    """Return the names in a zip archive; none for another file."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _not_whole(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: not a whole .pt file{looks_like(path)}", next_step=_copy_again(path))


def _copy_again(path: Path) -> str:
    if "never fetched" in looks_like(path):
        return "fetch it with `git lfs pull`, or download the file itself"
    return "copy or download it again and compare sizes"


# ---- anything else ----


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
    b"GGUF": "it is a GGUF file, whose weights are quantised",
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
