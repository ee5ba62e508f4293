"""Small random networks and checkpoints, for the tests of the mathematical core."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import UNetSpatioTemporalConditionModel
from hypothesis import strategies as st
from torch import Tensor, nn

from mobilevd_deploy.base.tensors import sqnr_db
from mobilevd_deploy.config.spec import (
    DecoderSpec,
    FunnelSpec,
    ImageEncoderSpec,
    ModelSpec,
    StepSpec,
    UNetSpec,
    VaeEncoderSpec,
)
from mobilevd_deploy.model.checkpoint import save_checkpoint
from mobilevd_deploy.model.components import build_component
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.model.unet import MobileVDUNet
from mobilevd_deploy.passes.runner import select_passes

M = TypeVar("M", bound=nn.Module)


# Never 32 channels alone: with one channel per group, GroupNorm hides every per-channel constant
# before it, and with it any error in a folded time embedding.
PLAIN = UNetSpec(
    block_out_channels=(64, 96),
    num_attention_heads=(2, 3),
    attention=(True, False),
    layers_per_block=1,
    cross_attention_dim=16,
    addition_time_embed_dim=8,
)
# Every optimisation at once; three temporal blocks are pruned, of both kinds.
FULL = dataclasses.replace(
    PLAIN,
    temporal_multiscaling="conv",
    gated=True,
    kept_temporal_blocks=(
        "down_blocks.0.attentions.0",
        "down_blocks.1.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.0",
        "mid_block.resnets.1",
        "up_blocks.0.resnets.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
    ),
    funnels=FunnelSpec(spatial_attention=0.5, temporal_attention=0.4, resblock=0.75),
)


def randomise(module: M, seed: int) -> M:
    """Fill every parameter so that none is trivial and signals keep their scale; gates are left alone.

    Matrices get variance 1 / fan-in, norm weights and biases lie around 1 and 0. The values do not depend
    on the dtype. Frozen and in evaluation mode afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            fan_in = parameter.shape[-1] if name.endswith(("squeeze", "widen")) else parameter[0].numel()
            draw /= math.sqrt(fan_in)
        elif name.endswith(("bias", "squeeze_bias")):
            draw *= 0.3
        elif name.endswith("weight"):
            draw = 1 + 0.3 * draw
        parameter.data = draw.to(parameter.dtype)
    return module.eval().requires_grad_(False)


def build_unet(
    spec: UNetSpec = PLAIN, *, frames: int = 4, step: StepSpec | None = None, seed: int = 0
) -> MobileVDUNet:
    """Build a random network in float64; a fresh copy at each call."""
    return copy.deepcopy(_built(spec, frames, step or StepSpec(), seed))


@functools.lru_cache(maxsize=8)
def _built(spec: UNetSpec, frames: int, step: StepSpec, seed: int) -> MobileVDUNet:
    with torch.device("meta"):  # saves diffusers' own initialisation
        unet = MobileVDUNet(spec, step, num_frames=frames)
    unet.to_empty(device="cpu").double()
    if spec.gated:
        unet.reset_gates()
    return randomise(unet, seed)


@torch.no_grad()
def apply_passes(unet: MobileVDUNet, names: Iterable[str]) -> None:
    """Rewrite without the runner's proof."""
    for step in select_passes(names):
        step.apply(unet)


def diffusers_unet(spec: UNetSpec, frames: int) -> UNetSpatioTemporalConditionModel:
    """Build diffusers' network of the same architecture in float64, weights uninitialised."""
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            down_block_types=tuple(
                "CrossAttnDownBlockSpatioTemporal" if a else "DownBlockSpatioTemporal" for a in spec.attention
            ),
            up_block_types=tuple(
                "CrossAttnUpBlockSpatioTemporal" if a else "UpBlockSpatioTemporal"
                for a in spec.attention[::-1]
            ),
            block_out_channels=spec.block_out_channels,
            addition_time_embed_dim=spec.addition_time_embed_dim,
            projection_class_embeddings_input_dim=3 * spec.addition_time_embed_dim,
            layers_per_block=spec.layers_per_block,
            cross_attention_dim=spec.cross_attention_dim,
            num_attention_heads=spec.num_attention_heads,
            num_frames=frames,
        )
    return unet.to_empty(device="cpu").double().eval().requires_grad_(False)


def unet_inputs(
    spec: UNetSpec, *, batch: int = 1, frames: int = 4, height: int = 4, width: int = 4, seed: int = 1
) -> dict[str, Any]:
    """Draw the arguments of the network's forward in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "sample": normal(batch, frames, spec.in_channels, height, width),
        "timestep": 1.25,
        "encoder_hidden_states": normal(batch, 1, spec.cross_attention_dim),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]], dtype=torch.float64).expand(batch, -1),
    }


def decibels(reference: Tensor, test: Tensor) -> float:
    """SQNR in dB; inf where equal."""
    return sqnr_db(reference.detach().numpy(), test.detach().numpy())


def temporal_paths(spec: UNetSpec) -> list[str]:
    """Paths of all temporal blocks, from the architecture's definition rather than from a network."""
    levels, layers = len(spec.attention), spec.layers_per_block
    paths = ["mid_block.attentions.0", "mid_block.resnets.0", "mid_block.resnets.1"]
    for side, has, count in (("down", spec.attention, layers), ("up", spec.attention[::-1], layers + 1)):
        for level in range(levels):
            for kind in ("attentions", "resnets") if has[level] else ("resnets",):
                paths += [f"{side}_blocks.{level}.{kind}.{i}" for i in range(count)]
    return paths


@st.composite
def unet_specs(draw: Any) -> UNetSpec:
    """Draw architectures, odd ones included; widths and depth stay small."""
    levels = draw(st.sampled_from([1, 2, 2, 3]))
    widths = tuple(draw(st.sampled_from([32, 64] if levels == 3 else [32, 64, 96])) for _ in range(levels))
    spec = UNetSpec(
        block_out_channels=widths,
        num_attention_heads=tuple(
            draw(st.sampled_from([h for h in (1, 2, 3, 8) if w % h == 0])) for w in widths
        ),
        attention=tuple(draw(st.booleans()) for _ in range(levels)),
        layers_per_block=draw(st.sampled_from({1: [1, 2, 3], 2: [1, 2], 3: [1]}[levels])),
        cross_attention_dim=draw(st.sampled_from([5, 16])),
        addition_time_embed_dim=draw(st.sampled_from([4, 8])),
        temporal_multiscaling=draw(st.sampled_from(["none", "mean", "conv"] if levels > 1 else ["none"])),
        gated=draw(st.booleans()),
        funnels=FunnelSpec(*(draw(st.sampled_from([1.0, 0.5, 0.3, 0.03])) for _ in range(3))),
    )
    if not spec.gated:
        return spec
    kept = draw(st.sampled_from(["all", "none", "some"]))
    blocks = st.sampled_from(temporal_paths(spec))
    some = {"all": None, "none": (), "some": tuple(draw(st.lists(blocks, unique=True)))}
    return dataclasses.replace(spec, kept_temporal_blocks=some[kept])


class Case(NamedTuple):
    """An architecture, and the frames and latent size that it is run at."""

    spec: UNetSpec
    frames: int
    height: int
    width: int
    batch: int = 1
    seed: int = 0


@st.composite
def cases(draw: Any) -> Case:
    """Draw networks with a size that fits them.

    One row of pixels at the lowest level is allowed. One or two pixels are not: GroupNorm over so few
    values is a sign function, which multiplies float32's rounding by any factor.
    """
    spec = draw(unet_specs())
    frames = draw(st.sampled_from([1, 2, 3] if spec.temporal_multiscaling == "none" else [2, 4]))
    height, width = (spec.size_multiple * draw(st.integers(low, low + 1)) for low in (1, 4))
    return Case(spec, frames, height, width, draw(st.integers(1, 2)), draw(st.integers(0, 99)))


# What random draws rarely bring together: one level, one head, r that divides nothing, all pruned or none.
ONE_LEVEL = Case(
    UNetSpec((64,), (1,), (True,), 3, 8, 4, 5, 4, "none", True, (), FunnelSpec(0.3, 0.03, 0.3)), 3, 1, 5
)
DEEP = Case(
    UNetSpec(
        (64, 32, 64),
        (8, 1, 2),
        (False, True, False),
        1,
        8,
        4,
        16,
        8,
        "conv",
        True,
        None,
        FunnelSpec(0.7, 1, 0.9),
    ),
    2,
    4,
    16,
    batch=2,
)


# A whole model with every optimisation in it, as small as it may be; its maps are 6x10 and 3x5.
TINY_MODEL = ModelSpec(
    name="tiny",
    frames=4,
    height=48,
    width=80,
    unet=FULL,
    image_encoder=ImageEncoderSpec(16, 32, 1, 2, image_size=32, patch_size=16, projection_dim=16),
    vae_encoder=VaeEncoderSpec(kind="pixel-unshuffle", block_out_channels=(8, 8), layers_per_block=1),
    decoder=DecoderSpec(kind="pixel-shuffle", block_out_channels=(8, 8), layers_per_block=1),
)


def write_checkpoint(path: Path, spec: ModelSpec = TINY_MODEL) -> Path:
    """Write a complete random checkpoint of `spec`; the same weights at each call."""
    states = {}
    for seed, name in enumerate(COMPONENTS):
        module = build_component(spec, name)
        if isinstance(module, MobileVDUNet) and spec.unet.gated:
            module.reset_gates()
        states[name] = randomise(module, seed).state_dict()
    save_checkpoint(path, spec, states)
    return path
