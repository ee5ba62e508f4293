from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
import torch

from mobilevd_deploy.artifact.manifest import Manifest, PassReport, Source
from mobilevd_deploy.base.processes import StageCost
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import GraphForms, load_recipe
from mobilevd_deploy.config.spec import StepSpec, UNetSpec
from mobilevd_deploy.errors import SpecError
from mobilevd_deploy.model.unet import MobileVDUNet
from mobilevd_deploy.report.page import graph_form_words, render_report
from mobilevd_deploy.report.temporal_map import temporal_block_groups
from tests.support.html_page import HOSTILE, Page, percent
from tests.support.tiny_artifact import build

PASSES = (
    PassReport("fold-channel-funnels", ("a", "b"), 1_000_000, 800_000, 4_000_000, 3_000_000, 131.26),
    PassReport("drop-temporal-blocks", ("c",), 800_000, 500_000, 3_000_000, 2_000_000, None),
    PassReport("subpixel-upsampling", ("d",), 500_000, 600_000, 2_000_000, 1_999_990, 118.0),
)


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    """The tiny artifact, said to hold the published network with its 13 of 38 temporal blocks."""
    return dataclasses.replace(
        build(tmp_path),
        name="walk",
        model=load_preset("mobilevd").model.to_dict(),
        recipe=load_recipe("onnx").to_dict(),
        passes=PASSES,
    )


def test_the_page_tells_the_artifact_and_stands_alone(manifest):
    text = render_report(manifest, {})
    page = Page(text)
    assert text == render_report(Manifest.from_json(manifest.to_json()), {})
    assert "Makes 2 frames of 24x16 pixels at 7 fps from one picture, in one step." in page.text
    assert "From tiny.pt (sha256 000000000000 ) by recipe onnx" in page.text
    assert "mobilevd-deploy generate PICTURE --artifact walk -o clip.gif" in page.text
    for name in ("Components", "Rewrites", "Temporal blocks", "Graph forms", "Operations", "Run it"):
        assert page.text.count(name) == 1
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", text)
    assert "prefers-color-scheme: dark" in text
    policies = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_key_figures_sum_over_the_components(manifest):
    stages = {"export unet": StageCost(60.0, 3_000_000_000), "export decoder": StageCost(5.0, 2_000_000_000)}
    text = Page(render_report(dataclasses.replace(manifest, stages=stages), {})).text
    parameters = sum(c.parameters for c in manifest.components)
    assert f"parameters {parameters / 1e3:.2f} k" in text
    assert "per clip 4.00 kFLOPs 25 % in" in text
    # unet: 110.0 after the last stage that measured it; the rewrites' 120.5 is history.
    assert "worst SQNR 110.0 dB unet" in text
    assert "export time 1 min 05 s peak memory 3.00 GB" in text


def test_components_table_names_tensors_and_drift(manifest):
    text = Page(render_report(manifest, {})).text
    assert "noise 2x4x2x3 noise stream 0 image_latents 1x4x2x3 from vae_encoder" in text
    assert "image 1x3x16x24 the picture" in text
    assert "unet 118.0 dB 120.5 dB 110.0 dB" in text, "behind each stage"
    assert text.count("not measured") == 2  # both encoders
    assert text.count("identical") == 3  # decoder, twice, and drop-temporal-blocks


def test_drift_that_is_identical_everywhere_or_absent(manifest):
    names = [c.name for c in manifest.components]
    same = dataclasses.replace(manifest, drift={"onnx": dict.fromkeys(names, math.inf)})
    assert "worst SQNR identical all components" in Page(render_report(same, {})).text
    absent = dataclasses.replace(manifest, drift={})
    assert "worst SQNR - not measured" in Page(render_report(absent, {})).text


def test_waterfall_steps_end_where_the_next_begins(manifest):
    page = Page(render_report(manifest, {}))
    assert "fold-channel-funnels 2 modules changed, 131.3 dB" in page.text
    assert "drop-temporal-blocks 1 module changed, identical 500 k -37.5 % 2.00 MFLOPs -33.3 %" in page.text
    assert "subpixel-upsampling 1 module changed, 118.0 dB 600 k +20.0 % 2.00 MFLOPs < 0.1 %" in page.text
    assert "rewritten UNet 3 rewrites 600 k -40.0 % 2.00 MFLOPs -50.0 %" in page.text
    saved, added = page.of_class("rect", "saved"), page.of_class("rect", "added")
    # (x, width) of parameters and FLOPs per pass, then of the whole way.
    assert [(percent(r["x"]), percent(r["width"])) for r in saved] == [
        (80, 20),
        (75, 25),
        (50, 30),
        (50, 25),
        (50, 0),
        (60, 40),
        (50, 50),
    ]
    assert [(percent(r["x"]), percent(r["width"])) for r in added] == [(50, 10)]


def test_no_passes(manifest):
    page = Page(render_report(dataclasses.replace(manifest, passes=()), {}))
    assert "None: the recipe names no rewrite" in page.text
    assert not page.of_class("rect", "saved")
    assert "with gate 0" in page.text  # nothing dropped the blocks whose gates are closed


@pytest.mark.parametrize(
    "unet",
    [
        UNetSpec(),
        load_preset("demo").model.unet,
        UNetSpec((32,), (1,), (False,), layers_per_block=3),
        UNetSpec((32, 64, 96), (1, 2, 3), (False, True, True), layers_per_block=1),
    ],
)
def test_blocks_are_those_of_the_network(unet):
    with torch.device("meta"):
        network = MobileVDUNet(unet, StepSpec())
    groups = temporal_block_groups(unet)
    assert len(groups) == 2 * len(unet.block_out_channels) + 1
    derived = {block.path: block.kind == "resnet" for group in groups for block in group}
    real = {path: "resnets" in path.split(".") for path in network.temporal_blocks()}
    assert derived == real


def test_map_shows_kept_blocks_and_importance(manifest):
    blocks = [b for group in temporal_block_groups(UNetSpec()) for b in group]
    importance = {b.path: float(i) for i, b in enumerate(blocks)}
    page = Page(render_report(manifest, importance))
    assert (
        "13 of 38 are kept: 9 of 16 transformers and 4 of 22 resnets. Height is importance, 0 to 37."
        in page.text
    )
    assert "with gate 0" not in page.text
    kept, dropped = page.of_class("rect", "kept"), page.of_class("rect", "dropped")
    assert (len(kept), len(dropped)) == (13, 25)
    bars = sorted((*kept, *dropped), key=lambda r: percent(r["x"]))
    heights = [float(r["height"] or "nan") for r in bars]
    assert heights == sorted(heights)  # importance rises in running order here
    assert heights[0] > 0
    assert percent(bars[-1]["x"]) + percent(bars[-1]["width"]) <= 100
    # Down the levels and up again, one height above the page for each.
    feet = [round(float(r["y"] or "nan") + float(r["height"] or "nan")) for r in bars]
    lowest = feet.index(max(feet))
    assert feet[:lowest] == sorted(feet[:lowest])
    assert feet[lowest:] == sorted(feet[lowest:], reverse=True)
    assert len(set(feet)) == 4
    assert "up_blocks.3.attentions.2 : kept" in page.text.replace("attentions.2:", "attentions.2 :")
    assert "level 1 7 frames of 32x16 , 640 channels" in page.text


@pytest.mark.parametrize("importance", [{}, {"down_blocks.0.resnets.0": 0.5}, {"no.such.block": 1.0}])
def test_map_without_a_ranking_has_equal_bars(manifest, importance):
    page = Page(render_report(manifest, importance))
    assert "Height is importance" not in page.text
    bars = (*page.of_class("rect", "kept"), *page.of_class("rect", "dropped"))
    assert len({r["height"] for r in bars}) == 1


def test_negative_importance_keeps_bars_inside(manifest):
    values = {"mid_block.resnets.0": -2.0, "mid_block.resnets.1": -1.0, "up_blocks.0.resnets.0": 3.0}
    page = Page(render_report(manifest, values))
    bars = (*page.of_class("rect", "kept"), *page.of_class("rect", "dropped"))
    tallest = max(float(r["height"] or "nan") for r in bars)
    assert all(0 < float(r["height"] or "nan") <= tallest <= 60 for r in bars)
    assert "Height is importance, -2 to 3." in page.text


def test_network_without_gates_keeps_every_block(manifest):
    model = load_preset("svd").model.to_dict()
    page = Page(render_report(dataclasses.replace(manifest, model=model), {}))
    assert "All 38 are kept." in page.text
    assert not page.of_class("rect", "dropped")
    assert "level 1 14 frames of 32x16" in page.text  # no temporal multiscaling


def test_every_graph_form_has_words():
    choices = {name: get_args(hint) for name, hint in get_type_hints(GraphForms).items() if get_args(hint)}
    for name, values in choices.items():
        said = {tuple(graph_form_words(GraphForms(**{name: value})).values()) for value in values}
        assert len(said) == len(values)
    assert "64 query positions" in graph_form_words(GraphForms(attention="tiles", query_tile=64))["Attention"]
    mixed = graph_form_words(GraphForms(attention="heads", query_tile=64, whole_up_to=128))["Attention"]
    assert "64 query positions" in mixed
    assert "whole on maps of up to 128 tokens" in mixed


def test_every_stage_of_a_component_is_in_its_drift(manifest):
    drift = manifest.drift | {"quantised": {"unet": 32.0}, "npu.SM8650": {"unet": 31.5}}
    text = Page(render_report(dataclasses.replace(manifest, drift=drift), {})).text
    assert "component rewritten rewrite onnx quantised simulated SM8650" in text
    assert "unet 118.0 dB 120.5 dB 110.0 dB 32.0 dB 31.5 dB" in text
    assert "vae_encoder - - - - -" in text


def test_hostile_names_are_only_text(manifest):
    unet = manifest.component("unet")
    noise, *others = unet.inputs
    hostile_unet = dataclasses.replace(
        unet, inputs=(dataclasses.replace(noise, name=HOSTILE), *others), ops={HOSTILE: 1}
    )
    components = tuple(hostile_unet if c is unet else c for c in manifest.components)
    hostile = dataclasses.replace(
        manifest,
        name=HOSTILE,
        source=Source(HOSTILE.replace("/", ""), "0" * 64),
        recipe=manifest.recipe | {"name": HOSTILE, "description": HOSTILE},
        passes=(dataclasses.replace(PASSES[0], name=HOSTILE),),
        drift={"first": {"unet": 99.0}, HOSTILE: {"unet": 98.0}, "last": {"unet": 97.0}},
        components=components,
        tools={HOSTILE: HOSTILE},
        stages={HOSTILE: StageCost(1.0, 1)},
    )
    page = Page(render_report(hostile, {HOSTILE: 1.0}))
    plain = Page(render_report(manifest, {}))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert {name for _, attrs in page.elements for name in attrs} == {n for _, a in plain.elements for n in a}
    assert page.text.count(HOSTILE) >= 10


def test_command_quotes_the_folder(manifest):
    for name, said in (("my clip", "'my clip'"), ("-o", "./-o")):
        text = Page(render_report(dataclasses.replace(manifest, name=name), {})).text
        assert f"--artifact {said} -o clip.gif" in text


def test_missing_optional_things(manifest):
    bare = dataclasses.replace(
        manifest, model={"name": "m"}, recipe={"name": "r"}, passes=(), drift={}, tools={}, stages={}
    )
    text = Page(render_report(bare, {})).text
    assert "export time 0.0 s" in text
    assert "Not recorded." in text


def test_a_manifest_of_something_else_is_refused(manifest):
    with pytest.raises(SpecError, match="unknown key"):
        render_report(dataclasses.replace(manifest, model={"name": "m", "depth": 3}), {})


@pytest.mark.parametrize("module", ["page", "profiles_page"])
def test_needs_no_torch(module):
    code = f"import sys, mobilevd_deploy.report.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
