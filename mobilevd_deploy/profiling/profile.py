"""Profiles and traffic reports: their data and their wording. store.py keeps them on the disk.

Profile                         one artifact on one device (or chip), from one source
└── components: ComponentProfile
    ├── ms: Latency | None      None: nothing was measured, and `error` says why
    ├── slowest: OpTime
    └── check: OutputCheck | None

TrafficReport                   bytes to and from DRAM, planned by the compiler for one chip
└── rows: TrafficRow
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from mobilevd_deploy.base.chart import Bar, draw_bars
from mobilevd_deploy.errors import SpecError

T = TypeVar("T")

SCHEMA_VERSION: Final = 1
SourceName = Literal["hub", "adb", "estimate", "host"]

# The origin of a profile in words, by its source.
HOW: dict[str, str] = {
    "hub": "measured through Qualcomm AI Hub",
    "adb": "measured on the attached phone",
    "estimate": "estimated, not measured",
    "host": "measured on this computer: good for comparing, not for a phone",
}
# The meaning of `peak_bytes`, by the sources that report it.
PEAK: dict[str, str] = {
    "hub": "as the runtime reports it, without the weights that it maps from the file",
    "adb": "peak resident memory of the app's process while the component was loaded, including the app",
}
MADE_UP = "the numbers are made up"
FIGURES = ("p95", "min", "first load", "warm load", "peak MB", "ops")


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call. An estimate has a median and no samples.

    `median` and `p95` exclude the first sample, which includes the warm-up; `min` and `samples` include it.
    """

    median: float
    p95: float | None = None
    min: float | None = None
    samples: int = 0

    def __post_init__(self) -> None:
        for name, value in (("median", self.median), ("p95", self.p95), ("min", self.min)):
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise SpecError(f"ms.{name}: {value} is not a time")

    @classmethod
    def of(cls, samples: Sequence[float]) -> Latency:
        """Summarise samples in running order, in milliseconds; p95 is the nearest rank.

        A single sample is not excluded. Raises SpecError for no samples, and for one that is not a time.
        """
        if not samples:
            raise SpecError("there are no samples")
        timed = sorted(samples[1:] or samples)
        p95 = timed[math.ceil(0.95 * len(timed)) - 1]
        return cls(statistics.median(timed), p95, min(samples), len(samples))


@dataclass(frozen=True)
class OpTime:
    """An operation of the compiled graph, its compute unit, and its time in a separate pass.

    The pass runs the operations one after another, so their times do not add up to the latency.
    """

    name: str
    type: str
    unit: str
    ms: float


@dataclass(frozen=True)
class OutputCheck:
    """SQNR of the device's output against this computer's for the same input; None: identical."""

    sqnr_db: float | None


@dataclass(frozen=True)
class ComponentProfile:
    """One component on the device.

    `peak_bytes`: its meaning depends on the source, see PEAK. `ops`: operations of the compiled graph by
    compute unit (NPU, GPU, CPU). `error`: why there is no time, or no check. `where`: where to find details,
    such as the job's page.
    """

    name: str
    ms: Latency | None
    first_load_ms: float | None = None
    warm_load_ms: float | None = None
    peak_bytes: int | None = None
    ops: dict[str, int] = field(default_factory=dict)
    slowest: tuple[OpTime, ...] = ()
    check: OutputCheck | None = None
    error: str | None = None
    where: str | None = None

    @property
    def figures(self) -> tuple[str, ...]:
        """The table cells after the median, in the order of FIGURES."""
        return (
            number(self.ms.p95 if self.ms else None),
            number(self.ms.min if self.ms else None),
            number(self.first_load_ms),
            number(self.warm_load_ms),
            number(None if self.peak_bytes is None else self.peak_bytes / 1e6),
            ", ".join(f"{count} {unit}" for unit, count in self.ops.items()) or "-",
        )


@dataclass(frozen=True)
class Profile:
    """An artifact on one device.

    `asked_for`: the user's name for the device. `device`: the measured device (or the chip's name). `notes`:
    the conditions of every number. `artifact`, `manifest_sha256`: what was profiled. `created`: UTC.
    `error_percent`: the error of estimates of this kind; None for a measurement, and for an estimate outside
    of the calibrated range. `total_ms`: the sum of the components' medians, because each component runs once
    per clip, one after another; None if a component has no time.
    """

    schema_version: Literal[1]
    asked_for: str
    device: str
    chipset: str
    source: SourceName
    created: str
    artifact: str
    manifest_sha256: str
    components: tuple[ComponentProfile, ...]
    total_ms: float | None
    error_percent: float | None = None
    notes: tuple[str, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.components:
            raise SpecError("components: there is none")
        names = [component.name for component in self.components]
        if len(set(names)) < len(names):
            raise SpecError("components: one is listed twice")

    @property
    def errors(self) -> tuple[str, ...]:
        """The errors of the components."""
        return tuple(f"{c.name}: {c.error}" for c in self.components if c.error is not None)

    @property
    def made_up(self) -> bool:
        """Whether the numbers are from a test server instead of AI Hub."""
        return any(MADE_UP in note for note in self.notes)

    @property
    def how(self) -> str:
        """The origin of the numbers, in words."""
        return "MADE UP by a server on this computer" if self.made_up else HOW[self.source]

    @property
    def outside(self) -> bool:
        """Whether it is an estimate outside of the calibrated range."""
        return self.source == "estimate" and self.error_percent is None

    @property
    def place(self) -> str:
        """The name that was asked for, and the device if it is another one."""
        return self.asked_for if self.device == self.asked_for else f"{self.asked_for} on {self.device}"

    @property
    def spread(self) -> str:
        """The error of an estimate, as text to append to the total."""
        if self.outside:
            return ", OUTSIDE of the calibration"
        return "" if self.error_percent is None else f" ± {self.error_percent:.0f} %"

    @property
    def in_sum(self) -> ComponentProfile | None:
        """The sum of all components, None if one has no time; an SQNR has no sum."""
        if self.total_ms is None:
            return None
        return dataclasses.replace(join_parts(self.components), name="total", check=None)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks on the table: the slowest operations, and the meaning of the peak memory."""
        slowest = [
            f"{component.name}, slowest: "
            + ", ".join(f"{op.name} ({op.type}, {op.unit}) {number(op.ms)} ms" for op in component.slowest)
            for component in self.components
            if component.slowest
        ]
        if slowest:
            slowest.append("times of single ops are from a separate pass and do not add up to the latency")
        peak = any(component.peak_bytes is not None for component in self.components)
        return (*slowest, *((f"peak MB: {PEAK[self.source]}",) if peak and self.source in PEAK else ()))

    def to_dict(self) -> dict[str, Any]:
        """As plain values; they go through JSON and back."""
        return dataclasses.asdict(self)


def total_ms(components: Sequence[ComponentProfile]) -> float | None:
    """Return the sum of the medians, None if a component has none."""
    medians = [component.ms.median for component in components if component.ms is not None]
    return sum(medians) if len(medians) == len(components) else None


def runtime_notes(compiled: Iterable[str], runtime: str | None, whose: str) -> Iterator[str]:
    """Yield a note for each QAIRT version that compiled binaries and differs from the one that ran them.

    A version is like "2.51.0" or "v2.51.0.260929181845"; `runtime` is None if it is unknown.
    """
    for sdk in sorted(set(compiled)):
        if runtime is None or version(sdk) == version(runtime):
            continue
        said = f"compiled with QAIRT {_plain_version(sdk)}, run with {_plain_version(runtime)} ({whose})"
        if version(runtime) < version(sdk):
            yield f"{said}: an older runtime may refuse the binary (errors 1009, 5000, 5005)"
        else:
            yield f"{said}: a newer runtime loads it, but its own compiler may make a faster binary"


def version(text: str) -> tuple[int, ...]:
    """Read major, minor and patch of a QAIRT version."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _plain_version(text: str) -> str:
    return ".".join(map(str, version(text)))


def join_parts(parts: Sequence[ComponentProfile]) -> ComponentProfile:
    """Join the parts of a split component, which run one after another: times and op counts add up.

    The 95th percentiles add up too, which is an upper bound: all parts are slow at once. The peak memory is
    that of the largest part.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    times = [part.ms for part in parts if part.ms is not None]
    ops: dict[str, int] = {}
    for part in parts:
        for unit, count in part.ops.items():
            ops[unit] = ops.get(unit, 0) + count
    slowest = sorted((op for part in parts for op in part.slowest), key=lambda op: -op.ms)
    return ComponentProfile(
        first.name,
        Latency(
            sum(ms.median for ms in times),
            _sum([ms.p95 for ms in times]),
            _sum([ms.min for ms in times]),
            min(ms.samples for ms in times),
        ),
        first_load_ms=_sum([part.first_load_ms for part in parts]),
        warm_load_ms=_sum([part.warm_load_ms for part in parts]),
        peak_bytes=max((part.peak_bytes for part in parts if part.peak_bytes is not None), default=None),
        ops=ops,
        slowest=tuple(slowest[: len(first.slowest)]),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def now() -> str:
    """Return the time in UTC, "2025-01-31T12:00:00Z"."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def draw_profile(profile: Profile) -> bytes:
    """Draw the components' medians as a PNG; its title names their origin."""
    bars = [
        Bar(component.name, (ms.median,), f"{number(ms.median)} ms")
        if ms
        else Bar(component.name, (), "failed")
        for component in profile.components
        for ms in (component.ms,)
    ]
    return draw_bars(
        head_words(profile),
        bars,
        f"{profile.artifact}: {total_words(profile, ' ms')} in total, {profile.created}",
    )


@dataclass(frozen=True)
class TrafficRow:
    """Bytes to and from DRAM in one run of a component, block or module, including its `parts`.

    Weights and inputs are only read, so written bytes other than the outputs are spills: values that did not
    fit into on-chip memory. `floor`: inputs, outputs and weights, each once. `note`: the conditions.
    """

    path: str
    read: int
    written: int
    floor: int | None = None
    parts: tuple[TrafficRow, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class TrafficReport:
    """DRAM traffic in the compiler's schedule, not measured on a chip; rows with most spills first.

    `what` is an artifact or a preset; `manifest_sha256` is None for a preset. `precision` is like "w8a16".
    """

    schema_version: Literal[1]
    what: str
    manifest_sha256: str | None
    target: str
    precision: str
    optimization_mode: int
    created: str
    rows: tuple[TrafficRow, ...]

    @property
    def read(self) -> int:
        """Total bytes read."""
        return sum(row.read for row in self.rows)

    @property
    def written(self) -> int:
        """Total bytes written."""
        return sum(row.written for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; they go through JSON and back."""
        return dataclasses.asdict(self)


def source_words(profile: Profile) -> str:
    """Name the source of a profile's numbers."""
    if profile.outside:
        return f"{profile.source}, OUTSIDE"
    return f"{profile.source}, MADE UP" if profile.made_up else profile.source


def head_words(profile: Profile) -> str:
    """Return the title of a profile: what was asked for, how it was measured, and on which device."""
    head = f"{profile.asked_for}: {profile.how}"
    if profile.device != profile.asked_for:
        head += f", on {profile.device}"
    return head if profile.chipset == profile.device else f"{head} ({profile.chipset})"


def total_words(profile: Profile, unit: str = "") -> str:
    """Format a profile's total with its error; "-" if a component has no time."""
    return number(profile.total_ms) + unit * (profile.total_ms is not None) + profile.spread


def number(value: float | None) -> str:
    """Format a measurement with at least three significant digits; "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
