"""The result of the app's benchmark, as the app writes it on the phone.

Benchmark                       files/benchmarks/<run_id>.json; JSON Schema in benchmark.schema.json
├── artifact: ArtifactId
├── device: Handset
├── runtime: PhoneRuntime
├── components: Timing          those that were measured completely
├── memory: Memory
└── error: Failure | None

The app writes the file aside (`.<run_id>.json.partial`) and renames it when it is complete. `am start` starts
BenchmarkActivity with the extras artifact, samples, warmup, backend, run_id and, for a selection, components
(names separated by commas).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Literal

from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import ArtifactError, SpecError

Thermal = Literal["none", "light", "moderate", "severe", "critical", "emergency", "shutdown"]

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ArtifactId:
    """The artifact's folder on the phone, and the sha256 of its manifest.json."""

    name: str
    manifest_sha256: str

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.manifest_sha256):
            raise SpecError(f"manifest_sha256: {self.manifest_sha256!r} is no sha256")


@dataclass(frozen=True)
class Handset:
    """The phone, as Android describes it; `soc` is None before Android 12."""

    manufacturer: str
    model: str
    soc: str | None
    android: str
    sdk_level: int

    def __post_init__(self) -> None:
        _at_least(1, sdk_level=self.sdk_level)


@dataclass(frozen=True)
class PhoneRuntime:
    """Versions in the app; `qnn` is QAIRT's, None in an app without Qualcomm's libraries."""

    onnxruntime: str
    qnn: str | None


@dataclass(frozen=True)
class Timing:
    """One component: `ms` of each timed call in running order, the sum of its parts.

    `backend`: where it ran. `npu_nodes`, `cpu_nodes`: how the runtime placed its nodes. `load_ms`: from files
    to ready sessions. `peak_bytes`: peak resident memory of the process meanwhile.
    """

    name: str
    backend: Literal["npu", "cpu"]
    npu_nodes: int
    cpu_nodes: int
    load_ms: float
    ms: tuple[float, ...]
    peak_bytes: int | None

    def __post_init__(self) -> None:
        if not self.ms:
            raise SpecError(f"component {self.name}: ms is empty")
        _at_least(0, npu_nodes=self.npu_nodes, cpu_nodes=self.cpu_nodes, load_ms=self.load_ms)
        _at_least(0, peak_bytes=self.peak_bytes or 0, ms=min(self.ms))
        if not math.isfinite(math.fsum(self.ms) + self.load_ms):
            raise SpecError(f"component {self.name}: a time is not finite")


@dataclass(frozen=True)
class Memory:
    """The phone's memory before the first component was loaded."""

    available_bytes: int
    total_bytes: int

    def __post_init__(self) -> None:
        _at_least(0, available_bytes=self.available_bytes, total_bytes=self.total_bytes)


@dataclass(frozen=True)
class Failure:
    """Why a benchmark ended early, and where."""

    message: str
    component: str | None
    step: str | None


@dataclass(frozen=True)
class Benchmark:
    """One run of the app's benchmark. `error` is None exactly when `state` is "done"."""

    schema_version: Literal[1]
    run_id: str
    app_version: str
    artifact: ArtifactId
    device: Handset
    asked_backend: Literal["auto", "npu", "cpu"]
    samples: int
    warmup: int
    runtime: PhoneRuntime
    components: tuple[Timing, ...]
    thermal_before: Thermal | None
    thermal_after: Thermal | None
    memory: Memory
    state: Literal["done", "failed"]
    error: Failure | None

    def __post_init__(self) -> None:
        if not _RUN_ID.fullmatch(self.run_id):
            raise SpecError(f"run_id: {self.run_id!r} is no name")
        _at_least(1, samples=self.samples)
        _at_least(0, warmup=self.warmup)
        if (self.state == "done") != (self.error is None):
            raise SpecError(f"state {self.state} does not fit error {self.error}")

    @classmethod
    def from_json(cls, text: str | bytes) -> Benchmark:
        """Read a result strictly. Raises ArtifactError with the invalid key."""
        try:
            return from_dict(cls, json.loads(text))
        except (SpecError, ValueError, RecursionError) as error:
            reason = error.what if isinstance(error, SpecError) else f"it is not JSON: {error}"
            raise ArtifactError(
                f"the app's benchmark result is invalid: {reason}",
                next_step="install the app of this toolkit's version (make apk), then profile again",
            ) from error


def _at_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if value < least:
            raise SpecError(f"{name}: {value} is less than {least}")
