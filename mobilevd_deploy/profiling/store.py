"""Profiles and traffic reports in the folder beside an artifact."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.diff import DiffRow
from mobilevd_deploy.artifact.manifest import MANIFEST
from mobilevd_deploy.base.files import file_sha256, write_durably
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import ArtifactError, SpecError
from mobilevd_deploy.profiling.profile import (
    HOW,
    SCHEMA_VERSION,
    Profile,
    T,
    TrafficReport,
    draw_profile,
    source_words,
)


def profiles_dir(artifact: Artifact) -> Path:
    """Return the folder of an artifact's profiles, NAME.profiles beside NAME; it may not exist yet.

    It is not inside of the artifact, because an artifact does not change.
    """
    root = artifact.root.resolve()
    return root.with_name(f"{root.name}.profiles")


def save_profile(profile: Profile, folder: Path) -> Path:
    """Write a profile into `folder` under a new name, and its bars as PNG; earlier profiles stay.

    Returns the JSON file.

    Raises ResourceError on a full disk, ArtifactError if the folder cannot be written.
    """
    device = re.sub(r"[^a-z0-9]+", "-", profile.asked_for.lower()).strip("-")[:60] or "device"
    stem = f"{profile.source}_{device}_{profile.created.replace(':', '').replace('-', '')}"
    text = json.dumps(profile.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    number, path = 1, folder / f"{stem}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while path.exists():
            number += 1
            path = folder / f"{stem}_{number}.json"
        write_durably(path, text)
        write_durably(path.with_suffix(".png"), draw_profile(profile))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error}") from error
    return path


def load_profile(path: str | Path) -> Profile:
    """Read a profile strictly. Raises ArtifactError."""
    return _load(Path(path), Profile, "profile again")


def _load(path: Path, kind: type[T], next_step: str) -> T:
    try:
        values = json.loads(path.read_bytes())
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise SpecError(f"schema version {version!r}; this toolkit reads {SCHEMA_VERSION}")
        return from_dict(kind, values)
    except SpecError as error:
        raise ArtifactError(f"{path}: {error.what}", next_step=next_step) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not a readable {kind.__name__}: {error}", next_step=next_step
        ) from error


def load_profiles(artifact: Artifact) -> list[Profile]:
    """Read all profiles of an artifact, oldest first."""
    paths = [path for source in HOW for path in profiles_dir(artifact).glob(f"{source}_*.json")]
    paths.sort(key=lambda path: (len(path.name), path.name))  # within one second, in the order of writing
    return sorted((load_profile(path) for path in paths), key=lambda profile: profile.created)


def newest_profiles(artifact: Artifact) -> list[Profile]:
    """Return the newest profile of each source and device, oldest first.

    A profile with a failed component does not replace the last complete one: both are returned. Profiles of
    an earlier artifact of this name are left out.
    """
    newest: dict[tuple[str, str], list[Profile]] = {}
    for profile in load_profiles(artifact):
        if profile.manifest_sha256 == artifact.digest:
            before = newest.setdefault((profile.source, profile.asked_for), [])
            whole = [] if profile.total_ms is not None else [p for p in before if p.total_ms is not None]
            before[:] = [*whole, profile]
    return sorted((p for found in newest.values() for p in found), key=lambda profile: profile.created)


def diff_profiles(a: Artifact, b: Artifact) -> tuple[DiffRow, ...]:
    """Compare the newest profiles of two artifacts: the total and each component's median, in ms.

    A row's quantity is "ms.<source>.<device>"; a value is None if only the other side has it.
    """
    sides = []
    for artifact in (a, b):
        values: dict[tuple[str | None, str], tuple[float, float | None]] = {}
        # Incomplete profiles first, so that a complete one replaces their times.
        for profile in sorted(newest_profiles(artifact), key=lambda profile: profile.total_ms is not None):
            quantity = f"ms.{source_words(profile)}.{profile.place}"
            parts = {c.name: c.ms.median for c in profile.components if c.ms is not None}
            whole = {} if profile.total_ms is None else {None: profile.total_ms}
            values |= {(name, quantity): (ms, profile.error_percent) for name, ms in (whole | parts).items()}
        sides.append(values)
    keys = sorted({*sides[0], *sides[1]}, key=lambda key: (key[0] or "", key[1]))
    rows = []
    for key in keys:
        (ms_a, error_a), (ms_b, error_b) = (side.get(key, (None, None)) for side in sides)
        rows.append(DiffRow(*key, ms_a, ms_b, error_a, error_b))
    return tuple(rows)


def save_traffic(report: TrafficReport, folder: Path) -> Path:
    """Write a report into `folder`, replacing an earlier one for the same chip; return the file.

    Raises ResourceError on a full disk, ArtifactError if the folder cannot be written.
    """
    path = folder / f"traffic_{report.target}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error}") from error
    return path


def load_traffic(artifact: Artifact) -> list[TrafficReport]:
    """Read an artifact's traffic reports by chip; those of an earlier artifact of this name are left out.

    Raises ArtifactError for a file that is no traffic report.
    """
    digest = file_sha256(artifact.root / MANIFEST)
    reports = [
        _load(path, TrafficReport, "measure the traffic again")
        for path in sorted(profiles_dir(artifact).glob("traffic_*.json"))
    ]
    return [report for report in reports if report.manifest_sha256 == digest]
