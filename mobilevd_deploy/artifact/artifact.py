"""Read, verify and find finished artifacts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mobilevd_deploy.artifact.manifest import MANIFEST, MANIFEST_DIGEST, Component, Manifest
from mobilevd_deploy.base.files import file_sha256
from mobilevd_deploy.errors import ArtifactError, UsageError

# File managers write these into folders that they show; they do not make an artifact invalid.
_IGNORED = {".DS_Store", "Thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: str | Path) -> Artifact:
        """Read the artifact in folder `root`; check its structure and its files' sizes.

        Raises ArtifactError for a file that is missing, extra, truncated or a link, and for a manifest that
        was changed or has another schema version. `verify` checks the contents of the other files.
        """
        root = Path(root)
        if not root.is_dir():
            raise ArtifactError(
                f"{root} is not a folder", next_step="mobilevd-deploy export writes artifacts"
            )
        try:
            for name in (MANIFEST, MANIFEST_DIGEST):
                if not (root / name).is_file():
                    raise ArtifactError(f"{name} is missing")
            text = (root / MANIFEST).read_bytes()
            if (root / MANIFEST_DIGEST).read_bytes() != digest_line(text):
                raise ArtifactError(f"{MANIFEST} does not match {MANIFEST_DIGEST}: one of them was changed")
            manifest = Manifest.from_json(text)
            found = {path.relative_to(root).as_posix(): path for path in plain_files(root)}
            del found[MANIFEST], found[MANIFEST_DIGEST]
            for entry in manifest.all_files():
                path = found.pop(entry.path, None)
                if path is None:
                    raise ArtifactError(f"{entry.path} is missing")
                if (size := path.stat().st_size) != entry.bytes:
                    raise ArtifactError(f"{entry.path} has {size} bytes, the manifest says {entry.bytes}")
            if found:
                raise ArtifactError(f"{min(found)} is not in the manifest", next_step="remove it")
        except ArtifactError as error:
            next_step = error.next_step or "export it again, or copy it again from its source"
            raise ArtifactError(f"{root}: {error.what}", next_step=next_step) from error
        except OSError as error:
            raise ArtifactError(f"{root} cannot be read: {error}") from error
        return cls(root, manifest)

    def verify(self, component: Component | None = None) -> None:
        """Compare the sha256 of every file, or of one component's files, with the manifest.

        Raises ArtifactError naming the first file that differs.
        """
        entries = self.manifest.all_files() if component is None else component.all_files()
        for entry in entries:
            path = self.root / entry.path
            try:
                intact = file_sha256(path) == entry.sha256
            except OSError as error:
                raise ArtifactError(f"{path} cannot be read: {error}") from error
            if not intact:
                raise ArtifactError(
                    f"{path} is damaged: its sha256 is not the manifest's",
                    next_step="export it again, or copy it again from its source",
                )

    def path(self, component: Component, role: str) -> Path:
        """Return the path of a component's file by its role."""
        return self.root / component.files[role].path

    @property
    def bytes(self) -> int:
        """Total size of the files that the manifest lists."""
        return sum(entry.bytes for entry in self.manifest.all_files())

    @property
    def digest(self) -> str:
        """The sha256 of manifest.json in hex. The manifest holds the digests of all other files."""
        return (self.root / MANIFEST_DIGEST).read_text(encoding="ascii").split()[0]


def find_newest(folder: Path, depth: int = 3, *, advice: str = "name one as the argument") -> Artifact:
    """Return the newest artifact in `folder` or up to `depth` levels below; hidden folders are skipped.

    Raises UsageError, with `advice` as the next step, if there is none; ArtifactError if it is damaged.
    """
    found: list[Path] = []
    level = [folder]
    for _ in range(depth + 1):
        found += filter(_holds_manifest, level)
        level = [child for path in level for child in _subfolders(path)]
    if not found:
        raise UsageError(
            f"no artifact in {folder} or up to {depth} levels below",
            next_step=f"{advice}, or make one with mobilevd-deploy export",
        )
    return Artifact.open(max(found, key=lambda path: (path / MANIFEST).stat().st_mtime))


def plain_files(root: Path) -> Iterator[Path]:
    """Yield the files below `root`, without those of file managers. Raises ArtifactError for links."""
    for path in root.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(f"{path.relative_to(root)} is not a plain file")
        if path.is_file() and path.name not in _IGNORED:
            yield path


def _holds_manifest(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file() and (folder / MANIFEST_DIGEST).is_file()
    except OSError:  # no permission to read the folder
        return False


def _subfolders(folder: Path) -> Iterable[Path]:
    try:
        with os.scandir(folder) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            ]
    except OSError:
        return []


def digest_line(manifest: bytes) -> bytes:
    """Return the content of manifest.sha256 for the bytes of manifest.json."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()
