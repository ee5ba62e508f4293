"""`--base` and `--lora` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobilevd_deploy.artifact.artifact import Artifact
from tests.cli.conftest import Run
from tests.support.networks import TINY_MODEL

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def unet(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    tensors = load_file(tiny_checkpoint)
    path = tmp_path / "trained_unet.safetensors"
    save_file({k.removeprefix("unet."): v for k, v in tensors.items() if k.startswith("unet.")}, path)
    return path


def test_a_unet_alone_asks_for_a_base(run: Run, unet: Path) -> None:
    ended = run("inspect", unet)
    assert ended.code == 1
    assert "trained_unet.safetensors: a UNet alone" in ended.err
    assert "add --base" in ended.err


def test_inspect_and_export_with_a_base_and_a_lora(
    run: Run, unet: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    weight = load_file(unet)[f"{LAYER}.weight"]
    low = {
        f"{LAYER}.lora_A.weight": torch.ones(2, weight.shape[1]),
        f"{LAYER}.lora_B.weight": torch.ones(len(weight), 2),
    }
    save_file(low, lora := tmp_path / "style.safetensors")
    options = ["--base", tiny_checkpoint, "--lora", f"{lora}:0.5"]
    described = run("inspect", unet, *options, "--json").json
    assert described["name"] == TINY_MODEL.name
    assert described["sha256"] != run("inspect", unet, "--base", tiny_checkpoint, "--json").json["sha256"]
    ended = run("export", unet, *options, "-r", "onnx", "-o", "out")
    assert ended.code == 0, ended.err
    assert "gives the configuration and image_encoder, vae_encoder, decoder" in ended.err
    assert "style.safetensors: merges 1 adapters at scale 0.5" in ended.err
    assert Artifact.open(tmp_path / "out").manifest.source.sha256 == described["sha256"]


def test_values_that_are_not_finite_stop_an_export_before_its_first_stage(
    run: Run, unet: Path, tiny_checkpoint: Path
) -> None:
    tensors = load_file(unet)
    tensors["conv_out.weight"].view(-1)[-1] = torch.nan
    save_file(tensors, unet)
    ended = run("export", unet, "--base", tiny_checkpoint, "-r", "onnx", "-o", "out")
    assert ended.code == 1
    assert "unet.conv_out.weight holds NaN or infinite values" in ended.err
    assert "export image_encoder" not in ended.err


def test_a_lora_that_is_not_there(run: Run, unet: Path, tiny_checkpoint: Path) -> None:
    ended = run("inspect", unet, "--base", tiny_checkpoint, "--lora", "none.safetensors")
    assert ended.code == 1
    assert "none.safetensors: no such file or folder" in ended.err
