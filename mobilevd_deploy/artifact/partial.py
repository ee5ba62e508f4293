"""The artifact while it is built: a locked folder beside the output, renamed in the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path, PurePosixPath
from types import TracebackType

from mobilevd_deploy.artifact.artifact import Artifact, digest_line, plain_files
from mobilevd_deploy.artifact.manifest import MANIFEST, MANIFEST_DIGEST, Manifest
from mobilevd_deploy.base.files import LockHeldError, disk_guard, fsync, take_lock, written_aside
from mobilevd_deploy.errors import ArtifactError, MobileVDError, UsageError


class PartialArtifact:
    """The folder `.NAME.partial` beside the output, where an artifact is built; a context manager.

    `artifact` below it becomes the output; everything else there (`work` for whoever needs a place, stage
    records) is thrown away in the end, or kept on request. The folder stays when the block ends without
    `finish`, so that a later run can resume. Its lock file is both the sign that the folder is ours and what
    keeps a second run out: the kernel drops the lock when the process dies, however it dies.

    Entering raises UsageError if the output exists and is not an intact artifact, if the partial folder is
    not ours, if another run holds it, or if it cannot be written.
    """

    LOCK = "lock.mobilevd-deploy"

    def __init__(self, output: str | Path) -> None:
        try:
            self.output = Path(output).resolve()
        except (OSError, RuntimeError) as error:
            raise UsageError(f"{output} is not a usable path: {error}") from error
        self.root = self.output.with_name(f".{self.output.name}.partial") if self.output.name else self.output
        self.artifact = self.root / "artifact"
        self.work = self.root / "work"
        self._replaced = self.root / "replaced"
        self._lock_path = self.root / self.LOCK
        self._lock: int | None = None

    def __enter__(self) -> PartialArtifact:
        try:
            # First, because a run that was killed between two renames left the old artifact inside.
            if self._is_ours():
                self._take_lock()
                self._recover()
            self._check_output()
            self._claim()
            self.artifact.mkdir(exist_ok=True)
            self.work.mkdir(exist_ok=True)
        except OSError as error:
            self._release()
            raise UsageError(
                f"cannot write beside {self.output}: {error}", next_step="choose another -o"
            ) from error
        except MobileVDError:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def clear(self) -> None:
        """Throw away everything built so far."""
        self._empty()
        self.artifact.mkdir()
        self.work.mkdir()

    def borrow(self, path: str) -> None:
        """Give a file of the partial folder that is not there a copy of what the finished output has for it.

        No second name for the same file: onnx reads no weights from a file that has two. Raises OSError,
        ResourceError on a full disk.
        """
        parts = PurePosixPath(path).parts
        source, wanted = self.output.joinpath(*parts[1:]), self.root / path
        if parts[0] == self.artifact.name and source.is_file() and not wanted.exists():
            wanted.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(wanted, source.stat().st_size) as aside:
                shutil.copyfile(source, aside)

    def finish(self, manifest: Manifest, *, keep: bool = False) -> Artifact:
        """Write the manifest, make all of it durable, and give it its name in one rename.

        `keep`: leave the rest of the partial folder, for an export that changes little.

        Files below `artifact` that the manifest does not list are removed. An artifact that lies at the
        output is replaced. Raises ArtifactError if files and manifest disagree, UsageError if the output is
        no longer ours to replace, ResourceError on a full disk.
        """
        text = manifest.to_json().encode()
        with disk_guard(self.root, 2 * len(text)):
            listed = {entry.path for entry in manifest.all_files()}
            for path in list(plain_files(self.artifact)):
                if path.relative_to(self.artifact).as_posix() not in listed:
                    path.unlink()
            (self.artifact / MANIFEST).write_bytes(text)
            (self.artifact / MANIFEST_DIGEST).write_bytes(digest_line(text))
            Artifact.open(self.artifact)
            for path in [*self.artifact.rglob("*"), self.artifact]:
                fsync(path)
        self._check_output()
        if self.output.exists():
            self.output.rename(self._replaced)
        try:
            self.artifact.rename(self.output)
        except OSError as error:
            self._recover()
            raise UsageError(f"cannot write {self.output}: {error}", next_step="choose another -o") from error
        fsync(self.output.parent)
        if keep:
            shutil.rmtree(self._replaced, ignore_errors=True)
            return Artifact.open(self.output)
        self._empty()
        self._lock_path.unlink()
        with contextlib.suppress(OSError):  # another run may be waiting in it by now
            self.root.rmdir()
        return Artifact.open(self.output)

    def _check_output(self) -> None:
        if not self.output.exists():
            return
        try:
            Artifact.open(self.output)
        except ArtifactError as error:
            raise UsageError(
                f"{self.output} exists and is not an intact artifact, so it is not touched ({error.what})",
                next_step="choose another -o, or remove it yourself",
            ) from error

    def _is_ours(self) -> bool:
        return self._lock_path.is_file() and not self.root.is_symlink() and not self._lock_path.is_symlink()

    def _is_foreign(self) -> bool:
        # By one listing: a run that ends in the meantime takes its lock file and then the folder away. An
        # empty folder is what a run leaves that was killed between making it and making the lock file.
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            names = {path.name for path in self.root.iterdir()}
        if self.root.is_symlink() or self._lock_path.is_symlink() or self._lock_path.is_dir():
            return True
        return bool(names) and self.LOCK not in names

    def _claim(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        if self._is_foreign():
            raise UsageError(
                f"{self.root} exists and is not ours, so it is not touched",
                next_step="choose another -o, or remove it yourself",
            )
        self._take_lock()

    def _take_lock(self) -> None:
        while self._lock is None:
            with contextlib.suppress(FileExistsError):
                self.root.mkdir()
            try:
                lock = take_lock(self._lock_path)
            except FileNotFoundError:
                continue  # the holder has finished and removed the folder
            except LockHeldError as error:
                raise UsageError(
                    f"another run (process {error.holder}) is writing {self.output}",
                    next_step="wait for it, or choose another -o",
                ) from None
            # The holder may have finished and removed the file while we opened it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), self._lock_path.stat()):
                    self._lock = lock
                    continue
            os.close(lock)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _recover(self) -> None:
        if not self._replaced.exists():
            return
        if self.output.exists():
            shutil.rmtree(self._replaced)
        else:
            self._replaced.rename(self.output)

    def _empty(self) -> None:
        # The lock file goes last, by the caller: without it a half-emptied folder would not be known as ours.
        for path in self.root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self._lock_path:
                path.unlink()
