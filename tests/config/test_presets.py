"""The shipped presets: complete, consistent with the paper's table, and of the published size."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mobilevd_deploy.config.presets import load_preset, preset_names, structural_rewrites
from mobilevd_deploy.errors import SpecError
from mobilevd_deploy.model.components import build_component
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.passes.runner import PASSES

ROWS = [
    # preset, TFLOPs, NFE, FVD, GPU ms, phone ms: arXiv 2412.07583
    ("svd-hd", 45.43, 50, (140, 149), 376, -1),
    ("svd", 8.60, 50, (366, 476), 82, -1),
    ("svd-lowres", 8.60, 50, (194, 196), 82, -1),
    ("svd-crossattn", 8.24, 50, (194, 196), 76, 3630),
    ("svd-onestep", 8.24, 1, (133, 168), 76, 3630),
    ("mobilevd-multiscale", 5.42, 1, (139, 156), 59, 2590),
    ("mobilevd-pruned", 4.64, 1, (127, 150), 47, 2100),
    ("mobilevd", 4.34, 1, (149, 171), 45, 1780),
]


def test_every_published_row_has_a_preset() -> None:
    presets = {name: load_preset(name) for name in preset_names()}
    rows = sorted(
        ((preset.ladder, name) for name, preset in presets.items() if preset.ladder),
        key=lambda row: row[0].order,
    )
    assert [(name, r.tflops, r.nfe, r.fvd, r.gpu_ms, r.phone_ms) for r, name in rows] == ROWS
    known = {p.name for p in PASSES}
    seen: set[str] = set()
    for row, _ in rows:
        assert seen <= set(row.rewrites) <= known
        seen |= set(row.rewrites)
    assert len(seen) == 3
    assert set(structural_rewrites()) == seen
    assert presets["svd"].rewrites == ()
    assert presets["demo"].rewrites == structural_rewrites()


@pytest.mark.parametrize("name", preset_names())
def test_presets_build(name: str) -> None:
    spec = load_preset(name).model
    assert spec.name == name
    with torch.device("meta"):
        for component in COMPONENTS:
            assert build_component(spec, component).state_dict()


def test_svd_is_the_published_size() -> None:
    with torch.device("meta"):
        unet = build_component(load_preset("svd").model, "unet")
    assert sum(parameter.numel() for parameter in unet.parameters()) == 1_524_623_082


def test_sizes() -> None:
    sizes = {name: (s.width, s.height) for name in preset_names() for s in [load_preset(name).model]}
    assert {name for name, size in sizes.items() if size == (1024, 576)} == {"svd-hd", "mobilevd-hd"}
    assert {size for name, size in sizes.items() if not name.endswith("-hd") and name != "demo"} == {
        (512, 256)
    }


def test_the_ladder_is_cumulative() -> None:
    """Each MobileVD preset is the one before it and one more optimisation."""
    multiscale, pruned, whole = (
        load_preset(name).model.unet for name in ("mobilevd-multiscale", "mobilevd-pruned", "mobilevd")
    )
    svd = load_preset("svd").model.unet
    assert dataclasses.replace(multiscale, temporal_multiscaling="none") == svd
    assert dataclasses.replace(pruned, gated=False, kept_temporal_blocks=None) == multiscale
    assert dataclasses.replace(whole, funnels=pruned.funnels) == pruned
    assert whole.funnels.spatial_attention == 0.5
    hd = load_preset("mobilevd-hd").model
    assert dataclasses.replace(hd, name="mobilevd", width=512, height=256) == load_preset("mobilevd").model


def test_the_thirteen_blocks() -> None:
    kept = load_preset("mobilevd").model.unet.kept_temporal_blocks
    assert kept is not None
    level = {"down_blocks.0": 0, "up_blocks.3": 0, "down_blocks.1": 1, "up_blocks.2": 1}
    kinds = sorted((level[path.rsplit(".", 2)[0]], path.split(".")[2]) for path in kept)
    assert kinds == [(0, "attentions")] * 5 + [(0, "resnets")] * 3 + [(1, "attentions")] * 4 + [
        (1, "resnets")
    ]


def test_own_presets_inherit(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "mobilevd"\n[step]\nfps = 12\n')
    preset = load_preset(path)
    assert preset.model.name == "mobilevd"
    assert preset.ladder is None
    assert preset.model.step.fps == 12
    assert preset.model.unet == load_preset("mobilevd").model.unet


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = 'nothing'", "no preset 'nothing'"),
        ("[unet\n", "mine.toml"),
        ("[unet]\nwings = 2", "unknown key 'wings'"),
        ("[unet]\ngated = 'yes'", "unet.gated: expected bool"),
        ("height = 100", "multiples of 64"),
    ],
)
def test_presets_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_preset(path)
