"""Find the pictures and clips in folders: one walk for every command that takes folders."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mobilevd_deploy.errors import MediaError
from mobilevd_deploy.runtime.media import HEIF_SUFFIXES, INSTALL_HEIF, picture_suffixes

# Thumbnails, deleted files and copies that systems and tools keep: never what a person means by the folder.
_SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
_SHOWN = 4


@dataclass(frozen=True)
class PictureFiles:
    """Files to read, sorted within each folder, and how many entries were left out, by reason."""

    files: tuple[Path, ...]
    skipped: Mapping[str, int]


def find_pictures(paths: Iterable[str | Path]) -> PictureFiles:
    """List the files among `paths`, and all pictures and clips in the folders among them.

    A file that is named itself is always listed. In folders, at any depth, a file counts if it is a plain
    file with an ending that `read_picture` opens. Left out: hidden names (leading dot, `__MACOSX`, `@eaDir`
    and the like), other endings, broken links, and a file that another name or link has already given.
    Links are followed, and each folder is walked once, so links that form a loop are harmless.
    Raises MediaError for a folder that cannot be read.
    """
    suffixes, skipped = picture_suffixes(), Counter[str]()
    files: list[Path] = []
    walked: set[tuple[int, int]] = set()
    seen: set[tuple[int, int]] = set()
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = []
        for file in _walk(path, walked, skipped):
            identity = _plain_file(file, suffixes, skipped)
            if identity is None:
                continue
            if identity in seen:
                skipped["duplicates"] += 1
                continue
            seen.add(identity)
            inside.append(file)
        files += sorted(inside)
    return PictureFiles(tuple(files), skipped)


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Return "; skipped 12 .heic (how to read them), 3 hidden, 2 duplicates", or "" where nothing was."""
    if not skipped:
        return ""
    ranked = sorted(skipped.items(), key=lambda item: -item[1])
    # Endings that nobody can read come last: labels and notes are no news.
    ranked.sort(key=lambda item: item[0].startswith(".") and item[0] not in HEIF_SUFFIXES)
    parts = [_counted(reason, count) for reason, count in ranked[:_SHOWN]]
    if rest := sum(count for _, count in ranked[_SHOWN:]):
        parts.append(f"{rest} more")
    return f"; skipped {', '.join(parts)}"


def _counted(reason: str, count: int) -> str:
    if reason in HEIF_SUFFIXES:
        return f"{count} {reason} ({INSTALL_HEIF})"
    return f"{count} {reason.removesuffix('s') if count == 1 and reason[0] != '.' else reason}"


def _walk(top: Path, walked: set[tuple[int, int]], skipped: Counter[str]) -> Iterator[Path]:
    """Yield the files below a folder that has not been walked yet, in sorted order."""

    def refuse(error: OSError) -> None:
        raise MediaError(
            f"{error.filename} cannot be read: {error.strerror}", next_step="change its permissions"
        ) from error

    for folder, folders, names in os.walk(top, followlinks=True, onerror=refuse):
        status = Path(folder).stat()
        if (identity := (status.st_dev, status.st_ino)) in walked:
            folders.clear()
            continue
        walked.add(identity)
        shown = [name for name in folders if not _is_hidden(name)]
        if hidden := len(folders) - len(shown) + sum(map(_is_hidden, names)):
            skipped["hidden"] += hidden
        folders[:] = sorted(shown)
        yield from (Path(folder, name) for name in sorted(names) if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def _plain_file(path: Path, suffixes: Collection[str], skipped: Counter[str]) -> tuple[int, int] | None:
    """Return what identifies a picture's file, or count why it is left out."""
    try:
        status = path.stat()
    except OSError:
        skipped["broken links"] += 1
        return None
    if not stat.S_ISREG(status.st_mode):
        skipped["special files"] += 1
        return None
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        skipped[suffix or "without an ending"] += 1
        return None
    return status.st_dev, status.st_ino
