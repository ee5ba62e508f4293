"""The artifact: a folder that holds everything a runner needs, and nothing that it must guess.

    NAME/
    ├── manifest.json        `Manifest`; JSON Schema in manifest.schema.json of this package
    ├── manifest.sha256      its digest, in the format of `sha256sum`
    ├── report.html          and other files of `Manifest.files`
    └── <component>/...      the files of each `Component`

It is immutable. While it is built it lies in `.NAME.partial/artifact` (`PartialArtifact`) and gets its name
by one rename; reading is strict: a missing, extra, truncated or changed file is an ArtifactError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal

from mobilevd_deploy.base.files import LockHeldError, disk_guard, file_sha256, fsync, take_lock, written_aside
from mobilevd_deploy.base.processes import StageCost
from mobilevd_deploy.config.strict import NAME, from_dict, require_match, require_unique
from mobilevd_deploy.errors import ArtifactError, MobileVDError, SpecError, UsageError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"

# Written by file browsers wherever they look; not worth refusing an artifact for.
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(rf"{NAME.pattern}(/{NAME.pattern})*")
_SOURCE = re.compile(rf"image|noise:(0|[1-9][0-9]{{0,8}})|component:{NAME.pattern}")
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a component.

    `layout` has one letter per axis: N (1, or the frames), C, H, W. `range` is what the values keep to,
    None where they have no bounds. `source` says who provides an input: "image" (the picture, as
    `PipelineSpec` describes it), "noise:<stream>" (unit noise of that stream), or "component:<name>" (the
    output of that component, which runs before); it is None for outputs.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "float16"]
    layout: str
    range: tuple[float, float] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise SpecError("a tensor has an empty name")
        if not self.shape or min(self.shape) < 1:
            raise SpecError(f"tensor {self.name}: shape {list(self.shape)} is not all positive")
        if len(self.layout) != len(self.shape) or set(self.layout) - set("NCHW"):
            raise SpecError(
                f"tensor {self.name}: layout {self.layout!r} does not name {len(self.shape)} axes"
            )
        if self.range is not None and not self.range[0] < self.range[1]:
            raise SpecError(f"tensor {self.name}: range {list(self.range)} is empty")
        if self.source is not None:
            require_match(_SOURCE, self.source, f"tensor {self.name}: source")


@dataclass(frozen=True)
class FileEntry:
    """A file of the artifact: `path` relative to its folder with forward slashes, sha256 in hex, size."""

    path: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        # No segment may start with a dot, so neither ".." nor a hidden file can be named.
        require_match(_PATH, self.path, "file path")
        require_match(_SHA256, self.sha256, f"sha256 of {self.path}")
        if self.path in (MANIFEST, MANIFEST_DIGEST):
            raise SpecError(f"file path: {self.path} cannot list itself")
        if self.bytes < 0:
            raise SpecError(f"size of {self.path}: {self.bytes} is negative")

    @classmethod
    def of(cls, root: Path, path: Path) -> FileEntry:
        """Describe the file `path`, which lies below `root`."""
        relative = path.relative_to(root).as_posix()
        return cls(relative, file_sha256(path), path.stat().st_size)


@dataclass(frozen=True)
class NpuPart:
    """A context binary and the ONNX wrapper that loads it: a whole component, or a part of one.

    Files by role: "wrapper", "context". `inputs` and `outputs` name values in the order of the wrapper's, all
    float32; their shapes stand in the wrapper. `dram_read` and `dram_written` are the bytes that a run moves
    from and to DRAM by the compiler's plan, None where it did not say.
    """

    files: dict[str, FileEntry]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dram_read: int | None = None
    dram_written: int | None = None

    def __post_init__(self) -> None:
        if set(self.files) != {"wrapper", "context"}:
            raise SpecError(f"npu part: files {sorted(self.files)} are not wrapper and context")
        if not self.inputs or not self.outputs:
            raise SpecError(f"npu part {self.files['wrapper'].path}: it needs inputs and outputs")


@dataclass(frozen=True)
class NpuBinary:
    """A component compiled for one chip.

    `target` is the part number and `arch` the Hexagon version, both read back from the binary. `precision`
    is "float16" or like "w8a16". `qnn_api` is the version of QNN's interface and `sdk` that of the SDK
    (QAIRT) that wrote it; an older runtime cannot load it. `parts` run in order, each on inputs of the
    component or outputs of parts before it; the last one gives the component's output. A value may be dropped
    after its last reader.
    """

    target: str
    arch: int
    precision: str
    qnn_api: str
    sdk: str
    parts: tuple[NpuPart, ...]

    @property
    def bytes(self) -> int:
        """Size of wrappers and contexts."""
        return sum(entry.bytes for entry in self.all_files())

    @property
    def dram_bytes(self) -> int | None:
        """Bytes that one run moves from and to DRAM, by the compiler's plan; None if it did not say."""
        moved = [value for part in self.parts for value in (part.dram_read, part.dram_written)]
        return None if None in moved else sum(value for value in moved if value is not None)

    def all_files(self) -> Iterator[FileEntry]:
        """Every file, part by part."""
        for part in self.parts:
            yield from part.files.values()

    def check_wiring(self, inputs: Iterable[str], output: str) -> None:
        """Raise SpecError unless the parts get from `inputs` to `output`."""
        known = set(inputs)
        for part in self.parts:
            if missing := [name for name in part.inputs if name not in known]:
                raise SpecError(f"npu {self.target}: nobody provides {missing[0]}")
            if again := [name for name in part.outputs if name in known]:
                raise SpecError(f"npu {self.target}: {again[0]} is given twice")
            known |= set(part.outputs)
        if not self.parts or output not in self.parts[-1].outputs:
            raise SpecError(f"npu {self.target}: its last part does not give {output}")

    def __post_init__(self) -> None:
        require_match(NAME, self.target, "npu target")


@dataclass(frozen=True)
class Component:
    """One network of the pipeline.

    `kind` says how to run it anywhere: "onnx" with the files "model" and, if the weights lie outside,
    "data". The quantised graph, where there is one, has the roles "quantised" and "quantised_data"; `npu`
    holds what was compiled for chips. It has one output. `flops` are 2 x MAC for one call; `ops` counts the
    graph's nodes by type.
    """

    name: str
    kind: Literal["onnx"]
    files: dict[str, FileEntry]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    flops: int
    ops: dict[str, int]
    npu: tuple[NpuBinary, ...] = ()

    def __post_init__(self) -> None:
        require_match(NAME, self.name, "component name")
        require_unique((binary.target for binary in self.npu), f"component {self.name}: npu target")
        if "model" not in self.files:
            raise SpecError(f"component {self.name}: no file has the role 'model'")
        if not self.inputs or len(self.outputs) != 1:
            raise SpecError(f"component {self.name}: it needs inputs, and one output")
        require_unique((t.name for t in self.inputs), f"component {self.name}: input")
        for tensor in self.inputs:
            if tensor.source is None:
                raise SpecError(f"component {self.name}: nobody provides input {tensor.name}")
        for tensor in self.outputs:
            if tensor.source is not None:
                raise SpecError(f"component {self.name}: output {tensor.name} has a source")
        for binary in self.npu:
            binary.check_wiring((t.name for t in self.inputs), self.outputs[0].name)
        for name, count in {"parameters": self.parameters, "flops": self.flops, **self.ops}.items():
            if count < 0:
                raise SpecError(f"component {self.name}: {name} {count} is negative")

    @property
    def bytes(self) -> int:
        """Size of the component's files."""
        return sum(entry.bytes for entry in self.all_files())

    def all_files(self) -> Iterator[FileEntry]:
        """Every file of the component."""
        yield from self.files.values()
        for binary in self.npu:
            yield from binary.all_files()


@dataclass(frozen=True)
class Quality:
    """What quantisation cost, on pictures that did not calibrate.

    `calibration`: where the pictures came from, how many, and the sha256 of each picture's bytes.
    `clip_psnr_db`: of the quantised clip against the float clip, frames in [-1, 1].
    `conditioning`: component, then input: how far the output moves when this input alone becomes another
    picture's, quantised over float; 1 is perfect, 0 a dead input.
    `sensitivity`: component, then block: SQNR in dB with nothing but this block quantised; None: no change.
    """

    calibration: str
    samples: int
    sha256: tuple[str, ...]
    clip_psnr_db: float | None
    conditioning: dict[str, dict[str, float]]
    sensitivity: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_psnr_db", _drift(self.clip_psnr_db, "quality.clip_psnr_db"))
        for digest in self.sha256:
            require_match(_SHA256, digest, "quality.sha256")


@dataclass(frozen=True)
class PipelineSpec:
    """How picture, noise and frames look outside the components.

    The picture: `resize` "cover" scales it so that it just covers width x height, `crop` "centre" cuts what
    stands out, `resample` names the filter; 8-bit values v become v / 127.5 - 1, so `image_range` is [-1, 1],
    in `image_layout` (1, 3, height, width), RGB. `noise` names the generator (noise.py holds its
    specification); a "noise:<stream>" input takes its elements in row-major order. The last component's
    output are the frames (frames, 3, height, width) in the same range; clamp, then round half to even:
    v = (x + 1) * 127.5. `fps` is the speed at which they are shown.
    """

    frames: int
    height: int
    width: int
    fps: int
    noise: Literal["splitmix64-as241-v1"] = "splitmix64-as241-v1"
    image_range: tuple[float, float] = (-1.0, 1.0)
    image_layout: Literal["NCHW"] = "NCHW"
    resize: Literal["cover"] = "cover"
    crop: Literal["centre"] = "centre"
    resample: Literal["lanczos3"] = "lanczos3"

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "fps"):
            if getattr(self, name) < 1:
                raise SpecError(f"pipeline.{name}: {getattr(self, name)} is less than 1")
        if self.image_range != (-1.0, 1.0):
            raise SpecError(f"pipeline.image_range: {list(self.image_range)} is not [-1, 1]")

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        """(1, 3, height, width)."""
        return 1, 3, self.height, self.width

    @property
    def frames_shape(self) -> tuple[int, int, int, int]:
        """(frames, 3, height, width)."""
        return self.frames, 3, self.height, self.width


@dataclass(frozen=True)
class PassReport:
    """What a rewrite did: modules changed, parameters and FLOPs (2 x MAC) of the UNet before and after.

    `sqnr_db` compares its outputs with the untouched network's; None: identical (inf is turned into None,
    which JSON can hold).
    """

    name: str
    changed: tuple[str, ...]
    params_before: int
    params_after: int
    flops_before: int
    flops_after: int
    sqnr_db: float | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sqnr_db", _drift(self.sqnr_db, f"pass {self.name}"))


@dataclass(frozen=True)
class Source:
    """The checkpoint that the artifact was made from: its name without folders, and its sha256."""

    name: str
    sha256: str

    def __post_init__(self) -> None:
        require_match(_SHA256, self.sha256, "source.sha256")
        if not self.name or "/" in self.name or "\\" in self.name:
            raise SpecError(f"source.name: {self.name!r} is not a plain file name")


@dataclass(frozen=True)
class Manifest:
    """What is in an artifact, how it was made, and how to run it.

    `created` is UTC, "2025-01-31T12:00:00Z". `recipe` and `model` are the resolved Recipe and the ModelSpec
    as plain values. `drift` holds, per stage and component, the SQNR in dB against the trained network, None
    where the outputs are identical (inf is turned into None): "onnx", then "quantised" as AIMET simulates it,
    then "npu.<target>" on the HTP simulator. `components` stand in running order. `files` are those that
    belong to no component. Raises SpecError where the parts do not fit together.
    """

    schema_version: Literal[1]
    created: str
    name: str
    source: Source
    recipe: dict[str, Any]
    model: dict[str, Any]
    passes: tuple[PassReport, ...]
    drift: dict[str, dict[str, float | None]]
    components: tuple[Component, ...]
    pipeline: PipelineSpec
    tools: dict[str, str]
    stages: dict[str, StageCost]
    files: dict[str, FileEntry] = field(default_factory=dict)
    quality: Quality | None = None

    def __post_init__(self) -> None:
        require_match(_CREATED, self.created, "created")
        drift = {
            stage: {name: _drift(value, f"drift.{stage}.{name}") for name, value in values.items()}
            for stage, values in self.drift.items()
        }
        object.__setattr__(self, "drift", drift)
        if not self.components:
            raise SpecError("components: there is none")
        # Case is ignored, because some file systems ignore it.
        require_unique((entry.path.lower() for entry in self.all_files()), "file")
        require_unique((c.name for c in self.components), "component")
        self._check_wiring()

    def _check_wiring(self) -> None:
        before: dict[str, Component] = {}
        for component in self.components:
            for tensor in component.inputs:
                where, source = f"component {component.name}: input {tensor.name}", tensor.source or ""
                if source == "image" and tensor.shape != self.pipeline.image_shape:
                    raise SpecError(
                        f"{where}: {list(tensor.shape)}, the image is {self.pipeline.image_shape}"
                    )
                if source.startswith("component:"):
                    provider = before.get(source.partition(":")[2])
                    if provider is None:
                        raise SpecError(f"{where}: no component before it is the {source!r}")
                    (given,) = provider.outputs
                    if (given.shape, given.dtype) != (tensor.shape, tensor.dtype):
                        raise SpecError(f"{where}: it does not fit the output of {source!r}")
            before[component.name] = component
        (frames,) = self.components[-1].outputs
        if frames.shape != self.pipeline.frames_shape:
            raise SpecError(
                f"components: the last one's output is not the frames {self.pipeline.frames_shape}"
            )

    def all_files(self) -> Iterator[FileEntry]:
        """Every file that the manifest lists."""
        for component in self.components:
            yield from component.all_files()
        yield from self.files.values()

    def component(self, name: str) -> Component:
        """Return the component of that name; ArtifactError if there is none."""
        for component in self.components:
            if component.name == name:
                return component
        raise ArtifactError(f"no component {name!r}", next_step=", ".join(c.name for c in self.components))

    def to_json(self) -> str:
        """As the text of manifest.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a manifest strictly.

        Raises ArtifactError for text that is not JSON, holds a key twice, has another schema version, an
        unknown or missing key, or values that do not fit together.
        """
        try:
            values = json.loads(
                text, object_pairs_hook=_no_duplicates, parse_constant=_number, parse_float=_number
            )
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{MANIFEST} is not readable: {error}") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if type(version) is not int:  # bool is an int too
            raise ArtifactError(f"{MANIFEST} is not the manifest of an artifact: it has no schema_version")
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{MANIFEST} has schema version {version}; this toolkit reads {SCHEMA_VERSION}",
                next_step="use the toolkit that wrote it, or export again",
            )
        try:
            return from_dict(cls, values)
        except SpecError as error:
            raise ArtifactError(f"{MANIFEST}: {error.what}") from error


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: str | Path) -> Artifact:
        """Read the artifact in folder `root`; check its structure and its files' sizes.

        Raises ArtifactError for anything missing, extra, truncated or not plain, and for a manifest that was
        changed or has another schema version. The contents of the other files are checked by `verify`.
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
            if (root / MANIFEST_DIGEST).read_bytes() != _digest_line(text):
                raise ArtifactError(f"{MANIFEST} does not match {MANIFEST_DIGEST}: one of them was changed")
            manifest = Manifest.from_json(text)
            found = {path.relative_to(root).as_posix(): path for path in _plain_files(root)}
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
            next_step = error.next_step or "export it again, or copy it again from where it came"
            raise ArtifactError(f"{root}: {error.what}", next_step=next_step) from error
        except OSError as error:
            raise ArtifactError(f"{root} cannot be read: {error}") from error
        return cls(root, manifest)

    def verify(self, component: Component | None = None) -> None:
        """Compare the sha256 of every file, or of `component`'s; ArtifactError names the one that differs."""
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
                    next_step="export it again, or copy it again from where it came",
                )

    def path(self, component: Component, role: str) -> Path:
        """Return where `component`'s file of that role lies."""
        return self.root / component.files[role].path

    @property
    def bytes(self) -> int:
        """Size of all listed files."""
        return sum(entry.bytes for entry in self.manifest.all_files())

    @property
    def digest(self) -> str:
        """The sha256 of manifest.json in hex, and so of everything that it lists."""
        return (self.root / MANIFEST_DIGEST).read_text(encoding="ascii").split()[0]


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
            for path in list(_plain_files(self.artifact)):
                if path.relative_to(self.artifact).as_posix() not in listed:
                    path.unlink()
            (self.artifact / MANIFEST).write_bytes(text)
            (self.artifact / MANIFEST_DIGEST).write_bytes(_digest_line(text))
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


def find_newest(folder: Path, depth: int = 3, *, advice: str = "name one as the argument") -> Artifact:
    """Return the artifact that was written last in `folder` or up to `depth` levels below; none hidden.

    Raises UsageError with `advice` if there is none, ArtifactError if the newest is damaged.
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


@dataclass(frozen=True)
class DiffRow:
    """One quantity of two artifacts, of a component or, where that is None, of the whole.

    `quantity` is "bytes", "parameters", "flops", "ops.<type>", "drift_db.<stage>" or "ms.<source>.<device>".
    None means that the side does not have it; a drift of inf means identical outputs. The errors are those of
    estimates.
    """

    component: str | None
    quantity: str
    a: float | None
    b: float | None
    a_error_percent: float | None = None
    b_error_percent: float | None = None


def diff(a: Artifact, b: Artifact) -> tuple[DiffRow, ...]:
    """Put two artifacts side by side: totals first, then component by component, equal rows included."""
    before, after = _quantities(a), _quantities(b)
    keys = dict.fromkeys([*before, *after])
    components = dict.fromkeys(component for component, _ in keys)
    return tuple(
        DiffRow(*key, before.get(key), after.get(key))
        for component in components
        for key in keys
        if key[0] == component
    )


def _quantities(artifact: Artifact) -> dict[tuple[str | None, str], float]:
    manifest = artifact.manifest
    rows: dict[tuple[str | None, str], float] = {
        (None, "bytes"): artifact.bytes,
        (None, "parameters"): sum(c.parameters for c in manifest.components),
        (None, "flops"): sum(c.flops for c in manifest.components),
    }
    for c in manifest.components:
        rows |= {(c.name, "bytes"): c.bytes, (c.name, "parameters"): c.parameters, (c.name, "flops"): c.flops}
        rows |= {(c.name, f"ops.{kind}"): count for kind, count in sorted(c.ops.items())}
        for stage, values in manifest.drift.items():
            if c.name in values:
                value = values[c.name]
                rows[c.name, f"drift_db.{stage}"] = math.inf if value is None else value
    return rows


def _plain_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(f"{path.relative_to(root)} is not a plain file")
        if path.is_file() and path.name not in _LITTER:
            yield path


def _holds_manifest(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file() and (folder / MANIFEST_DIGEST).is_file()
    except OSError:  # somebody else's folder, which we may not look into
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


def _digest_line(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _drift(value: float | None, what: str) -> float | None:
    if value is None or value == math.inf:
        return None
    if not math.isfinite(value):
        raise SpecError(f"{what}: {value} dB is not a measurement")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a key of {sorted(values)} stands twice")
    return values


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number that JSON can hold")
    return value
