"""The two encoders of the image as static graphs, with their preprocessing; the input is pixels in [-1, 1].

NpuImageEncoder   SVD's resize and CLIP's normalisation, then CLIP's vision transformer with projection
NpuVaeEncoder     noise augmentation, then the mean of the posterior; its variance is never computed
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D
from torch import Tensor, nn

from mobilevd_deploy.config.recipe import GraphForms
from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.model.components import (
    CLIP_MEAN,
    CLIP_STD,
    DemoVaeEncoder,
    ImageEncoder,
    SvdVaeEncoder,
    resize_matrix,
)
from mobilevd_deploy.npu.ops import (
    Add,
    Concat,
    Constant,
    MapAttention,
    Multiply,
    ResBlock,
    ResidualConvs,
    SelfAttention,
    SiLU,
    TokenNorm,
    conv2d,
    copy_sharing,
    group_norm,
    pointwise,
    to_tokens,
)


class Resize(nn.Module):
    """`antialiased_resize` as two linear layers, one per axis of the image."""

    def __init__(self, height: int, width: int, size: int, like: Tensor, forms: GraphForms) -> None:
        """Build for images of `height` x `width`, in the dtype of `like`."""
        super().__init__()
        self.columns = pointwise(resize_matrix(width, size).to(like), None, forms)
        self.rows = pointwise(resize_matrix(height, size).to(like), None, forms)
        self.channels_first = forms.linear == "conv"

    def forward(self, image: Tensor) -> Tensor:
        """Map (1, 3, H, W) to (1, 3, size, size)."""
        if self.channels_first:  # the axis that a layer mixes becomes the channel axis
            image = self.columns(image.permute(0, 3, 2, 1))
            return self.rows(image.permute(0, 2, 1, 3)).permute(0, 3, 1, 2)
        return self.rows(self.columns(image).transpose(2, 3)).transpose(2, 3)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's approximation of GELU."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.slope = Constant(like.new_tensor(1.702))
        self.steepen, self.sigmoid, self.multiply = Multiply(), nn.Sigmoid(), Multiply()

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to itself."""
        return self.multiply(x, self.sigmoid(self.steepen(x, self.slope())))


class VisionLayer(nn.Module):
    """One pre-norm layer of CLIP's vision transformer, from transformers' CLIPEncoderLayer."""

    def __init__(self, layer: Any, tokens: int, hidden_act: str, forms: GraphForms) -> None:
        super().__init__()
        attn, mlp = layer.self_attn, layer.mlp
        projections = [(p.weight, p.bias) for p in (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj)]
        self.layer_norm1 = TokenNorm(layer.layer_norm1, forms)
        self.self_attn = SelfAttention(projections, attn.num_heads, attn.scale, "space", tokens, forms)
        self.add1 = Add()
        self.layer_norm2 = TokenNorm(layer.layer_norm2, forms)
        self.fc1 = pointwise(mlp.fc1.weight, mlp.fc1.bias, forms)
        self.act = nn.GELU() if hidden_act == "gelu" else QuickGELU(mlp.fc1.weight)
        self.fc2 = pointwise(mlp.fc2.weight, mlp.fc2.bias, forms)
        self.add2 = Add()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to tokens."""
        tokens = self.add1(tokens, self.self_attn(self.layer_norm1(tokens)))
        return self.add2(tokens, self.fc2(self.act(self.fc1(self.layer_norm2(tokens)))))


class NpuImageEncoder(nn.Module):
    """Image (1, 3, H, W) in [-1, 1] -> image_embeds (1, D).

    The tokens are the class token and one per patch. As a map they are one row, (1, C, 1, N).
    """

    def __init__(self, component: ImageEncoder, spec: ModelSpec, forms: GraphForms) -> None:
        """Build for images of the size in `spec`."""
        super().__init__()
        vision, embeddings = component.vision_model, component.vision_model.embeddings
        positions = embeddings.position_embedding.weight.T[None, :, None, :]  # (1, C, 1, N)
        self.forms = forms
        self.resize = Resize(spec.height, spec.width, component.image_size, positions, forms)
        self.patch_embedding = _normalising(embeddings.patch_embedding)
        self.positions, self.add_positions = Constant(to_tokens(positions[..., 1:], forms)), Add()
        class_token = embeddings.class_embedding[None, :, None, None] + positions[..., :1]
        self.class_token = Constant(to_tokens(class_token, forms))
        self.join = Concat(3 if forms.linear == "conv" else 1)
        self.pre_layrnorm = TokenNorm(vision.pre_layrnorm, forms)
        self.layers = nn.Sequential(
            *(
                VisionLayer(layer, positions.shape[-1], spec.image_encoder.hidden_act, forms)
                for layer in vision.encoder.layers
            )
        )
        self.post_layernorm = TokenNorm(vision.post_layernorm, forms)
        self.visual_projection = pointwise(component.visual_projection.weight, None, forms)

    def forward(self, image: Tensor) -> Tensor:
        """Return the embedding of the image."""
        patches = self.patch_embedding(self.resize(image))
        patches = patches.reshape(1, patches.shape[1], 1, -1)
        patches = self.add_positions(to_tokens(patches, self.forms), self.positions())
        tokens = self.layers(self.pre_layrnorm(self.join(self.class_token(), patches)))
        pooled = tokens[..., :1] if self.forms.linear == "conv" else tokens[:, :1]
        return self.visual_projection(self.post_layernorm(pooled)).reshape(1, -1)


def _normalising(conv: nn.Conv2d) -> nn.Conv2d:
    # Pixels x in [-1, 1] reach CLIP as ((x + 1) / 2 - mean) / std. Exact: patches are not padded.
    mean, std = (conv.weight.new_tensor(value)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
    bias = (conv.weight * ((0.5 - mean) / std)).sum((1, 2, 3))
    return conv2d(conv.weight * (0.5 / std), bias, conv.stride)


class Augment(nn.Module):
    """SVD's noise augmentation: image + strength * noise."""

    def __init__(self, strength: Tensor) -> None:
        super().__init__()
        self.strength = Constant(strength)
        self.multiply, self.add = Multiply(), Add()

    def forward(self, image: Tensor, image_noise: Tensor) -> Tensor:
        """Return the noisy image, same shape."""
        return self.add(image, self.multiply(image_noise, self.strength()))


class NpuVaeEncoder(nn.Module):
    """Image (1, 3, H, W) in [-1, 1] -> image_latents (1, 4, h, w): the posterior's mode, not scaled.

    `image_noise` (1, 3, H, W), unit normal, is an input only if the model's noise_aug_strength is above 0.
    """

    def __init__(self, component: SvdVaeEncoder | DemoVaeEncoder, spec: ModelSpec, forms: GraphForms) -> None:
        """Build for images of the size in `spec`."""
        super().__init__()
        strength = spec.step.noise_aug_strength
        like = next(component.parameters())
        self.augment = Augment(like.new_tensor(strength)) if strength > 0 else None
        if isinstance(component, SvdVaeEncoder):
            self.encoder = _svd_encoder(component, spec.latent_size, forms)
        else:
            self.encoder = _pixel_unshuffle_encoder(component)

    def forward(self, image: Tensor, image_noise: Tensor | None = None) -> Tensor:
        """Return the image's latents."""
        if self.augment is not None:
            image = self.augment(image, image_noise)
        return self.encoder(image)


def _svd_encoder(component: SvdVaeEncoder, latent_size: tuple[int, int], forms: GraphForms) -> nn.Sequential:
    encoder, mid = component.encoder, component.encoder.mid_block
    middle: list[nn.Module] = [ResBlock(mid.resnets[0], forms)]
    for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
        middle += [MapAttention(attention, latent_size, forms), ResBlock(resnet, forms)]
    layers: dict[str, nn.Module] = {
        "conv_in": copy_sharing(encoder.conv_in),
        "down_blocks": nn.Sequential(*(_down_block(block, forms) for block in encoder.down_blocks)),
        "mid_block": nn.Sequential(*middle),
        "conv_norm_out": group_norm(encoder.conv_norm_out, forms),
        "conv_act": SiLU(),
        "conv_out": _posterior_mean(encoder.conv_out, component.quant_conv),
    }
    return nn.Sequential(OrderedDict(layers))


def _down_block(block: DownEncoderBlock2D, forms: GraphForms) -> nn.Sequential:
    layers: dict[str, nn.Module] = {"resnets": nn.Sequential(*(ResBlock(r, forms) for r in block.resnets))}
    for downsampler in block.downsamplers or ():
        # diffusers pads this convolution on the right and below only.
        layers |= {"pad": nn.ZeroPad2d((0, 1, 0, 1)), "downsample": copy_sharing(downsampler.conv)}
    return nn.Sequential(OrderedDict(layers))


def _posterior_mean(conv: Any, quant_conv: Any) -> nn.Conv2d:
    # A 1x1 convolution after another convolution is a matrix product of the two. Its first half is the mean.
    mix = quant_conv.weight[: len(quant_conv.weight) // 2, :, 0, 0]
    weight = (mix @ conv.weight.flatten(1)).unflatten(1, conv.weight.shape[1:])
    return conv2d(weight, mix @ conv.bias + quant_conv.bias[: len(mix)], padding=conv.padding)


def _pixel_unshuffle_encoder(component: DemoVaeEncoder) -> nn.Sequential:
    layers: dict[str, nn.Module] = {
        "conv_in": _unshuffling(component.conv_in, component.unshuffle.downscale_factor),
        "act_in": SiLU(),
        "down": copy_sharing(component.down),
        "blocks": nn.Sequential(*(ResidualConvs(block) for block in component.blocks)),
        "act_out": SiLU(),
        "conv_out": copy_sharing(component.conv_out),
    }
    return nn.Sequential(OrderedDict(layers))


def _unshuffling(conv: nn.Conv2d, factor: int) -> nn.Conv2d:
    # Unshuffled channel (c, i, j) at (y, x) is pixel (factor y + i, factor x + j) of channel c, so a stride
    # does the rearrangement. An op for it would export with a tensor of rank 6.
    out, _, height, width = conv.weight.shape
    taps = conv.weight.unflatten(1, (-1, factor, factor)).permute(0, 1, 4, 2, 5, 3)
    weight = taps.reshape(out, -1, height * factor, width * factor)
    (top, left) = (int(p) * factor for p in conv.padding)
    return conv2d(weight, conv.bias, (factor, factor), (top, left))
