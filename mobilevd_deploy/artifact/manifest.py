"""The manifest of an artifact. An artifact is a folder that holds everything that a runner needs.

    NAME/
    ├── manifest.json        `Manifest`; manifest.schema.json of this package is its JSON Schema
    ├── manifest.sha256      digest of manifest.json, in the format of `sha256sum`
    ├── report.html          and other files of `Manifest.files`
    └── <component>/...      the files of each `Component`

An artifact is immutable. It is built in `.NAME.partial/artifact` (`PartialArtifact`) and renamed once it is
complete. Readers are strict: a missing, extra, truncated or changed file raises ArtifactError.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mobilevd_deploy.base.files import file_sha256
from mobilevd_deploy.base.processes import StageCost
from mobilevd_deploy.config.strict import NAME, from_dict, require_match, require_unique
from mobilevd_deploy.errors import ArtifactError, SpecError
from mobilevd_deploy.model.interface import TensorSpec

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(rf"{NAME.pattern}(/{NAME.pattern})*")
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@dataclass(frozen=True)
class FileEntry:
    """A file: `path` relative to the artifact, with forward slashes; sha256 in hex; size in bytes."""

    path: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        # No segment may start with a dot; this excludes ".." and hidden files.
        require_match(_PATH, self.path, "file path")
        require_match(_SHA256, self.sha256, f"sha256 of {self.path}")
        if self.path in (MANIFEST, MANIFEST_DIGEST):
            raise SpecError(f"file path: {self.path} cannot list itself")
        if self.bytes < 0:
            raise SpecError(f"size of {self.path}: {self.bytes} is negative")

    @classmethod
    def of(cls, root: Path, path: Path) -> FileEntry:
        """Describe the file `path` of the artifact in `root`."""
        relative = path.relative_to(root).as_posix()
        return cls(relative, file_sha256(path), path.stat().st_size)


@dataclass(frozen=True)
class NpuPart:
    """A context binary and the ONNX wrapper that loads it: a whole component, or one part of it.

    `files` by role: "wrapper", "context". `inputs` and `outputs` name the wrapper's inputs and outputs in its
    order; all are float32, and the wrapper gives their shapes. `dram_read` and `dram_written` are the bytes
    that one run moves from and to DRAM by the compiler's plan; None if the compiler did not report them.
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

    `target` (part number) and `arch` (Hexagon version) are read back from the binary. `precision` is
    "float16", or "w8a16" and the like for integers. `qnn_api` is the version of QNN's interface and `sdk` the
    version of the SDK (QAIRT) that wrote the binary; an older runtime cannot load it. `parts` run in order. A
    part reads inputs of the component and outputs of earlier parts; the last part gives the component's
    output. A value may be freed after its last reader.
    """

    target: str
    arch: int
    precision: str
    qnn_api: str
    sdk: str
    parts: tuple[NpuPart, ...]

    @property
    def bytes(self) -> int:
        """Total size of wrappers and context binaries."""
        return sum(entry.bytes for entry in self.all_files())

    @property
    def dram_bytes(self) -> int | None:
        """Bytes that one run moves from and to DRAM by the compiler's plan; None if not reported."""
        moved = [value for part in self.parts for value in (part.dram_read, part.dram_written)]
        return None if None in moved else sum(value for value in moved if value is not None)

    def all_files(self) -> Iterator[FileEntry]:
        """Yield every file, part by part."""
        for part in self.parts:
            yield from part.files.values()

    def check_wiring(self, inputs: Iterable[str], output: str) -> None:
        """Raise SpecError unless the parts compute `output` from `inputs`."""
        known = set(inputs)
        for part in self.parts:
            if missing := [name for name in part.inputs if name not in known]:
                raise SpecError(f"npu {self.target}: no earlier part provides {missing[0]}")
            if again := [name for name in part.outputs if name in known]:
                raise SpecError(f"npu {self.target}: {again[0]} is provided twice")
            known |= set(part.outputs)
        if not self.parts or output not in self.parts[-1].outputs:
            raise SpecError(f"npu {self.target}: its last part does not provide {output}")

    def __post_init__(self) -> None:
        require_match(NAME, self.target, "npu target")


@dataclass(frozen=True)
class Component:
    """One network of the pipeline. It has one output.

    `kind` "onnx": `files` has the role "model" (the ONNX graph) and, if the weights are in a separate file,
    "data". A quantised graph has the roles "quantised" and "quantised_data". `npu` lists the binaries, one
    per chip. `flops`: 2 x MAC for one call. `ops`: number of the graph's nodes by type.
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
            raise SpecError(f"component {self.name}: it needs inputs and exactly one output")
        require_unique((t.name for t in self.inputs), f"component {self.name}: input")
        for tensor in self.inputs:
            if tensor.source is None:
                raise SpecError(f"component {self.name}: input {tensor.name} has no source")
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
        """Total size of the component's files."""
        return sum(entry.bytes for entry in self.all_files())

    def all_files(self) -> Iterator[FileEntry]:
        """Yield every file of the component."""
        yield from self.files.values()
        for binary in self.npu:
            yield from binary.all_files()


@dataclass(frozen=True)
class Quality:
    """Loss by quantisation, measured on pictures that did not calibrate.

    - `calibration`: source of the calibration pictures; `samples`: their number; `sha256`: of each one's
      bytes.
    - `clip_psnr_db`: PSNR of the quantised clip relative to the float clip, frames in [-1, 1].
    - `conditioning`: component -> input -> change of the quantised output, relative to float, when this
      input alone is replaced by another picture's. 1: the same change; 0: the input has no effect.
    - `sensitivity`: component -> block -> SQNR in dB if only this block is quantised; None: no change.
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
    """How a runner makes the components' inputs, and frames from the last output.

    - Picture: `resize` "cover" scales it, with the filter `resample`, to the smallest size that covers
      width x height; `crop` "centre" cuts the rest off. An 8-bit value v becomes v / 127.5 - 1, so
      `image_range` is [-1, 1]; `image_layout` is (1, 3, height, width), RGB.
    - Noise: `noise` names the generator (runtime/noise.py specifies it). An input "noise:<stream>" takes
      the stream's values in row-major order.
    - Frames: the last component's output, (frames, 3, height, width) in the same range. An 8-bit value is
      (x + 1) * 127.5, clamped and rounded half to even. `fps`: frames per second of the clip.
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
class Source:
    """The checkpoint that the artifact was made from: file name without folders, and sha256."""

    name: str
    sha256: str

    def __post_init__(self) -> None:
        require_match(_SHA256, self.sha256, "source.sha256")
        if not self.name or "/" in self.name or "\\" in self.name:
            raise SpecError(f"source.name: {self.name!r} is not a plain file name")


@dataclass(frozen=True)
class Manifest:
    """Content of an artifact, how it was made, and how to run it.

    `created`: UTC, "2025-01-31T12:00:00Z". `recipe`, `model`: the Recipe and the ModelSpec as plain values,
    with defaults. `drift`: stage -> component -> SQNR in dB relative to the trained network; None if the
    outputs are identical (inf becomes None). Its stages are "onnx", "quantised" (AIMET's simulation) and
    "npu.<target>" (HTP simulator). `components`: in running order. `files`: by role, those of no component.

    Raises SpecError if the values contradict each other.
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
            raise SpecError("components: the list is empty")
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
                        f"{where}: shape {list(tensor.shape)}, but the image is {self.pipeline.image_shape}"
                    )
                if source.startswith("component:"):
                    provider = before.get(source.partition(":")[2])
                    if provider is None:
                        raise SpecError(f"{where}: no earlier component provides {source!r}")
                    (given,) = provider.outputs
                    if (given.shape, given.dtype) != (tensor.shape, tensor.dtype):
                        raise SpecError(f"{where}: shape or dtype does not match the output of {source!r}")
            before[component.name] = component
        (frames,) = self.components[-1].outputs
        if frames.shape != self.pipeline.frames_shape:
            raise SpecError(
                f"components: the last output is not the frames: expected {self.pipeline.frames_shape}"
            )

    def all_files(self) -> Iterator[FileEntry]:
        """Yield every file that the manifest lists."""
        for component in self.components:
            yield from component.all_files()
        yield from self.files.values()

    def component(self, name: str) -> Component:
        """Return the component of that name; ArtifactError if there is none."""
        for component in self.components:
            if component.name == name:
                return component
        known = ", ".join(component.name for component in self.components)
        raise ArtifactError(f"no component {name!r}", next_step=f"components are {known}")

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a manifest strictly.

        Raises ArtifactError for text that is not JSON, a repeated, unknown or missing key, another schema
        version, or values that contradict each other.
        """
        try:
            values = json.loads(
                text, object_pairs_hook=_no_duplicates, parse_constant=_number, parse_float=_number
            )
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{MANIFEST} is not readable: {error}") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if type(version) is not int:  # bool is an int too
            raise ArtifactError(f"{MANIFEST} is not an artifact's manifest: it has no schema_version")
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{MANIFEST} has schema version {version}; this toolkit reads {SCHEMA_VERSION}",
                next_step="use the toolkit version that wrote it, or export again",
            )
        try:
            return from_dict(cls, values)
        except SpecError as error:
            raise ArtifactError(f"{MANIFEST}: {error.what}") from error


def _drift(value: float | None, what: str) -> float | None:
    if value is None or value == math.inf:
        return None
    if not math.isfinite(value):
        raise SpecError(f"{what}: {value} dB is not a measurement")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"one of the keys {sorted(values)} occurs twice")
    return values


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number that JSON can hold")
    return value


@dataclass(frozen=True)
class PassReport:
    """Effect of a rewrite: modules changed; parameters and FLOPs (2 x MAC) of the UNet before and after.

    `sqnr_db` compares the outputs with those of the network before the first rewrite; None if they are
    identical (inf becomes None, because JSON has no inf).
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
