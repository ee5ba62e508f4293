"""A diffusers folder of Stable Video Diffusion as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import CheckpointError, SpecError
from mobilevd_deploy.model.components import CLIP_MEAN, CLIP_STD
from mobilevd_deploy.model.weight_files import (
    SafetensorsFiles,
    WeightSource,
    looks_like,
    read_json,
    safetensors_keys,
)


def open_diffusers_folder(path: Path) -> tuple[ModelSpec, WeightSource]:
    """Open a diffusers folder of Stable Video Diffusion. Raises CheckpointError."""
    configs = {
        "unet": path / "unet" / "config.json",
        "vae": path / "vae" / "config.json",
        "image_encoder": path / "image_encoder" / "config.json",
        "feature_extractor": path / "feature_extractor" / "preprocessor_config.json",
    }
    if missing := [str(file.relative_to(path)) for file in configs.values() if not file.is_file()]:
        raise CheckpointError(
            f"{path}: not a diffusers folder of Stable Video Diffusion, it lacks {', '.join(missing)}",
            next_step="give the folder that holds model_index.json, completely downloaded",
        )
    config = {part: _Config(file) for part, file in configs.items()}
    spec = _svd_spec(path.resolve().name, config)
    names: dict[str, tuple[Path, str]] = {}
    indices: list[Path] = []
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("image_encoder", "model"),
    ):
        files, index = _weight_files(path / part, stem)
        indices += index
        for file in files:
            for key in safetensors_keys(file)[0]:
                if name := _component_name(part, key):
                    if name in names:
                        raise CheckpointError(f"{file}: {key} is also in {names[name][0].name}")
                    names[name] = (file, key)
    return spec, SafetensorsFiles(names, [*configs.values(), *indices])


def _component_name(part: str, key: str) -> str | None:
    if part == "unet":
        return f"unet.{key}"
    if part == "vae":
        return (
            f"decoder.{key.removeprefix('decoder.')}" if key.startswith("decoder.") else f"vae_encoder.{key}"
        )
    # 0..n-1, which transformers stored up to 4.30 and no longer reads.
    return None if key == "vision_model.embeddings.position_ids" else f"image_encoder.{key}"


def _weight_files(folder: Path, stem: str) -> tuple[list[Path], list[Path]]:
    """Return the weight files of a part and the index that lists them, full precision first."""
    for variant in ("", ".fp16"):
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return [whole], []
        for index in (
            folder / f"{stem}.safetensors.index{variant}.json",
            folder / f"{stem}{variant}.safetensors.index.json",
        ):
            if not index.is_file():
                continue
            shards = _Config(index).get("weight_map", dict).values()
            files = [folder / str(shard) for shard in sorted(set(shards))]
            for file in files:
                if file.parent != folder or not file.is_file():
                    raise CheckpointError(f"{index}: names {file.name!r}, which is not in this folder")
            return files, [index]
    hint = "only .bin pickles are there; " if list(folder.glob("*.bin")) else ""
    raise CheckpointError(
        f"{folder}: no {stem}.safetensors", next_step=f"{hint}get the .safetensors files of this model"
    )


class _Config:
    """A part's JSON configuration, whose values are asked for with a type and errors name the key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            values = read_json(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not JSON{looks_like(path)}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: not a table but {type(values).__name__}")
        self.values = values

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in self.values or not isinstance(self.values[key], kind):
            found = repr(self.values[key]) if key in self.values else "nothing"
            raise CheckpointError(f"{self.path}: {key}: found {found}")
        return self.values[key]

    def expect(self, key: str, *wanted: object) -> None:
        value = self.values.get(key, wanted[0])
        if value not in wanted:
            raise CheckpointError(
                f"{self.path}: {key} is {value!r}; only {wanted[0]!r} is supported",
                next_step="the folder must hold Stable Video Diffusion (image to video), finetuned or not",
            )

    def one(self, key: str) -> int:
        """An integer, or a list of equal ones."""
        value = self.get(key, (int, list))
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(value, list) and any(item != first for item in value):
            raise CheckpointError(
                f"{self.path}: {key} differs between levels ({value}), which is not supported"
            )
        return cast(int, first)


def _svd_spec(name: str, config: Mapping[str, _Config]) -> ModelSpec:
    unet, vae, clip = config["unet"], config["vae"], config["image_encoder"]
    unet.expect("_class_name", "UNetSpatioTemporalConditionModel")
    unet.expect("transformer_layers_per_block", 1, [1] * len(unet.get("block_out_channels", list)))
    down, up = unet.get("down_block_types", list), unet.get("up_block_types", list)
    attention = [kind == "CrossAttnDownBlockSpatioTemporal" for kind in down]
    unet.expect("down_block_types", [f"{'CrossAttn' * has}DownBlockSpatioTemporal" for has in attention])
    if up != [f"{'CrossAttn' * has}UpBlockSpatioTemporal" for has in reversed(attention)]:
        raise CheckpointError(f"{unet.path}: up_block_types {up} do not mirror down_block_types")
    heads = unet.get("num_attention_heads", (int, list))
    vae.expect("_class_name", "AutoencoderKLTemporalDecoder")
    vae.expect("latent_channels", 4)
    clip.expect("model_type", "clip_vision_model")
    clip.expect("layer_norm_eps", 1e-5)
    for key, wanted in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        config["feature_extractor"].expect(key, list(wanted))
    vae_widths = {
        "block_out_channels": vae.get("block_out_channels", list),
        "layers_per_block": vae.one("layers_per_block"),
    }
    values = {
        "name": name,
        "frames": unet.get("num_frames", int),
        "unet": {
            "block_out_channels": unet.get("block_out_channels", list),
            "num_attention_heads": heads if isinstance(heads, list) else [heads] * len(down),
            "attention": attention,
            "layers_per_block": unet.one("layers_per_block"),
            "in_channels": unet.get("in_channels", int),
            "out_channels": unet.get("out_channels", int),
            "cross_attention_dim": unet.one("cross_attention_dim"),
            "addition_time_embed_dim": unet.get("addition_time_embed_dim", int),
        },
        "image_encoder": _clip_values(clip),
        "vae_encoder": {"kind": "svd", **vae_widths},
        "decoder": {"kind": "svd-temporal", "scaling_factor": vae.get("scaling_factor", float), **vae_widths},
    }
    try:
        return from_dict(ModelSpec, values)
    except SpecError as error:
        raise CheckpointError(f"{unet.path.parent.parent}: {error.what}") from error


# transformers leaves out of config.json what equals its defaults.
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
}


def _clip_values(clip: _Config) -> dict[str, Any]:
    return {key: clip.values.get(key, default) for key, default in _CLIP_DEFAULTS.items()}
