"""Architecture of a model as frozen dataclasses: read from a preset's TOML, stored in every checkpoint.

ModelSpec
├── unet: UNetSpec                    the UNet, and MobileVD's optimisations that it was trained with
├── step: StepSpec                    noise level and added ids of the single denoising step
├── image_encoder: ImageEncoderSpec   CLIP
├── vae_encoder: VaeEncoderSpec       image to latents
└── decoder: DecoderSpec              latents to frames

This module imports no torch, so that `--help` and argument checks stay fast.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from mobilevd_deploy.errors import SpecError

ComponentName = Literal["image_encoder", "vae_encoder", "unet", "decoder"]


@dataclass(frozen=True)
class FunnelSpec:
    """Fun-factors r of the channel funnels: inner width over original width; 1 means no funnel.

    Source: MobileVD, channel funnels (0 < r <= 1; published choice 0.5 on attention).
    """

    spatial_attention: float = 1.0
    temporal_attention: float = 1.0
    resblock: float = 1.0


@dataclass(frozen=True)
class UNetSpec:
    """Architecture of `MobileVDUNet`; the defaults are Stable Video Diffusion's.

    Tuples run from level 0 (full latent resolution) downwards. `temporal_multiscaling`: "none",
    "mean" (parameter-free: pairs averaged, then repeated) or "conv" (strided temporal convolution).
    `gated`: every temporal block carries a gate in {0, 1} and an importance value.
    `kept_temporal_blocks`: paths whose gate starts at 1; None keeps all of them.
    """

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_attention_heads: tuple[int, ...] = (5, 10, 20, 20)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    in_channels: int = 8
    out_channels: int = 4
    cross_attention_dim: int = 1024
    addition_time_embed_dim: int = 256
    temporal_multiscaling: Literal["none", "mean", "conv"] = "none"
    gated: bool = False
    kept_temporal_blocks: tuple[str, ...] | None = None
    funnels: FunnelSpec = field(default_factory=FunnelSpec)

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not levels or len(self.num_attention_heads) != levels or len(self.attention) != levels:
            raise SpecError(
                "block_out_channels, num_attention_heads and attention need one entry per level; "
                f"they have {levels}, {len(self.num_attention_heads)} and {len(self.attention)}",
            )
        for channels, heads in zip(self.block_out_channels, self.num_attention_heads, strict=True):
            if channels <= 0 or channels % 32:
                raise SpecError(
                    f"block_out_channels: {channels} is not a positive multiple of 32 (GroupNorm)"
                )
            if heads <= 0 or channels % heads:
                raise SpecError(f"num_attention_heads: {heads} heads do not divide {channels} channels")
        if not 0 < self.out_channels < self.in_channels:
            raise SpecError(
                f"in_channels: {self.in_channels} must exceed out_channels {self.out_channels}: "
                "the input holds the noise and the image's latents"
            )
        if self.cross_attention_dim < 1 or self.addition_time_embed_dim < 2:
            raise SpecError(
                f"cross_attention_dim {self.cross_attention_dim} must be at least 1 and "
                f"addition_time_embed_dim {self.addition_time_embed_dim} at least 2"
            )
        if self.layers_per_block < 1:
            raise SpecError(f"layers_per_block: {self.layers_per_block} is less than 1")
        if self.temporal_multiscaling != "none" and levels < 2:
            raise SpecError(
                "temporal_multiscaling needs at least two levels: it halves the frames below level 0"
            )
        for name, r in dataclasses.asdict(self.funnels).items():
            if not 0 < r <= 1:
                raise SpecError(f"funnels.{name}: {r} is not in (0, 1]")
        if self.kept_temporal_blocks is not None and not self.gated:
            raise SpecError(
                "kept_temporal_blocks is given, but gated is false: only gated blocks can be pruned"
            )

    @property
    def size_multiple(self) -> int:
        """Latent height and width must be multiples of this."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def frames_at(self, level: int, frames: int) -> int:
        """Return how many of the clip's `frames` a level works on: half below level 0 if multiscaled."""
        return frames // 2 if level > 0 and self.temporal_multiscaling != "none" else frames

    def level_of(self, path: str) -> int:
        """Return the level of a module path such as "up_blocks.0.resnets.1" (diffusers' names)."""
        lowest = len(self.block_out_channels) - 1
        side, _, rest = path.partition(".")
        if side == "mid_block":
            return lowest
        index = int(rest.partition(".")[0])
        return index if side == "down_blocks" else lowest - index


@dataclass(frozen=True)
class StepSpec:
    """The single denoising step: noise level sigma and SVD's added ids.

    EDM preconditioning in terms of unit noise n, where x = sqrt(sigma^2 + 1) n as in diffusers'
    EulerDiscreteScheduler: c_in x = n, and denoised = c_skip x + c_out F(n, c_noise).
    Source: Karras et al. 2022, table 1 with sigma_data = 1 and v-prediction.
    """

    sigma: float = 700.0
    fps: int = 7
    motion_bucket_id: int = 127
    noise_aug_strength: float = 0.02

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise SpecError(f"step.sigma: {self.sigma} is not a positive number")
        if not (self.noise_aug_strength >= 0 and math.isfinite(self.noise_aug_strength)):
            raise SpecError(
                f"step.noise_aug_strength: {self.noise_aug_strength} is not a finite number of at least 0"
            )

    @property
    def c_noise(self) -> float:
        """The continuous timestep, the network's input: ln(sigma) / 4."""
        return 0.25 * math.log(self.sigma)

    @property
    def noise_to_denoised(self) -> float:
        """Factor of unit noise in the denoised latents: c_skip * sqrt(sigma^2 + 1)."""
        return 1.0 / math.hypot(self.sigma, 1.0)

    @property
    def c_out(self) -> float:
        """Factor of the network's output in the denoised latents."""
        return -self.sigma / math.hypot(self.sigma, 1.0)

    @property
    def added_time_ids(self) -> tuple[float, float, float]:
        """SVD's added ids: (fps - 1, motion_bucket_id, noise_aug_strength)."""
        return (self.fps - 1, self.motion_bucket_id, self.noise_aug_strength)


@dataclass(frozen=True)
class ImageEncoderSpec:
    """CLIP vision transformer with projection; the defaults are SVD's ViT-H/14.

    The names are those of transformers' CLIPVisionConfig. The image is resized to image_size x image_size px.
    """

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 1024
    hidden_act: Literal["gelu", "quick_gelu"] = "gelu"


@dataclass(frozen=True)
class VaeEncoderSpec:
    """Image to latents: SVD's VAE encoder ("svd") or the demo's small encoder ("pixel-unshuffle").

    `block_out_channels` and `layers_per_block` are diffusers'; "pixel-unshuffle" uses the first and the last
    width. The latents are the mode of the posterior, not multiplied by the scaling factor.
    """

    kind: Literal["svd", "pixel-unshuffle"] = "svd"
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2


@dataclass(frozen=True)
class DecoderSpec:
    """Latents to frames: SVD's temporal decoder ("svd-temporal"), the same without time layers
    ("svd-image", in svd_xt_image_decoder), the decoder of diffusers' AutoencoderTiny ("tiny", TAESD's
    layout), or the demo's decoder ("pixel-shuffle").

    The UNet's latents are divided by `scaling_factor` before they are decoded. It is 1 for "tiny", which is
    trained on scaled latents.
    """

    kind: Literal["svd-temporal", "svd-image", "tiny", "pixel-shuffle"] = "svd-temporal"
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    scaling_factor: float = 0.18215


@dataclass(frozen=True)
class ModelSpec:
    """Everything that determines the shapes of a checkpoint's tensors and of its clips."""

    name: str
    frames: int = 14
    height: int = 256
    width: int = 512
    unet: UNetSpec = field(default_factory=UNetSpec)
    step: StepSpec = field(default_factory=StepSpec)
    image_encoder: ImageEncoderSpec = field(default_factory=ImageEncoderSpec)
    vae_encoder: VaeEncoderSpec = field(default_factory=VaeEncoderSpec)
    decoder: DecoderSpec = field(default_factory=DecoderSpec)

    def __post_init__(self) -> None:
        multiple = 8 * self.unet.size_multiple
        for side in (self.height, self.width):
            if side <= 0 or side % multiple:
                raise SpecError(f"{self.width}x{self.height} px: both sides must be multiples of {multiple}")
        if self.frames < 1 or (self.unet.temporal_multiscaling != "none" and self.frames % 2):
            raise SpecError(f"frames: {self.frames} must be positive, and even with temporal multiscaling")
        if self.image_encoder.projection_dim != self.unet.cross_attention_dim:
            raise SpecError(
                f"image_encoder.projection_dim {self.image_encoder.projection_dim} is not "
                f"unet.cross_attention_dim {self.unet.cross_attention_dim}"
            )

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent height and width: an eighth of the clip's."""
        return self.height // 8, self.width // 8

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; defaults are included."""
        return dataclasses.asdict(self)
