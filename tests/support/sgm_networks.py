"""Stable Video Diffusion as its own training code (sgm) and open_clip build and run it, in small.

Written from the published structure of those modules, so that names come from the modules and outputs from a
forward of their own: a reference for the conversion to diffusers' names. For one clip (batch 1), in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width): cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    angles = t[:, None].double() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class ResBlock(nn.Module):
    def __init__(self, width: int, out: int, emb: int, *, time: bool = False) -> None:
        super().__init__()
        conv = nn.Conv3d if time else nn.Conv2d
        kernel, padding = ((3, 1, 1), (1, 0, 0)) if time else ((3, 3), (1, 1))
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), conv(width, out, kernel, padding=padding)
        )  # type: ignore[arg-type]
        if emb:
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out),
            nn.SiLU(),
            nn.Dropout(0.0),
            conv(out, out, kernel, padding=padding),  # type: ignore[arg-type]
        )
        self.skip_connection = nn.Identity() if width == out else conv(width, out, 1)

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = self.in_layers(x)
        if emb is not None:
            added = self.emb_layers(emb)  # (T, C)
            h = h + (added.T[None, :, :, None, None] if x.ndim == 5 else added[:, :, None, None])
        return self.skip_connection(x) + self.out_layers(h)


class AlphaBlender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.zeros(1))

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        alpha = self.mix_factor.sigmoid()
        return alpha * spatial + (1 - alpha) * temporal


def as_video(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]  # (T, C, h, w) -> (1, C, T, h, w)


def as_frames(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


class VideoResBlock(ResBlock):
    def __init__(self, width: int, out: int, emb: int) -> None:
        super().__init__(width, out, emb)
        self.time_stack = ResBlock(out, out, emb, time=True)
        self.time_mixer = AlphaBlender()

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        spatial = as_video(super().forward(x, emb))
        return as_frames(self.time_mixer(spatial, self.time_stack(spatial, emb)))


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Spatial, or with `time` the temporal one, which has a feed-forward layer before its attention."""

    def __init__(self, width: int, context: int, heads: int, *, time: bool = False) -> None:
        super().__init__()
        if time:
            self.norm_in, self.ff_in = nn.LayerNorm(width), FeedForward(width)
        self.time = time
        self.attn1 = CrossAttention(width, width, heads)
        self.attn2 = CrossAttention(width, context, heads)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        if self.time:
            x = x.transpose(0, 1)  # (T, pixels, C) -> (pixels, T, C)
            x = x + self.ff_in(self.norm_in(x))
            context = context[:1].expand(len(x), -1, -1)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return x.transpose(0, 1) if self.time else x


class SpatialVideoTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context, heads)])
        self.time_stack = nn.ModuleList([TransformerBlock(width, context, heads, time=True)])
        self.time_pos_embed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )
        self.time_mixer = AlphaBlender()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        frames, width, height, _ = x.shape
        hidden = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        position = self.time_pos_embed(timestep_embedding(torch.arange(frames), width))[:, None]
        spatial = self.transformer_blocks[0](hidden, context)
        mixed = self.time_mixer(spatial, self.time_stack[0](spatial + position, context))
        return x + self.proj_out(mixed).transpose(1, 2).unflatten(2, (height, -1))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class VideoUNet(nn.Module):
    """sgm's UNet of SVD. `attention` tells which levels attend; heads have 64 channels."""

    def __init__(self, widths: list[int], attention: list[bool], layers: int, context: int, ids: int) -> None:
        super().__init__()
        self.widths, emb = widths, 4 * widths[0]
        self.time_embed = nn.Sequential(nn.Linear(widths[0], emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Sequential(nn.Sequential(nn.Linear(3 * ids, emb), nn.SiLU(), nn.Linear(emb, emb)))
        self.ids = ids

        def attend(width: int) -> SpatialVideoTransformer:
            return SpatialVideoTransformer(width, context, width // 64)

        now, skips = widths[0], [widths[0]]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(8, now, 3, padding=1)])])
        for level, width in enumerate(widths):
            for _ in range(layers):
                block: list[nn.Module] = [VideoResBlock(now, width, emb)]
                now = width
                self.input_blocks.append(nn.ModuleList(block + [attend(width)] * attention[level]))
                skips.append(now)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(now)]))
                skips.append(now)
        middle = [VideoResBlock(now, now, emb), attend(now), VideoResBlock(now, now, emb)]
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for layer in range(layers + 1):
                block = [VideoResBlock(now + skips.pop(), widths[level], emb)]
                now = widths[level]
                block += [attend(now)] * attention[level]
                block += [Upsample(now)] * (level > 0 and layer == layers)
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, 4, 3, padding=1))

    def forward(self, x: Tensor, t: float, context: Tensor, ids: Tensor) -> Tensor:
        """x (T, 8, h, w), t = c_noise, context (1, 1, D), ids (3,) -> (T, 4, h, w)."""
        frames = len(x)
        emb = self.time_embed(timestep_embedding(torch.tensor([t]), self.widths[0]))
        emb = emb + self.label_emb(timestep_embedding(ids, self.ids).flatten()[None])
        emb, context = emb.expand(frames, -1), context.expand(frames, -1, -1)

        def run(block: nn.Module, x: Tensor) -> Tensor:
            for layer in block:  # type: ignore[attr-defined]
                if isinstance(layer, VideoResBlock):
                    x = layer(x, emb)
                else:
                    x = layer(x, context) if isinstance(layer, SpatialVideoTransformer) else layer(x)
            return x

        skips = []
        for block in self.input_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, skips.pop()], 1))
        return self.out(x)


# ---- VAE ----


class ResnetBlock(nn.Module):
    """Spatial resblock of the VAE; with `video` a temporal one follows, mixed in by mix_factor."""

    def __init__(self, width: int, out: int, *, video: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, width, eps=1e-6), nn.GroupNorm(32, out, eps=1e-6)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)
        if video:
            self.time_stack = ResBlock(out, out, 0, time=True)
            self.mix_factor = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        x = h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        if hasattr(self, "time_stack"):
            alpha = self.mix_factor.sigmoid()  # here the share of the temporal half
            x = as_frames(alpha * self.time_stack(as_video(x), None) + (1 - alpha) * as_video(x))
        return x


class AttnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        return x + self.proj_out((weights @ v).transpose(1, 2).unflatten(2, x.shape[2:]))


class Level(nn.Module):
    def __init__(self, blocks: list[ResnetBlock], sample: nn.Module | None, name: str) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.sample_name = name if sample is not None else ""
        if sample is not None:
            setattr(self, name, sample)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.sample_name)(x) if self.sample_name else x


class PaddedDownsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Middle(nn.Module):
    def __init__(self, width: int, *, video: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width, video=video)
        self.attn_1 = AttnBlock(width)
        self.block_2 = ResnetBlock(width, width, video=video)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class VaeEncoder(nn.Module):
    def __init__(self, widths: list[int], layers: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        now = widths[0]
        for level, width in enumerate(widths):
            blocks = [ResnetBlock(now if i == 0 else width, width) for i in range(layers)]
            sample = PaddedDownsample(width) if level < len(widths) - 1 else None
            self.down.append(Level(blocks, sample, "downsample"))
            now = width
        self.mid = Middle(now, video=False)
        self.norm_out = nn.GroupNorm(32, now, eps=1e-6)
        self.conv_out = nn.Conv2d(now, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class TimeMixedConv(nn.Conv2d):
    """The last layer of the video decoder: a convolution, then one along time."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3, 3, padding=1)
        self.time_mix_conv = nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return as_frames(self.time_mix_conv(as_video(super().forward(x))))


class VaeDecoder(nn.Module):
    def __init__(self, widths: list[int], layers: int, *, video: bool) -> None:
        super().__init__()
        now = widths[-1]
        self.conv_in = nn.Conv2d(4, now, 3, padding=1)
        self.mid = Middle(now, video=video)
        levels = []
        for level in reversed(range(len(widths))):
            width = widths[level]
            blocks = [ResnetBlock(now if i == 0 else width, width, video=video) for i in range(layers + 1)]
            levels.append(Level(blocks, Upsample(width) if level else None, "upsample"))
            now = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(32, now, eps=1e-6)
        self.conv_out = TimeMixedConv(now) if video else nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PictureVae(nn.Module):
    """The VAE inside the conditioner, which has quant_conv and a decoder that is never used."""

    def __init__(self, widths: list[int], layers: int) -> None:
        super().__init__()
        self.encoder = VaeEncoder(widths, layers)
        self.decoder = VaeDecoder(widths, layers, video=False)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)


class FrameVae(nn.Module):
    """first_stage_model, without quant_conv."""

    def __init__(self, widths: list[int], layers: int, *, video: bool) -> None:
        super().__init__()
        self.encoder = VaeEncoder(widths, layers)
        self.decoder = VaeDecoder(widths, layers, video=video)


# ---- open_clip's vision tower ----


class ClipBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ClipVisual(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, patch: int, size: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ClipBlock(width, heads) for _ in range(layers))
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels normalised as CLIP wants them, (N, 3, size, size) -> (N, out)."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:  # type: ignore[union-attr]
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


# ---- the file ----


class SgmSvd(nn.Module):
    """All networks of an SVD file, under its prefixes: `state_dict()` is what the file holds."""

    def __init__(self, *, video_decoder: bool = True) -> None:
        super().__init__()
        conditioner = nn.Module()
        conditioner.embedders = nn.ModuleList(nn.Module() for _ in range(5))
        clip = nn.Module()
        clip.model = nn.Module()
        clip.model.visual = ClipVisual(32, 2, 16, 8, 32, 24)
        clip.model.logit_scale = nn.Parameter(torch.zeros(()))
        conditioner.embedders[0].open_clip = clip
        conditioner.embedders[3].encoder = PictureVae([32, 32, 64, 64], 2)
        self.conditioner = conditioner
        self.first_stage_model = FrameVae([32, 32, 64, 64], 2, video=video_decoder)
        self.model = nn.Module()
        self.model.diffusion_model = VideoUNet([64, 128], [True, False], 2, 24, 16)
