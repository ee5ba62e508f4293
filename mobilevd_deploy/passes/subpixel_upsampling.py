"""Compute nearest-neighbour upsampling and the 3x3 convolution after it on the small map."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevd_deploy.errors import RewriteError
from mobilevd_deploy.model.funnels import conv_like
from mobilevd_deploy.model.unet import MobileVDUNet


class SubPixelUpsample(nn.Module):
    """Four 2x2 convolutions on the small map, one per output phase, interleaved to twice the size.

    One convolution over the map, padded by one pixel, computes all phases as output channels. The result of
    phase (a, b) starts at offset (a, b), because the phases need their padding on different sides.
    """

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv_like(conv, phase_kernels(conv.weight), conv.bias.repeat_interleave(4))

    def forward(self, hidden_states: Tensor, output_size: object = None) -> Tensor:
        """Map (N, C, H, W) to (N, C', 2H, 2W)."""
        height, width = hidden_states.shape[2:]
        phases = self.conv(hidden_states).unflatten(1, (-1, 4))
        placed = [phases[:, :, 2 * a + b, a : a + height, b : b + width] for a in (0, 1) for b in (0, 1)]
        return F.pixel_shuffle(torch.stack(placed, 2).flatten(1, 2), 2)


def phase_kernels(weight: Tensor) -> Tensor:
    """Turn a 3x3 kernel after nearest x2 upsampling into four 2x2 kernels: (O, C, 3, 3) -> (4 O, C, 2, 2).

    Channel 4 o + 2 a + b is phase (a, b) of output o. Along one axis, output 2i reads the small pixels
    (i-1, i, i) with the taps (k0, k1, k2), and output 2i+1 reads (i, i, i+1). So the merged taps are
    (k0, k1 + k2) and (k0 + k1, k2).
    """
    early = weight.new_tensor([[1, 0, 0], [0, 1, 1]])
    late = weight.new_tensor([[1, 1, 0], [0, 0, 1]])
    merge = torch.stack([early, late])
    kernels = torch.einsum("ayk,bxl,ockl->oabcyx", merge, merge, weight)
    return kernels.flatten(0, 2)


class SubPixelUpsampling:
    """Replace nearest x2 upsampling and its 3x3 convolution by the sub-pixel form.

        before  conv3x3(nearest(x))             9 multiplies per output pixel
        after   interleave(four conv2x2(x))     4 multiplies per output pixel

    Upsampling repeats pixels, so taps on the same small pixel can be summed in advance.
    Source: our own derivation; exact at the borders too.
    """

    name = "subpixel-upsampling"

    def requires(self, unet: MobileVDUNet) -> None:
        """Refuse an upsampler that is not nearest x2 with a padded 3x3 convolution and bias."""
        for path, module in _upsamplers(unet).items():
            conv = module.conv
            if (
                module.norm is not None
                or not isinstance(conv, nn.Conv2d)
                or conv.kernel_size != (3, 3)
                or conv.padding != (1, 1)
                or conv.bias is None
            ):
                raise RewriteError(
                    f"{path}: not a nearest x2 upsampler with a 3x3 convolution, padding 1 and bias",
                    next_step='choose upsample = "nearest" in the recipe',
                )

    def apply(self, unet: MobileVDUNet) -> tuple[str, ...]:
        """Replace every upsampler."""
        upsamplers = _upsamplers(unet)
        for path, module in upsamplers.items():
            unet.set_submodule(path, SubPixelUpsample(module.conv))
        return tuple(upsamplers)


def _upsamplers(unet: MobileVDUNet) -> dict[str, Upsample2D]:
    return {path: module for path, module in unet.named_modules() if isinstance(module, Upsample2D)}
