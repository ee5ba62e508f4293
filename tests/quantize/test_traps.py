"""Graphs that compile and were wrong: what the deploy form does about it, on the HTP simulator."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers.models.resnet import TemporalResnetBlock
from torch import Tensor, nn

from mobilevd_deploy.base.tensors import sqnr_db
from mobilevd_deploy.config.recipe import NpuOptions, QuantRule, load_recipe
from mobilevd_deploy.npu import ops
from mobilevd_deploy.npu.onnx_export import MODEL
from mobilevd_deploy.qnn.compiler import compile_context
from mobilevd_deploy.qnn.lint import lint
from mobilevd_deploy.qnn.simulator import NpuSimRunner
from mobilevd_deploy.qnn.targets import find_target
from mobilevd_deploy.quantize import qdq_check, simulation
from mobilevd_deploy.quantize.simulation import quantise

pytestmark = pytest.mark.npu

RECIPE = load_recipe("xiaomi-14-pro")
Shape = tuple[int, int, int, int]


class PlainSiLU(nn.Module):
    """The product of a tensor with its own sigmoid, as the compiler should not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid, self.multiply = nn.Sigmoid(), ops.Multiply()

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.sigmoid(x))


def identity() -> nn.Module:
    """As half of an image's resize is where no size changes."""
    return ops.conv2d(torch.eye(64)[:, :, None, None], None)


def agreement(folder: Path, module: nn.Module, shape: Shape, mode: int = 3, *rules: QuantRule) -> float:
    """SQNR in dB of the simulator against AIMET's simulation."""
    inputs = {"x": np.random.default_rng(0).standard_normal(shape, np.float32)}
    assert RECIPE.quant is not None
    quantised = quantise(module, [inputs], dataclasses.replace(RECIPE.quant, rules=rules))
    expected = quantised.run(inputs)
    quantised.export(folder, inputs, ["out"])
    options = dataclasses.replace(NpuOptions(), optimization_mode=mode)
    made = compile_context(folder / MODEL, folder / "npu", find_target("SM8650"), options, float16=False)
    return sqnr_db(expected, NpuSimRunner(made.wrapper).run(inputs)["out"])


def norm(channels: int) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.GroupNorm(32, channels)
    nn.init.normal_(plain.weight, 1, 0.2)
    nn.init.normal_(plain.bias, 0, 0.2)
    return ops.group_norm(plain, RECIPE.graph)


@pytest.mark.parametrize("shape", [(14, 64, 8, 16), (7, 192, 2, 4), (7, 160, 4, 8)])
def test_silu_behind_a_group_norm_is_right(shape: Shape, tmp_path: Path) -> None:
    assert agreement(tmp_path, nn.Sequential(norm(shape[1]), ops.SiLU()), shape) > 60


@pytest.mark.parametrize("shape", [(4, 32, 16, 8), (1, 32, 64, 4), (1, 32, 128, 7)])
def test_silu_behind_groups_of_one_channel_is_still_wrong_on_narrow_maps(
    shape: Shape, tmp_path: Path
) -> None:
    """If this fails, the compiler was mended: lint's rule can go, and the rows of `TemporalResBlock`."""
    assert agreement(tmp_path, nn.Sequential(norm(32), ops.SiLU()), shape) < 20
    (finding,) = lint(tmp_path / MODEL, float16=False)
    assert (finding.rule, finding.where) == ("silu", "1.sigmoid/Sigmoid")
    assert finding.next_step


@pytest.mark.parametrize("shape", [(4, 32, 16, 9), (4, 32, 8, 8), (4, 32, 12, 4), (4, 64, 16, 8)])
def test_silu_is_right_beside_that(shape: Shape, tmp_path: Path) -> None:
    assert agreement(tmp_path, nn.Sequential(norm(shape[1]), ops.SiLU()), shape) > 60
    assert lint(tmp_path / MODEL, float16=False) == ()


@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("temporal_conv", ["rows", "columns"])
def test_temporal_resblocks_are_right(
    channels: int, temporal_conv: Literal["rows", "columns"], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    block = TemporalResnetBlock(channels, channels, temb_channels=None)
    module = ops.TemporalResBlock(
        block, dataclasses.replace(RECIPE.graph, temporal_conv=temporal_conv)
    ).eval()
    assert agreement(tmp_path, module, (7, channels, 8, 16), 0) > 60


def test_the_plain_product_is_still_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the compiler was mended: SiLU's detour can go, and the check that refuses it."""
    monkeypatch.setattr(qdq_check, "_is_silu", lambda *_: False)
    assert agreement(tmp_path, nn.Sequential(norm(64), PlainSiLU()), (14, 64, 8, 16)) < 20


def test_instance_norms_are_still_wrong_in_mode_1(tmp_path: Path) -> None:
    """If this fails, the compiler was mended: recipe.py need not refuse mode 1."""
    assert agreement(tmp_path, nn.Sequential(nn.Conv2d(96, 96, 1), norm(96)), (7, 96, 2, 4), mode=1) < 20


def test_weights_with_few_values_are_right(tmp_path: Path) -> None:
    assert agreement(tmp_path, identity(), (1, 64, 16, 3)) > 65


def test_small_integers_are_still_coarse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the compiler was mended: _use_all_steps and _check_steps can go."""
    monkeypatch.setattr(simulation, "_use_all_steps", lambda *_: None)
    monkeypatch.setattr(qdq_check, "_check_steps", lambda *_: None)
    assert agreement(tmp_path, identity(), (1, 64, 16, 3)) < 50


class Residual(nn.Module):
    """Two convolutions, added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.act, self.add = nn.GELU(), ops.Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.last(self.act(self.first(x))))


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        (QuantRule("1.*", activations=8), 35),  # at 8 bits rounding flips spread
        (QuantRule("1.*", weights=16), 60),
        (QuantRule("1.*", weights=32, activations=32), 50),
    ],
    ids=["a8", "w16", "float"],
)
def test_mixed_precision_compiles(rule: QuantRule, least: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(Residual(), Residual(), Residual())
    assert agreement(tmp_path, blocks, (1, 32, 8, 16), 3, rule) > least
