"""Channel funnels: a narrow bridge between two affine layers, merged into them at deployment.

A funnel multiplies two affine layers apart: producer -> squeeze (d to r d) -> consumer with
widen (r d to d). On attention the pairs are (to_q, to_k), where both sides squeeze because the
product is q^T k, and (to_v, to_out), where one squeezes and the other widens; both per head.
Source: MobileVD, channel funnels and coupled singular initialisation (CSI).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F


def funnel_width(width: int, r: float) -> int:
    """Inner width of a funnel on `width` channels: r * width to the nearest integer, at least 1."""
    return max(1, round(r * width))


class SqueezedLinear(nn.Linear):
    """A linear layer whose output each head squeezes: (..., heads * d) -> (..., heads * inner).

    `weight` and `bias` are those of `base`, shared; `squeeze` is (heads, inner, d).
    """

    def __init__(self, base: nn.Linear, heads: int, inner: int) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")  # holds nothing of its own
        self.weight, self.bias = base.weight, base.bias
        self.squeeze = nn.Parameter(base.weight.new_zeros(heads, inner, base.out_features // heads))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, then the squeeze: the training form, two maps in a row."""
        heads = super().forward(input).unflatten(-1, (self.squeeze.shape[0], -1))
        return torch.einsum("...hd,hrd->...hr", heads, self.squeeze).flatten(-2)

    def fold(self) -> nn.Linear:
        """Return the one linear layer that equals both maps."""
        heads = self.squeeze.shape[0]
        weight = torch.einsum("hrd,hdc->hrc", self.squeeze, self.weight.unflatten(0, (heads, -1))).flatten(
            0, 1
        )
        bias = None
        if self.bias is not None:
            bias = torch.einsum("hrd,hd->hr", self.squeeze, self.bias.unflatten(0, (heads, -1))).flatten()
        return linear_from(weight, bias)


class WidenedLinear(nn.Linear):
    """A linear layer whose input each head widens first: (..., heads * inner) -> (..., out).

    `weight` and `bias` are those of `base`, shared; `widen` is (heads, d, inner).
    """

    def __init__(self, base: nn.Linear, heads: int, inner: int) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")  # holds nothing of its own
        self.weight, self.bias = base.weight, base.bias
        self.widen = nn.Parameter(base.weight.new_zeros(heads, base.in_features // heads, inner))

    def forward(self, input: Tensor) -> Tensor:
        """Widen, then apply the layer."""
        heads = input.unflatten(-1, (self.widen.shape[0], -1))
        return super().forward(torch.einsum("...hr,hdr->...hd", heads, self.widen).flatten(-2))

    def fold(self) -> nn.Linear:
        """Return the one linear layer that equals both maps."""
        heads = self.widen.shape[0]
        weight = torch.einsum("ohd,hdr->ohr", self.weight.unflatten(1, (heads, -1)), self.widen).flatten(1)
        return linear_from(weight, self.bias)


class SqueezedConv(nn.Module):
    """A convolution followed by a 1x1 squeeze of its output channels: C to inner.

    `conv` is the plain layer (2-D or 3-D), `squeeze` is (inner, C), `squeeze_bias` (inner,).
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, inner: int) -> None:
        super().__init__()
        self.conv = conv
        self.squeeze = nn.Parameter(conv.weight.new_zeros(inner, conv.out_channels))
        self.squeeze_bias = nn.Parameter(conv.weight.new_zeros(inner))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, then mix channels."""
        return _mix_channels(self.conv(input), self.squeeze) + self.squeeze_bias.view(
            -1, *[1] * (input.ndim - 2)
        )

    def fold(self) -> nn.Conv2d | nn.Conv3d:
        """Return the one convolution that equals both maps; exact, biases included."""
        weight = torch.einsum("ro,o...->r...", self.squeeze, self.conv.weight)
        bias = (
            self.squeeze_bias if self.conv.bias is None else self.squeeze @ self.conv.bias + self.squeeze_bias
        )
        return conv_like(self.conv, weight, bias)


class WidenedConv(nn.Module):
    """A 1x1 widening (inner to C) followed by a convolution.

    `widen` is (C, inner). `widen_bias` (C,) may be absent: with zero padding, a bias before the
    convolution reaches inner pixels but not the border, so it can not be folded.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, inner: int, *, bias: bool = False) -> None:
        super().__init__()
        self.conv = conv
        self.widen = nn.Parameter(conv.weight.new_zeros(conv.in_channels, inner))
        self.widen_bias = nn.Parameter(conv.weight.new_zeros(conv.in_channels)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """Mix channels, then convolve."""
        wide = _mix_channels(input, self.widen)
        if self.widen_bias is not None:
            wide = wide + self.widen_bias.view(-1, *[1] * (input.ndim - 2))
        return self.conv(wide)

    @property
    def foldable(self) -> bool:
        """Whether folding is exact: no widen bias, or no padding for it to miss."""
        return self.widen_bias is None or not any(self.conv.padding) or not bool(self.widen_bias.any())

    def fold(self) -> nn.Conv2d | nn.Conv3d:
        """Return the one convolution that equals both maps; requires `foldable`."""
        weight = torch.einsum("oc...,cr->or...", self.conv.weight, self.widen)
        bias = self.conv.bias
        if self.widen_bias is not None:
            taps = self.conv.weight.flatten(2).sum(-1)
            bias = taps @ self.widen_bias + (0 if bias is None else bias)
        return conv_like(self.conv, weight, bias)


class ScaledAttention:
    """Attention processor (diffusers' extension point) that keeps the softmax scale of the original width.

    diffusers' default divides by the square root of the key's own width, which a funnel has shrunk.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Map (B, L, C) to (B, L, C); the context defaults to the hidden states."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=attn.scale)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def add_attention_funnels(attention: Attention, r: float) -> None:
    """Put funnels of factor r on both pairs of a self-attention; uninitialised until csi or he runs."""
    heads = attention.heads
    inner = funnel_width(attention.to_q.out_features // heads, r)
    for name in ("to_q", "to_k", "to_v"):
        setattr(attention, name, SqueezedLinear(getattr(attention, name), heads, inner))
    attention.to_out[0] = WidenedLinear(attention.to_out[0], heads, inner)


def add_resblock_funnel(block: ResnetBlock2D | TemporalResnetBlock, r: float) -> None:
    """Put a funnel between the two convolutions of a resblock: norm2 and SiLU then run at r C channels.

    The embedding joins after conv1, so its projection is squeezed as well.
    """
    conv1, conv2, norm2 = block.conv1, block.conv2, block.norm2
    inner = funnel_width(conv1.out_channels, r)
    block.conv1 = SqueezedConv(conv1, inner)
    block.conv2 = WidenedConv(conv2, inner)
    block.norm2 = nn.GroupNorm(math.gcd(norm2.num_groups, inner), inner, norm2.eps, **_placement(conv1))
    block.time_emb_proj = SqueezedLinear(block.time_emb_proj, 1, inner)


@torch.no_grad()
def initialise_csi(module: nn.Module) -> None:
    """Coupled singular initialisation of every funnel below `module`, in place.

    Per head, the product that the pair computes (W_q^T W_k, or W_out W_v) is replaced by its best
    rank-inner approximation, with the square root of the singular values on each side. Thin QR of
    the d x C factors leaves only d x d matrices to decompose. A resblock's pair is parted by norm2
    and SiLU and has no such product: there the squeeze keeps conv1's strongest output directions
    and the widen returns them. Source: MobileVD, coupled singular initialisation.
    """
    for attention in _funnelled_attentions(module):
        q, k, v, out = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
        heads = q.squeeze.shape[0]
        for head in range(heads):
            w_q, w_k, w_v = (layer.weight.unflatten(0, (heads, -1))[head] for layer in (q, k, v))
            w_out = out.weight.unflatten(1, (heads, -1))[:, head]
            q.squeeze[head], k.squeeze[head] = coupled_factors(w_q, w_k, q.squeeze.shape[1])
            widen_t, v.squeeze[head] = coupled_factors(w_out.T, w_v, v.squeeze.shape[1])
            out.widen[head] = widen_t.T
    for block in _funnelled_resblocks(module):
        kernel = block.conv1.conv.weight.flatten(1)
        # Ascending, and complete where the kernel has fewer columns than rows.
        directions = torch.linalg.eigh(kernel @ kernel.T).eigenvectors.flip(1)
        _set_resblock_funnel(block, directions[:, : block.conv1.squeeze.shape[0]].T)


def coupled_factors(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find P, Q of shape (rank, d) so that (P a)^T (Q b) is the best rank-`rank` fit of a^T b.

    `a` is (d, m), `b` is (d, n). With thin QR a^T = Q_a R_a and the SVD R_a R_b^T = U S V^T the
    truncated product is Q_a U S V^T Q_b^T, and P = S^(-1/2) V^T R_b yields P a = S^(1/2) U^T Q_a^T
    without inverting R_a; likewise Q. Directions of singular value 0 get zero rows.
    """
    r_a = torch.linalg.qr(a.T.double()).R
    r_b = torch.linalg.qr(b.T.double()).R
    # A factor with fewer columns than rows has a short R; the product below is d x d all the same.
    u, s, vh = torch.linalg.svd(r_a @ r_b.T if r_a.shape[0] == r_b.shape[0] else _pad(r_a) @ _pad(r_b).T)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    # Below the rounding of the factors a singular value is noise, which its inverse root would blow up.
    noise = min(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps) * r_a.norm() * r_b.norm()
    scale = torch.where(s > noise, s.rsqrt(), torch.zeros_like(s))
    p = scale[:, None] * (vh[:, : r_b.shape[0]] @ r_b)
    q = scale[:, None] * (u.T[:, : r_a.shape[0]] @ r_a)
    return _fill(p, rank).to(a.dtype), _fill(q, rank).to(b.dtype)


@torch.no_grad()
def initialise_he(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """He initialisation of every funnel below `module`, in place: the paper's weaker alternative."""

    def normal_(tensor: Tensor) -> None:
        tensor.normal_(0.0, math.sqrt(2.0 / tensor.shape[-1]), generator=generator)

    for attention in _funnelled_attentions(module):
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            normal_(layer.squeeze)
        normal_(attention.to_out[0].widen)
    for block in _funnelled_resblocks(module):
        squeeze = torch.empty_like(block.conv1.squeeze)
        normal_(squeeze)
        _set_resblock_funnel(block, squeeze)
        normal_(block.conv2.widen)


def linear_from(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer that holds these tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


def conv_like(conv: nn.Conv2d | nn.Conv3d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d | nn.Conv3d:
    """Return a convolution with `conv`'s stride and padding that holds these tensors."""
    geometry: dict[str, Any] = {
        "kernel_size": tuple(weight.shape[2:]),
        "stride": conv.stride,
        "padding": conv.padding,
    }
    copy = type(conv)(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", **geometry)
    copy.weight = nn.Parameter(weight.detach())
    if bias is not None:
        copy.bias = nn.Parameter(bias.detach())
    return copy


def _set_resblock_funnel(block: Any, squeeze: Tensor) -> None:
    block.conv1.squeeze.copy_(squeeze)
    block.time_emb_proj.squeeze[0].copy_(squeeze)
    block.conv2.widen.copy_(squeeze.T)
    block.conv1.squeeze_bias.zero_()


def _funnelled_attentions(module: nn.Module) -> Iterator[Attention]:
    return (m for m in module.modules() if isinstance(m, Attention) and isinstance(m.to_q, SqueezedLinear))


def _funnelled_resblocks(module: nn.Module) -> Iterator[Any]:
    return (m for m in module.modules() if isinstance(getattr(m, "conv1", None), SqueezedConv))


def _mix_channels(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("rc,bc...->br...", matrix, x)


def _placement(layer: nn.Module) -> dict[str, Any]:
    weight = next(layer.parameters())
    return {"device": weight.device, "dtype": weight.dtype}


def _pad(r: Tensor) -> Tensor:
    return F.pad(r, (0, 0, 0, r.shape[1] - r.shape[0]))


def _fill(rows: Tensor, rank: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, rank - rows.shape[0]))
