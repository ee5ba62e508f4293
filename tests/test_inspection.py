"""What inspection reports, for each kind of thing, and the ladder."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType

from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.cli.tables import render_inspection, render_ladder
from mobilevd_deploy.config.presets import Preset
from mobilevd_deploy.errors import CheckpointError, SpecError, UsageError
from mobilevd_deploy.inspection import inspect, ladder
from mobilevd_deploy.model.checkpoint import save_checkpoint
from mobilevd_deploy.model.components import build_component
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.passes.runner import PASSES
from tests.support import tiny_artifact
from tests.support.networks import FULL, TINY_MODEL

SPEC = dataclasses.replace(TINY_MODEL, name="little", height=64, width=64)


def text(renderable: RenderableType) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return ladder()


def test_ladder_meets_the_published_figures(rows: list[dict[str, Any]]) -> None:
    assert [row["preset"] for row in rows] == [
        "svd-hd",
        "svd",
        "svd-lowres",
        "svd-crossattn",
        "svd-onestep",
        "mobilevd-multiscale",
        "mobilevd-pruned",
        "mobilevd",
    ]
    for row in rows:
        assert row["deviation"] == pytest.approx(row["tflops"] / row["published_tflops"] - 1)
        assert abs(row["deviation"]) < 0.02, row
        # The last row's funnels are placed by us: the paper does not say where they are.
        allowed = 0.008 if row["preset"] == "mobilevd" else 0.003
        assert abs(row["deviation_paper_convention"]) < allowed, row


def test_ladder_is_derived_from_the_trees(rows: list[dict[str, Any]]) -> None:
    by_name = {row["preset"]: row for row in rows}
    assert by_name["svd"]["parameters"] == 1_524_623_082
    assert by_name["mobilevd"]["parameters"] == pytest.approx(0.89e9, rel=0.01)
    assert by_name["mobilevd"]["parameters"] < by_name["mobilevd-pruned"]["parameters"]
    assert by_name["svd"]["tflops"] == by_name["svd-lowres"]["tflops"]


def test_ladder_is_plain_data_and_renders(rows: list[dict[str, Any]]) -> None:
    assert json.loads(json.dumps(rows)) == rows
    shown = text(render_ladder(rows))
    for row in rows:
        assert row["preset"] in shown
    assert "50 x 45.43 / 4.34 = 523" in shown
    assert "40 x 45.43 = 1817.2" in shown


def test_preset() -> None:
    report = inspect(Preset(SPEC))
    assert json.loads(json.dumps(report)) == report
    with torch.device("meta"):
        unet = build_component(SPEC, "unet")
    assert report["kind"] == "preset"
    assert report["parameters"] == sum(p.numel() for p in unet.parameters())
    assert report["components"]["unet"] == report["parameters"]
    assert report["parameters_rewritten"] < report["parameters"]
    assert 0 < report["tflops"] < report["tflops_paper_convention"]
    blocks = report["temporal_blocks"]
    assert blocks["total"] == len(unet.temporal_blocks()) == 12  # type: ignore[operator]
    assert blocks["kept"] == 9
    assert {block["path"] for block in blocks["blocks"] if block["kept"]} == set(
        FULL.kept_temporal_blocks or ()
    )
    assert report["funnels"]["spatial_attention"] == 0.5
    assert [level["frames"] for level in report["structure"]["levels"]] == [4, 2]


def test_dropped_blocks_cost_what_their_absence_saves() -> None:
    """Opening one more gate costs what the report says of that block, and nothing else."""
    report = inspect(Preset(SPEC))
    dropped = next(b for b in report["temporal_blocks"]["blocks"] if not b["kept"] and b["kind"] == "resnet")
    kept = (*(FULL.kept_temporal_blocks or ()), dropped["path"])
    more = dataclasses.replace(SPEC, unet=dataclasses.replace(FULL, kept_temporal_blocks=kept))
    assert inspect(Preset(more))["tflops"] - report["tflops"] == pytest.approx(dropped["tflops"], rel=1e-6)


def test_levels_of_blocks() -> None:
    levels = {b["path"]: b["level"] for b in inspect(Preset(SPEC))["temporal_blocks"]["blocks"]}
    assert levels["down_blocks.0.resnets.0"] == levels["up_blocks.1.attentions.1"] == 0
    assert (
        levels["down_blocks.1.resnets.0"]
        == levels["mid_block.resnets.0"]
        == levels["up_blocks.0.resnets.0"]
        == 1
    )


def test_shipped_preset_by_name_and_by_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "demo"\nname = "mine"\n')
    mine, demo = inspect(path), inspect("demo")
    assert mine.pop("name") == "mine"
    assert demo.pop("name") == "demo"
    assert mine == demo


def test_checkpoint(tmp_path: Path) -> None:
    states = {name: build_component(SPEC, name).state_dict() for name in COMPONENTS}
    states["unet"]["mid_block.resnets.1.time_mixer.gate"] = torch.zeros(())
    states["unet"]["mid_block.resnets.1.time_mixer.importance"] = torch.tensor(-0.25)
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, SPEC, states)
    report = inspect(path)
    assert report["kind"] == "checkpoint"
    assert report["file"] == "m.safetensors"
    assert len(report["sha256"]) == 64
    assert report["temporal_blocks"]["kept"] == 8
    block = next(b for b in report["temporal_blocks"]["blocks"] if b["path"] == "mid_block.resnets.1")
    assert block["kept"] is False
    assert block["importance"] == -0.25
    assert report["tflops"] < inspect(Preset(SPEC))["tflops"]
    shown = text(render_inspection(report))
    assert "8 of 12 kept" in shown
    assert "-0.250" in shown
    assert f"{report['parameters']:,}" in shown


def test_artifact(tmp_path: Path) -> None:
    with PartialArtifact(tmp_path / "a") as partial:
        manifest = tiny_artifact.build(partial.artifact)
        passes = tuple(dataclasses.replace(manifest.passes[0], name=p.name) for p in PASSES)
        manifest = dataclasses.replace(manifest, model=SPEC.to_dict(), passes=passes)
        partial.finish(manifest)
    report = inspect(tmp_path / "a")
    assert json.loads(json.dumps(report)) == report
    assert report["kind"] == "artifact"
    assert report["rewrites"] == [p.name for p in PASSES]
    assert report["temporal_blocks"]["kept"] == 9
    assert report["tflops"] == manifest.component("unet").flops / 1e12
    assert report["parameters_rewritten"] == manifest.component("unet").parameters
    assert report["source"]["sha256"] == manifest.source.sha256
    text(render_inspection(report))


def test_things_that_can_not_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a file or folder nor a preset"):
        inspect("nothing")
    with pytest.raises(SpecError, match="no preset"):
        inspect("nothing.toml")
    with pytest.raises(CheckpointError, match="not a diffusers folder"):
        inspect(tmp_path)
