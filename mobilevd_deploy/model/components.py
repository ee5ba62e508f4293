"""The four networks of a model in training form: what every deploy form is compared with.

    image_encoder   image (1, 3, H, W)                                    -> image_embeds (1, D)
    vae_encoder     image, image_noise (1, 3, H, W)                       -> image_latents (1, 4, h, w)
    unet            noise (T, 4, h, w), image_latents, image_embeds       -> latents (T, 4, h, w)
    decoder         latents                                               -> frames (T, 3, H, W)

Images and frames are float in [-1, 1] (frames nominally, they are not clamped), h = H / 8, w = W / 8.
Built from transformers' and diffusers' own modules, under their own state-dict names, so that weights
of Stable Video Diffusion or TAESD fit unchanged. `image_noise` is an input only where the model's
noise_aug_strength is above 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny, Encoder
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevd_deploy.config.spec import (
    ComponentName,
    DecoderSpec,
    ImageEncoderSpec,
    ModelSpec,
    VaeEncoderSpec,
)
from mobilevd_deploy.errors import MobileVDError, SpecError
from mobilevd_deploy.model.autoencoder import PixelShuffleDecoder, PixelUnshuffleEncoder
from mobilevd_deploy.model.unet import MobileVDUNet

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def build_component(spec: ModelSpec, name: ComponentName) -> nn.Module:
    """Build one network with random weights; under `torch.device("meta")` nothing is allocated.

    Its state dict has the third party's names. Apart from the UNet, whose own forward is diffusers',
    calling it follows the module docstring; `deploy_contract` gives all four that form.

    Raises:
        SpecError: the configuration can not be built.
    """
    try:
        module = _BUILDERS[name](spec)
    except Exception as error:  # third-party constructors raise what they like
        if isinstance(error, MobileVDError):
            raise
        raise SpecError(f"{spec.name}: {name} can not be built from this configuration: {error}") from error
    _settle_on_meta(module)
    return module.eval()


def _settle_on_meta(module: nn.Module) -> None:
    # diffusers makes its blend factors with torch.Tensor([...]), which ignores the device context.
    if any(parameter.is_meta for parameter in module.parameters()):
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if not parameter.is_meta:
                    setattr(part, name, nn.Parameter(parameter.to("meta")))


def deploy_contract(module: nn.Module) -> nn.Module:
    """Return `module` as something that is called as the module docstring says.

    A UNet is wrapped, everything else is so already. State-dict names of the wrapped one gain "unet.".
    """
    return DenoiseStep(module) if isinstance(module, MobileVDUNet) else module


class DenoiseStep(nn.Module):
    """The UNet's one-step map with frames as the batch: see `MobileVDUNet.denoise`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noise: Tensor, image_latents: Tensor, image_embeds: Tensor) -> Tensor:
        """Map noise (T, 4, h, w), image_latents (1, 4, h, w), image_embeds (1, D) to latents (T, 4, h, w)."""
        denoise = self.unet.denoise
        return cast(Tensor, denoise(noise[None], image_latents, image_embeds)[0])  # type: ignore[operator]


class ImageEncoder(nn.Module):
    """CLIP's vision transformer with projection, and SVD's preprocessing before it.

    State dict: that of transformers' CLIPVisionModelWithProjection.
    """

    def __init__(self, spec: ImageEncoderSpec) -> None:
        super().__init__()
        # Late: transformers takes seconds to import and only this class needs it.
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        config = CLIPVisionConfig(
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_hidden_layers=spec.num_hidden_layers,
            num_attention_heads=spec.num_attention_heads,
            image_size=spec.image_size,
            patch_size=spec.patch_size,
            projection_dim=spec.projection_dim,
            hidden_act=spec.hidden_act,
        )
        clip = CLIPVisionModelWithProjection(config)
        self.image_size = spec.image_size
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.register_load_state_dict_post_hook(_restore_position_ids)

    def forward(self, image: Tensor) -> Tensor:
        """Embed (N, 3, H, W) in [-1, 1] as (N, D)."""
        pixels = (antialiased_resize(image, self.image_size) + 1) / 2
        mean, std = (image.new_tensor(value).view(1, 3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
        pooled = self.vision_model((pixels - mean) / std).pooler_output
        return cast(Tensor, self.visual_projection(pooled))


def _restore_position_ids(module: nn.Module, _incompatible: object) -> None:
    # transformers keeps 0..n-1 outside of the state dict: built on meta, it would stay empty for ever.
    embeddings = module.vision_model.embeddings  # type: ignore[union-attr]
    weight: Tensor = embeddings.position_embedding.weight  # type: ignore[union-attr,assignment]
    embeddings.position_ids = torch.arange(len(weight), device=weight.device)[None]  # type: ignore[union-attr]


def antialiased_resize(image: Tensor, size: int) -> Tensor:
    """Resize (N, C, H, W) to (N, C, size, size) as SVD does before its image encoder.

    Gaussian blur against aliasing, then bicubic with corners aligned: linear and separable, hence one
    matrix per axis. Equals diffusers' `_resize_with_antialiasing`.
    """
    rows = resize_matrix(image.shape[-2], size).to(image)
    columns = resize_matrix(image.shape[-1], size).to(image)
    return rows @ image @ columns.T


def resize_matrix(before: int, after: int) -> Tensor:
    """Return the (after, before) matrix that `antialiased_resize` applies along one axis, float64 on the CPU.

    Sigma is (before / after - 1) / 2, the kernel twice two sigmas wide and odd, the border reflected.
    """
    sigma = max((before / after - 1) / 2, 0.001)
    reach = int(max(4 * sigma, 3)) // 2
    with torch.device("cpu"):
        taps = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
        units = torch.eye(before, dtype=torch.float64)[:, None]
        blurred = F.conv1d(F.pad(units, (reach, reach), mode="reflect"), (taps / taps.sum()).view(1, 1, -1))
        # A second axis of one row: bicubic interpolation exists for images only.
        resized = F.interpolate(blurred[:, :, None], (1, after), mode="bicubic", align_corners=True)
        return resized[:, 0, 0].T.contiguous()


class SvdVaeEncoder(nn.Module):
    """SVD's VAE encoder, up to the mode of the posterior.

    State dict: `encoder.*` and `quant_conv.*` of diffusers' AutoencoderKLTemporalDecoder.
    """

    def __init__(self, spec: VaeEncoderSpec, noise_aug_strength: float) -> None:
        super().__init__()
        self.noise_aug_strength = noise_aug_strength
        self.encoder = Encoder(
            in_channels=3,
            out_channels=4,
            down_block_types=("DownEncoderBlock2D",) * len(spec.block_out_channels),
            block_out_channels=spec.block_out_channels,
            layers_per_block=spec.layers_per_block,
            double_z=True,
        )
        self.quant_conv = nn.Conv2d(8, 8, 1)

    def forward(self, image: Tensor, image_noise: Tensor | None = None) -> Tensor:
        """Encode (N, 3, H, W), with unit noise of that shape, as unscaled latents (N, 4, H/8, W/8)."""
        moments = self.quant_conv(self.encoder(_augment(image, image_noise, self.noise_aug_strength)))
        return cast(Tensor, moments[:, :4])  # the other half is the log-variance


class DemoVaeEncoder(PixelUnshuffleEncoder):
    """The demo's encoder, behind SVD's noise augmentation."""

    def __init__(self, spec: VaeEncoderSpec, noise_aug_strength: float) -> None:
        super().__init__(spec)
        self.noise_aug_strength = noise_aug_strength

    def forward(self, image: Tensor, image_noise: Tensor | None = None) -> Tensor:
        """Encode (N, 3, H, W), with unit noise of that shape, as unscaled latents (N, 4, H/8, W/8)."""
        return super().forward(_augment(image, image_noise, self.noise_aug_strength))


def _augment(image: Tensor, noise: Tensor | None, strength: float) -> Tensor:
    if strength == 0:
        return image
    if noise is None:
        raise ValueError(f"this model adds noise to the image (strength {strength}): image_noise is missing")
    return image + strength * noise


class SvdTemporalDecoder(TemporalDecoder):  # type: ignore[misc]
    """SVD's decoder, which mixes neighbouring frames.

    State dict: `decoder.*` of diffusers' AutoencoderKLTemporalDecoder, without that prefix.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(4, 3, spec.block_out_channels, spec.layers_per_block)
        self.scaling_factor = spec.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """Decode one clip's scaled latents (T, 4, h, w) as frames (T, 3, 8h, 8w)."""
        video = latents.new_zeros(1, len(latents))  # "image only" is false for every frame
        return cast(Tensor, super().forward(latents / self.scaling_factor, video, num_frames=len(latents)))


class SvdImageDecoder(Decoder):  # type: ignore[misc]
    """SVD's decoder without time layers, frame by frame: that of `svd_xt_image_decoder`.

    State dict: `decoder.*` of diffusers' AutoencoderKL, without that prefix.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(
            in_channels=4,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(spec.block_out_channels),
            block_out_channels=spec.block_out_channels,
            layers_per_block=spec.layers_per_block,
        )
        self.scaling_factor = spec.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (T, 4, h, w) as frames (T, 3, 8h, 8w)."""
        return cast(Tensor, super().forward(latents / self.scaling_factor))


class TinyDecoder(DecoderTiny):  # type: ignore[misc]
    """TAESD's decoder, frame by frame.

    State dict: `decoder.*` of diffusers' AutoencoderTiny, without that prefix; `layers_per_block`
    residual blocks on every level but the last, which has one.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        levels = len(spec.block_out_channels)
        blocks = (spec.layers_per_block,) * (levels - 1) + (1,)
        super().__init__(4, 3, blocks, spec.block_out_channels, 2, act_fn="relu", upsample_fn="nearest")
        self.scaling_factor = spec.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (T, 4, h, w) as frames (T, 3, 8h, 8w)."""
        return cast(Tensor, super().forward(latents / self.scaling_factor))


class DemoDecoder(PixelShuffleDecoder):
    """The demo's decoder, frame by frame."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec)
        self.scaling_factor = spec.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (T, 4, h, w) as frames (T, 3, 8h, 8w)."""
        return super().forward(latents / self.scaling_factor)


_VAE_ENCODERS: dict[str, type[SvdVaeEncoder] | type[DemoVaeEncoder]] = {
    "svd": SvdVaeEncoder,
    "pixel-unshuffle": DemoVaeEncoder,
}
_DECODERS: dict[str, Callable[[DecoderSpec], nn.Module]] = {
    "svd-temporal": SvdTemporalDecoder,
    "svd-image": SvdImageDecoder,
    "tiny": TinyDecoder,
    "pixel-shuffle": DemoDecoder,
}
_BUILDERS: dict[ComponentName, Callable[[ModelSpec], nn.Module]] = {
    "image_encoder": lambda spec: ImageEncoder(spec.image_encoder),
    "vae_encoder": lambda spec: _VAE_ENCODERS[spec.vae_encoder.kind](
        spec.vae_encoder, spec.step.noise_aug_strength
    ),
    "unet": lambda spec: MobileVDUNet(spec.unet, spec.step, spec.frames),
    "decoder": lambda spec: _DECODERS[spec.decoder.kind](spec.decoder),
}
