"""Channel funnels: folding, the softmax scale, and the optimality of coupled singular initialisation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import Tensor, nn

from mobilevd_deploy.config.spec import FunnelSpec
from mobilevd_deploy.model.funnels import (
    ScaledAttention,
    SqueezedConv,
    SqueezedLinear,
    WidenedConv,
    WidenedLinear,
    add_attention_funnels,
    add_resblock_funnel,
    coupled_factors,
    funnel_width,
    initialise_csi,
    initialise_he,
)
from mobilevd_deploy.passes.runner import UNetProbe
from tests.support.networks import PLAIN, build_unet, decibels, randomise

EXACT_DB = 280.0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(width: int, heads: int, seed: int = 0) -> Attention:
    module = Attention(width, heads=heads, dim_head=width // heads, processor=ScaledAttention()).double()
    return randomise(module, seed)


def with_funnels(base: Attention, r: float) -> Attention:
    module = attention(base.to_q.in_features, base.heads)
    add_attention_funnels(module, r)
    left = module.load_state_dict(base.state_dict(), strict=False)
    assert {name.rsplit(".", 1)[1] for name in left.missing_keys} == {"squeeze", "widen"}
    return module.requires_grad_(False)


@pytest.mark.parametrize(
    ("width", "r", "expected"),
    [(64, 0.5, 32), (10, 0.33, 3), (7, 0.5, 4), (5, 0.5, 2), (8, 0.01, 1), (1, 0.2, 1), (8, 0.99, 8)],
)
def test_funnel_width_is_the_nearest_integer_and_never_0(width: int, r: float, expected: int) -> None:
    assert funnel_width(width, r) == expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "inner"), [(1, 5), (3, 1), (2, 6), (4, 3)])
def test_linear_funnels_fold_exactly(bias: bool, heads: int, inner: int) -> None:
    squeezed = randomise(SqueezedLinear(nn.Linear(7, 12, bias=bias).double(), heads, inner), 1)
    folded = squeezed.fold()
    x = normal(2, 3, 7)
    assert type(folded) is nn.Linear
    assert (folded.in_features, folded.out_features) == (7, heads * inner)
    assert decibels(squeezed(x), folded(x)) > EXACT_DB

    widened = randomise(WidenedLinear(nn.Linear(12, 7, bias=bias).double(), heads, inner), 2)
    folded = widened.fold()
    y = normal(2, 3, heads * inner)
    assert type(folded) is nn.Linear
    assert (folded.in_features, folded.out_features) == (heads * inner, 7)
    assert decibels(widened(y), folded(y)) > EXACT_DB


CONVOLUTIONS: dict[str, Any] = {
    "2d": lambda bias: nn.Conv2d(6, 8, 3, padding=1, bias=bias),
    "2d-stride": lambda bias: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=bias),
    "2d-unpadded": lambda bias: nn.Conv2d(6, 8, 3, bias=bias),
    "temporal": lambda bias: nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0), bias=bias),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_funnels_fold_exactly(kind: str, bias: bool) -> None:
    conv = CONVOLUTIONS[kind](bias).double()
    spatial = (4, 5, 3) if kind == "temporal" else (4, 5)
    squeezed = randomise(SqueezedConv(conv, 3), 1)
    x = normal(2, 6, *spatial)
    folded = squeezed.fold()
    assert (type(folded), folded.stride, folded.padding) == (type(conv), conv.stride, conv.padding)
    assert decibels(squeezed(x), folded(x)) > EXACT_DB

    widened = randomise(WidenedConv(conv, 3), 2)
    y = normal(2, 3, *spatial)
    assert widened.foldable
    assert decibels(widened(y), widened.fold()(y)) > EXACT_DB


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_widen_bias_folds_without_padding_only(kind: str, bias: bool) -> None:
    conv = CONVOLUTIONS[kind](bias).double()
    widened = randomise(WidenedConv(conv, 3, bias=True), 2)
    y = normal(2, 3, *((4, 5, 3) if kind == "temporal" else (4, 5)))
    assert widened.foldable == (kind == "2d-unpadded")
    if widened.foldable:
        assert decibels(widened(y), widened.fold()(y)) > EXACT_DB
    else:  # refused for a reason: the border would be wrong
        assert decibels(widened(y), widened.fold()(y)) < 60
    widened.widen_bias.zero_()
    assert widened.foldable
    assert decibels(widened(y), widened.fold()(y)) > EXACT_DB


@pytest.mark.parametrize(("width", "heads", "r"), [(8, 1, 0.5), (12, 3, 0.3), (12, 2, 0.5), (6, 6, 0.5)])
def test_funnelled_attention_divides_by_the_root_of_the_original_width(
    width: int, heads: int, r: float
) -> None:
    module = randomise(with_funnels(attention(width, heads), r), 3)
    x = normal(2, 5, width)
    d, inner = width // heads, funnel_width(width // heads, r)
    out = torch.zeros_like(x)
    for head in range(heads):
        rows = slice(head * d, (head + 1) * d)
        q, k, v = (
            x @ (layer.squeeze[head] @ layer.weight[rows]).T
            for layer in (module.to_q, module.to_k, module.to_v)
        )
        assert q.shape[-1] == inner
        mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(d), -1) @ v
        out += mixed @ (module.to_out[0].weight[:, rows] @ module.to_out[0].widen[head]).T
    assert decibels(out + module.to_out[0].bias, module(x)) > EXACT_DB
    for name in ("to_q", "to_k", "to_v"):
        setattr(module, name, getattr(module, name).fold())
    module.to_out[0] = module.to_out[0].fold()
    assert decibels(out + module.to_out[0].bias, module(x)) > EXACT_DB


def test_full_width_identity_funnels_are_diffusers_network() -> None:
    plain = build_unet()
    spec = dataclasses.replace(PLAIN, funnels=FunnelSpec(spatial_attention=0.995, temporal_attention=0.995))
    funnelled = build_unet(spec)
    left = funnelled.load_state_dict(plain.state_dict(), strict=False)
    assert not left.unexpected_keys
    for name in left.missing_keys:
        parameter = funnelled.get_parameter(name)
        parameter.copy_(torch.eye(32, dtype=torch.float64).expand(parameter.shape))
    probe = UNetProbe.make(plain, 4, 4)
    assert len(left.missing_keys) == 4 * 8
    assert decibels(probe.run(plain), probe.run(funnelled)) > EXACT_DB


def test_full_rank_csi_reproduces_the_network() -> None:
    plain = build_unet()
    spec = dataclasses.replace(PLAIN, funnels=FunnelSpec(spatial_attention=0.995, temporal_attention=0.995))
    funnelled = build_unet(spec)
    funnelled.load_state_dict(plain.state_dict(), strict=False)
    initialise_csi(funnelled)
    probe = UNetProbe.make(plain, 4, 4)
    assert decibels(probe.run(plain), probe.run(funnelled)) > 250


def products(module: Attention, head: int) -> list[tuple[Tensor, Tensor]]:
    """(full, squeezed) products of a head: W_q^T W_k, then W_out W_v."""
    d = module.to_q.out_features // module.heads
    rows = slice(head * d, (head + 1) * d)
    w_q, w_k, w_v = (layer.weight[rows] for layer in (module.to_q, module.to_k, module.to_v))
    p_q, p_k, p_v = (layer.squeeze[head] for layer in (module.to_q, module.to_k, module.to_v))
    w_out, widen = module.to_out[0].weight[:, rows], module.to_out[0].widen[head]
    return [
        (w_q.T @ w_k, (p_q @ w_q).T @ (p_k @ w_k)),
        (w_out @ w_v, (w_out @ widen) @ (p_v @ w_v)),
    ]


@pytest.mark.parametrize(
    ("width", "heads", "r"), [(16, 1, 0.5), (16, 2, 0.5), (18, 3, 0.4), (20, 4, 0.01), (14, 2, 0.9)]
)
def test_csi_is_the_best_product_of_its_rank_per_head(width: int, heads: int, r: float) -> None:
    """Eckart-Young: the squared error is the tail of the squared singular values, and none is lower."""
    module = with_funnels(attention(width, heads), r)
    initialise_csi(module)
    inner = funnel_width(width // heads, r)
    for head in range(heads):
        for full, squeezed in products(module, head):
            s = np.linalg.svd(full.numpy(), compute_uv=False)
            error = float(torch.linalg.matrix_norm(full - squeezed))
            tail = float(np.sqrt(np.sum(s[inner:] ** 2)))
            assert error == pytest.approx(tail, rel=1e-9, abs=1e-12 * s[0])
            kept = np.linalg.svd(squeezed.numpy(), compute_uv=False)
            np.testing.assert_allclose(kept[:inner], s[:inner], rtol=1e-9)
            assert kept[inner:].max(initial=0) < 1e-12 * s[0]


def test_csi_shares_the_singular_values_evenly() -> None:
    module = with_funnels(attention(24, 2), 0.5)
    initialise_csi(module)
    for head in range(2):
        rows = slice(head * 12, (head + 1) * 12)
        q = module.to_q.squeeze[head] @ module.to_q.weight[rows]
        k = module.to_k.squeeze[head] @ module.to_k.weight[rows]
        v = module.to_v.squeeze[head] @ module.to_v.weight[rows]
        out = module.to_out[0].weight[:, rows] @ module.to_out[0].widen[head]
        for left, right, full in (
            (q, k, products(module, head)[0][0]),
            (out.T, v, products(module, head)[1][0]),
        ):
            s = torch.linalg.svdvals(full)[:6]
            torch.testing.assert_close(left @ left.T, torch.diag(s))
            torch.testing.assert_close(right @ right.T, torch.diag(s))


def test_csi_keeps_the_weights_themselves() -> None:
    base = attention(16, 2)
    module = with_funnels(base, 0.5)
    initialise_csi(module)
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())


def low_rank(d: int, columns: int, rank: int, seed: int) -> Tensor:
    return normal(d, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)


def opposite_halves() -> tuple[Tensor, Tensor]:
    """Factors of full size whose product is exactly 0."""
    a, b = normal(4, 24), normal(4, 30, seed=1)
    return torch.cat([a, a]), torch.cat([b, -b])


DEGENERATE: dict[str, tuple[Tensor, Tensor, int]] = {
    "rank below the funnel": (low_rank(8, 24, 2, 0), normal(8, 30, seed=9), 5),
    "both of low rank": (low_rank(8, 24, 3, 0), low_rank(8, 30, 2, 5), 4),
    "repeated rows": (normal(4, 24).repeat(2, 1), normal(8, 30, seed=1), 6),
    "d > C": (normal(12, 5), normal(12, 7, seed=1), 6),
    "d > C on one side": (normal(12, 5), normal(12, 40, seed=1), 4),
    "rank above C": (normal(12, 3), normal(12, 4, seed=1), 8),
    "one channel": (normal(1, 6), normal(1, 5, seed=1), 1),
    "zero factor": (torch.zeros(6, 9, dtype=torch.float64), normal(6, 9), 3),
    "zero product": (*opposite_halves(), 6),
    "steep spectrum": (
        torch.logspace(0, -14, 8, dtype=torch.float64)[:, None] * normal(8, 24),
        normal(8, 30, seed=1),
        6,
    ),
    "huge": (1e18 * normal(8, 24), 1e18 * normal(8, 30, seed=1), 4),
    "small": (1e-15 * normal(8, 24), 1e-15 * normal(8, 30, seed=1), 4),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", DEGENERATE)
def test_csi_of_degenerate_factors_is_finite_and_optimal(case: str, dtype: torch.dtype) -> None:
    a, b, rank = (x.to(dtype) if isinstance(x, Tensor) else x for x in DEGENERATE[case])
    p, q = coupled_factors(a, b, rank)
    assert (p.shape, q.shape, p.dtype) == ((rank, a.shape[0]), (rank, a.shape[0]), dtype)
    assert bool(p.isfinite().all())
    assert bool(q.isfinite().all())
    # The squeezed factors as a network of this dtype computes them.
    product = (p @ a).double().T @ (q @ b).double()
    full = a.double().T @ b.double()
    tail = torch.linalg.svdvals(full)[rank:].norm()
    unit = a.double().norm() * b.double().norm() + 1e-300
    excess = (torch.linalg.matrix_norm(full - product) - tail) / unit
    assert float(excess) < 100 * torch.finfo(dtype).eps


def test_he_is_far_worse_than_csi() -> None:
    errors = {}
    for initialise in (initialise_csi, initialise_he):
        module = with_funnels(attention(64, 4), 0.5)
        initialise(module)
        pairs = [pair for head in range(4) for pair in products(module, head)]
        errors[initialise] = sum(float((full - squeezed).square().sum()) for full, squeezed in pairs)
    assert errors[initialise_he] > 5 * errors[initialise_csi]


def test_he_has_the_variance_of_its_fan_in_and_follows_the_generator() -> None:
    module = with_funnels(attention(512, 2), 0.5)
    initialise_he(module, torch.Generator().manual_seed(4))
    first = module.to_q.squeeze.clone()
    assert float(first.std()) == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert float(module.to_out[0].widen.std()) == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    initialise_he(module, torch.Generator().manual_seed(4))
    assert torch.equal(first, module.to_q.squeeze)


def resblock(kind: type, channels: int, out: int) -> Any:
    if kind is ResnetBlock2D:
        return randomise(ResnetBlock2D(in_channels=channels, out_channels=out, temb_channels=8).double(), 0)
    return randomise(TemporalResnetBlock(channels, out, temb_channels=8).double(), 0)


@pytest.mark.parametrize("kind", [ResnetBlock2D, TemporalResnetBlock])
@pytest.mark.parametrize(
    ("channels", "out", "r"), [(64, 64, 0.5), (32, 96, 0.3), (64, 32, 0.9), (32, 320, 0.95)]
)
def test_resblock_funnels_initialise_at_every_width(kind: type, channels: int, out: int, r: float) -> None:
    for initialise in (initialise_csi, initialise_he):
        block = resblock(kind, channels, out)
        add_resblock_funnel(block, r)
        block.requires_grad_(False)
        for parameter in (
            p for n, p in block.named_parameters() if n.endswith(("squeeze", "widen", "_bias"))
        ):
            parameter.fill_(math.nan)  # whatever initialisation forgets stays NaN
        initialise(block)
        x = normal(2, channels, 3, 3) if kind is ResnetBlock2D else normal(1, channels, 3, 2, 2)
        temb = normal(2, 8) if kind is ResnetBlock2D else normal(1, 3, 8)
        assert bool(block(x, temb).isfinite().all())
        assert block.norm2.num_channels == funnel_width(out, r)


def test_resblock_csi_keeps_the_strongest_output_directions() -> None:
    block = resblock(ResnetBlock2D, 64, 64)
    kernel = block.conv1.weight.flatten(1).clone()
    add_resblock_funnel(block, 0.25)
    initialise_csi(block)
    squeeze = block.conv1.squeeze.detach()
    torch.testing.assert_close(squeeze @ squeeze.T, torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(block.conv2.widen.detach(), squeeze.T)
    s = torch.linalg.svdvals(kernel)
    assert float((squeeze @ kernel).norm()) == pytest.approx(float(s[:16].norm()), rel=1e-9)
    # The embedding joins behind the squeeze, so it is squeezed alike.
    assert torch.equal(block.time_emb_proj.squeeze[0], squeeze)
