"""The estimate: its fit by hand, its errors, its refusals, and that it behaves on structures never seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.cli.tables import render_profile
from mobilevd_deploy.config.devices import find
from mobilevd_deploy.config.presets import load_preset, structural_rewrites
from mobilevd_deploy.config.spec import FunnelSpec, ModelSpec
from mobilevd_deploy.errors import SpecError, UsageError
from mobilevd_deploy.model.flops import count_flops
from mobilevd_deploy.profiling import estimate as estimate_module
from mobilevd_deploy.profiling.estimate import (
    Calibration,
    Counts,
    Row,
    count_module,
    count_operations,
    estimate,
    estimate_counts,
    estimate_profile,
    floor,
    load_calibration,
)
from mobilevd_deploy.profiling.profile import TrafficReport, TrafficRow
from mobilevd_deploy.profiling.store import profiles_dir, save_traffic
from mobilevd_deploy.qnn.compiled import DramBytes
from tests.support import ROOT, tiny_artifact
from tests.support.networks import FULL

CHIP = "Snapdragon 8 Gen 3"
TINY = ModelSpec(
    name="tiny", frames=4, height=64, width=64, unet=dataclasses.replace(FULL, cross_attention_dim=1024)
)


def calibration(*rows: tuple[float, Counts]) -> Calibration:
    named = tuple(Row(f"row{i}", ms, counts) for i, (ms, counts) in enumerate(rows))
    return Calibration(CHIP, 4, 64, 64, "by hand", named, Counts(spatial_linear=762), DramBytes(5, 5))


def test_rate_by_hand() -> None:
    # Loads 100 and 300 (attention counts twice): 2 and 3 per ms, so the rate is (2 + 3) / (4 + 9).
    made = calibration((50, Counts(spatial_linear=100)), (100, Counts(100, 0, 0, 0, 80, 20)))
    assert made.rate() == pytest.approx(5 / 13)
    errors = made.leave_one_out()
    assert errors["row0"] == pytest.approx(100 / 3 / 50 - 1)
    assert errors["row1"] == pytest.approx(300 / 2 / 100 - 1)


def test_a_row_that_repeats_itself_would_predict_itself() -> None:
    presets = [row.preset for row in load_calibration().rows]
    counts = [row.counts for row in load_calibration().rows]
    assert len(set(presets)) == len(presets) == 4
    assert len(set(counts)) == 4


def test_calibration_holds_what_is_published() -> None:
    for row in load_calibration().rows:
        ladder = load_preset(row.preset).ladder
        assert ladder is not None
        assert row.published_ms == ladder.phone_ms
        assert row.counts.total / 1e12 == pytest.approx(ladder.tflops, rel=0.02)


def test_calibration_is_reproduced_by_counting() -> None:
    """The shipped counts of one row are those of the module tree."""
    (row,) = (row for row in load_calibration().rows if row.preset == "mobilevd")
    preset = load_preset("mobilevd")
    assert count_operations(preset.model, preset.rewrites) == row.counts


def test_leave_one_out_meets_the_goal_and_rows_lie_within_the_error() -> None:
    made = load_calibration()
    errors = [abs(error) for error in made.leave_one_out().values()]
    assert sum(errors) / len(errors) <= 0.08
    for row in made.rows:
        found = estimate_counts(row.counts, find(CHIP).chip, made)
        assert found.error_percent is not None
        assert abs(found.ms / row.published_ms - 1) <= found.error_percent / 100
        assert found.error_percent == pytest.approx(100 * max(errors))
        assert found.warnings == ()


def test_results_file_agrees_with_the_calibration() -> None:
    path = ROOT / "benchmarks" / "results" / "estimate_calibration.json"
    written = json.loads(path.read_text())
    errors = load_calibration().leave_one_out()
    assert {row["preset"]: row["leave_one_out_error"] for row in written["rows"]} == pytest.approx(errors)


@pytest.mark.parametrize("kind", [field.name for field in dataclasses.fields(Counts)])
def test_every_operation_costs_time(kind: str) -> None:
    counts = load_calibration().rows[-1].counts
    more = dataclasses.replace(counts, **{kind: getattr(counts, kind) + 10**11})
    chip = find(CHIP).chip
    before, after = (estimate_counts(c, chip, load_calibration()) for c in (counts, more))
    assert after.ms > before.ms > 0
    assert sum(after.shares.values()) == pytest.approx(1)
    assert after.shares[kind] > before.shares[kind]


UNSEEN = {
    "funnels alone, nothing pruned": ("mobilevd-multiscale", FunnelSpec(0.5, 0.5, 1.0)),
    "funnels in the convolutions": ("mobilevd", FunnelSpec(0.5, 1.0, 0.5)),
    "attention of a quarter of its rank": ("mobilevd", FunnelSpec(0.25, 0.25, 1.0)),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_network_never_seen_gets_a_sane_number(name: str) -> None:
    """Faster than the one it was made of by about what it saves, and never below its arithmetic."""
    base, funnels = UNSEEN[name]
    preset, made, chip = load_preset(base), load_calibration(), find(CHIP).chip
    (row,) = (row for row in made.rows if row.preset == base)
    spec = dataclasses.replace(preset.model, unet=dataclasses.replace(preset.model.unet, funnels=funnels))
    counts = count_operations(spec, load_preset("mobilevd").rewrites)
    before, after = (estimate_counts(c, chip, made) for c in (row.counts, counts))
    saved, faster = 1 - counts.total / row.counts.total, 1 - after.ms / before.ms
    assert 0.04 < saved < 0.25
    assert 0.9 * saved < faster < 1.6 * saved  # what is saved in attention counts twice
    bound = floor(counts, chip, 0)
    assert bound is not None
    assert after.ms > bound.ms
    assert (after.warnings, after.error_percent) == ((), before.error_percent)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temporal_block = nn.Linear(4, 4)
        self.linear = nn.Linear(4, 6)
        self.attention = Attention(6, heads=1, dim_head=6)
        self.conv = nn.Conv2d(1, 2, 3)
        self.over_time = nn.Conv3d(1, 1, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Any) -> Any:
        x = self.attention(self.linear(self.temporal_block(x)))
        return self.over_time(self.conv(x[:, None])[:, None])


def test_kinds_by_hand() -> None:
    module = Parts().to("meta")
    counts = count_module(module, module, torch.empty(2, 5, 4, device="meta"))
    assert counts == Counts(
        spatial_convolution=2 * 2 * 2 * (3 * 4) * 9,
        temporal_convolution=2 * 2 * 2 * (3 * 4) * 3,
        spatial_linear=2 * 10 * (4 * 6 + 4 * 6 * 6),
        temporal_linear=2 * 10 * 4 * 4,
        spatial_attention=2 * 2 * 5 * 5 * (6 + 6),
    )


@pytest.mark.parametrize("rewrites", [(), structural_rewrites()])
def test_no_operation_is_lost(rewrites: tuple[str, ...]) -> None:
    from mobilevd_deploy.model.components import build_component, deploy_contract
    from mobilevd_deploy.model.interface import input_shapes
    from mobilevd_deploy.passes.runner import select_passes

    counts = count_operations(TINY, rewrites)
    assert min(dataclasses.astuple(counts)) > 0
    with torch.device("meta"):
        step = deploy_contract(build_component(TINY, "unet"))
        inputs = [torch.empty(shape) for shape in input_shapes(TINY, "unet").values()]
    with torch.no_grad():
        for rewrite in select_passes(rewrites):
            rewrite.apply(step.unet)  # type: ignore[arg-type]
    assert counts.total == count_flops(step, *inputs)


def test_other_sizes_and_chips_are_refused() -> None:
    with pytest.raises(UsageError, match="14 frames of 1024x576: there is no estimate"):
        estimate(load_preset("mobilevd-hd").model, (), CHIP)
    model = load_preset("mobilevd").model
    with pytest.raises(UsageError, match="28 frames"):
        estimate(dataclasses.replace(model, frames=28), (), CHIP)
    with pytest.raises(UsageError, match="no phone or chip"):
        estimate(model, (), "Nokia 3310")
    counts = load_calibration().rows[0].counts
    with pytest.raises(UsageError, match="Snapdragon 8 Gen 2: the vendor publishes no latency") as caught:
        estimate_counts(counts, find("Xiaomi 13").chip, load_calibration())
    assert CHIP in (caught.value.next_step or "")


def test_another_chip_is_scaled_with_a_wider_error() -> None:
    counts = load_calibration().rows[-1].counts
    here, there = (estimate_counts(counts, find(name).chip, load_calibration()) for name in ("S24", "S25"))
    assert there.ms / here.ms == pytest.approx(58.1 / 76.2)
    assert there.error_percent is not None
    assert here.error_percent is not None
    assert there.error_percent - here.error_percent == pytest.approx(100 * ((127 / 152) / (58.1 / 76.2) - 1))
    assert "scaled from Snapdragon 8 Gen 3 by 0.76" in there.notes[0]
    assert "on Samsung Galaxy S25 and Samsung Galaxy S24 (Qualcomm AI Hub Models" in there.notes[0]
    assert here.notes == ()
    assert there.well_built_ms / here.well_built_ms == pytest.approx(58.1 / 76.2)


def test_what_was_not_calibrated_is_said_loudly() -> None:
    chip, made = find(CHIP).chip, load_calibration()
    counts = made.rows[-1].counts
    tenfold = estimate_counts(Counts(*(10 * value for value in dataclasses.astuple(counts))), chip, made)
    assert "do not trust this number" in tenfold.warnings[0]
    assert tenfold.error_percent is None
    lopsided = Counts(spatial_convolution=counts.total)
    assert any("100% of the load" in warning for warning in estimate_counts(lopsided, chip, made).warnings)


def test_profile_of_a_preset() -> None:
    found = estimate_profile("mobilevd", "Xiaomi 14 Pro")
    assert (found.source, found.asked_for, found.chipset) == ("estimate", "Xiaomi 14 Pro", CHIP)
    assert found.total_ms == pytest.approx(1780, rel=(found.error_percent or 0) / 100)
    (unet,) = found.components
    assert unet.name == "unet"
    assert unet.ms is not None
    assert (unet.ms.median, unet.ms.samples) == (found.total_ms, 0)
    assert json.loads(json.dumps(found.to_dict()))["error_percent"] == found.error_percent
    assert any("leaving one out" in note for note in found.notes)
    valid = "valid for 3.4 to 10.1 TFLOPs, with each kind's share within 5 points of those of the calibrated"
    assert any(note.startswith(valid) and "14 frames of 512x256" in note for note in found.notes)
    assert any("time by kind" in note and "spatial attention" in note for note in found.notes)
    render_profile(found)


def test_floor_by_hand() -> None:
    counts = Counts(spatial_linear=10**12, spatial_attention=5 * 10**11)
    found = floor(counts, find(CHIP).chip, 7_680_000_000)
    assert found is not None
    assert found.dram_ms == pytest.approx(100)
    assert found.arithmetic_ms == pytest.approx(2 * 2e12 / 45e12 * 1000)
    assert (found.ms, found.binds) == (found.dram_ms, "DRAM traffic")
    little = floor(counts, find(CHIP).chip, 1)
    assert little is not None
    assert (little.ms, little.binds) == (little.arithmetic_ms, "arithmetic")
    without_peak = floor(counts, find("S25").chip, 84_800_000)
    assert without_peak is not None
    assert without_peak.arithmetic_ms is None
    assert (without_peak.ms, without_peak.binds) == (pytest.approx(1), "DRAM traffic")
    assert floor(counts, find("S22").chip, 1) is None


def test_no_calibrated_row_and_no_published_figure_beats_its_arithmetic_floor() -> None:
    made, chip = load_calibration(), find(CHIP).chip
    for counts, ms in [*((r.counts, r.published_ms) for r in made.rows), (made.sd15, 76.2)]:
        found = floor(counts, chip, 0)
        assert found is not None
        assert ms > found.ms


def test_an_artifact_whose_traffic_was_counted_gets_its_floor(tmp_path: Path) -> None:
    with PartialArtifact(tmp_path / "clip") as partial:
        manifest = tiny_artifact.build(partial.artifact)
        passes = tuple(dataclasses.replace(manifest.passes[0], name=name) for name in structural_rewrites())
        artifact = partial.finish(dataclasses.replace(manifest, model=TINY.to_dict(), passes=passes))
    shipped = dataclasses.replace(load_calibration(), frames=4, width=64, height=64)
    notes = estimate_profile(artifact, CHIP, shipped).notes
    assert any("no floor" in note for note in notes)
    assert any(n.startswith("bracket") and "not known without its DRAM traffic" in n for n in notes)
    rows = (TrafficRow("decoder", 1, 1), TrafficRow("unet", 10**11, 10**11))
    report = TrafficReport(1, "clip", artifact.digest, "SM8650", "w8a16", 0, "2025-01-31T12:00:00Z", rows)
    for target in ("SM8650", "SM8750"):
        save_traffic(dataclasses.replace(report, target=target), profiles_dir(artifact))
    notes = estimate_profile(artifact, CHIP, shipped).notes
    (said,) = (note for note in notes if note.startswith("floor"))
    assert "floor: 2,604 ms, and DRAM traffic binds" in said
    assert "(200.00 GB as the compiler planned, at 76.8 GB/s: four 16-bit channels of LPDDR5X" in said
    assert "45 TOPS int8: runlocalai.co's page of the chip; the vendor publishes none" in said
    (said,) = (n for n in estimate_profile(artifact, "S25", shipped).notes if n.startswith("floor"))
    assert "floor: 2,358 ms, of DRAM traffic alone" in said
    assert "for arithmetic Snapdragon 8 Elite has no sourced peak" in said
    assert any("no floor" in note for note in estimate_profile(artifact, "S26", shipped).notes)


def test_where_in_the_bracket_a_network_lies_by_its_own_traffic() -> None:
    """The vendor's network: 762 Mops in 76.2 ms, far above its arithmetic floor."""
    chip, mega = find(CHIP).chip, 10**6
    made = dataclasses.replace(
        calibration(*2 * ((400, Counts(spatial_linear=1000 * mega)),)),
        sd15=Counts(spatial_linear=762 * mega),
        sd15_moved=DramBytes(1_900_000_000, 1_026_080_000),  # 38.1 ms: it takes twice its floor
    )
    counts = Counts(spatial_linear=1000 * mega)
    result = estimate_counts(counts, chip, made)
    assert result.well_built_ms == pytest.approx(100)
    parts = (TrafficRow("a", 7_000_000_000, 0), TrafficRow("b", 0, 1_000_000_000))
    said = estimate_module._bracket(
        counts, result, made, TrafficRow("unet", *2 * (3_840_000_000,), None, parts)
    )
    assert "it lies at 200 ms, 2.0 times its floor" in said  # 100 ms of traffic
    assert "moves 7680.00 bytes, of which it writes 3840.00" in said
    assert "in our forms 3840.00 and 1346.56" in said
    assert "moves most is a (91%)" in said
    said = estimate_module._bracket(counts, result, made, TrafficRow("unet", 768_000_000, 0))
    assert "it could reach the faster end" in said
    assert "moves most" not in said


def test_a_preset_whose_traffic_the_benchmarks_counted_is_placed_too() -> None:
    (row,) = (row for row in load_calibration().rows if row.moved)
    assert row.preset == "mobilevd"
    notes = estimate_profile("mobilevd", CHIP).notes
    assert any(f"{row.moved.total / 1e9:.2f} GB as the compiler planned, in the shipped" in n for n in notes)
    assert any(n.startswith("bracket") and "By its own traffic it" in n for n in notes)
    for others in (estimate_profile("mobilevd", "S25"), estimate_profile("mobilevd-pruned", CHIP)):
        assert any("not known without its DRAM traffic" in note for note in others.notes)
        assert not any("floor" in note for note in others.notes)


def test_profile_of_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no preset"):
        estimate_profile("nothing", CHIP)
    with pytest.raises(SpecError):
        estimate_profile(tmp_path / "none.toml", CHIP)


def test_profile_of_an_artifact(tmp_path: Path) -> None:
    with PartialArtifact(tmp_path / "clip") as partial:
        manifest = tiny_artifact.build(partial.artifact)
        passes = tuple(dataclasses.replace(manifest.passes[0], name=name) for name in structural_rewrites())
        artifact = partial.finish(dataclasses.replace(manifest, model=TINY.to_dict(), passes=passes))
    with pytest.raises(UsageError, match="4 frames of 64x64"):
        estimate_profile(artifact, CHIP)
    shipped = dataclasses.replace(load_calibration(), frames=4, width=64, height=64)
    for what in (artifact, tmp_path / "clip"):
        found = estimate_profile(what, CHIP, shipped)
        assert found.artifact == "clip"
        assert found.manifest_sha256 == (tmp_path / "clip" / "manifest.sha256").read_text().split()[0]
        assert found.notes[0].startswith("OUTSIDE of the calibration: this artifact is not quantised")
        assert found.notes[1].startswith("OUTSIDE of the calibration")
        assert found.error_percent is None
