from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import NpuOptions, Recipe, load_recipe
from mobilevd_deploy.errors import ArtifactError, UsageError
from mobilevd_deploy.profiling import traffic
from mobilevd_deploy.profiling.profile import TrafficReport, TrafficRow
from mobilevd_deploy.profiling.store import load_profiles, load_traffic, profiles_dir, save_traffic
from mobilevd_deploy.profiling.traffic import (
    bars,
    measure_artifact,
    measure_preset,
    unet_blocks,
    write_picture,
)
from mobilevd_deploy.qnn.compiled import DramBytes, Traffic
from mobilevd_deploy.qnn.targets import Target
from tests.support.networks import TINY_MODEL

DEMO = load_preset("demo").model
FLOAT = load_recipe("npu-float")


def test_blocks_are_the_deploy_forms_own_and_run() -> None:
    blocks = {block.path: block for block in unet_blocks(DEMO, FLOAT)}
    assert set(blocks) >= {"down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.3.attentions.1"}
    assert blocks["mid_block.resnets.0"].inputs["x"].shape == (7, 96, 1, 2)
    block = blocks["down_blocks.0.attentions.0"]
    assert {name: value.shape for name, value in block.inputs.items()} == {
        "x": (14, 32, 8, 16),
        "image_embeds": (1, 64),
    }
    with torch.no_grad():
        out = block.module(*(torch.from_numpy(value) for value in block.inputs.values()))
    assert out.shape == (14, 32, 8, 16)
    assert torch.isfinite(out).all()
    assert 0.3 < out.std() < 30


def test_the_floor_counts_weights_inputs_and_outputs_once() -> None:
    (block,) = unet_blocks(DEMO, FLOAT, ["mid_block.resnets.0"])
    weights = sum(p.numel() for p in block.module.parameters())
    assert block.floor_bytes == 2 * (weights + 2 * 7 * 96 * 2)


def test_frames_one_after_the_other_share_their_weights() -> None:
    recipe = dataclasses.replace(FLOAT, graph=dataclasses.replace(FLOAT.graph, frames="sequential"))
    floors = [next(iter(unet_blocks(DEMO, r, ["down_blocks.0.*"]))).floor_bytes for r in (FLOAT, recipe)]
    assert floors[0] == floors[1]


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(UsageError, match="no block matches nonsense") as caught:
        next(iter(unet_blocks(DEMO, FLOAT, ["nonsense"])))
    assert "down_blocks.0.resnets.0" in str(caught.value)


def test_an_artifact_without_binaries_is_refused(exported: dict[str, Artifact]) -> None:
    with pytest.raises(UsageError, match="compiled for no chip"):
        measure_artifact(exported["onnx"])


@pytest.mark.npu
@pytest.mark.parametrize("recipe", [FLOAT, load_recipe("xiaomi-14-pro")], ids=["float16", "w8a16"])
def test_the_compilers_schedule_of_a_block(recipe: Recipe, request: pytest.FixtureRequest) -> None:
    """Weights have to come from DRAM at least once, and a block this small never spills."""
    report = measure_preset("demo", DEMO, recipe, ["mid_block.resnets.0"])
    (row,) = report.rows
    weights = 2 * 9 * 96 * 96 * (2 if recipe is FLOAT else 1)
    assert row.path == "mid_block.resnets.0"
    assert weights <= row.read < 4 * weights
    assert row.written < row.read
    assert row.floor is not None
    assert sum(part.read for part in row.parts) == row.read == report.read
    assert sum(part.written for part in row.parts) == row.written == report.written
    by_path = {part.path: part for part in row.parts}
    assert by_path["spatial_res_block.conv1"].read >= weights // 2
    assert (report.target, report.precision) == ("SM8650", request.node.callspec.id)


def row(path: str, read: int, written: int, *parts: TrafficRow, floor: int | None = None) -> TrafficRow:
    return TrafficRow(path, read, written, floor, parts)


REPORT = TrafficReport(
    1,
    "a <model>",
    None,
    "SM8650",
    "w8a16",
    0,
    "2025-01-31T12:00:00Z",
    (row("a", 3_000_000, 2_000_000, row("a.b", 3_000_000, 500_000), floor=1_000_000), row("c", 4_000_000, 0)),
)


def test_the_picture_shows_every_row_and_part(tmp_path: Path) -> None:
    found = bars(REPORT)
    assert [(bar.label, bar.depth, bar.lengths, bar.mark) for bar in found] == [
        ("a", 0, (3_000_000, 2_000_000), 1_000_000),
        ("a.b", 1, (3_000_000, 500_000), None),
        ("c", 0, (4_000_000, 0), None),
    ]
    assert found[1].text == "3.0 + 0.5 MB"
    write_picture(REPORT, tmp_path / "deep" / "traffic.png")
    with Image.open(tmp_path / "deep" / "traffic.png") as picture:
        assert picture.height == 5 * 44


def test_a_long_picture_leaves_rows_out(tmp_path: Path) -> None:
    many = dataclasses.replace(REPORT, rows=tuple(row(f"block{i}", 1, 1) for i in range(50)))
    write_picture(many, tmp_path / "traffic.png")
    with Image.open(tmp_path / "traffic.png") as picture:
        assert picture.height == 42 * 44
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_picture(many, tmp_path / "folder.png")


def test_what_was_measured_is_kept_beside_the_artifact(exported: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = Artifact.open(shutil.copytree(exported["onnx"].root, tmp_path / "model"))
    digest = hashlib.sha256((artifact.root / "manifest.json").read_bytes()).hexdigest()
    report = dataclasses.replace(REPORT, manifest_sha256=digest)
    assert load_traffic(artifact) == []
    path = save_traffic(report, profiles_dir(artifact))
    assert path == tmp_path / "model.profiles" / "traffic_SM8650.json"
    assert load_traffic(artifact) == [report]
    assert load_profiles(artifact) == []
    save_traffic(REPORT, profiles_dir(artifact))
    assert load_traffic(artifact) == []  # of another artifact that had this name
    path.write_text(path.read_text().replace('"read"', '"red"'))
    with pytest.raises(ArtifactError, match=r"unknown key 'red'.*\n.*measure the traffic again"):
        load_traffic(artifact)


def test_an_artifact_is_measured_by_component_and_a_large_unet_by_block(
    exported: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = exported["onnx"]
    recipe = dataclasses.replace(FLOAT, npu=NpuOptions(targets=("SM8750",), optimization_mode=2))
    manifest = dataclasses.replace(artifact.manifest, recipe=recipe.to_dict())
    artifact = dataclasses.replace(artifact, manifest=manifest)
    asked: list[tuple[str, str, int, bool]] = []

    def planned(model: Path, target: Target, options: NpuOptions, *, float16: bool) -> Traffic:
        asked.append((model.parent.name, target.name, options.optimization_mode, float16))
        block = "up_blocks.3.attentions.1"
        modules = {f"{block}.to_q.conv": DramBytes(1, 2), block: DramBytes(2, 0), "": DramBytes(1, 0)}
        return Traffic(modules, DramBytes(5, 7))

    monkeypatch.setattr(traffic, "measure_traffic", planned)
    report = measure_artifact(artifact)
    assert sorted(asked) == sorted(
        (component.name, "SM8750", 2, True) for component in artifact.manifest.components
    )
    assert report.what == artifact.manifest.name
    assert (report.target, report.precision, report.optimization_mode) == ("SM8750", "float16", 2)
    assert (report.read, report.written) == (9 * len(asked), 9 * len(asked))
    block = "up_blocks.3.attentions.1"
    modules = row(f"{block}.to_q.conv", 1, 2), row(block, 2, 0)
    parts = row("inputs and outputs", 5, 7), row(block, 3, 2, *modules), row("others", 1, 0)
    assert report.rows[0].parts == parts

    monkeypatch.setattr(traffic, "WHOLE_UP_TO_FLOPS", 0)
    monkeypatch.setattr(traffic, "export_block", lambda *_: None)
    blocks = measure_artifact(artifact).rows
    (unet,) = (row for row in blocks if row.path == "unet")
    assert {part.path for part in unet.parts} == {block.path for block in unet_blocks(TINY_MODEL, FLOAT)}
    assert (unet.read, unet.written) == (9 * len(unet.parts), 9 * len(unet.parts))
    assert unet.note is not None
    assert [row.note for row in blocks if row.path != "unet"] == [None] * (len(blocks) - 1)
