"""Folders of Stable Video Diffusion in diffusers' layout, whole or only the UNet.

unet/, vae/, image_encoder/ hold config.json and weights; feature_extractor/ holds preprocessor_config.json.
Where a part has several sets of weights, the one that diffusers and transformers load is read, and a notice
names the others.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import CheckpointError, SpecError
from mobilevd_deploy.model.components import CLIP_MEAN, CLIP_STD
from mobilevd_deploy.model.weight_files import Entry, Weights, looks_like, read_json, read_stored

UNET_CLASS = "UNetSpatioTemporalConditionModel"
_DIFFUSERS = ("diffusion_pytorch_model", "diffusion_pytorch_model")
_TRANSFORMERS = ("model", "pytorch_model")
_VARIANTS = ("", "fp16", "bf16", "ema")  # before others such as non_ema
Notice = Callable[[str], None]


def svd_configs(path: Path) -> dict[str, Path]:
    """Return the configuration files of a folder in diffusers' layout by part; they may be missing."""
    return {
        "unet": path / "unet" / "config.json",
        "vae": path / "vae" / "config.json",
        "image_encoder": path / "image_encoder" / "config.json",
        "feature_extractor": path / "feature_extractor" / "preprocessor_config.json",
    }


def missing_configs(path: Path) -> list[str]:
    """Return the configuration files that a folder lacks, relative to it."""
    return [str(file.relative_to(path)) for file in svd_configs(path).values() if not os.path.lexists(file)]


def open_svd_folder(path: Path, name: str, notice: Notice) -> tuple[ModelSpec, Weights]:
    """Open a whole folder of Stable Video Diffusion. Raises CheckpointError.

    Args:
        path: the folder, with every file of `svd_configs`.
        name: name of the model.
        notice: receives a sentence about each choice.
    """
    configs = svd_configs(path)
    config = {part: Config(file) for part, file in configs.items()}
    spec = _svd_spec(name, config, notice)
    entries: dict[str, Entry] = {}
    others = [*configs.values()]
    for part in ("unet", "vae", "image_encoder"):
        chosen = choose_weights(path / part, _TRANSFORMERS if part == "image_encoder" else _DIFFUSERS, notice)
        others += chosen.others
        for key, entry in chosen.entries():
            if (ours := _component_name(part, key)) is not None:
                entries[ours] = entry
    return spec, Weights(entries, tuple(others))


def _component_name(part: str, key: str) -> str | None:
    if part == "unet":
        return f"unet.{key}"
    if part == "vae":
        return (
            f"decoder.{key.removeprefix('decoder.')}" if key.startswith("decoder.") else f"vae_encoder.{key}"
        )
    # 0..n-1, which transformers stored up to 4.30 and no longer reads.
    return None if key == "vision_model.embeddings.position_ids" else f"image_encoder.{key}"


# ---- files of weights ----


@dataclass(frozen=True)
class ChosenWeights:
    """The weight files of one network, and the index that lists them if they are shards."""

    files: tuple[Path, ...]
    others: tuple[Path, ...] = ()

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Yield every tensor. Raises CheckpointError: a name that two files hold."""
        seen: dict[str, Path] = {}
        for file in self.files:
            for key, entry in read_stored(file).entries.items():
                if key in seen:
                    raise CheckpointError(f"{file}: {key} is also in {seen[key].name}")
                seen[key] = file
                yield key, entry


def choose_weights(folder: Path, stems: tuple[str, str], notice: Notice) -> ChosenWeights:
    """Choose the weights that diffusers (for its own stem) or transformers would load from a folder.

    Full precision before variants (fp16, bf16, ema, others), .safetensors before .bin. diffusers prefers
    shards to a whole file, transformers the whole file.

    Args:
        folder: holds the files.
        stems: file name without ending, of .safetensors and of .bin files.
        notice: told which files are there but not read.

    Raises CheckpointError: no weights, a shard that is missing, or a link whose target is gone.
    """
    readings = _readings(folder, stems)
    if not readings:
        files = sorted(file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin"))
        raise CheckpointError(
            f"{folder}: no {stems[0]}.safetensors" + (f", only {', '.join(files[:3])}" if files else ""),
            next_step="rename them as diffusers does" if files else "download the weights of this folder too",
        )
    chosen, *beside = readings
    require_target(chosen)
    plain = {f"{stems[0]}.safetensors", f"{stems[1]}.bin"}
    if beside:
        loader = "diffusers" if stems == _DIFFUSERS else "transformers"
        unread = ", ".join(file.name for file in beside)
        notice(f"{folder.name}: reads {chosen.name}, as {loader} does, not {unread}")
    elif chosen.name.removesuffix(".index.json") not in plain:
        notice(f"{folder.name}: reads the variant {chosen.name}, the only one there")
    if chosen.suffix != ".json":
        return ChosenWeights((chosen,))
    names = sorted(set(map(str, Config(chosen).get("weight_map", dict).values())))
    shards = tuple(folder / name for name in names)
    for shard in shards:
        if shard.parent != folder or not os.path.lexists(shard):
            there = sorted(file.name for file in folder.glob("*-of-*") if file.name not in names)
            raise CheckpointError(
                f"{chosen}: names {shard.name!r}, which is not in this folder",
                next_step=f"rename the shards as the index says; one is {there[0]}"
                if there
                else "download the missing shards",
            )
        require_target(shard)
    return ChosenWeights(shards, (chosen,))


def _readings(folder: Path, stems: tuple[str, str]) -> list[Path]:
    """List whole files and indices of shards, the one to read first."""
    names = {file.name for file in folder.glob("*")}
    found: list[tuple[tuple[int, str, int, int], Path]] = []
    for container, (stem, ending) in enumerate(zip(stems, ("safetensors", "bin"), strict=True)):
        base = re.escape(stem)
        whole = re.compile(rf"{base}(?:\.([\w-]+?))?\.{ending}")
        index = re.compile(rf"{base}(?:\.([\w-]+?))?\.{ending}\.index(?:\.([\w-]+))?\.json")
        for name in names:
            if match := whole.fullmatch(name):
                if re.search(r"-\d+-of-\d+$", match[1] or ""):
                    continue
                variant, sharded = match[1] or "", False
            elif match := index.fullmatch(name):
                variant, sharded = match[1] or match[2] or "", True
            else:
                continue
            rank = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
            second = sharded != (stems == _DIFFUSERS)
            found.append(((rank, variant, container, int(second)), folder / name))
    return [file for _, file in sorted(found)]


def require_target(path: Path) -> None:
    """Raise CheckpointError if a path is a link and its target is gone, as in a cleaned cache."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path}: a link to {path.readlink()}, which is gone",
            next_step="download the model again, or copy the folder with its links followed (cp -rL)",
        )


# ---- configurations ----


class Config:
    """A JSON configuration; values are read with a type, and errors name the key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        require_target(path)
        try:
            values = read_json(path.read_text(encoding="utf-8-sig"), str(path))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not JSON{looks_like(path)}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: not a table but {type(values).__name__}")
        self.values = values
        self.defaulted: dict[str, Any] = {}
        self.notice: Notice = lambda _: None

    def with_defaults(self, constructor: Callable[..., Any], notice: Notice) -> None:
        """Add the defaults of the class that the file configures.

        Say which keys the class does not know, and later which default was read.
        """
        parameters = inspect.signature(constructor).parameters
        private = ("_", "torch_dtype", "dtype")
        unknown = [key for key in self.values if key not in parameters and not key.startswith(private)]
        if unknown:
            notice(f"{self.path.parent.name}/{self.path.name}: ignores {', '.join(unknown)}")
        known = {
            name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty
        }
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
        self.defaulted = {key: value for key, value in plain.items() if key not in self.values}
        self.values = plain | self.values
        self.notice = notice

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Return a value. Raises CheckpointError: it is missing, or of another type."""
        if key not in self.values or not isinstance(self.values[key], kind):
            found = repr(self.values[key]) if key in self.values else "nothing"
            raise CheckpointError(f"{self.path}: {key}: found {found}")
        if key in self.defaulted:
            default = self.defaulted.pop(key)
            self.notice(
                f"{self.path.parent.name}/{self.path.name}: no {key}, so {default}, diffusers' default"
            )
        return self.values[key]

    def expect(self, key: str, *wanted: object) -> None:
        """Raise CheckpointError unless a value is one of `wanted`, or missing."""
        value = self.values.get(key, wanted[0])
        if value not in wanted:
            raise CheckpointError(
                f"{self.path}: {key} is {value!r}; only {wanted[0]!r} is supported",
                next_step="the folder must hold Stable Video Diffusion (image to video), finetuned or not",
            )

    def one(self, key: str) -> int:
        """Return an integer; a list of equal ones is fine."""
        value = self.get(key, (int, list))
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(value, list) and any(item != first for item in value):
            raise CheckpointError(
                f"{self.path}: {key} differs between levels ({value}), which is not supported"
            )
        return cast(int, first)


def _svd_spec(name: str, config: Mapping[str, Config], notice: Notice) -> ModelSpec:
    # Late: these classes are needed for their defaults only.
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

    unet, vae, clip = config["unet"], config["vae"], config["image_encoder"]
    unet.expect("_class_name", UNET_CLASS)
    vae.expect("_class_name", "AutoencoderKLTemporalDecoder")
    unet.with_defaults(UNetSpatioTemporalConditionModel.__init__, notice)
    vae.with_defaults(AutoencoderKLTemporalDecoder.__init__, notice)
    unet.expect("transformer_layers_per_block", 1, [1] * len(unet.get("block_out_channels", list)))
    down, up = unet.get("down_block_types", list), unet.get("up_block_types", list)
    attention = [kind == "CrossAttnDownBlockSpatioTemporal" for kind in down]
    unet.expect("down_block_types", [f"{'CrossAttn' * has}DownBlockSpatioTemporal" for has in attention])
    if up != [f"{'CrossAttn' * has}UpBlockSpatioTemporal" for has in reversed(attention)]:
        raise CheckpointError(f"{unet.path}: up_block_types {up} do not mirror down_block_types")
    heads = unet.get("num_attention_heads", (int, list))
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
        "decoder": {
            "kind": "svd-temporal",
            "scaling_factor": vae.get("scaling_factor", (int, float)),
            **vae_widths,
        },
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


def _clip_values(clip: Config) -> dict[str, Any]:
    return {key: clip.values.get(key, default) for key, default in _CLIP_DEFAULTS.items()}
