"""Latency of the UNet on a phone's NPU, from the network's structure alone. Nothing here is measured.

    ms = rate x (operations of layers with weights + 2 x operations of attention's two products)

`rate` is fitted by least squares of the relative errors on the four structures with a published latency
(latency.json holds their counts). The factor 2 is not fitted: at 16-bit activations and 8-bit weights, a
product of two activations takes twice the multiplier passes of one with weights. A fitted factor for
attention predicts the left-out row worse. A fitted factor for convolutions becomes 0, which fits the four
rows best (2.3 %) but is impossible, because convolutions take time. benchmarks/estimate_calibration.py
compares these forms.

Elementwise operations, norms and copies have no term of their own: `rate` includes them, which is valid for
networks with about as many of them per operation as the calibrated ones. This limits the valid range below.
Source of the latencies: MobileVD, table of the ablation (section 3).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevd_deploy.config.devices import Chip, chip_called, find, table
from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.qnn.compiled import DramBytes

if TYPE_CHECKING:
    from mobilevd_deploy.artifact.artifact import Artifact
    from mobilevd_deploy.profiling.profile import Profile, TrafficRow

# Passes per operation of a product of two 16-bit activations, over those of one with 8-bit weights.
ATTENTION_WEIGHT = 2
# Passes of the int8 unit for one operation on a 16-bit activation and an 8-bit weight.
PASSES = 2
# An estimate may have this many times more, or fewer, operations than the calibrated structures.
REACH = 1.25
# A kind's share of the load may be this far outside of the calibrated structures' shares.
SHARE_SLACK = 0.05


@dataclass(frozen=True)
class Counts:
    """Operations (2 x MAC) of one evaluation of the UNet, by kind."""

    spatial_convolution: int = 0
    temporal_convolution: int = 0
    spatial_linear: int = 0
    temporal_linear: int = 0
    spatial_attention: int = 0
    temporal_attention: int = 0

    @property
    def total(self) -> int:
        """All operations."""
        return sum(dataclasses.astuple(self))

    def weighted(self) -> dict[str, int]:
        """Return the operations by kind, those of attention times ATTENTION_WEIGHT."""
        return {
            kind: count * (ATTENTION_WEIGHT if kind.endswith("attention") else 1)
            for kind, count in dataclasses.asdict(self).items()
        }

    def shares(self) -> dict[str, float]:
        """Return each kind's part of the weighted operations; they add up to 1."""
        load = self.weighted()
        total = sum(load.values())
        return {kind: value / total for kind, value in load.items()}


@dataclass(frozen=True)
class Row:
    """A structure with a published latency.

    `moved`: its DRAM traffic on the calibrated chip with the shipped recipe, if the benchmarks counted it.
    """

    preset: str
    published_ms: float
    counts: Counts
    moved: DramBytes | None = None


@dataclass(frozen=True)
class Calibration:
    """The content of latency.json: the published rows and the conditions of their measurement.

    `sd15`: operations of Stable Diffusion 1.5's UNet, whose latency the vendor publishes per chip.
    `sd15_moved`: its DRAM traffic on `chip` in our graph forms, block by block.
    """

    chip: str
    frames: int
    width: int
    height: int
    source: str
    rows: tuple[Row, ...]
    sd15: Counts
    sd15_moved: DramBytes

    def rate(self, rows: Sequence[Row] | None = None) -> float:
        """Fit milliseconds per weighted operation to `rows` (all): least squares of the relative errors."""
        loads = [
            sum(row.counts.weighted().values()) / row.published_ms
            for row in (self.rows if rows is None else rows)
        ]
        return sum(loads) / sum(load * load for load in loads)

    def leave_one_out(self) -> dict[str, float]:
        """Return the relative error of each row when the rate is fitted to the others."""
        errors = {}
        for row in self.rows:
            rate = self.rate([other for other in self.rows if other != row])
            errors[row.preset] = rate * sum(row.counts.weighted().values()) / row.published_ms - 1
        return errors


@dataclass(frozen=True)
class Floor:
    """The minimum time of the UNet in ms: planned DRAM bytes over bandwidth, and operations over peak rate.

    At 16-bit activations an operation takes PASSES passes of the int8 unit, one of attention twice as many.
    `arithmetic_ms` is None if no peak rate of the chip is known.
    """

    dram_bytes: int
    dram_ms: float
    arithmetic_ms: float | None

    @property
    def ms(self) -> float:
        """The larger of the two, because they run in parallel."""
        return max(self.dram_ms, self.arithmetic_ms or 0)

    @property
    def binds(self) -> str:
        """Which of the two is larger."""
        return "DRAM traffic" if self.dram_ms == self.ms else "arithmetic"


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of one evaluation of the UNet, with the error.

    `error_percent`: the worst leave-one-out error of the calibration plus the error of scaling to another
    chip, None with warnings; `mean_error_percent`: the mean leave-one-out error. `shares`: of the time, by
    kind of operation; they add up to 1. `well_built_ms`: the same operations at the rate of the vendor's
    Stable Diffusion 1.5 UNet on this chip. `warnings`: why it is outside of the calibrated range, if it is.
    """

    chip: Chip
    ms: float
    error_percent: float | None
    mean_error_percent: float
    shares: dict[str, float]
    tflops: float
    well_built_ms: float
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def estimate(
    spec: ModelSpec, rewrites: Sequence[str], device: str, calibration: Calibration | None = None
) -> Estimate:
    """Estimate one evaluation of the UNet of `spec` after `rewrites` on a phone or chip by name.

    Raises:
        UsageError: the device is unknown, the vendor publishes no latency for its chip, or the clip's size
            or number of frames is not the calibrated one.
    """
    calibration, chip = calibration or load_calibration(), find(device).chip
    _require_calibrated_size(spec, calibration)
    return estimate_counts(count_operations(spec, rewrites), chip, calibration)


def estimate_counts(counts: Counts, chip: Chip, calibration: Calibration) -> Estimate:
    """Turn operation counts into an estimate for `chip`; UsageError if it has no published latency."""
    reference = next(c for c in table().chip if c.name == calibration.chip)
    scale, scale_error, notes = _scaled(chip, reference)
    total = sum(counts.weighted().values())
    errors = [100 * abs(error) for error in calibration.leave_one_out().values()]
    sd15_load = sum(calibration.sd15.weighted().values())
    warnings = _warnings(counts, calibration)
    return Estimate(
        chip=chip,
        ms=scale * calibration.rate() * total,
        error_percent=None if warnings else max(errors) + scale_error,
        mean_error_percent=sum(errors) / len(errors),
        shares=counts.shares(),
        tflops=counts.total / 1e12,
        well_built_ms=chip.published_ms["sd15_unet"] / sd15_load * total,
        warnings=warnings,
        notes=notes,
    )


def floor(counts: Counts, chip: Chip, dram_bytes: int) -> Floor | None:
    """Return the floor of a UNet on `chip` from its operations and the DRAM bytes that the compiler planned.

    None if the chip's bandwidth is unknown.
    """
    if chip.dram_gb_s is None:
        return None
    passes = PASSES * sum(counts.weighted().values())
    arithmetic = passes / chip.int8_tops.value / 1e9 if chip.int8_tops is not None else None
    return Floor(dram_bytes, dram_bytes / chip.dram_gb_s.value / 1e6, arithmetic)


def _planned(
    artifact: Artifact | None, counts: Counts, chip: Chip, calibration: Calibration
) -> TrafficRow | None:
    """Return the UNet's DRAM traffic if `traffic` has counted the artifact for this chip.

    Without an artifact, return that of the calibrated structure with these counts.
    """
    from mobilevd_deploy.profiling.profile import TrafficRow
    from mobilevd_deploy.profiling.store import load_traffic

    if artifact is not None:
        rows = (row for r in load_traffic(artifact) if chip_called(r.target) == chip for row in r.rows)
        return next((row for row in rows if row.path == "unet"), None)
    moved = next((row.moved for row in calibration.rows if row.counts == counts), None)
    if moved is None or chip.name != calibration.chip:
        return None
    note = "in the shipped recipe, block by block"
    return TrafficRow("unet", moved.read, moved.written, note=note)


def _bracket(counts: Counts, result: Estimate, calibration: Calibration, planned: TrafficRow | None) -> str:
    """Describe the range of plausible times, and the time at the vendor network's distance from its floor."""
    ends = (
        f"bracket: {result.ms:,.0f} ms at the rate of the paper's networks, {result.well_built_ms:,.0f} ms "
        f"at the {result.ms / result.well_built_ms:.1f} times faster one that the vendor publishes for "
        f"Stable Diffusion 1.5's UNet (W8A16, {result.chip.published_on}: {table().published_by})"
    )
    other = calibration.sd15_moved
    own = floor(counts, result.chip, planned.read + planned.written) if planned else None
    its = floor(calibration.sd15, result.chip, other.total)
    if planned is None or own is None or its is None:
        return f"{ends}; where between them it lies is not known without its DRAM traffic"
    ratio = result.chip.published_ms["sd15_unet"] / its.ms
    if own.dram_ms * ratio > result.well_built_ms:
        place = f"lies at {own.dram_ms * ratio:,.0f} ms, {ratio:.1f} times its floor, as that UNet does"
    else:
        place = "could reach the faster end"
    each, others = 1000 / counts.total, 1000 / calibration.sd15.total
    reason = (
        f"per thousand operations it moves {each * own.dram_bytes:.2f} bytes, of which it writes "
        f"{each * planned.written:.2f}; that UNet in our forms {others * other.total:.2f} and "
        f"{others * other.written:.2f}"
    )
    if planned.parts:
        heaviest = max(planned.parts, key=lambda part: part.read + part.written)
        share = (heaviest.read + heaviest.written) / own.dram_bytes
        reason += f". The part that moves most is {heaviest.path} ({share:.0%})"
    return f"{ends}. By its own traffic it {place}: {reason}"


def _floor_note(counts: Counts, chip: Chip, planned: TrafficRow | None, ms: float) -> str:
    """Describe the floor, or say how to count the traffic that it needs."""
    if planned is None:
        return (
            f"no floor: its DRAM traffic on {chip.name} was not counted (mobilevd-deploy traffic counts it)"
        )
    found = floor(counts, chip, planned.read + planned.written)
    note = f", {planned.note}" if planned.note else ""
    if found is None or chip.dram_gb_s is None:
        return f"no floor: there is no sourced figure of {chip.name}'s memory bandwidth"
    if found.arithmetic_ms is None or chip.int8_tops is None:
        binds, arithmetic = "of DRAM traffic alone", f"for arithmetic {chip.name} has no sourced peak"
    else:
        binds = f"and {found.binds} binds"
        arithmetic = (
            f"arithmetic {found.arithmetic_ms:,.0f} ms ({PASSES} passes per operation at "
            f"{chip.int8_tops.value:g} TOPS int8: {chip.int8_tops.source})"
        )
    return (
        f"floor: {found.ms:,.0f} ms, {binds}. DRAM traffic takes {found.dram_ms:,.0f} ms "
        f"({found.dram_bytes / 1e9:.2f} GB as the compiler planned{note}, at {chip.dram_gb_s.value:g} GB/s: "
        f"{chip.dram_gb_s.source}), "
        f"{arithmetic}; the estimate is {ms / found.ms:.1f} times the floor"
    )


def _require_calibrated_size(spec: ModelSpec, calibration: Calibration) -> None:
    size = (spec.frames, spec.width, spec.height)
    if size != (calibration.frames, calibration.width, calibration.height):
        raise UsageError(
            f"{spec.name} makes {spec.frames} frames of {spec.width}x{spec.height}: there is no estimate, "
            f"because latencies are published for {calibration.frames} of "
            f"{calibration.width}x{calibration.height} only",
            next_step="profile it through AI Hub or on a phone; profile host compares on this computer",
        )


def _scaled(chip: Chip, reference: Chip) -> tuple[float, float, tuple[str, ...]]:
    """Return the factor from `reference` to `chip`, the error in percent that it adds, and notes."""
    if chip == reference:
        return 1.0, 0.0, ()
    if not chip.published_ms:
        known = ", ".join(c.name for c in table().chip if c.published_ms)
        raise UsageError(
            f"{chip.name}: the vendor publishes no latency for it that an estimate could be scaled by",
            next_step=f"an estimate is possible for {known}",
        )
    ratios = {name: ms / reference.published_ms[name] for name, ms in chip.published_ms.items()}
    unet = ratios["sd15_unet"]
    # The ratios of two networks on the same two chips differ, which is the error for a third network.
    error = 100 * max(abs(ratio / unet - 1) for ratio in ratios.values())
    note = (
        f"scaled from {reference.name} by {unet:.2f}, the ratio of the latencies that the vendor publishes "
        f"for Stable Diffusion 1.5's UNet on {chip.published_on} and {reference.published_on} "
        f"({table().published_by}); its decoder's ratio differs by {error:.0f} %, which widens the error. "
        "Galaxy phones may run their chips at other clocks"
    )
    return unet, error, (note,)


def _reach(calibration: Calibration) -> tuple[float, float]:
    """Return the fewest and most operations that an estimate may have."""
    totals = [row.counts.total for row in calibration.rows]
    return min(totals) / REACH, max(totals) * REACH


def _validity(calibration: Calibration) -> str:
    low, high = _reach(calibration)
    return (
        f"valid for {low / 1e12:.1f} to {high / 1e12:.1f} TFLOPs, with each kind's share within "
        f"{100 * SHARE_SLACK:.0f} points of those of the calibrated networks, and "
        f"{calibration.frames} frames of {calibration.width}x{calibration.height}"
    )


def _warnings(counts: Counts, calibration: Calibration) -> tuple[str, ...]:
    warnings = []
    low, high = _reach(calibration)
    if not low <= counts.total <= high:
        warnings.append(
            f"{counts.total / 1e12:.2f} TFLOPs are outside of {low / 1e12:.2f} to {high / 1e12:.2f}: do not "
            "trust this number"
        )
    calibrated = [row.counts.shares() for row in calibration.rows]
    for kind, share in counts.shares().items():
        seen = [shares[kind] for shares in calibrated]
        if not min(seen) - SHARE_SLACK <= share <= max(seen) + SHARE_SLACK:
            warnings.append(
                f"{kind.replace('_', ' ')} is {share:.0%} of the load, in the calibrated networks "
                f"{min(seen):.0%} to {max(seen):.0%}"
            )
    return tuple(warnings)


@lru_cache(maxsize=1)
def load_calibration() -> Calibration:
    """Read latency.json, which benchmarks/estimate_calibration.py writes."""
    path = Path(__file__).with_name("latency.json")
    return from_dict(Calibration, json.loads(path.read_text(encoding="utf-8")))


def count_operations(spec: ModelSpec, rewrites: Sequence[str]) -> Counts:
    """Count the UNet's operations by kind, on its module tree without weights: seconds at full size."""
    from mobilevd_deploy.npu.skeleton import rewritten_skeleton

    step, inputs = rewritten_skeleton(spec, rewrites)
    return count_module(step.unet, step, *inputs)


def count_module(module: object, function: object, *inputs: object) -> Counts:
    """Count the operations of `function(*inputs)`, which runs `module`, by kind."""
    from diffusers.models.attention_processor import Attention
    from torch import nn

    from mobilevd_deploy.model.flops import count_flops_by_module

    assert isinstance(module, nn.Module)
    assert callable(function)
    counted = count_flops_by_module(module, function, *inputs)["honest"]
    own = dict(counted)
    for path, flops in counted.items():
        if path:
            own[path.rpartition(".")[0]] -= flops
    parts = dict(module.named_modules())
    kinds = dict.fromkeys((field.name for field in dataclasses.fields(Counts)), 0)
    for path, flops in own.items():
        part = parts[path]
        # diffusers names the layers that work across frames "temporal".
        where = "temporal" if "temporal" in path or isinstance(part, nn.Conv3d) else "spatial"
        if isinstance(part, Attention):
            kind = "attention"
        elif isinstance(part, nn.Linear):
            kind = "linear"
        else:
            kind = "convolution"
        kinds[f"{where}_{kind}"] += flops
    return Counts(**kinds)


def estimate_profile(
    what: str | Path | Artifact, device: str, calibration: Calibration | None = None
) -> Profile:
    """Estimate an artifact, or a preset by name or TOML file, as a Profile.

    It holds the UNet only, because the published latencies are the UNet's.

    Raises:
        UsageError, SpecError, ArtifactError: as `estimate`, or a preset or artifact that cannot be read.
    """
    from mobilevd_deploy.artifact.artifact import Artifact
    from mobilevd_deploy.artifact.manifest import MANIFEST_DIGEST
    from mobilevd_deploy.config.presets import load_preset
    from mobilevd_deploy.profiling.profile import SCHEMA_VERSION, ComponentProfile, Latency, Profile, now

    if isinstance(what, (str, Path)) and (Path(what) / MANIFEST_DIGEST).exists():
        what = Artifact.open(what)
    notes, outside = [], []
    if isinstance(what, Artifact):
        manifest = what.manifest
        spec = from_dict(ModelSpec, manifest.model)
        name, rewrites = what.root.name, tuple(report.name for report in manifest.passes)
        digest = what.digest
        if not manifest.recipe.get("quant"):
            outside.append(
                "this artifact is not quantised; the number is for its form with 8-bit weights and 16-bit "
                "activations"
            )
    else:
        preset = load_preset(what)
        spec, name, rewrites, digest = preset.model, preset.model.name, preset.rewrites, ""
        notes.append("of the preset's structure: there is no artifact yet")
    calibration, chip = calibration or load_calibration(), find(device).chip
    _require_calibrated_size(spec, calibration)
    counts = count_operations(spec, rewrites)
    result = estimate_counts(counts, chip, calibration)
    planned = _planned(what if isinstance(what, Artifact) else None, counts, chip, calibration)
    shares = sorted(result.shares.items(), key=lambda item: -item[1])
    outside += result.warnings
    notes = [
        *(f"OUTSIDE of the calibration: {warning}" for warning in outside),
        *notes,
        f"estimated from {result.tflops:.2f} TFLOPs of the UNet alone: the encoders and the decoder are not "
        "in the published latencies",
        "time by kind: "
        + ", ".join(f"{share:.0%} {kind.replace('_', ' ')}" for kind, share in shares if share >= 0.005),
        f"calibrated on {len(calibration.rows)} published latencies ({calibration.source}); leaving one out, "
        f"the others predict it within {result.mean_error_percent:.1f} % in the mean. Their precision is not "
        "published: 8-bit weights and 16-bit activations are assumed",
        _validity(calibration),
        _bracket(counts, result, calibration, planned),
        *((_floor_note(counts, chip, planned, result.ms),) if planned or isinstance(what, Artifact) else ()),
        *result.notes,
    ]
    unet = ComponentProfile("unet", Latency(result.ms))
    return Profile(
        schema_version=SCHEMA_VERSION,
        asked_for=device,
        device=result.chip.name,
        chipset=result.chip.name,
        source="estimate",
        created=now(),
        artifact=name,
        manifest_sha256=digest,
        components=(unet,),
        total_ms=result.ms,
        error_percent=None if outside else result.error_percent,
        notes=tuple(notes),
    )
