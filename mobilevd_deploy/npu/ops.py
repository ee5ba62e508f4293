"""Building blocks of the deploy form: arithmetic as modules, and the forms that a recipe can select.

Every sum, product, matrix product and concatenation is a module of its own, with one instance per call,
so that a quantiser can give each its own ranges or replace its class. The only other ops are reshapes,
permutations and slices, which do not change values.

Tokens have the layout of the recipe's linear layers:
    linear = "matmul"   (T, N, C)       nn.Linear
    linear = "conv"     (T, C, H, W)    1x1 nn.Conv2d
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mobilevd_deploy.config.recipe import GraphForms


class Add(nn.Module):
    """a + b, broadcasting."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum."""
        return a + b


class Multiply(nn.Module):
    """a * b, broadcasting."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product."""
        return a * b


class MatMul(nn.Module):
    """a @ b over the last two dimensions."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the matrix product."""
        return a @ b


class Concat(nn.Module):
    """Concatenation along one dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the tensors joined."""
        return torch.cat(tensors, self.dim)


class Constant(nn.Module):
    """A constant operand of a sum or product."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach())

    def forward(self) -> Tensor:
        """Return the tensor."""
        return self.value


class SiLU(nn.Module):
    """x sigmoid(x) as two modules: nn.SiLU exports without a range between sigmoid and product.

    The sigmoid runs on the map reshaped to one row, so that the compiler does not recognise the product of a
    tensor with its own sigmoid. Behind a group norm it compiles that product to code that reads uninitialised
    memory at many sizes (0 dB at 14x64x8x16, with other values at the next run). With the reshape the result
    is correct (77 dB).
    """

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()
        self.multiply = Multiply()

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to itself."""
        row = x.reshape(*x.shape[:2], 1, -1) if x.ndim == 4 else x
        return self.multiply(x, self.sigmoid(row).reshape(x.shape))


class InstanceGroupNorm(nn.Module):
    """Group normalisation as instance normalisation over merged rows, then a scale and a shift per channel.

    (B, C, H, W) is reshaped to (B, G, C/G H, W). Exact. The HTP runs this form in integers, and
    GroupNormalization in float32.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        placement: dict[str, Any] = {"dtype": norm.weight.dtype, "device": norm.weight.device}
        self.norm = nn.InstanceNorm2d(norm.num_groups, norm.eps, affine=True, **placement)
        self.multiply, self.add = Multiply(), Add()
        self.scale = Constant(norm.weight[:, None, None])
        self.shift = Constant(norm.bias[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to itself."""
        batch, _, _, width = x.shape
        grouped = self.norm(x.reshape(batch, self.norm.num_features, -1, width))
        return self.add(self.multiply(grouped.reshape(x.shape), self.scale()), self.shift())


class TwoStepGroupNorm(nn.Module):
    """Group normalisation whose statistics stay accurate in float32, however large a group is.

    A group of up to `LIMIT` elements is one GroupNormalization. A larger one is read as a matrix, nearly
    square, and a mean over it is a mean of each row, then a mean of those. onnxruntime's CPU kernels add up a
    whole group with few accumulators: SQNR against float64 falls from 122 dB at 131,072 elements to 72 dB at
    7.3 M and 65 dB at 13 M. In two steps it is 137 dB or more (`benchmarks/norm_rounding.py`).
    """

    LIMIT = 131_072

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to itself."""
        size = math.prod(x.shape[1:]) // self.num_groups
        if size <= self.LIMIT:
            return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        grouped = x.reshape(x.shape[0], self.num_groups, -1, columns(size))
        centred = grouped - _mean(grouped)
        normalised = centred * torch.rsqrt(_mean(centred * centred) + self.eps)
        return normalised.reshape(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]


def _mean(x: Tensor) -> Tensor:
    """Return the mean (B, G, 1, 1) of (B, G, rows, columns), in two steps.

    The rows' means change shape in between: onnxsim makes one ReduceMean of two that follow each other.
    """
    batch, groups, rows, _ = x.shape
    return x.mean(3, keepdim=True).reshape(batch, groups, 1, rows).mean(3, keepdim=True)


def columns(size: int) -> int:
    """Return the divisor of `size` that is nearest to its root from below; 1 for a prime."""
    return next(k for k in range(math.isqrt(size), 0, -1) if size % k == 0)


def group_norm(norm: nn.GroupNorm, forms: GraphForms) -> nn.Module:
    """Return group normalisation of (B, C, H, W) in the recipe's form."""
    return InstanceGroupNorm(norm) if forms.group_norm == "instance" else TwoStepGroupNorm(norm)


def copy_sharing(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its parameters and buffers, so that it takes no new memory."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def conv2d(
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
) -> nn.Conv2d:
    """Return a convolution with this weight (O, C, kh, kw) and bias (O,)."""
    geometry: dict[str, Any] = {"kernel_size": tuple(weight.shape[2:]), "stride": stride, "padding": padding}
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", **geometry)
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return conv


def temporal_conv(conv: Any) -> nn.Conv2d:
    """Return a (3, 1, 1) convolution over (C, T, H, W) as a (3, 1) convolution over (1, C, T, H W)."""
    return conv2d(conv.weight.squeeze(-1), conv.bias, conv.stride[:2], conv.padding[:2])


def pointwise(weight: Tensor, bias: Tensor | None, forms: GraphForms) -> nn.Module:
    """Return a linear map of tokens, weight (O, C), in the layout of the recipe's linear layers."""
    if forms.linear == "conv":
        return conv2d(weight[:, :, None, None], bias)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def per_channel(values: Tensor, forms: GraphForms) -> Tensor:
    """Reshape (T, C) values so that they broadcast over tokens."""
    return values[:, :, None, None] if forms.linear == "conv" else values[:, None, :]


def to_tokens(x: Tensor, forms: GraphForms) -> Tensor:
    """Convert a map (T, C, H, W) to tokens."""
    return x if forms.linear == "conv" else x.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int, forms: GraphForms) -> Tensor:
    """Convert tokens to a map (T, C, H, W)."""
    if forms.linear == "conv":
        return tokens
    frames, _, channels = tokens.shape
    return tokens.transpose(1, 2).reshape(frames, channels, height, width)


class TokenNorm(nn.Module):
    """Layer normalisation over the channels of tokens in the recipe's layout."""

    def __init__(self, norm: nn.LayerNorm, forms: GraphForms) -> None:
        super().__init__()
        self.norm = copy_sharing(norm)
        self.channels_first = forms.linear == "conv"

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to tokens."""
        if not self.channels_first:
            return self.norm(tokens)
        return self.norm(tokens.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention over space (per frame) or over time (per pixel).

    Channels-first tokens are (T, C, H, W) over space, and (1, C, H W, T) over time. The softmax scale is
    folded into the query. Over space, the recipe's form decides how much of the similarity map is computed
    at once: the whole map, a tile of queries, or a tile of one head.
    """

    def __init__(
        self,
        projections: Sequence[tuple[Tensor, Tensor | None]],
        heads: int,
        scale: float,
        over: Literal["space", "time"],
        tokens: int,
        forms: GraphForms,
    ) -> None:
        """Build from (weight, bias) of query, key, value and output; `tokens` is N = H W."""
        super().__init__()
        (q, q_bias), (k, k_bias), (v, v_bias), (out, out_bias) = projections
        self.heads, self.over, self.channels_first = heads, over, forms.linear == "conv"
        self.to_q = pointwise(scale * q, None if q_bias is None else scale * q_bias, forms)
        self.to_k = pointwise(k, k_bias, forms)
        self.to_v = pointwise(v, v_bias, forms)
        self.to_out = pointwise(out, out_bias, forms)
        whole = over == "time" or forms.attention == "whole" or tokens <= forms.whole_up_to
        tile = tokens if whole else min(forms.query_tile, tokens)
        self.tiles = [(start, min(start + tile, tokens)) for start in range(0, tokens, tile)]
        apart = not whole and forms.attention == "heads"
        self.groups = [(h, h + 1) for h in range(heads)] if apart else [(0, heads)]
        parts = len(self.groups) * len(self.tiles)
        self.similarity = nn.ModuleList(MatMul() for _ in range(parts))
        self.softmax = nn.ModuleList(nn.Softmax(dim=-1) for _ in range(parts))
        self.mix = nn.ModuleList(MatMul() for _ in range(parts))
        # Every module must be called: a quantiser that never runs gets no range.
        self.join_tiles = nn.ModuleList(Concat(2) for _ in self.groups if len(self.tiles) > 1)
        self.join_groups = Concat(1) if len(self.groups) > 1 else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to tokens."""
        return self.attend(tokens, tokens)

    def attend(self, tokens: Tensor, source: Tensor) -> Tensor:
        """Map tokens to tokens, with keys and values from the tokens `source`."""
        query = self._split(self.to_q(tokens))
        key = self._split(self.to_k(source), transposed=True)
        value = self._split(self.to_v(source))
        groups = []
        for g, (first, last) in enumerate(self.groups):
            one = (
                (query, key, value)
                if len(self.groups) == 1
                else tuple(x[:, first:last] for x in (query, key, value))
            )
            tiles = []
            for t, (start, stop) in enumerate(self.tiles):
                part = g * len(self.tiles) + t
                rows = one[0] if len(self.tiles) == 1 else one[0][:, :, start:stop]
                similarity = self.softmax[part](self.similarity[part](rows, one[1]))
                tiles.append(self.mix[part](similarity, one[2]))
            groups.append(tiles[0] if len(tiles) == 1 else self.join_tiles[g](*tiles))
        mixed = groups[0] if self.join_groups is None else self.join_groups(*groups)
        return self.to_out(self._merge(mixed, tokens))

    def _split(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Convert tokens to (batch, heads, length, d), or (batch, heads, d, length) if transposed."""
        b, h, n, d = 0, 2, 1, 3
        if not self.channels_first:  # (T, N, heads, d)
            x = x.reshape(x.shape[0], x.shape[1], self.heads, -1)
            if self.over == "time":
                b, n = 1, 0
        elif self.over == "time":  # (1, C, N, T) to (N, T, heads, d), the NPU's own layout
            x = x.permute(0, 2, 3, 1).reshape(x.shape[2], x.shape[3], self.heads, -1)
        else:  # (T, heads, d, N)
            x = x.reshape(x.shape[0], self.heads, -1, x.shape[2] * x.shape[3])
            h, n, d = 1, 3, 2
        return x.permute(b, h, d, n) if transposed else x.permute(b, h, n, d)

    def _merge(self, x: Tensor, like: Tensor) -> Tensor:
        """Convert (batch, heads, length, d) to the layout of `like`."""
        channels = x.shape[1] * x.shape[3]
        if not self.channels_first:
            x = x.permute(2, 0, 1, 3) if self.over == "time" else x.permute(0, 2, 1, 3)
            return x.reshape(like.shape[0], like.shape[1], channels)
        if self.over == "time":
            rows = x.permute(0, 2, 1, 3).reshape(1, like.shape[2], like.shape[3], channels)
            return rows.permute(0, 3, 1, 2)
        return x.permute(0, 1, 3, 2).reshape(like.shape[0], channels, like.shape[2], like.shape[3])


class MapAttention(nn.Module):
    """Group norm and self-attention over the pixels of each frame, added to the input.

    Built from diffusers' Attention with a group norm, as in the middle of its autoencoders.
    """

    def __init__(self, attention: Any, size: tuple[int, int], forms: GraphForms) -> None:
        """Build for maps of `size` (H, W)."""
        super().__init__()
        self.size, self.forms = size, forms
        layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
        projections = [(layer.weight, layer.bias) for layer in layers]
        self.group_norm = group_norm(attention.group_norm, forms)
        self.attention = SelfAttention(
            projections, attention.heads, attention.scale, "space", size[0] * size[1], forms
        )
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to itself."""
        tokens = self.attention(to_tokens(self.group_norm(x), self.forms))
        return self.add(x, from_tokens(tokens, *self.size, self.forms))


class ResidualConvs(nn.Module):
    """SiLU and convolution, twice, plus the input: `model.autoencoder.ResidualConvs`."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.act1, self.act2, self.add = SiLU(), SiLU(), Add()
        self.conv1, self.conv2 = copy_sharing(block.conv1), copy_sharing(block.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to itself."""
        return self.add(x, self.conv2(self.act2(self.conv1(self.act1(x)))))


class ResBlock(nn.Module):
    """norm, SiLU, convolution, twice, plus the (projected) input: diffusers' ResnetBlock2D without embedding.

    Built from any block with norm1, conv1, norm2, conv2 and perhaps conv_shortcut.
    """

    def __init__(self, block: Any, forms: GraphForms) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(block.norm1, forms), group_norm(block.norm2, forms)
        self.act1, self.act2 = SiLU(), SiLU()
        self.conv1, self.conv2 = copy_sharing(block.conv1), copy_sharing(block.conv2)
        shortcut = block.conv_shortcut
        self.conv_shortcut = None if shortcut is None else copy_sharing(shortcut)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to (T, C', H, W)."""
        hidden = self.conv1(self.act1(self.norm1(x)))
        hidden = self.conv2(self.act2(self.norm2(hidden)))
        return self.add(x if self.conv_shortcut is None else self.conv_shortcut(x), hidden)


class TemporalResBlock(nn.Module):
    """diffusers' TemporalResnetBlock without embedding; `weight` scales its residual.

    Frames are rows of (1, C, T, H W) or columns of (1, C, H W, T), as the recipe sets it. If the groups of
    the norms have one channel, frames are always rows: on up to 8 columns the compiler computes the SiLU
    wrongly (rule "silu" of qnn.lint).
    """

    def __init__(self, block: Any, forms: GraphForms, weight: Tensor | None = None) -> None:
        super().__init__()
        grouped = block.norm1.num_channels > block.norm1.num_groups
        self.columns = forms.temporal_conv == "columns" and grouped
        self.norm1, self.norm2 = group_norm(block.norm1, forms), group_norm(block.norm2, forms)
        self.act1, self.act2 = SiLU(), SiLU()
        self.conv1, self.conv2 = temporal_conv(block.conv1), temporal_conv(block.conv2)
        if weight is not None:
            assert self.conv2.bias is not None
            self.conv2 = conv2d(weight * self.conv2.weight, weight * self.conv2.bias, padding=(1, 0))
        if self.columns:
            self.conv1, self.conv2 = (
                conv2d(conv.weight.transpose(2, 3), conv.bias, padding=(0, 1))
                for conv in (self.conv1, self.conv2)
            )
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to itself."""
        frames, channels, height, width = x.shape
        if self.columns:
            video = x.permute(1, 2, 3, 0).reshape(1, channels, height * width, frames)
        else:
            video = x.transpose(0, 1).reshape(1, channels, frames, height * width)
        hidden = self.conv1(self.act1(self.norm1(video)))
        hidden = self.conv2(self.act2(self.norm2(hidden)))
        if self.columns:
            return self.add(x, hidden.reshape(channels, height, width, frames).permute(3, 0, 1, 2))
        return self.add(x, hidden.reshape(channels, frames, height, width).transpose(0, 1))


class Upsample(nn.Module):
    """Nearest-neighbour x2 and a 3x3 convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv = copy_sharing(conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to (T, C', 2H, 2W)."""
        return self.conv(self.upsample(x))


class SubPixelUpsample(nn.Module):
    """The sub-pixel form of `Upsample`: one 2x2 convolution on the padded small map, phases interleaved.

    In `conv`, the four phases of an output channel are adjacent (see passes.subpixel_upsampling).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        # Phase-major output channels, so that each phase is one contiguous slice.
        weight = conv.weight.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)
        bias = None if conv.bias is None else conv.bias.unflatten(0, (-1, 4)).transpose(0, 1).flatten()
        self.conv = conv2d(weight, bias, padding=(1, 1))
        self.concat = Concat(1)
        self.interleave = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, C, H, W) to (T, C', 2H, 2W)."""
        frames, _, height, width = x.shape
        y = self.conv(x)
        channels = y.shape[1] // 4
        phases = self.concat(
            *(
                y[:, (2 * a + b) * channels : (2 * a + b + 1) * channels, a : a + height, b : b + width]
                for a in (0, 1)
                for b in (0, 1)
            )
        )
        # PixelShuffle needs the phases of a channel in adjacent channels.
        phases = phases.reshape(frames, 4, channels, height * width).transpose(1, 2)
        return self.interleave(phases.reshape(frames, 4 * channels, height, width))


class PerFrame(nn.Module):
    """A module applied to one frame at a time: one instance per frame, with shared weights.

    Arguments after the first are the same for all frames.
    """

    def __init__(self, unit: nn.Module, frames: int) -> None:
        super().__init__()
        self.frames = nn.ModuleList(copy_sharing(unit) for _ in range(frames))
        self.concat = Concat(0)

    def forward(self, x: Tensor, *shared: Tensor) -> Tensor:
        """Map (T, ...) to (T, ...)."""
        return self.concat(*(unit(x[t : t + 1], *shared) for t, unit in enumerate(self.frames)))


def over_frames(unit: nn.Module, frames: int, forms: GraphForms) -> nn.Module:
    """Return a spatial module in the recipe's form: all frames as a batch, or one frame at a time."""
    return PerFrame(unit, frames) if forms.frames == "sequential" and frames > 1 else unit
