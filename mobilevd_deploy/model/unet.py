"""MobileVDUNet: Stable Video Diffusion's UNet with MobileVD's optimisations, in training form.

With every optimisation off this is diffusers' `UNetSpatioTemporalConditionModel`: same names, same
outputs. Each optimisation replaces modules at construction, through their ordinary attributes:

    gated                    time_mixer becomes GatedBlender: x_s + z (1 - alpha) r_t
    funnels                  attn1.to_q/k/v/out (and resblock convolutions) get squeeze and widen
    temporal_multiscaling    T frames -> T/2 behind level 0's downsampler, T behind the upsampler back to it

The rewrites in passes/ work on this class, and `denoise` is the map that all of them must keep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import AlphaBlender, ResnetBlock2D, SpatioTemporalResBlock, TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from mobilevd_deploy.config.spec import StepSpec, UNetSpec
from mobilevd_deploy.errors import SpecError
from mobilevd_deploy.model.funnels import ScaledAttention, add_attention_funnels, add_resblock_funnel

TEMPORAL_BLOCKS = (SpatioTemporalResBlock, TransformerSpatioTemporalModel)


class Preconditioning(NamedTuple):
    """denoised = skip * n + c_out * F(n) for unit noise n: c_in cancels against the noise's own scale.

    c_out is 1 once it is folded into the weights.
    """

    skip: float
    c_out: float


class GatedBlender(AlphaBlender):  # type: ignore[misc]
    """diffusers' blend with a gate on the temporal residual: x_s + z (1 - alpha) (x_t - x_s).

    `gate` z is a scalar buffer, 0 or 1 outside of training; `importance` q ranks the block.
    Source: MobileVD, temporal block pruning.
    """

    gate: Tensor

    def __init__(self, base: AlphaBlender) -> None:
        super().__init__(0.5, base.merge_strategy, base.switch_spatial_to_temporal_mix)
        self.mix_factor = base.mix_factor
        self.register_buffer("gate", torch.ones(()))
        self.importance = nn.Parameter(torch.zeros(()))

    def forward(
        self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        """Blend tensors of equal shape: (B, C, T, H, W), or (B T, H W, C)."""
        alpha = self.get_alpha(image_only_indicator, x_spatial.ndim).to(x_spatial.dtype)
        return x_spatial + self.gate * (1.0 - alpha) * (x_temporal - x_spatial)


class TemporalDownsample(nn.Module):
    """Halve the frames of (B T, C, H, W): the mean of each pair, or a temporal convolution of stride 2."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (3, 1, 1), (2, 1, 1), (1, 0, 0)) if kind == "conv" else None

    def forward(self, hidden_states: Tensor, num_frames: int) -> Tensor:
        """Map (B T, C, H, W) to (B T/2, C, H, W)."""
        if self.conv is None:
            return hidden_states.unflatten(0, (-1, 2)).mean(1)
        video = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2)
        return self.conv(video).transpose(1, 2).flatten(0, 1)


class TemporalUpsample(nn.Module):
    """Double the frames of (B T, C, H, W) by repeating each, then smooth over time if `kind` is "conv"."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)) if kind == "conv" else None

    def forward(self, hidden_states: Tensor, num_frames: int) -> Tensor:
        """Map (B T, C, H, W) to (B 2T, C, H, W)."""
        doubled = hidden_states.repeat_interleave(2, dim=0)
        if self.conv is None:
            return doubled
        video = doubled.unflatten(0, (-1, 2 * num_frames)).transpose(1, 2)
        return self.conv(video).transpose(1, 2).flatten(0, 1)


class MobileVDUNet(UNetSpatioTemporalConditionModel):  # type: ignore[misc]
    """The one-step video UNet; see the module docstring. Build on `torch.device("meta")` to allocate nothing.

    `time_embedding`, `add_embedding` are None once the single step is folded into the weights; the
    timestep and ids are then those of `step_spec`, and others are refused.
    """

    def __init__(self, unet_spec: UNetSpec, step_spec: StepSpec, num_frames: int = 14) -> None:
        super().__init__(
            in_channels=unet_spec.in_channels,
            out_channels=unet_spec.out_channels,
            down_block_types=tuple(
                "CrossAttnDownBlockSpatioTemporal" if has else "DownBlockSpatioTemporal"
                for has in unet_spec.attention
            ),
            up_block_types=tuple(
                "CrossAttnUpBlockSpatioTemporal" if has else "UpBlockSpatioTemporal"
                for has in reversed(unet_spec.attention)
            ),
            block_out_channels=unet_spec.block_out_channels,
            addition_time_embed_dim=unet_spec.addition_time_embed_dim,
            projection_class_embeddings_input_dim=3 * unet_spec.addition_time_embed_dim,
            layers_per_block=unet_spec.layers_per_block,
            cross_attention_dim=unet_spec.cross_attention_dim,
            num_attention_heads=unet_spec.num_attention_heads,
            num_frames=num_frames,
        )
        self.unet_spec = unet_spec
        self.step_spec = step_spec
        self.preconditioning = Preconditioning(step_spec.noise_to_denoised, step_spec.c_out)
        self.temporal_downsample: TemporalDownsample | None = None
        self.temporal_upsample: TemporalUpsample | None = None
        if unet_spec.temporal_multiscaling != "none":
            level0, level1 = unet_spec.block_out_channels[:2]
            self.temporal_downsample = TemporalDownsample(level0, unet_spec.temporal_multiscaling)
            self.temporal_upsample = TemporalUpsample(level1, unet_spec.temporal_multiscaling)
        self._add_funnels()
        if unet_spec.gated:
            for block in self.temporal_blocks().values():
                block.time_mixer = GatedBlender(block.time_mixer)
            self.reset_gates()

    def _add_funnels(self) -> None:
        funnels = self.unet_spec.funnels
        for module in list(self.modules()):
            if isinstance(module, (BasicTransformerBlock, TemporalBasicTransformerBlock)):
                spatial = isinstance(module, BasicTransformerBlock)
                r = funnels.spatial_attention if spatial else funnels.temporal_attention
                module.attn1.set_processor(ScaledAttention())
                module.attn2.set_processor(ScaledAttention())
                if r < 1:
                    add_attention_funnels(module.attn1, r)
            elif isinstance(module, (ResnetBlock2D, TemporalResnetBlock)) and funnels.resblock < 1:
                add_resblock_funnel(module, funnels.resblock)

    def reset_gates(self) -> None:
        """Set the gates to the spec's `kept_temporal_blocks`, as real scalars even on the meta device."""
        blocks = self.temporal_blocks()
        kept = self.unet_spec.kept_temporal_blocks
        if kept is not None and (unknown := sorted(set(kept) - set(blocks))):
            raise SpecError(
                f"unet.kept_temporal_blocks: no temporal block {unknown[0]!r}",
                next_step="blocks are named like " + next(iter(blocks)),
            )
        for path, block in blocks.items():
            block.time_mixer.gate = torch.tensor(1.0 if kept is None or path in kept else 0.0, device="cpu")

    def temporal_blocks(self) -> dict[str, SpatioTemporalResBlock | TransformerSpatioTemporalModel]:
        """Every block that still has a temporal half, by module path in running order."""
        return {path: m for path, m in self.named_modules() if isinstance(m, TEMPORAL_BLOCKS)}

    def denoise(self, noise: Tensor, image_latents: Tensor, image_embeds: Tensor) -> Tensor:
        """Make clean latents from unit noise in one step.

        Args:
            noise: (B, T, 4, h, w), standard normal.
            image_latents: (B, 4, h, w), mode of the posterior, not multiplied by the scaling factor.
            image_embeds: (B, D), the image encoder's projection.

        Returns:
            (B, T, 4, h, w), latents multiplied by the scaling factor.

        Source: EDM preconditioning, StepSpec.
        """
        skip, c_out = self.preconditioning
        frames = image_latents[:, None].expand(-1, noise.shape[1], -1, -1, -1)
        ids = noise.new_tensor([self.step_spec.added_time_ids]).expand(noise.shape[0], -1)
        predicted = self(
            torch.cat([noise, frames], dim=2), self.step_spec.c_noise, image_embeds[:, None], ids
        )
        return skip * noise + c_out * predicted

    def embed_step(self, timestep: Tensor | float, added_time_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the time embedding plus the added-id embedding, (B, 4 C_0).

        `timestep` is c_noise, one for all; `added_time_ids` is (B, 3).
        """
        ids = added_time_ids
        timesteps = torch.as_tensor(timestep, dtype=torch.float64, device=ids.device).expand(ids.shape[0])
        emb = self.time_embedding(self.time_proj(timesteps).to(dtype))
        added = self.add_time_proj(ids.flatten()).reshape(ids.shape[0], -1).to(dtype)
        return emb + self.add_embedding(added)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
    ) -> Tensor:
        """Predict F(x) of the EDM parametrisation.

        Args:
            sample: (B, T, 8, h, w), scaled noise and image latents; h and w multiples of `size_multiple`.
            timestep: c_noise = 0.25 ln sigma.
            encoder_hidden_states: (B, 1, D), one context token.
            added_time_ids: (B, 3), (fps - 1, motion bucket, noise augmentation strength).

        Returns:
            (B, T, 4, h, w).

        Raises:
            ValueError: a size that the levels do not divide, an odd number of frames with temporal
                multiscaling, or another step than the folded one.
        """
        batch, frames, _, height, width = sample.shape
        multiple = self.unet_spec.size_multiple
        if height % multiple or width % multiple:
            raise ValueError(f"latent {height}x{width}: both sides must be multiples of {multiple}")
        if self.temporal_downsample is not None and frames % 2:
            raise ValueError(
                f"{frames} frames: temporal multiscaling halves them, so their number must be even"
            )
        if self.time_embedding is None:
            self._refuse_other_step(timestep, added_time_ids)
            emb = None
        else:
            emb = self.embed_step(timestep, added_time_ids, sample.dtype)

        def clock(frames: int) -> dict[str, Tensor | None]:
            """What every block is told at this frame rate; diffusers reads T off the indicator."""
            return {
                "temb": None if emb is None else emb.repeat_interleave(frames, dim=0),
                "image_only_indicator": sample.new_zeros(batch, frames),
            }

        def context(frames: int) -> Tensor:
            return encoder_hidden_states.repeat_interleave(frames, dim=0)

        hidden = self.conv_in(sample.flatten(0, 1))
        skips: list[Tensor] = [hidden]
        now = frames
        for level, block in enumerate(self.down_blocks):
            attends = {"encoder_hidden_states": context(now)} if hasattr(block, "attentions") else {}
            hidden, states = block(hidden_states=hidden, **clock(now), **attends)
            if level == 0 and self.temporal_downsample is not None:
                hidden = self.temporal_downsample(hidden, now)
                # The last state is the downsampled map itself: its skip runs at the halved rate too.
                states = (*states[:-1], hidden)
                now //= 2
            skips.extend(states)

        hidden = self.mid_block(hidden_states=hidden, encoder_hidden_states=context(now), **clock(now))

        for position, block in enumerate(self.up_blocks):
            used = len(block.resnets)
            attends = {"encoder_hidden_states": context(now)} if hasattr(block, "attentions") else {}
            hidden = block(
                hidden_states=hidden, res_hidden_states_tuple=tuple(skips[-used:]), **clock(now), **attends
            )
            del skips[-used:]
            if position == len(self.up_blocks) - 2 and self.temporal_upsample is not None:
                hidden = self.temporal_upsample(hidden, now)
                now *= 2

        hidden = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return hidden.unflatten(0, (batch, frames))

    def _refuse_other_step(self, timestep: Tensor | float, added_time_ids: Tensor) -> None:
        wanted = added_time_ids.new_tensor(self.step_spec.added_time_ids)
        if added_time_ids.is_meta:
            return
        same_time = abs(float(timestep) - self.step_spec.c_noise) < 1e-6
        if not same_time or not torch.allclose(added_time_ids, wanted.expand_as(added_time_ids)):
            raise ValueError(
                f"this network is folded for timestep {self.step_spec.c_noise:.4f} and ids "
                f"{self.step_spec.added_time_ids}; it was asked for {float(timestep):.4f} "
                f"and {added_time_ids.tolist()}"
            )
