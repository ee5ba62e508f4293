"""Initial checkpoints: random weights, and SVD's weights with optimisations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobilevd_deploy.cli.main import app
from mobilevd_deploy.config.spec import FunnelSpec
from mobilevd_deploy.errors import SpecError, UsageError
from mobilevd_deploy.model.checkpoint import Checkpoint, open_checkpoint
from mobilevd_deploy.model.components import build_component
from mobilevd_deploy.model.funnels import initialise_csi
from mobilevd_deploy.model.unet import MobileVDUNet
from mobilevd_deploy.training.initialise import compress_svd, draw_checkpoint, read_importance
from tests.support.networks import FULL, PLAIN, TINY_MODEL, decibels, temporal_paths, write_checkpoint

SVD = dataclasses.replace(TINY_MODEL, name="svd", unet=PLAIN)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("svd") / "svd.safetensors", SVD))


def load_unet(checkpoint: Checkpoint) -> MobileVDUNet:
    unet = checkpoint.load("unet", torch.float64)
    assert isinstance(unet, MobileVDUNet)
    return unet


def clip_inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 4, 4, 4), (1, 4, 4, 4), (1, PLAIN.cross_attention_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


# ---- drawn ----


def test_a_drawn_checkpoint_is_whole_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "drawn.safetensors"
    draw_checkpoint(path, TINY_MODEL)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.spec.unet.kept_temporal_blocks or ()) == set(FULL.kept_temporal_blocks or ())
    importance = checkpoint.importance()
    assert set(importance) == set(temporal_paths(FULL))
    top = sorted(importance, key=lambda path: -importance[path])[: len(FULL.kept_temporal_blocks or ())]
    assert set(top) == set(FULL.kept_temporal_blocks or ())
    with torch.no_grad():
        out = load_unet(checkpoint).denoise(*clip_inputs())
    assert 0.1 < float(out.std()) < 10


def test_the_seed_decides(tmp_path: Path) -> None:
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        draw_checkpoint(tmp_path / f"{number}.safetensors", TINY_MODEL, seed=seed)
        digests.append(open_checkpoint(tmp_path / f"{number}.safetensors").sha256)
    assert digests[0] == digests[1] != digests[2]


# ---- from SVD ----


def test_without_optimisations_svd_stays_as_it_is(source: Checkpoint, tmp_path: Path) -> None:
    written = compress_svd(tmp_path / "same.safetensors", source, SVD)
    assert written == SVD
    same = open_checkpoint(tmp_path / "same.safetensors")
    for component in ("image_encoder", "vae_encoder", "unet", "decoder"):
        before, after = source.load(component).state_dict(), same.load(component).state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_funnels_begin_as_csi_does_on_the_whole_network(source: Checkpoint, tmp_path: Path) -> None:
    """Compare with the same funnels put into the whole network at once."""
    compress_svd(tmp_path / "small.safetensors", source, TINY_MODEL)
    checkpoint = open_checkpoint(tmp_path / "small.safetensors")
    state = checkpoint.load("unet").state_dict()
    whole: Any = build_component(TINY_MODEL, "unet")
    plain = source.load("unet").state_dict()
    for path, module in whole.named_modules():
        if isinstance(module, nn.GroupNorm):  # those within a funnel have no counterpart
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        for name, parameter in module.named_parameters(recurse=False):
            old = f"{path}.{name}".replace(".conv1.conv.", ".conv1.").replace(".conv2.conv.", ".conv2.")
            if old in plain and plain[old].shape == parameter.shape:
                parameter.data = plain[old].clone()
    initialise_csi(whole)
    for name, tensor in whole.state_dict().items():
        if "time_mixer.gate" in name or "importance" in name or name.startswith("temporal_"):
            continue
        assert torch.allclose(state[name], tensor, atol=1e-5), name


def test_where_nothing_is_lost_the_clip_stays(source: Checkpoint, tmp_path: Path) -> None:
    """Heads of width 32 on 64 channels, whose products have full rank: r = 1 keeps all of it."""
    gated = dataclasses.replace(PLAIN, gated=True, funnels=FunnelSpec(spatial_attention=0.99))
    compress_svd(tmp_path / "gated.safetensors", source, dataclasses.replace(SVD, unet=gated))
    with torch.no_grad():
        before = load_unet(source).denoise(*clip_inputs())
        after = load_unet(open_checkpoint(tmp_path / "gated.safetensors")).denoise(*clip_inputs())
    assert decibels(before, after) > 120


def test_strided_resampling_begins_as_mean_and_repetition(source: Checkpoint, tmp_path: Path) -> None:
    clips = []
    for kind in ("mean", "conv"):
        unet = dataclasses.replace(PLAIN, temporal_multiscaling=kind)
        compress_svd(tmp_path / f"{kind}.safetensors", source, dataclasses.replace(SVD, unet=unet))
        with torch.no_grad():
            clips.append(load_unet(open_checkpoint(tmp_path / f"{kind}.safetensors")).denoise(*clip_inputs()))
    assert decibels(*clips) > 120


def test_importance_decides_who_stays(source: Checkpoint, tmp_path: Path) -> None:
    paths = temporal_paths(FULL)
    importance = {path: float(i) for i, path in enumerate(paths)}
    compress_svd(tmp_path / "q.safetensors", source, TINY_MODEL, importance=importance)
    checkpoint = open_checkpoint(tmp_path / "q.safetensors")
    assert checkpoint.importance() == importance
    assert set(checkpoint.spec.unet.kept_temporal_blocks or ()) == set(paths[-9:])


def test_importance_that_does_not_fit(source: Checkpoint, tmp_path: Path) -> None:
    for spec, importance, message in [
        (TINY_MODEL, {"mid_block.attentions.7": 1.0}, "no gated temporal block 'mid_block.attentions.7'"),
        (TINY_MODEL, {"mid_block.attentions.0": 1.0}, "is missing"),
        (SVD, {"mid_block.attentions.0": 1.0}, "no gated temporal block"),
    ]:
        with pytest.raises(SpecError, match=message):
            compress_svd(tmp_path / "x.safetensors", source, spec, importance=importance)
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_optimised_already_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the one that tiny is made from"):
        compress_svd(tmp_path / "x.safetensors", open_checkpoint(tiny_checkpoint), TINY_MODEL)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": "b"}', '{"a": NaN}', '{"a": true'])
def test_importance_files_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(SpecError, match=r"q\.json"):
        read_importance(tmp_path / "q.json")


# ---- the command ----


def test_init(source: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo.safetensors"
    app(
        ["init", "--preset", "demo", "-o", str(output), "--json", "--dtype", "float16"], standalone_mode=False
    )
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"]["unet"] == 6_550_580
    assert len(told["kept_temporal_blocks"]) == 8
    assert open_checkpoint(output).spec.name == "demo"
    with pytest.raises(UsageError, match="not the one that demo is made from"):
        app(
            ["init", "--preset", "demo", "--from", str(source.path), "-o", str(output)], standalone_mode=False
        )
    with pytest.raises(UsageError, match="--importance needs --from"):
        app(["init", "-o", str(output), "--importance", str(output)], standalone_mode=False)
