"""A UNet alone, as trainers save it: a folder, or a file in diffusers' or sgm's names.

    checkpoint-N/unet/                  diffusers' save_pretrained; unet_ema/ beside it is preferred
    checkpoint-N/model.safetensors      accelerate
    {"state_dict": ...}, {"ema": ...}   Lightning, and dictionaries with optimiser state

It needs a base: a checkpoint that gives the configuration and the other three networks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mobilevd_deploy.model.svd_folder import UNET_CLASS, ChosenWeights, Config, choose_weights

STEMS = (
    ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    ("model", "pytorch_model"),
    ("pytorch_lora_weights", "pytorch_lora_weights"),
    ("adapter_model", "adapter_model"),
)


def find_unet_folder(path: Path, notice: Callable[[str], None]) -> Path:
    """Return the folder with the UNet's weights: unet_ema/ or unet/ inside `path`, or `path` itself."""
    inside = [path / name for name in ("unet_ema", "unet") if (path / name).is_dir()]
    if len(inside) == 2:
        notice(f"{path.name}: reads unet_ema/ (averaged weights), not unet/; give {inside[1]} for the other")
    return inside[0] if inside else path


def open_unet_folder(path: Path, notice: Callable[[str], None]) -> ChosenWeights | None:
    """Return the weights in a folder that is no whole SVD folder; None if it has none under a known name.

    Raises CheckpointError: the folder says that it holds another network.
    """
    folder = find_unet_folder(path, notice)
    config = folder / "config.json"
    if os.path.lexists(config):
        Config(config).expect("_class_name", UNET_CLASS)
    for stems in STEMS:
        if any(any(folder.glob(f"{stem}*.{ending}*")) for stem in stems for ending in ("safetensors", "bin")):
            return choose_weights(folder, stems, notice)
    return None
