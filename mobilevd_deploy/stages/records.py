"""Records of finished stages in the partial artifact, so that a later run does not repeat them.

The input digest of a stage covers the key of the whole run, the stage's name and own inputs, and the digest
and output files of every earlier stage. Its record is written with one rename, after its files are on the
disk, so a killed process leaves a finished stage or none. A record is valid only if its digest matches and
its files are intact. A long stage keeps records of its pieces in the same way.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilevd_deploy.artifact.manifest import FileEntry
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.files import digest, disk_guard, file_sha256, fsync, write_durably
from mobilevd_deploy.base.processes import StageCost, peak_bytes, reset_peak
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import SpecError

_FOLDER = "stages"


@dataclass(frozen=True)
class StageOutput:
    """The result of a stage: files below the partial folder, and values that JSON can hold.

    `steps`: time and memory of its steps that ran in processes of their own.
    """

    files: tuple[Path, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, StageCost] = field(default_factory=dict)


@dataclass(frozen=True)
class StageRecord:
    """A finished stage as stored. File paths are relative to the partial folder.

    `values` went through JSON, so tuples are lists, in a new record as in a reused one.
    """

    name: str
    digest: str
    files: tuple[FileEntry, ...]
    values: dict[str, Any]
    cost: StageCost
    steps: dict[str, StageCost] = field(default_factory=dict)


class Stages:
    """Runs stages in order, or reuses those of an earlier run in the same partial folder.

    `key` holds what all stages depend on: the checkpoint's sha256, versions of toolkit and tools. A folder of
    another key is emptied. A stage must not change the files of earlier stages.
    """

    def __init__(
        self, partial: PartialArtifact, key: Mapping[str, Any], progress: Progress | None = None
    ) -> None:
        self._partial = partial
        self._progress = progress or Progress()
        self._key = digest(key)
        self._records: dict[str, StageRecord] = {}
        folder = partial.root / _FOLDER
        key_file = folder / "key"
        if not key_file.is_file() or key_file.read_bytes() != self._key.encode():
            partial.clear()
            folder.mkdir()
            write_durably(key_file, self._key)

    @property
    def costs(self) -> dict[str, StageCost]:
        """Time and memory of each stage so far, measured in the run that executed it.

        The steps of a stage with several follow it as "<stage>: <step>".
        """
        costs: dict[str, StageCost] = {}
        for name, record in self._records.items():
            costs[name] = record.cost
            if len(record.steps) > 1:
                costs |= {f"{name}: {step}": cost for step, cost in record.steps.items()}
        return costs

    def run(
        self, name: str, inputs: Mapping[str, Any], action: Callable[[], StageOutput], *, disk_bytes: int = 0
    ) -> StageRecord:
        """Return the stage's record: that of an earlier run if nothing changed, else after `action`.

        `inputs`: everything that decides the result, apart from the key and the earlier stages.
        `disk_bytes`: estimate of what `action` writes. Raises ResourceError if the disk has less or fills up,
        and the errors of `action`. After an error the stage counts as not run.
        """
        if name in self._records:
            raise ValueError(f"stage {name!r} ran already")
        expected = self._digest(name, inputs)
        self._progress.begin(name)
        record = _find(self._partial, name, expected)
        reused = record is not None
        if record is None:
            with disk_guard(self._partial.root, disk_bytes):
                reset_peak()
                record = _make(self._partial, name, expected, action)
        self._records[name] = record
        self._progress.end(reused=reused)
        return record

    def pieces(self, name: str, inputs: Mapping[str, Any]) -> Pieces:
        """Return the pieces of the stage `name`, to be run with these `inputs`."""
        return Pieces(self._partial, name, self._digest(name, inputs))

    def _digest(self, name: str, inputs: Mapping[str, Any]) -> str:
        before = [[r.name, r.digest, [f.sha256 for f in r.files]] for r in self._records.values()]
        return digest({"key": self._key, "name": name, "inputs": inputs, "before": before})


@dataclass(frozen=True)
class Pieces:
    """Records of the finished pieces of a stage, so that a run after a kill continues from there.

    `stage` and `digest` are the stage's. Can be used in threads and in a child process.
    """

    partial: PartialArtifact
    stage: str
    digest: str

    def run(self, name: str, action: Callable[[], StageOutput], progress: Progress) -> StageRecord:
        """Return the record of a piece: that of an earlier run with the same inputs, else a new one."""
        name = f"{self.stage}, {name}"
        if found := _find(self.partial, name, self.digest):
            progress.say(f"{name}: done in an earlier run")
            return found
        return _make(self.partial, name, self.digest, action)


def _path(partial: PartialArtifact, name: str) -> Path:
    return partial.root / _FOLDER / f"{name}.json"


def _find(partial: PartialArtifact, name: str, expected: str) -> StageRecord | None:
    try:
        record = from_dict(StageRecord, json.loads(_path(partial, name).read_bytes()))
        if record.digest == expected and all(_is_intact(partial, file) for file in record.files):
            return record
    except (OSError, ValueError, SpecError):
        pass
    return None


def _is_intact(partial: PartialArtifact, entry: FileEntry) -> bool:
    partial.borrow(entry.path)
    path = partial.root / entry.path
    return path.stat().st_size == entry.bytes and file_sha256(path) == entry.sha256


def _make(
    partial: PartialArtifact, name: str, expected: str, action: Callable[[], StageOutput]
) -> StageRecord:
    _path(partial, name).unlink(missing_ok=True)
    begun = time.monotonic()
    output = action()
    peak = max([peak_bytes(), *(step.peak_bytes for step in output.steps.values())])
    cost = StageCost(round(time.monotonic() - begun, 3), peak)
    for path in output.files:
        fsync(path)
        fsync(path.parent)
    files = tuple(FileEntry.of(partial.root, path) for path in output.files)
    values = json.loads(json.dumps(output.values))
    record = StageRecord(name, expected, files, values, cost, output.steps)
    write_durably(_path(partial, name), json.dumps(dataclasses.asdict(record)))
    return record
