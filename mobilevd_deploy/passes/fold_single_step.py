"""Fold everything that depends on the noise level alone: with one denoising step it is constant."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevd_deploy.config.recipe import PassName
from mobilevd_deploy.errors import RewriteError
from mobilevd_deploy.model.funnels import SqueezedConv
from mobilevd_deploy.model.unet import MobileVDUNet


class FramePositions(nn.Module):
    """A table (T, C) of the frame positions' embeddings; it replaces diffusers' `time_proj`."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, positions: Tensor) -> Tensor:
        """Map positions (N,) below T to embeddings (N, C)."""
        return self.table[positions]


class FoldSingleStep:
    """Fold time embedding, added ids and frame positions into biases and tables.

        before  conv1(x) + time_emb_proj(silu(emb))                 emb from sigma, fps, motion bucket, ...
        after   conv1'(x) with bias' = bias + time_emb_proj(silu(emb))
        before  time_pos_embed(time_proj(frame))
        after   table[frame]

    After this pass, fps, motion bucket and noise augmentation strength are fixed to those of the StepSpec.
    Source: our own derivation; exact because a convolution adds its bias to every pixel.
    """

    name: PassName = "fold-single-step"

    def requires(self, unet: MobileVDUNet) -> None:
        """Refuse a resblock funnel between conv1 and the embedding."""
        for path, block in _resblocks(unet).items():
            if isinstance(block.conv1, SqueezedConv):
                raise RewriteError(
                    f"{path}: its funnel is not folded yet",
                    next_step="run fold-channel-funnels before this pass",
                )

    def apply(self, unet: MobileVDUNet) -> tuple[str, ...]:
        """Move the constants into biases and tables, and remove the layers that computed them."""
        if unet.time_embedding is None:
            return ()
        dtype = unet.conv_in.weight.dtype
        ids = unet.conv_in.weight.new_tensor([unet.step_spec.added_time_ids])
        emb = F.silu(unet.embed_step(unet.step_spec.c_noise, ids, dtype))
        changed = ["time_embedding", "add_embedding"]
        unet.time_embedding = unet.add_embedding = None
        for path, block in _resblocks(unet).items():
            block.conv1.bias.add_(block.time_emb_proj(emb)[0])
            block.time_emb_proj = None
            changed.append(path)
        for path, module in unet.named_modules():
            if isinstance(module, TransformerSpatioTemporalModel):
                positions = torch.arange(unet.config.num_frames, device=ids.device)
                table = module.time_pos_embed(module.time_proj(positions).to(dtype))
                module.time_proj, module.time_pos_embed = FramePositions(table), nn.Identity()
                changed.append(path)
        return tuple(changed)


def _resblocks(unet: MobileVDUNet) -> dict[str, ResnetBlock2D | TemporalResnetBlock]:
    return {p: m for p, m in unet.named_modules() if isinstance(m, (ResnetBlock2D, TemporalResnetBlock))}
