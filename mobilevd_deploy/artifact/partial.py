"""Build an artifact in a locked folder beside the output, and rename it when it is complete."""

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
    """The folder `.NAME.partial` beside the output, in which an artifact is built; a context manager.

    Its subfolder `artifact` becomes the output. The rest (`work` for temporary files, stage records) is
    removed at the end, or kept on request. If the block ends without `finish`, the folder stays and a later
    run resumes. Its lock file marks the folder as one of this toolkit and keeps other runs out; the kernel
    releases the lock when the process ends, even if it is killed.

    Entering raises UsageError if the output exists and is not an intact artifact, if the partial folder is
    not one of this toolkit, if another run holds it, or if it cannot be written.
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
            # First, because a run that was killed between two renames left the old artifact in the folder.
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
                f"cannot write into {self.output.parent}: {error}", next_step="choose another -o"
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
        """Remove everything that was built so far."""
        self._empty()
        self.artifact.mkdir()
        self.work.mkdir()

    def borrow(self, path: str) -> None:
        """Copy a file from the finished output if the partial folder lacks it.

        `path` is relative to the partial folder. The file is copied, not linked: onnx refuses to read weights
        from a file with two names. Raises OSError, ResourceError on a full disk.
        """
        parts = PurePosixPath(path).parts
        source, target = self.output.joinpath(*parts[1:]), self.root / path
        if parts[0] == self.artifact.name and source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(target, source.stat().st_size) as aside:
                shutil.copyfile(source, aside)

    def finish(self, manifest: Manifest, *, keep: bool = False) -> Artifact:
        """Write the manifest, flush all files to the disk, and rename `artifact` to the output.

        Files that the manifest does not list are removed. An existing artifact at the output is replaced.
        `keep` keeps the rest of the partial folder, so that a later export can reuse finished stages.

        Raises ArtifactError if files and manifest disagree, UsageError if the output is no longer an intact
        artifact or cannot be written, ResourceError on a full disk.
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
        with contextlib.suppress(OSError):  # another run may have created its lock file
            self.root.rmdir()
        return Artifact.open(self.output)

    def _check_output(self) -> None:
        if not self.output.exists():
            return
        try:
            Artifact.open(self.output)
        except ArtifactError as error:
            raise UsageError(
                f"{self.output} exists and is not an intact artifact, so it is left unchanged ({error.what})",
                next_step="choose another -o, or remove it yourself",
            ) from error

    def _is_ours(self) -> bool:
        return self._lock_path.is_file() and not self.root.is_symlink() and not self._lock_path.is_symlink()

    def _is_foreign(self) -> bool:
        # List the folder once: a run that ends meanwhile removes its lock file and then the folder. A run
        # that was killed before it created its lock file leaves an empty folder.
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
                f"{self.root} exists and was not created by this toolkit, so it is left unchanged",
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
            # The holder may have finished and removed the file after we opened it.
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
        # The caller removes the lock file last: it marks a partly emptied folder as one of this toolkit.
        for path in self.root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self._lock_path:
                path.unlink()
