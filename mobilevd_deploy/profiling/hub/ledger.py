"""The ledger on disk: uploads and jobs, so that no run repeats them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from mobilevd_deploy.base.files import LockHeldError, remove_leftovers, take_lock, write_durably
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import ArtifactError, MobileVDError, SpecError, UsageError
from mobilevd_deploy.profiling.hub.hosted import HostedPhone

JobKind = Literal["compile", "profile", "inference"]
JobState = Literal["submitted", "done", "failed"]

LEDGER = "ledger.json"
LEDGER_VERSION: Final = 1


@dataclass(frozen=True)
class Request:
    """The request of a run of `profile`.

    `compile`: None profiles the artifact's own context binaries. Otherwise the hub compiles: "onnx" from the
    quantised graph (or else the float graph), "aimet" from the same graph without its quantisers plus AIMET's
    encodings.
    """

    devices: tuple[str, ...]
    components: tuple[str, ...] = ()
    samples: int = 100
    compile: Literal["onnx", "aimet"] | None = None
    check: bool = False
    image: str | None = None


@dataclass(frozen=True)
class Upload:
    """A model or dataset on a hub; `sha256` is the digest of its source."""

    kind: Literal["model", "dataset"]
    sha256: str
    hub: str
    id: str
    time: str


@dataclass(frozen=True)
class HubJob:
    """A job on the hub. `model` is the id of its input, `target` the id of a compile job's output.

    `part` is the index of a binary of a split component.
    """

    kind: JobKind
    component: str
    device: str
    os: str
    id: str
    url: str
    model: str
    time: str
    target: str | None = None
    state: JobState = "submitted"
    reason: str | None = None
    part: int = 0


@dataclass(frozen=True)
class Run:
    """One call of `profile`; `saved` maps the requested device names to the profiles' files.

    `runtime`: the QAIRT version on the devices, as far as the hub reports it; `runtime_option` requests it.
    """

    id: str
    begun: str
    hub: str
    manifest_sha256: str
    request: Request
    targets: tuple[HostedPhone, ...]
    jobs: tuple[HubJob, ...] = ()
    saved: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    runtime: str | None = None
    runtime_option: str = ""

    def job(self, kind: JobKind, component: str, target: HostedPhone, part: int = 0) -> HubJob | None:
        """Return the job of that kind; two targets with the same hosted device share it."""
        wanted = (kind, component, target.device, target.os, part)
        return next((j for j in self.jobs if (j.kind, j.component, j.device, j.os, j.part) == wanted), None)


@dataclass(frozen=True)
class Ledger:
    """Everything that a later run can reuse. It never holds a token."""

    schema_version: Literal[1] = LEDGER_VERSION
    uploads: tuple[Upload, ...] = ()
    runs: tuple[Run, ...] = ()


class Book:
    """The ledger in a folder, locked by one process at a time; a context manager.

    Entering raises UsageError if another run holds it, ArtifactError if the ledger is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger()
        self._lock: int | None = None

    def __enter__(self) -> Book:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.folder / "lock")
            remove_leftovers(self.folder)
            for left in self.folder.glob(".upload-*"):
                shutil.rmtree(left)
            self.ledger = read_ledger(self.folder / LEDGER)
        except LockHeldError:
            raise UsageError(
                f"another run is profiling with {self.folder}",
                next_step="wait for it, or end it; then --resume",
            ) from None
        except OSError as error:
            self._release()
            raise UsageError(f"{self.folder} cannot be used: {error}") from error
        except MobileVDError:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def add_upload(self, upload: Upload) -> None:
        """Record an upload, replacing one of the same content."""
        key = (upload.kind, upload.sha256, upload.hub)
        others = (u for u in self.ledger.uploads if (u.kind, u.sha256, u.hub) != key)
        self._write(dataclasses.replace(self.ledger, uploads=(*others, upload)))

    def put(self, run: Run) -> None:
        """Record a run, replacing its earlier state."""
        others = tuple(other for other in self.ledger.runs if other.id != run.id)
        self._write(dataclasses.replace(self.ledger, runs=(*others, run)))

    def _write(self, ledger: Ledger) -> None:
        try:
            write_durably(self.folder / LEDGER, json.dumps(dataclasses.asdict(ledger), indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"{self.folder / LEDGER} cannot be written: {error}") from error
        self.ledger = ledger

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_ledger(path: Path) -> Ledger:
    """Read a ledger strictly; a missing file is an empty ledger. Raises ArtifactError if it is damaged."""
    try:
        return from_dict(Ledger, json.loads(path.read_bytes()))
    except FileNotFoundError:
        return Ledger()
    except (OSError, ValueError, RecursionError, SpecError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}", next_step="remove it; its record of uploads and jobs is lost"
        ) from error
