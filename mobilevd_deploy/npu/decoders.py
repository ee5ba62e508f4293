"""The decoders as static graphs: from scaled latents of a clip to frames, nominally in [-1, 1], not clamped.

The division by the scaling factor is folded into the weights of the first layer.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import UpBlockTemporalDecoder
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

from mobilevd_deploy.config.recipe import GraphForms
from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.model.components import DemoDecoder, SvdImageDecoder, SvdTemporalDecoder, TinyDecoder
from mobilevd_deploy.npu.ops import (
    Add,
    Constant,
    MapAttention,
    Multiply,
    ResBlock,
    ResidualConvs,
    SiLU,
    SubPixelUpsample,
    TemporalResBlock,
    Upsample,
    conv2d,
    copy_sharing,
    group_norm,
    over_frames,
    temporal_conv,
)
from mobilevd_deploy.passes.subpixel_upsampling import phase_kernels


class NpuDecoder(nn.Module):
    """Latents (T, 4, h, w), multiplied by the scaling factor -> frames (T, 3, H, W)."""

    def __init__(
        self,
        component: SvdTemporalDecoder | SvdImageDecoder | TinyDecoder | DemoDecoder,
        spec: ModelSpec,
        forms: GraphForms,
    ) -> None:
        """Build for clips of the size and length in `spec`."""
        super().__init__()
        self.decoder: nn.Module
        if isinstance(component, SvdTemporalDecoder):
            self.decoder = _temporal_decoder(component, spec, forms)
        elif isinstance(component, SvdImageDecoder):
            self.decoder = over_frames(_image_decoder(component, spec, forms), spec.frames, forms)
        elif isinstance(component, TinyDecoder):
            self.decoder = over_frames(_tiny_decoder(component, forms), spec.frames, forms)
        else:
            self.decoder = over_frames(_pixel_shuffle_decoder(component), spec.frames, forms)

    def forward(self, latents: Tensor) -> Tensor:
        """Return the clip's frames."""
        return self.decoder(latents)


class TimeConv(nn.Module):
    """A convolution along the frames of a clip."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.conv = temporal_conv(conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to (T, C', H, W)."""
        frames, channels, height, width = x.shape
        video = self.conv(x.transpose(0, 1).reshape(1, channels, frames, height * width))
        return video.reshape(-1, frames, height, width).transpose(0, 1)


class SoftClamp(nn.Module):
    """tanh(scale x)."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = Constant(scale)
        self.multiply, self.tanh = Multiply(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to itself."""
        return self.tanh(self.multiply(x, self.scale()))


class TinyBlock(nn.Module):
    """Three convolutions with ReLU plus the input: diffusers' AutoencoderTinyBlock of equal widths."""

    def __init__(self, block: AutoencoderTinyBlock) -> None:
        super().__init__()
        first, second, third = (copy_sharing(block.conv[i]) for i in (0, 2, 4))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.add, self.fuse = Add(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to itself."""
        return self.fuse(self.add(self.conv(x), x))


def _temporal_decoder(component: SvdTemporalDecoder, spec: ModelSpec, forms: GraphForms) -> nn.Sequential:
    mid, frames = component.mid_block, spec.frames
    middle: list[nn.Module] = [_video_res_block(mid.resnets[0], frames, forms)]
    # Not strict: diffusers also runs a resblock only behind an attention.
    for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=False):
        middle.append(over_frames(MapAttention(attention, spec.latent_size, forms), frames, forms))
        middle.append(_video_res_block(resnet, frames, forms))
    to_frame: dict[str, nn.Module] = {
        "conv_norm_out": group_norm(component.conv_norm_out, forms),
        "conv_act": SiLU(),
        "conv_out": copy_sharing(component.conv_out),
    }
    layers: dict[str, nn.Module] = {
        "conv_in": _scaled(component.conv_in, 1 / component.scaling_factor),
        "mid_block": nn.Sequential(*middle),
        "up_blocks": nn.Sequential(*(_up_block(block, frames, forms) for block in component.up_blocks)),
        "to_frame": over_frames(nn.Sequential(OrderedDict(to_frame)), frames, forms),
        "time_conv_out": TimeConv(component.time_conv_out),
    }
    return nn.Sequential(OrderedDict(layers))


def _up_block(block: UpBlockTemporalDecoder, frames: int, forms: GraphForms) -> nn.Sequential:
    resnets = nn.Sequential(*(_video_res_block(resnet, frames, forms) for resnet in block.resnets))
    layers: dict[str, nn.Module] = {"resnets": resnets}
    for upsampler in block.upsamplers or ():
        layers["upsample"] = over_frames(_upsample(upsampler.conv, forms), frames, forms)
    return nn.Sequential(OrderedDict(layers))


def _video_res_block(block: SpatioTemporalResBlock, frames: int, forms: GraphForms) -> nn.Sequential:
    # The blend is x_s + w r_t. diffusers' own module returns w for the blend of 0 and 1.
    zero = torch.zeros_like(block.time_mixer.mix_factor)
    weight = block.time_mixer(zero, zero + 1).reshape(())
    layers: dict[str, nn.Module] = {
        "spatial_res_block": over_frames(ResBlock(block.spatial_res_block, forms), frames, forms),
        "temporal_res_block": TemporalResBlock(block.temporal_res_block, forms, weight),
    }
    return nn.Sequential(OrderedDict(layers))


def _image_decoder(component: SvdImageDecoder, spec: ModelSpec, forms: GraphForms) -> nn.Sequential:
    """SVD's decoder without time layers; the same spatial layers as `_temporal_decoder`."""
    first, second = component.mid_block.resnets
    blocks = []
    for block in component.up_blocks:
        layers: dict[str, nn.Module] = {
            "resnets": nn.Sequential(*(ResBlock(resnet, forms) for resnet in block.resnets))
        }
        for upsampler in block.upsamplers or ():
            layers["upsample"] = _upsample(upsampler.conv, forms)
        blocks.append(nn.Sequential(OrderedDict(layers)))
    parts: dict[str, nn.Module] = {
        "conv_in": _scaled(component.conv_in, 1 / component.scaling_factor),
        "mid_block": nn.Sequential(
            ResBlock(first, forms),
            MapAttention(component.mid_block.attentions[0], spec.latent_size, forms),
            ResBlock(second, forms),
        ),
        "up_blocks": nn.Sequential(*blocks),
        "conv_norm_out": group_norm(component.conv_norm_out, forms),
        "conv_act": SiLU(),
        "conv_out": copy_sharing(component.conv_out),
    }
    return nn.Sequential(OrderedDict(parts))


def _tiny_decoder(component: TinyDecoder, forms: GraphForms) -> nn.Sequential:
    """TAESD's decoder, with 3 tanh(x / 3) before and 2 y - 1 after the layers folded into their weights."""
    first, *middle, last = component.layers
    inner: list[nn.Module] = []
    for layer in middle:
        if isinstance(layer, nn.Conv2d):  # each follows an nn.Upsample
            inner.append(_upsample(layer, forms))
        elif isinstance(layer, AutoencoderTinyBlock):
            inner.append(TinyBlock(layer))
        elif isinstance(layer, nn.ReLU):
            inner.append(nn.ReLU())
    layers: dict[str, nn.Module] = {
        "clamp": SoftClamp(first.weight.new_tensor(1 / (3 * component.scaling_factor))),
        "conv_in": _scaled(first, 3),
        "layers": nn.Sequential(*inner),
        "conv_out": conv2d(2 * last.weight, 2 * last.bias - 1, padding=last.padding),
    }
    return nn.Sequential(OrderedDict(layers))


def _pixel_shuffle_decoder(component: DemoDecoder) -> nn.Sequential:
    layers: dict[str, nn.Module] = {
        "conv_in": _scaled(component.conv_in, 1 / component.scaling_factor),
        "blocks": nn.Sequential(*(ResidualConvs(block) for block in component.blocks)),
        "act_up": SiLU(),
        "up": copy_sharing(component.up),
        "shuffle_up": nn.PixelShuffle(component.shuffle_up.upscale_factor),
        "refine": ResidualConvs(component.refine),
        "act_out": SiLU(),
        "conv_out": copy_sharing(component.conv_out),
        "shuffle_out": nn.PixelShuffle(component.shuffle_out.upscale_factor),
    }
    return nn.Sequential(OrderedDict(layers))


def _scaled(conv: Any, factor: float) -> nn.Conv2d:
    """Return a convolution with its input multiplied by `factor`."""
    return conv2d(factor * conv.weight, conv.bias, padding=conv.padding)


def _upsample(conv: nn.Conv2d, forms: GraphForms) -> nn.Module:
    """Return nearest-neighbour x2 followed by the 3x3 `conv`, in the recipe's form."""
    if forms.upsample == "nearest":
        return Upsample(conv)
    bias = None if conv.bias is None else conv.bias.repeat_interleave(4)
    return SubPixelUpsample(conv2d(phase_kernels(conv.weight), bias))
