"""NpuUNet: the rewritten `MobileVDUNet` as a static graph of one denoising step, with folded constants.

It is built from a network after the passes. Modules keep diffusers' names, so that a rule or a report can
name `down_blocks.0.attentions.1`.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from mobilevd_deploy.config.recipe import GraphForms, PassName
from mobilevd_deploy.errors import RewriteError
from mobilevd_deploy.model.unet import MobileVDUNet, TemporalDownsample, TemporalUpsample
from mobilevd_deploy.npu.ops import (
    Add,
    Concat,
    Constant,
    Multiply,
    ResBlock,
    SelfAttention,
    SiLU,
    SubPixelUpsample,
    TemporalResBlock,
    TokenNorm,
    Upsample,
    conv2d,
    copy_sharing,
    from_tokens,
    group_norm,
    over_frames,
    per_channel,
    pointwise,
    temporal_conv,
    to_tokens,
)
from mobilevd_deploy.passes.drop_temporal_blocks import FixedBlend, SpatialResBlock, TemporalResult
from mobilevd_deploy.passes.fold_single_step import FramePositions
from mobilevd_deploy.passes.single_token_cross_attention import SingleTokenCrossAttention


class FeedForward(nn.Module):
    """diffusers' GEGLU feed-forward. Value and gate are two layers, so that no tensor is split.

    Channels-first tokens of several frames are reshaped to the rows of one map, which moves no data. The
    compiler then keeps the hidden layer on chip. For a batch of maps of 16-bit integers it writes the hidden
    layer to DRAM.
    """

    def __init__(self, feed_forward: Any, forms: GraphForms) -> None:
        super().__init__()
        geglu, out = feed_forward.net[0], feed_forward.net[2]
        (value, gate), (value_bias, gate_bias) = geglu.proj.weight.chunk(2), geglu.proj.bias.chunk(2)
        self.value, self.gate = pointwise(value, value_bias, forms), pointwise(gate, gate_bias, forms)
        self.gelu, self.multiply = nn.GELU(), Multiply()
        self.out = pointwise(out.weight, out.bias, forms)
        self.channels_first = forms.linear == "conv"

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to tokens."""
        if not self.channels_first or tokens.shape[0] == 1:
            return self.feed(tokens)
        frames, channels, height, width = tokens.shape
        below = tokens.permute(0, 2, 3, 1).reshape(1, frames * height, width, channels)
        fed = self.feed(below.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return fed.reshape(frames, height, width, channels).permute(0, 3, 1, 2)

    def feed(self, tokens: Tensor) -> Tensor:
        """Map tokens in any layout to tokens."""
        return self.out(self.multiply(self.value(tokens), self.gelu(self.gate(tokens))))


class CrossAttention(nn.Module):
    """Cross-attention to a single token, which reduces to one vector per clip, added to every token."""

    def __init__(self, attention: SingleTokenCrossAttention, forms: GraphForms) -> None:
        super().__init__()
        self.proj = nn.Linear(attention.proj.in_features, attention.proj.out_features, device="meta")
        self.proj.weight, self.proj.bias = attention.proj.weight, attention.proj.bias
        self.forms = forms
        self.add = Add()

    def forward(self, tokens: Tensor, image_embeds: Tensor) -> Tensor:
        """Add the projected embedding (1, D) to tokens."""
        return self.add(tokens, per_channel(self.proj(image_embeds), self.forms))


class TransformerBlock(nn.Module):
    """diffusers' basic transformer block over space, or its temporal one (with norm_in, ff_in) over time."""

    def __init__(self, block: Any, tokens: int, forms: GraphForms) -> None:
        super().__init__()
        temporal = isinstance(block, TemporalBasicTransformerBlock)
        if temporal:
            self.norm_in, self.ff_in = TokenNorm(block.norm_in, forms), FeedForward(block.ff_in, forms)
            self.add_in = Add()
        self.temporal = temporal
        attn = block.attn1
        layers = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        self.norm1 = TokenNorm(block.norm1, forms)
        self.attn1 = SelfAttention(
            [(layer.weight, layer.bias) for layer in layers],
            attn.heads,
            attn.scale,
            "time" if temporal else "space",
            tokens,
            forms,
        )
        self.add1 = Add()
        self.attn2 = CrossAttention(block.attn2, forms)
        self.norm3, self.ff = TokenNorm(block.norm3, forms), FeedForward(block.ff, forms)
        self.add3 = Add()

    def forward(self, tokens: Tensor, image_embeds: Tensor) -> Tensor:
        """Map tokens to tokens."""
        if self.temporal:
            tokens = self.add_in(tokens, self.ff_in(self.norm_in(tokens)))
        tokens = self.add1(tokens, self.attn1(self.norm1(tokens)))
        tokens = self.attn2(tokens, image_embeds)
        return self.add3(tokens, self.ff(self.norm3(tokens)))


class SpatialStage(nn.Module):
    """Norm, projection and spatial blocks of a transformer: the modules that see only one frame."""

    def __init__(self, model: Any, tokens: int, forms: GraphForms) -> None:
        super().__init__()
        self.forms = forms
        self.norm = group_norm(model.norm, forms)
        self.proj_in = pointwise(model.proj_in.weight, model.proj_in.bias, forms)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(block, tokens, forms) for block in model.transformer_blocks
        )

    def forward(self, x: Tensor, image_embeds: Tensor) -> Tensor:
        """Map (T, C, H, W) to tokens."""
        tokens = self.proj_in(to_tokens(self.norm(x), self.forms))
        for block in self.transformer_blocks:
            tokens = block(tokens, image_embeds)
        return tokens


class TemporalStage(nn.Module):
    """One temporal block of a transformer with its frame positions and blend: alpha x_s + (1 - alpha) x_t.

    Channels-first tokens are permuted to (1, C, H W, T) once. Nothing in the block mixes pixels, so with the
    pixels as rows the compiler runs the whole block on a few rows at a time, on chip. The block starts from
    x_s + positions, and the blend uses that sum instead of x_s: alpha x_s = alpha (x_s + positions) - alpha
    positions. So x_s does not have to be kept in memory as well.
    """

    def __init__(
        self, block: nn.Module, positions: Tensor, weight: Tensor, tokens: int, forms: GraphForms
    ) -> None:
        super().__init__()
        self.channels_first = forms.linear == "conv"
        by_frame = positions.t()[None, :, None] if self.channels_first else per_channel(positions, forms)
        self.positions, self.blended_positions = Constant(by_frame), Constant((weight - 1) * by_frame)
        self.add_positions, self.remove_positions = Add(), Add()
        self.block = TransformerBlock(block, tokens, forms)
        self.temporal_weight, self.spatial_weight = Constant(weight), Constant(1 - weight)
        self.multiply_temporal, self.multiply_spatial, self.blend = Multiply(), Multiply(), Add()

    def forward(self, tokens: Tensor, image_embeds: Tensor) -> Tensor:
        """Map tokens to tokens, across frames."""
        if not self.channels_first:
            return self.mix(tokens, image_embeds)
        frames, channels, height, width = tokens.shape
        rows = tokens.permute(1, 2, 3, 0).reshape(1, channels, height * width, frames)
        mixed = self.mix(rows, image_embeds)
        return mixed.reshape(channels, height, width, frames).permute(3, 0, 1, 2)

    def mix(self, tokens: Tensor, image_embeds: Tensor) -> Tensor:
        """Map tokens in the block's layout to tokens of the same layout."""
        placed = self.add_positions(tokens, self.positions())
        mixed = self.blend(
            self.multiply_spatial(placed, self.spatial_weight()),
            self.multiply_temporal(self.block(placed, image_embeds), self.temporal_weight()),
        )
        return self.remove_positions(mixed, self.blended_positions())


class Transformer(nn.Module):
    """A spatial, or spatio-temporal, transformer on maps (T, C, H, W)."""

    def __init__(self, model: Any, frames: int, size: tuple[int, int], forms: GraphForms) -> None:
        super().__init__()
        self.size, self.forms = size, forms
        tokens = size[0] * size[1]
        self.spatial = over_frames(SpatialStage(model, tokens, forms), frames, forms)
        self.temporal: TemporalStage | None = None
        if isinstance(model, TransformerSpatioTemporalModel):
            (block,) = model.temporal_transformer_blocks
            positions = model.time_proj.table[:frames]
            self.temporal = TemporalStage(block, positions, model.time_mixer.weight, tokens, forms)
        self.proj_out = pointwise(model.proj_out.weight, model.proj_out.bias, forms)
        self.add = Add()

    def forward(self, x: Tensor, image_embeds: Tensor) -> Tensor:
        """Map (T, C, H, W) to itself."""
        tokens = self.spatial(x, image_embeds)
        if self.temporal is not None:
            tokens = self.temporal(tokens, image_embeds)
        return self.add(x, from_tokens(self.proj_out(tokens), *self.size, self.forms))


class VideoResBlock(nn.Module):
    """A spatial resblock, followed by a temporal one if it was kept."""

    def __init__(
        self, block: SpatialResBlock | SpatioTemporalResBlock, frames: int, forms: GraphForms
    ) -> None:
        super().__init__()
        self.spatial_res_block = over_frames(ResBlock(block.spatial_res_block, forms), frames, forms)
        kept = isinstance(block, SpatioTemporalResBlock)
        self.temporal_res_block = TemporalResBlock(block.temporal_res_block, forms) if kept else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to (T, C', H, W)."""
        x = self.spatial_res_block(x)
        return x if self.temporal_res_block is None else self.temporal_res_block(x)


class HalveFrames(nn.Module):
    """`TemporalDownsample`: the sum of each pair of frames, or a convolution.

    The factor 1/2 of the mean is folded into the layer before.
    """

    def __init__(self, module: TemporalDownsample) -> None:
        super().__init__()
        self.conv: Any = None if module.conv is None else temporal_conv(module.conv)
        self.add = Add() if self.conv is None else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to (T/2, C, H, W)."""
        frames, channels, height, width = x.shape
        if self.add is not None:
            pairs = x.reshape(frames // 2, 2 * channels, height, width)
            return self.add(pairs[:, :channels], pairs[:, channels:])
        video = self.conv(x.transpose(0, 1).reshape(1, channels, frames, height * width))
        return video.reshape(channels, frames // 2, height, width).transpose(0, 1)


class DoubleFrames(nn.Module):
    """`TemporalUpsample`: each frame twice, smoothed if the checkpoint has a convolution for it."""

    def __init__(self, module: TemporalUpsample) -> None:
        super().__init__()
        self.concat = Concat(1)
        self.conv = None if module.conv is None else temporal_conv(module.conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to (2T, C, H, W)."""
        frames, channels, height, width = x.shape
        # Not an Expand of an extra axis: the HTP simulator computes that wrongly.
        doubled = self.concat(x, x).reshape(2 * frames, channels, height, width)
        if self.conv is None:
            return doubled
        video = self.conv(doubled.transpose(0, 1).reshape(1, channels, 2 * frames, height * width))
        return video.reshape(channels, 2 * frames, height, width).transpose(0, 1)


class Level(nn.Module):
    """Resblocks and transformers of one level. In the up path a skip is concatenated before each resblock."""

    def __init__(
        self, block: Any, frames: int, size: tuple[int, int], forms: GraphForms, skips: bool = False
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(VideoResBlock(resnet, frames, forms) for resnet in block.resnets)
        self.attentions = nn.ModuleList(
            Transformer(attention, frames, size, forms) for attention in getattr(block, "attentions", ())
        )
        self.joins = nn.ModuleList(Concat(1) for _ in self.resnets) if skips else None

    def forward(self, x: Tensor, image_embeds: Tensor, skips: list[Tensor] | None = None) -> list[Tensor]:
        """Map (T, C, H, W) to the states after each resblock and its transformer; the last is the result."""
        states = []
        for i, resnet in enumerate(self.resnets):
            if self.joins is not None and skips is not None:
                x = self.joins[i](x, skips.pop())
            x = resnet(x)
            if self.attentions:
                x = self.attentions[i](x, image_embeds)
            states.append(x)
        return states


class MidBlock(nn.Module):
    """Resblocks of the lowest level with a transformer between each two."""

    def __init__(self, block: Any, frames: int, size: tuple[int, int], forms: GraphForms) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(VideoResBlock(resnet, frames, forms) for resnet in block.resnets)
        self.attentions = nn.ModuleList(
            Transformer(attention, frames, size, forms) for attention in block.attentions
        )

    def forward(self, x: Tensor, image_embeds: Tensor) -> Tensor:
        """Map (T, C, H, W) to itself."""
        x = self.resnets[0](x)
        for i, attention in enumerate(self.attentions, start=1):
            # Not a slice of the resnets: the exporter would name the nodes after the slice.
            x = self.resnets[i](attention(x, image_embeds))
        return x


class NpuUNet(nn.Module):
    """One denoising step: noise, image latents and image embedding -> latents, at a fixed size.

    Inputs, all float: noise (T, 4, h, w) unit normal; image_latents (1, 4, h, w); image_embeds (1, D).
    Output: latents (T, 4, h, w), as `MobileVDUNet.denoise` gives for a batch of one.
    """

    def __init__(self, unet: MobileVDUNet, frames: int, height: int, width: int, forms: GraphForms) -> None:
        """Build from a rewritten network for `frames` frames of `height` x `width` latents.

        Raises RewriteError naming the pass that has not run.
        """
        super().__init__()
        _require_rewritten(unet)
        spec = unet.unet_spec
        noise_channels = spec.out_channels
        weight, bias = unet.conv_in.weight, unet.conv_in.bias
        # The image is the same for all frames, so its half of conv_in runs once.
        self.conv_in_noise = conv2d(weight[:, :noise_channels], None, padding=(1, 1))
        self.conv_in_image = conv2d(weight[:, noise_channels:], bias, padding=(1, 1))
        self.add_in = Add()

        sizes = [(height >> level, width >> level) for level in range(len(spec.block_out_channels))]
        rates = [spec.frames_at(level, frames) for level in range(len(sizes))]
        self.down_blocks = nn.ModuleList(
            Level(block, rate, size, forms)
            for block, rate, size in zip(unet.down_blocks, rates, sizes, strict=True)
        )
        self.downsamplers = nn.ModuleList(copy_sharing(b.downsamplers[0].conv) for b in unet.down_blocks[:-1])
        self.mid_block = MidBlock(unet.mid_block, rates[-1], sizes[-1], forms)
        self.up_blocks = nn.ModuleList(
            Level(block, rate, size, forms, skips=True)
            for block, rate, size in zip(unet.up_blocks, reversed(rates), reversed(sizes), strict=True)
        )
        self.upsamplers = nn.ModuleList(
            Upsample(b.upsamplers[0].conv)
            if isinstance(b.upsamplers[0], Upsample2D)
            else SubPixelUpsample(b.upsamplers[0].conv)
            for b in unet.up_blocks[:-1]
        )
        self.temporal_downsample = (
            None if unet.temporal_downsample is None else HalveFrames(unet.temporal_downsample)
        )
        self.temporal_upsample = (
            None if unet.temporal_upsample is None else DoubleFrames(unet.temporal_upsample)
        )
        if self.temporal_downsample is not None and self.temporal_downsample.conv is None:
            conv = unet.down_blocks[0].downsamplers[0].conv
            self.downsamplers[0] = conv2d(0.5 * conv.weight, 0.5 * conv.bias, conv.stride, conv.padding)

        self.conv_norm_out = group_norm(unet.conv_norm_out, forms)
        self.conv_act = SiLU()
        self.conv_out = copy_sharing(unet.conv_out)
        self.skip = Constant(weight.new_tensor(unet.preconditioning.skip))
        self.multiply_out, self.add_out = Multiply(), Add()

    def forward(self, noise: Tensor, image_latents: Tensor, image_embeds: Tensor) -> Tensor:
        """Return the denoised latents (T, 4, h, w)."""
        x = self.add_in(self.conv_in_noise(noise), self.conv_in_image(image_latents))
        skips = [x]
        for level, block in enumerate(self.down_blocks):
            states = block(x, image_embeds)
            x = states[-1]
            skips += states
            if level < len(self.downsamplers):
                x = self.downsamplers[level](x)
                if level == 0 and self.temporal_downsample is not None:
                    x = self.temporal_downsample(x)
                skips.append(x)
        x = self.mid_block(x, image_embeds)
        for position, block in enumerate(self.up_blocks):
            x = block(x, image_embeds, skips)[-1]
            if position < len(self.upsamplers):
                x = self.upsamplers[position](x)
                if position == len(self.upsamplers) - 1 and self.temporal_upsample is not None:
                    x = self.temporal_upsample(x)
        predicted = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return self.add_out(predicted, self.multiply_out(noise, self.skip()))


def _require_rewritten(unet: MobileVDUNet) -> None:
    """Raise RewriteError if a pass that the deploy form requires has not run."""
    for path, module in unet.named_modules():
        missing: PassName | None = None
        if isinstance(module, (BasicTransformerBlock, TemporalBasicTransformerBlock)):
            if hasattr(module.attn1.to_q, "squeeze"):
                missing = "fold-channel-funnels"
            elif not isinstance(module.attn2, SingleTokenCrossAttention):
                missing = "single-token-cross-attention"
        elif isinstance(module, (SpatioTemporalResBlock, TransformerSpatioTemporalModel)):
            resblock = isinstance(module, SpatioTemporalResBlock)
            if not isinstance(module.time_mixer, TemporalResult if resblock else FixedBlend):
                missing = "drop-temporal-blocks"
            elif not resblock and not isinstance(module.time_proj, FramePositions):
                missing = "fold-single-step"
        if missing:
            raise RewriteError(
                f"{path}: the deploy form needs {missing}", next_step="name that pass in the recipe"
            )
    if unet.time_embedding is not None or unet.preconditioning.c_out != 1:
        missing = "fold-single-step" if unet.time_embedding is not None else "fold-preconditioning"
        raise RewriteError(f"the deploy form needs {missing}", next_step="name that pass in the recipe")
