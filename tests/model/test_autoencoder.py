from __future__ import annotations

import pytest
import torch
from torch import nn

from mobilevd_deploy.config.spec import DecoderSpec, VaeEncoderSpec
from mobilevd_deploy.model.autoencoder import PixelShuffleDecoder, PixelUnshuffleEncoder, ResidualConvs

ENCODER = VaeEncoderSpec("pixel-unshuffle", (16, 24), 2)
DECODER = DecoderSpec("pixel-shuffle", (16, 24), 2, 0.5)


@pytest.mark.parametrize(("height", "width"), [(64, 128), (8, 8), (24, 40)])
def test_shapes(height: int, width: int) -> None:
    latents = PixelUnshuffleEncoder(ENCODER)(torch.rand(3, 3, height, width))
    assert latents.shape == (3, 4, height // 8, width // 8)
    assert PixelShuffleDecoder(DECODER)(latents).shape == (3, 3, height, width)


def test_widths_and_depth_follow_the_spec() -> None:
    encoder, decoder = PixelUnshuffleEncoder(ENCODER), PixelShuffleDecoder(DECODER)
    assert encoder.conv_in.out_channels == 16
    assert encoder.down.out_channels == 24
    assert len(encoder.blocks) == len(decoder.blocks) == 2
    assert decoder.up.out_channels == 4 * 16


def test_residual_blocks_start_as_the_identity() -> None:
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(ResidualConvs(8)(x), x)


def test_signals_keep_their_size_at_initialisation() -> None:
    torch.manual_seed(0)
    image = torch.randn(8, 3, 64, 128)
    latents = PixelUnshuffleEncoder(ENCODER)(image)
    frames = PixelShuffleDecoder(DECODER)(latents)
    assert 0.2 < latents.std() < 5
    assert 0.2 < frames.std() < 5


@pytest.mark.parametrize(
    ("net", "shape"),
    [(PixelUnshuffleEncoder(ENCODER), (1, 3, 64, 128)), (PixelShuffleDecoder(DECODER), (1, 4, 8, 16))],
    ids=["encoder", "decoder"],
)
def test_nothing_convolves_at_full_size_and_every_layer_is_plain(
    net: nn.Module, shape: tuple[int, ...]
) -> None:
    leaves = [m for m in net.modules() if not list(m.children())]
    assert all(isinstance(m, (nn.Conv2d, nn.SiLU, nn.PixelShuffle, nn.PixelUnshuffle)) for m in leaves)
    widths: list[int] = []
    for leaf in leaves:
        if isinstance(leaf, nn.Conv2d):
            leaf.register_forward_hook(lambda _module, _inputs, output: widths.append(output.shape[-1]))
    net(torch.rand(shape))
    assert max(widths) == 128 // 4
    assert widths.count(128 // 8) > widths.count(128 // 4)


def test_it_learns() -> None:
    torch.manual_seed(0)
    encoder, decoder = PixelUnshuffleEncoder(ENCODER), PixelShuffleDecoder(DECODER)
    # One flat colour per picture: four latent channels are plenty.
    image = (2 * torch.rand(16, 3, 1, 1) - 1).expand(-1, -1, 16, 16)
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 2e-3)
    losses = []
    for _ in range(60):
        loss = (decoder(encoder(image)) - image).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]
