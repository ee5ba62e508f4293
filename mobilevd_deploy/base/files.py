"""Files: atomic writes, locks, digests, durability, and a clear error for a full disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mobilevd_deploy.errors import ResourceError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""The errno values of a full disk and of a used-up quota."""


@contextlib.contextmanager
def disk_guard(folder: Path, needed: int) -> Iterator[None]:
    """Raise ResourceError if `folder`'s disk has less than `needed` bytes free, or if a disk fills up inside.

    The error names the disk that is full, which may be that of the temporary folder.
    """
    if free_bytes(folder) < needed:
        raise disk_full(folder, needed)
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise disk_full(_full_place(folder, error), needed) from error


def disk_full(folder: Path, needed: int) -> ResourceError:
    """Return the error for a full disk; `needed`: bytes that were to be written, 0 if unknown."""
    free = f"{free_bytes(folder):,} bytes are free"
    return ResourceError(
        f"{folder}: the disk is full: " + (f"about {needed:,} bytes are needed, {free}" if needed else free),
        next_step="free some space, or choose a folder on another disk",
    )


def free_bytes(folder: Path) -> int:
    """Return the free bytes of a folder's disk. Raises OSError."""
    return shutil.disk_usage(folder).free


def _full_place(folder: Path, error: OSError) -> Path:
    """Return the folder whose disk caused the error: that of its file, else the fuller of two candidates."""
    if isinstance(error.filename, str):
        return nearest_folder(Path(error.filename).parent)
    try:
        return min((folder, Path(tempfile.gettempdir())), key=free_bytes)
    except FileNotFoundError:  # no temporary folder is usable
        return folder


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest place above it that exists: a folder, unless a file is in the way."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def written_aside(path: Path, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; rename it to `path` if the block succeeds.

    The content reaches the disk before the rename, so a killed process leaves the old file or the new one.
    If the block raises, the temporary file is removed and `path` is unchanged.

    Args:
        path: a file, or a folder that does not exist or is empty. The temporary path has the same suffix.
        needed: bytes that the block writes, approximately.

    Raises ResourceError on a full disk, OSError otherwise.
    """
    aside = path.with_name(f".{os.getpid()}.new.{path.name}")
    try:
        with disk_guard(path.parent, needed):
            yield aside
            fsync(aside)
            aside.replace(path)
            fsync(path.parent)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary paths that killed processes left in `folder` (see `written_aside`). Raises OSError."""
    for path in folder.glob(".*.new.*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


class LockHeldError(Exception):
    """Another process holds the lock; `holder` is its process id, or "unknown"."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"process {holder} holds the lock")
        self.holder = holder


def take_lock(path: Path) -> int:
    """Lock a file for this process, create it if it is missing, and return its descriptor.

    The lock is released when the descriptor is closed or the process ends, even if it is killed.
    Raises LockHeldError, OSError.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    except BlockingIOError:
        holder = os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
        os.close(lock)
        raise LockHeldError(holder) from None
    except OSError:
        os.close(lock)
        raise
    return lock


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a small file by `written_aside`. Raises the same errors."""
    data = content.encode() if isinstance(content, str) else content
    with written_aside(path, len(data)) as aside:
        aside.write_bytes(data)


def digest(values: Mapping[str, Any]) -> str:
    """Return the sha256, in hex, of plain values: of their JSON with sorted keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
