"""FLOP counts: by hand, against PyTorch's own counter, and against the table of the paper's facts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.spec import DecoderSpec, ImageEncoderSpec, ModelSpec, VaeEncoderSpec
from mobilevd_deploy.model.components import build_component, deploy_contract
from mobilevd_deploy.model.flops import count_flops, count_flops_by_module
from mobilevd_deploy.model.interface import COMPONENTS, input_shapes
from mobilevd_deploy.model.unet import MobileVDUNet
from tests.support.networks import FULL


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def both(function: Any, *inputs: Any) -> tuple[int, int]:
    return count_flops(function, *inputs), count_flops(function, *inputs, convention="paper")


@pytest.mark.parametrize(
    ("function", "inputs", "honest", "paper"),
    [
        # batch 3, 5 -> 7 features: 2 x MAC, and no bias in either convention
        (nn.Linear(5, 7, device="meta"), [meta(3, 5)], 210, 210),
        # 4 outputs of 2 channels, 6 groups of... 3x3 taps on 6 / 2 channels; the bias counts on paper
        (nn.Conv2d(6, 8, 3, groups=2, device="meta"), [meta(2, 6, 4, 4)], 2 * 64 * 27, 2 * 64 * 27 + 64),
        (
            nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), bias=False, device="meta"),
            [meta(1, 4, 5, 2, 2)],
            1920,
            1920,
        ),
        (nn.Conv1d(3, 2, 3, stride=2, device="meta"), [meta(1, 3, 9)], 2 * 8 * 9, 2 * 8 * 9 + 8),
        (torch.matmul, [meta(2, 3, 4), meta(2, 4, 5)], 240, 240),
        (lambda a, b: a @ b, [meta(3, 4), meta(4, 5)], 120, 120),
        (torch.bmm, [meta(2, 3, 4), meta(2, 4, 5)], 240, 240),
        (torch.Tensor.matmul, [meta(3, 4), meta(4, 5)], 120, 120),
        (torch.addmm, [meta(3, 5), meta(3, 4), meta(4, 5)], 120, 135),
        (torch.baddbmm, [meta(2, 3, 5), meta(2, 3, 4), meta(2, 4, 5)], 240, 270),
        (lambda a, b: torch.einsum("rc,bc...->br...", a, b), [meta(2, 3), meta(5, 3, 7, 7)], 2940, 2940),
        (lambda a, b: torch.einsum("ohd,hdr->ohr", a, b), [meta(3, 2, 4), meta(2, 4, 5)], 240, 240),
        # 6 maps of 7 x 9 entries over 4 and 5 channels
        (F.scaled_dot_product_attention, [meta(2, 3, 7, 4), meta(2, 3, 9, 4), meta(2, 3, 9, 5)], 6804, 7182),
        (nn.GroupNorm(2, 4, device="meta"), [meta(3, 4, 5)], 0, 300),
        (nn.LayerNorm(4, device="meta"), [meta(3, 4)], 0, 60),
        (F.silu, [meta(3, 4)], 0, 12),
        (F.gelu, [meta(3, 4)], 0, 12),
        (nn.ReLU(), [meta(3, 4)], 0, 12),
        (lambda x: F.softmax(x, -1) + x * 2, [meta(3, 4)], 0, 0),
        # 3 in the batch: the factor 2 to the power of 3, not of the 2 spatial axes
        (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), [meta(3, 1, 2, 2)], 0, 12 * 8),
        (lambda x: F.interpolate(x, size=(5, 5), mode="nearest"), [meta(3, 1, 2, 2)], 0, 25),
    ],
)
def test_by_hand(function: Any, inputs: list[Tensor], honest: int, paper: int) -> None:
    assert both(function, *inputs) == (honest, paper)


def test_products_of_three_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="products of two"):
        count_flops(lambda a: torch.einsum("ab,bc,cd->ad", a, a, a), meta(3, 3))


def test_real_and_meta_tensors_count_alike() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2))
    real = both(network, torch.randn(2, 3, 4, 4))
    assert both(network.to("meta"), meta(2, 3, 4, 4)) == real
    assert 0 < real[0] < real[1]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner[0](x)) @ x.new_empty(2, 2)


def test_attribution_to_module_paths() -> None:
    module = Twice().to("meta")
    counts = count_flops_by_module(module, module, meta(1, 4))["honest"]
    assert counts == {"inner.0": 64, "inner.1": 16, "inner": 80, "": 88}
    assert not module.inner[0]._forward_hooks
    assert not module.inner[0]._forward_pre_hooks


def test_hooks_go_when_the_call_fails() -> None:
    module = Twice().to("meta")
    with pytest.raises(RuntimeError):
        count_flops_by_module(module, module, meta(1, 5))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


SMALL = ModelSpec(
    name="small",
    frames=4,
    height=64,
    width=64,
    unet=FULL,
    image_encoder=ImageEncoderSpec(32, 64, 2, 2, image_size=32, patch_size=8, projection_dim=16),
    vae_encoder=VaeEncoderSpec(block_out_channels=(32, 32, 32, 64), layers_per_block=1),
    decoder=DecoderSpec(block_out_channels=(32, 32, 32, 64), layers_per_block=1),
)
KINDS = [
    SMALL,
    dataclasses.replace(
        SMALL,
        vae_encoder=VaeEncoderSpec(kind="pixel-unshuffle", block_out_channels=(16, 24)),
        decoder=DecoderSpec(kind="pixel-shuffle", block_out_channels=(16, 24)),
    ),
    dataclasses.replace(
        SMALL, decoder=DecoderSpec(kind="tiny", block_out_channels=(8,) * 4, layers_per_block=3)
    ),
]


@pytest.mark.parametrize(("spec", "name"), itertools.product(KINDS, COMPONENTS))
def test_honest_count_agrees_with_pytorchs_own(spec: ModelSpec, name: Any) -> None:
    """PyTorch counts below the functional calls, on the operators that are really executed."""
    torch.manual_seed(0)
    module = deploy_contract(build_component(spec, name)).requires_grad_(False)
    inputs = [torch.randn(shape) for shape in input_shapes(spec, name).values()]
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    assert count_flops(module, *inputs) == counter.get_total_flops() > 0


class PublishedCrossAttention:
    """The paper's form of single-token cross-attention: W_out (W_v c), not merged."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        return attn.to_out[0](attn.to_v(encoder_hidden_states))


def counted(unet: nn.Module, height: int, width: int) -> list[float]:
    inputs = (meta(1, 14, 8, height, width), 1.0, meta(1, 1, 1024), meta(1, 3))
    counts = count_flops_by_module(unet, unet, *inputs)
    return [round(counts[convention][""] / 1e12, 3) for convention in ("honest", "paper")]  # type: ignore[index]


def full_size(preset: str) -> MobileVDUNet:
    with torch.device("meta"):
        return build_component(load_preset(preset).model, "unet")  # type: ignore[return-value]


def test_table_of_the_facts() -> None:
    """SVD at both sizes, its optimised cross-attention, and temporal multiscaling, to the digits given."""
    svd, multiscale = full_size("svd"), full_size("mobilevd-multiscale")
    assert counted(svd, 72, 128) == [44.802, 45.417]
    assert counted(svd, 32, 64) == [8.459, 8.590]
    for unet in (svd, multiscale):
        for module in unet.modules():
            if hasattr(module, "attn2"):
                module.attn2.set_processor(PublishedCrossAttention())
    assert counted(svd, 32, 64) == [8.095, 8.226]
    # 5.415 there: it counts 0.00002 T for repeating frames, which ours does without arithmetic.
    assert counted(multiscale, 32, 64) == [5.407, 5.414]


def test_diffusers_own_network_counts_the_same() -> None:
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(
            num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024, num_frames=14
        )
    # diffusers makes its blend factors on the CPU whatever the device context says.
    count = count_flops(unet.to("meta"), meta(1, 14, 8, 32, 64), 1.0, meta(1, 1, 1024), meta(1, 3))
    assert math.isclose(count, 8.459e12, rel_tol=1e-4)
