"""Small folders of Stable Video Diffusion, written by diffusers' and transformers' own save_pretrained."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mobilevd_deploy.model.components import CLIP_MEAN, CLIP_STD

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "image_encoder": "model"}


def write_svd_folder(
    folder: Path,
    *,
    frames: int = 14,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    shard: str = "10GB",
    safetensors: bool = True,
    seed: int = 0,
) -> Path:
    """Write the folder; the same seed gives the same weights up to the rounding of `dtype`."""
    torch.manual_seed(seed)
    unet = UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        num_attention_heads=(2, 4),
        layers_per_block=1,
        cross_attention_dim=16,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=frames,
    )
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32, 32, 32, 64), layers_per_block=1
    )
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=36, intermediate_size=48, num_hidden_layers=2, projection_dim=16, image_size=64
        )
    )
    for part, network in (("unet", unet), ("vae", vae), ("image_encoder", clip)):
        options = {} if part == "image_encoder" else {"safe_serialization": safetensors}
        network.to(dtype).save_pretrained(folder / part, variant=variant, max_shard_size=shard, **options)
    (folder / "feature_extractor").mkdir()
    preprocessor = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
