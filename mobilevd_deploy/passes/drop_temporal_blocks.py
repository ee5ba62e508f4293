"""Remove temporal blocks whose gate is 0; fold gate and blend factor of the others into their weights."""

from __future__ import annotations

import torch
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from mobilevd_deploy.config.recipe import PassName
from mobilevd_deploy.errors import RewriteError
from mobilevd_deploy.model.funnels import WidenedConv
from mobilevd_deploy.model.unet import GatedBlender, MobileVDUNet


class SpatialResBlock(nn.Module):
    """The spatial half of a spatio-temporal resblock, with the same call signature."""

    def __init__(self, block: SpatioTemporalResBlock) -> None:
        super().__init__()
        self.spatial_res_block = block.spatial_res_block

    def forward(
        self, hidden_states: Tensor, temb: Tensor | None = None, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        """Map (B T, C, H, W) to (B T, C', H, W), frame by frame."""
        return self.spatial_res_block(hidden_states, temb)


class SpatialTransformer(nn.Module):
    """The spatial half of a spatio-temporal transformer, with the same call signature."""

    def __init__(self, block: TransformerSpatioTemporalModel) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = block.norm, block.proj_in, block.proj_out
        self.transformer_blocks = block.transformer_blocks

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_only_indicator: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Map (B T, C, H, W) to the same shape, frame by frame."""
        tokens = self.proj_in(self.norm(hidden_states).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
        mapped = self.proj_out(tokens).transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        return (hidden_states + mapped,)


class TemporalResult(nn.Module):
    """A blend whose factor is folded into the temporal block's weights: it returns the temporal branch."""

    def forward(
        self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        """Return x_temporal."""
        return x_temporal


class FixedBlend(nn.Module):
    """x_s + c (x_t - x_s) with c = 1 - alpha as a constant."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(
        self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        """Blend tensors of equal shape."""
        return x_spatial + self.weight * (x_temporal - x_spatial)


class DropTemporalBlocks:
    """Remove the temporal half if its gate is exactly 0; else fold gate and blend factor.

        z = 0                  x_s + z (1 - alpha) r_t  ->  x_s: the temporal layers are removed
        z = 1, resblock        r_t ends in conv2        ->  conv2' = (1 - alpha) conv2: no blend remains
        z = 1, transformer     r_t sums four branches, and later norms read the partial sums, so no single
                               affine layer can be scaled  ->  a blend by the constant 1 - alpha

    Source: MobileVD, temporal block pruning; x_t = x_s + r_t in SVD's blend.
    """

    name: PassName = "drop-temporal-blocks"

    def requires(self, unet: MobileVDUNet) -> None:
        """Refuse a gate that is neither 0 nor 1, and a resblock funnel in front of conv2."""
        for path, block in unet.temporal_blocks().items():
            gate = float(block.time_mixer.gate) if isinstance(block.time_mixer, GatedBlender) else 1.0
            if gate not in (0.0, 1.0):
                raise RewriteError(
                    f"{path}.time_mixer.gate is {gate:g}: only gates of exactly 0 or 1 can be deployed",
                    next_step="finish training with hard gates: 1 for the most important blocks, else 0",
                )
            temporal = getattr(block, "temporal_res_block", None)
            if temporal is not None and isinstance(temporal.conv2, WidenedConv):
                raise RewriteError(
                    f"{path}: its funnel is not folded yet",
                    next_step="run fold-channel-funnels before this pass",
                )

    def apply(self, unet: MobileVDUNet) -> tuple[str, ...]:
        """Replace pruned blocks by their spatial halves; simplify the blend of the others."""
        changed = []
        for path, block in unet.temporal_blocks().items():
            mixer = block.time_mixer
            if isinstance(mixer, (TemporalResult, FixedBlend)):
                continue
            changed.append(path)
            resblock = isinstance(block, SpatioTemporalResBlock)
            if isinstance(mixer, GatedBlender) and float(mixer.gate) == 0.0:
                unet.set_submodule(path, SpatialResBlock(block) if resblock else SpatialTransformer(block))
                continue
            weight = 1 - torch.sigmoid(mixer.mix_factor)
            if resblock:
                last = block.temporal_res_block.conv2
                last.weight.mul_(weight)
                last.bias.mul_(weight)
                block.time_mixer = TemporalResult()
            else:
                block.time_mixer = FixedBlend(weight.detach())
        return tuple(changed)
