"""Stable Video Diffusion in one file, under the names of its own training code (sgm).

    model.diffusion_model.*                          UNet
    conditioner.embedders.0.open_clip.model.visual.* open_clip's vision tower
    conditioner.embedders.3.encoder.*                VAE that encodes the picture, with quant_conv
    first_stage_model.*                              VAE that decodes the frames, without quant_conv

Such a file has no configuration: all sizes follow from shapes. What shapes do not tell is SVD's own: UNet
heads of 64 channels, and 16 heads in the image encoder. Sources of the names: the modules of
Stability-AI/generative-models and open_clip, and diffusers' names for the same layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mobilevd_deploy.errors import CheckpointError
from mobilevd_deploy.model.weight_files import Entry

UNET_ANCHOR = "input_blocks.0.0.weight"
UNET = "model.diffusion_model."
CLIP = "conditioner.embedders.0.open_clip.model.visual."
PICTURE_VAE = "conditioner.embedders.3.encoder."
VAE = "first_stage_model."
_HEAD_CHANNELS = 64
_CLIP_HEADS = 16  # open_clip's towers H, L and bigG; SVD has H

Named = Mapping[str, Entry]


def convert_unet(names: Named) -> dict[str, Entry]:
    """Return a UNet's entries under diffusers' names."""
    layers = _layers_per_block(names)
    return {_unet_name(name, layers): entry for name, entry in names.items()}


def unet_spec(names: Named, where: str) -> dict[str, Any]:
    """Derive the values of UNetSpec from shapes. Raises CheckpointError: not SVD's UNet."""
    shapes = {name: entry.header.shape for name, entry in convert_unet(names).items()}
    levels = 1 + _highest(shapes, r"down_blocks\.(\d+)\.")
    widths = [shapes[f"down_blocks.{i}.resnets.0.spatial_res_block.conv2.weight"][0] for i in range(levels)]
    context = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    ids = shapes["add_embedding.linear_1.weight"][1]
    if "mid_block.resnets.0.time_mixer.mix_factor" not in shapes:
        raise CheckpointError(
            f"{where}: a UNet for pictures, without temporal layers",
            next_step="give a checkpoint of Stable Video Diffusion (image to video)",
        )
    if ids % 3:
        raise CheckpointError(
            f"{where}: its UNet takes {ids} values of added ids, which is not a multiple of 3: SVD has three "
            "(fps, motion bucket, noise augmentation), so this is another model, such as SV3D"
        )
    if odd := [width for width in widths if width % _HEAD_CHANNELS]:
        raise CheckpointError(
            f"{where}: {odd[0]} channels are not whole heads of {_HEAD_CHANNELS}, as in SVD"
        )
    return {
        "block_out_channels": widths,
        "num_attention_heads": [width // _HEAD_CHANNELS for width in widths],
        "attention": [f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in range(levels)],
        "layers_per_block": _layers_per_block(names),
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "cross_attention_dim": context[0] if context else 0,
        "addition_time_embed_dim": ids // 3,
    }


def convert_vae_encoder(names: Named) -> dict[str, Entry]:
    """Return the VAE encoder's entries under diffusers' names, with quant_conv.

    A VAE without quant_conv has it merged into the encoder, so the identity takes its place.
    """
    converted = {_vae_name(name, 0): entry for name, entry in names.items() if name.startswith("encoder.")}
    quant = {name: entry for name, entry in names.items() if name.startswith("quant_conv.")}
    if not quant and "encoder.conv_out.bias" in names:
        bias = names["encoder.conv_out.bias"]
        quant = {
            "quant_conv.weight": bias.changed(_identity_kernel),
            "quant_conv.bias": bias.changed(torch.zeros_like),
        }
    return {name: _as_linear(name, entry) for name, entry in converted.items()} | quant


def vae_encoder_spec(names: Named) -> dict[str, Any]:
    """Derive the values of VaeEncoderSpec from shapes."""
    shapes = {name: entry.header.shape for name, entry in convert_vae_encoder(names).items()}
    levels = 1 + _highest(shapes, r"encoder\.down_blocks\.(\d+)\.")
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"][0] for i in range(levels)]
    layers = 1 + _highest(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    return {"kind": "svd", "block_out_channels": widths, "layers_per_block": layers}


def convert_decoder(names: Named) -> dict[str, Entry]:
    """Return the decoder's entries under diffusers' names: of its TemporalDecoder, or of its Decoder."""
    decoder = {name: entry for name, entry in names.items() if name.startswith("decoder.")}
    levels, temporal = 1 + _highest(decoder, r"decoder\.up\.(\d+)\."), has_time_layers(names)
    renamed = {
        _vae_name(name, levels, temporal).removeprefix("decoder."): entry for name, entry in decoder.items()
    }
    return {name: _as_linear(name, entry) for name, entry in renamed.items()}


def has_time_layers(names: Named) -> bool:
    """Tell whether a VAE's decoder mixes neighbouring frames; that of `svd_xt_image_decoder` does not."""
    return any(name.startswith("decoder.") and name.endswith("mix_factor") for name in names)


def decoder_spec(names: Named) -> dict[str, Any]:
    """Derive the values of DecoderSpec from shapes."""
    converted, temporal = convert_decoder(names), has_time_layers(names)
    shapes = {name: entry.header.shape for name, entry in converted.items()}
    levels = 1 + _highest(shapes, r"up_blocks\.(\d+)\.")
    conv = "spatial_res_block.conv2.weight" if temporal else "conv2.weight"
    widths = [shapes[f"up_blocks.{i}.resnets.0.{conv}"][0] for i in range(levels)]
    return {
        "kind": "svd-temporal" if temporal else "svd-image",
        "block_out_channels": widths[::-1],
        "layers_per_block": _highest(shapes, r"up_blocks\.0\.resnets\.(\d+)\."),
    }


def convert_clip(names: Named) -> dict[str, Entry]:
    """Return the vision tower's entries under the names of transformers' CLIPVisionModelWithProjection."""
    converted: dict[str, Entry] = {}
    for name, entry in names.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.*)", name)
        if block is None:
            converted[_CLIP_NAMES.get(name, name)] = entry.changed(_transposed) if name == "proj" else entry
            continue
        layer, inner = f"vision_model.encoder.layers.{block[1]}.", block[2]
        if fused := re.fullmatch(r"attn\.in_proj_(weight|bias)", inner):
            for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
                converted[f"{layer}self_attn.{part}.{fused[1]}"] = entry.changed(_Third(i))
            continue
        converted[layer + _renamed(inner, _CLIP_BLOCK)] = entry
    return converted


def clip_spec(names: Named) -> dict[str, Any]:
    """Derive the values of ImageEncoderSpec from shapes."""
    shapes = {name: entry.header.shape for name, entry in names.items()}
    hidden, _, patch, _ = shapes["conv1.weight"]
    tokens, _ = shapes["positional_embedding"]
    return {
        "hidden_size": hidden,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": 1 + _highest(shapes, r"transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": _CLIP_HEADS,
        "image_size": patch * round((tokens - 1) ** 0.5),
        "patch_size": patch,
        "projection_dim": shapes["proj"][1],
        "hidden_act": "gelu",
    }


# ---- names ----

_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "nin_shortcut": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_TRANSFORMER = {
    "time_stack": "temporal_transformer_blocks",
    "time_pos_embed.0": "time_pos_embed.linear_1",
    "time_pos_embed.2": "time_pos_embed.linear_2",
}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_VAE_ENDS = {"norm_out": "conv_norm_out", "conv_out.time_mix_conv": "time_conv_out"}
_CLIP_NAMES = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
    "proj": "visual_projection.weight",
}
_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """Replace what a name begins with, in whole segments, by the table; other names stay."""
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def _layers_per_block(names: Iterable[str]) -> int:
    """The first downsampler follows the blocks of level 0; a network of one level has none."""
    inputs = [int(match[1]) for name in names if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))]
    return min(inputs) - 1 if inputs else _highest(names, r"input_blocks\.(\d+)\.")


def _unet_name(name: str, layers: int) -> str:
    if (end := _renamed(name, _UNET_ENDS)) != name:
        return end
    if middle := re.fullmatch(r"middle_block\.([012])\.(.*)", name):
        part = ("resnets.0", "attentions.0", "resnets.1")[int(middle[1])]
        return f"mid_block.{part}.{_inner_name(part, middle[2])}"
    block = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", name)
    if block is None:
        return name
    side, number, position, inner = block[1], int(block[2]), int(block[3]), block[4]
    path, count = ("down_blocks", number - 1) if side == "input" else ("up_blocks", number)
    level, layer = divmod(count, layers + 1)
    if inner.startswith("op."):
        return f"{path}.{level}.downsamplers.0.conv.{inner.removeprefix('op.')}"
    if position and inner.startswith("conv."):
        return f"{path}.{level}.upsamplers.0.{inner}"
    part = f"attentions.{layer}" if position else f"resnets.{layer}"
    return f"{path}.{level}.{part}.{_inner_name(part, inner)}"


def _inner_name(part: str, inner: str) -> str:
    return _renamed(inner, _TRANSFORMER) if part.startswith("attentions") else _video_block_name(inner)


def _video_block_name(inner: str) -> str:
    """Name a tensor inside a resblock that has a spatial and a temporal half."""
    if inner.endswith("mix_factor"):
        return "time_mixer.mix_factor"
    if inner.startswith("time_stack."):
        return "temporal_res_block." + _renamed(inner.removeprefix("time_stack."), _RES_BLOCK)
    return "spatial_res_block." + _renamed(inner, _RES_BLOCK)


def _vae_name(name: str, levels: int, temporal: bool = False) -> str:
    side, rest = name.split(".", 1)
    block_name = _video_block_name if temporal else lambda inner: _renamed(inner, _RES_BLOCK)
    if middle := re.fullmatch(r"mid\.block_([12])\.(.*)", rest):
        return f"{side}.mid_block.resnets.{int(middle[1]) - 1}.{block_name(middle[2])}"
    if rest.startswith("mid.attn_1."):
        inner = _renamed(rest.removeprefix("mid.attn_1."), _VAE_ATTENTION)
        return f"{side}.mid_block.attentions.0.{inner}"
    block = re.fullmatch(r"(down|up)\.(\d+)\.(block\.(\d+)|downsample|upsample)\.(.*)", rest)
    if block is None:
        return f"{side}.{_renamed(rest, _VAE_ENDS)}"
    # sgm counts the decoder's levels as the encoder's, diffusers in running order.
    level = int(block[2]) if block[1] == "down" else levels - 1 - int(block[2])
    if block[4] is None:
        return f"{side}.{block[1]}_blocks.{level}.{block[3]}rs.0.{block[5]}"
    return f"{side}.{block[1]}_blocks.{level}.resnets.{block[4]}.{block_name(block[5])}"


def _highest(names: Iterable[str], pattern: str) -> int:
    return max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


# ---- values ----


@dataclass(frozen=True)
class _Third:
    """Cut one of query, key and value out of a fused projection."""

    index: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(3)[self.index]


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous()


def _squeezed(kernel: Tensor) -> Tensor:
    return kernel.flatten(1)


def _as_linear(name: str, entry: Entry) -> Entry:
    # sgm's attention in the VAE has 1x1 convolutions.
    return entry.changed(_squeezed) if ".attentions." in name and len(entry.header.shape) == 4 else entry


def _identity_kernel(bias: Tensor) -> Tensor:
    return torch.eye(len(bias), dtype=bias.dtype, device=bias.device)[:, :, None, None]
