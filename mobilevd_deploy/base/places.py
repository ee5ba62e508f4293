"""Places to write to, checked before the work: writable, enough space, and no input among the outputs.

Every check tries the place instead of reading its permissions, because a read-only mount, a full disk and a
privileged user make permissions meaningless.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mobilevd_deploy.base.files import FULL_DISK, disk_full, free_bytes, nearest_folder
from mobilevd_deploy.errors import ResourceError, UsageError

SCRATCH_BYTES = 64 * 2**20
"""What the temporary folder must have free: the simulator's inputs and outputs of one component."""

_PROBE = b"mobilevd-deploy"


def require_file_place(path: Path, needed: int = len(_PROBE)) -> None:
    """Raise unless a file of `needed` bytes can be written at `path`; missing folders count as writable.

    Raises:
        UsageError: `path` is a folder, or cannot be written.
        ResourceError: its disk has less than `needed` bytes free.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder", next_step="name a file")
    _try(path, nearest_folder(path.parent), needed)


def require_folder_place(path: Path, needed: int = len(_PROBE)) -> None:
    """Raise unless files of `needed` bytes in sum can be written into the folder `path`; it may be missing.

    Raises:
        UsageError: `path` is a file, or cannot be written.
        ResourceError: its disk has less than `needed` bytes free.
    """
    _try(path, nearest_folder(path), needed)


def require_scratch(needed: int = SCRATCH_BYTES) -> None:
    """Raise unless the temporary folder (TMPDIR, else the system's) can be written and has `needed` bytes.

    Python silently takes another folder if TMPDIR is unusable, but native libraries do not. Raises
    UsageError, ResourceError.
    """
    try:
        folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    except FileNotFoundError as error:  # gettempdir() tried all candidates
        raise UsageError("no temporary folder can be written", next_step=_SET_TMPDIR) from error
    try:
        _write_probe(folder, needed)
    except ResourceError as error:
        raise ResourceError(f"temporary folder {error.what}", next_step=_SET_TMPDIR) from error
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"the temporary folder {folder} cannot be written: {reason}", next_step=_SET_TMPDIR
        ) from error


def require_distinct(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise UsageError if an output is one of the inputs, or two outputs are one file.

    Paths are compared as the file system sees them: through links, and in any spelling.
    """
    taken: list[tuple[Path, str]] = [(path, "an input") for path in inputs]
    for output in outputs:
        for other, role in taken:
            if _same_file(output, other):
                raise UsageError(
                    f"{output} is {role} ({other}) and would be overwritten",
                    next_step="choose another output",
                )
        taken.append((output, "another output"))


_SET_TMPDIR = "set TMPDIR to a folder that can be written, on a disk with space"


def _try(path: Path, folder: Path, needed: int) -> None:
    try:
        _write_probe(folder, needed)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {folder}: {error.strerror or error}",
            next_step="choose another output",
        ) from error


def _write_probe(folder: Path, needed: int) -> None:
    """Write and remove a small file. Raises OSError, and ResourceError if `needed` bytes are not free."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(_PROBE)
            file.flush()
    except OSError as error:
        if error.errno in FULL_DISK:
            raise disk_full(folder, needed) from error
        raise
    if free_bytes(folder) < needed:
        raise disk_full(folder, needed)


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:  # one of them does not exist yet
        return a.resolve() == b.resolve()
