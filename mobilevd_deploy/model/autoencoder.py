"""The demo's autoencoder: images to 4-channel latents at an eighth of the size, and back.

Pixels are folded into channels before the first convolution and unfolded after the last one, so that
nothing convolves at full size: most layers run at 1/8, a few at 1/4. Only convolutions, SiLU, sums and
pixel (un)shuffles: what every exporter and NPU compiler takes.

    encoder  image -> unshuffle 4 -> conv -> conv /2 -> residual blocks -> conv -> latents
    decoder  latents -> conv -> residual blocks -> conv, shuffle 2 -> block -> conv, shuffle 4 -> frames

Both read two widths from `block_out_channels`: the first at 1/4, the last at 1/8 of the image's size.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from mobilevd_deploy.config.spec import DecoderSpec, VaeEncoderSpec

LATENT_CHANNELS = 4
_FOLD = 4  # pixels per side that become channels


class ResidualConvs(nn.Module):
    """x + conv(silu(conv(silu(x)))), all 3x3; starts as the identity.

    Shapes: (N, C, H, W) -> the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act1 = nn.SiLU()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act2 = nn.SiLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        _keep_variance(self)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add the refined features to x."""
        return cast(Tensor, x + self.conv2(self.act2(self.conv1(self.act1(x)))))


class PixelUnshuffleEncoder(nn.Module):
    """Image (N, 3, H, W) in [-1, 1] -> latents (N, 4, H/8, W/8), not multiplied by the scaling factor.

    H and W must be multiples of 8. Deterministic: the mode of the posterior is the posterior.
    """

    def __init__(self, spec: VaeEncoderSpec) -> None:
        super().__init__()
        outer, inner = spec.block_out_channels[0], spec.block_out_channels[-1]
        self.unshuffle = nn.PixelUnshuffle(_FOLD)
        self.conv_in = nn.Conv2d(3 * _FOLD**2, outer, 3, padding=1)
        self.act_in = nn.SiLU()
        self.down = nn.Conv2d(outer, inner, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(ResidualConvs(inner) for _ in range(spec.layers_per_block))
        self.act_out = nn.SiLU()
        self.conv_out = nn.Conv2d(inner, LATENT_CHANNELS, 3, padding=1)
        for conv in (self.conv_in, self.down, self.conv_out):
            _keep_variance(conv)

    def forward(self, image: Tensor) -> Tensor:
        """Encode; see the class for shapes."""
        x = self.down(self.act_in(self.conv_in(self.unshuffle(image))))
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.conv_out(self.act_out(x)))


class PixelShuffleDecoder(nn.Module):
    """Latents (N, 4, h, w) -> frames (N, 3, 8h, 8w), nominally in [-1, 1], not clamped.

    Takes the encoder's latents: whoever holds scaled ones divides by `DecoderSpec.scaling_factor` first.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        outer, inner = spec.block_out_channels[0], spec.block_out_channels[-1]
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, inner, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualConvs(inner) for _ in range(spec.layers_per_block))
        self.act_up = nn.SiLU()
        self.up = nn.Conv2d(inner, 4 * outer, 3, padding=1)
        self.shuffle_up = nn.PixelShuffle(2)
        self.refine = ResidualConvs(outer)
        self.act_out = nn.SiLU()
        self.conv_out = nn.Conv2d(outer, 3 * _FOLD**2, 3, padding=1)
        self.shuffle_out = nn.PixelShuffle(_FOLD)
        for conv in (self.conv_in, self.up, self.conv_out):
            _keep_variance(conv)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode; see the class for shapes."""
        x = self.conv_in(latents)
        for block in self.blocks:
            x = block(x)
        x = self.refine(self.shuffle_up(self.up(self.act_up(x))))
        return cast(Tensor, self.shuffle_out(self.conv_out(self.act_out(x))))


def _keep_variance(module: nn.Module) -> None:
    # PyTorch's default shrinks the signal at every layer, and there are no norms here to undo that.
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=(2 / conv.weight[0].numel()) ** 0.5)
            nn.init.zeros_(cast(Tensor, conv.bias))
