"""Low-rank adapters (LoRA), merged into the UNet's weights as they are read: W + scale alpha / r B A.

Three spellings of names are read:

    peft        base_model.model.<module>.lora_A.weight, lora_B.weight; alpha in adapter_config.json
    diffusers   unet.<module>.lora_A.weight or .lora.down.weight, <attention>.processor.to_q_lora.down.weight
    kohya       lora_unet_<module with underscores>.lora_down.weight, lora_up.weight, alpha
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobilevd_deploy.errors import CheckpointError, UsageError
from mobilevd_deploy.model.weight_files import Entry, Stored, Weights, read_json, read_stored

_DOWN = r"(?:lora_A(?:\.default)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight"
_UP = r"(?:lora_B(?:\.default)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight"
_ROLES = {
    "down": re.compile(rf"(.+)\.{_DOWN}"),
    "up": re.compile(rf"(.+)\.{_UP}"),
    "alpha": re.compile(r"(.+)\.alpha"),
}
_OLD_PROCESSOR = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")
_ADAPTER = re.compile(r"lora_|\.lora\.|_lora\.|\.base_layer\.|hada_w|lokr_w|dora_scale")
_OTHER_KINDS = {
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
}
_ROOTS = ("base_model.model.", "unet.", "model.diffusion_model.", "diffusion_model.")
_KOHYA = "lora_unet_"
_FILES = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
_SHOWN = 5  # misfits that a message lists


@dataclass(frozen=True)
class Lora:
    """A file of adapters, or the folder that holds one, and the factor of its difference."""

    path: Path
    scale: float = 1.0


def parse_lora(text: str) -> Lora:
    """Read FILE or FILE:SCALE, as `--lora` takes it. Raises UsageError: the scale is not a number."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Lora(Path(text))
    try:
        factor = float(scale)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise UsageError(
            f"--lora {text}: no such file, and {scale!r} is not a scale",
            next_step="write it as FILE or FILE:0.8",
        )
    return Lora(Path(path), factor)


def is_adapter(name: str) -> bool:
    """Tell whether a tensor's name is that of an adapter, or of a layer that an adapter wraps."""
    return bool(_ADAPTER.search(name))


def merge_loras(weights: Weights, loras: Sequence[Lora], notice: Callable[[str], None]) -> Weights:
    """Return weights whose UNet entries add the adapters' differences when they are read.

    The result of a changed tensor is float32. Raises CheckpointError: a file that holds no adapters, or
    adapters of another kind, or that do not fit this UNet.
    """
    entries, others = dict(weights.entries), list(weights.others)
    for lora in loras:
        stored, config = _open(lora.path)
        pairs = _pairs(stored)
        modules = _modules(entries)
        misfits = []
        for target, parts in pairs.items():
            name = modules.get(_module_name(target, modules))
            if (problem := _misfit(target, name, parts, entries)) is not None:
                misfits.append(problem)
            elif name is not None:
                factor = lora.scale * _factor(target, parts, config)
                entries[name] = entries[name].changed(_AddLowRank(parts["down"], parts["up"], factor))
        if misfits:
            more = f"\n  and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
            raise CheckpointError(
                f"{lora.path}: {len(misfits)} of {len(pairs)} adapters do not fit this UNet:\n  "
                + "\n  ".join(misfits[:_SHOWN])
                + more,
                next_step="give the LoRA that was trained on this network (Stable Video Diffusion's UNet)",
            )
        others.append(stored.path)
        others += [config.path] if config.path else []
        notice(f"{lora.path.name}: merges {len(pairs)} adapters at scale {lora.scale:g}{config.remark}")
    return Weights(entries, tuple(others))


@dataclass(frozen=True)
class _AddLowRank:
    """Add factor * up @ down to a weight; for a convolution, `down` has its kernel and `up` is 1x1."""

    down: Entry
    up: Entry
    factor: float

    @property
    def reads(self) -> tuple[Entry, Entry]:
        """The pair of the adapter."""
        return self.down, self.up

    def __call__(self, weight: Tensor) -> Tensor:
        if weight.is_meta:
            return weight
        both = Weights({"down": self.down, "up": self.up})
        parts = {name: tensor.double() for name, tensor in both.read(("down", "up"))}
        difference = parts["up"].flatten(1) @ parts["down"].flatten(1)
        return (weight.double() + self.factor * difference.reshape(weight.shape)).float()


@dataclass(frozen=True)
class _Config:
    """What an adapter's configuration says of alpha; the ranks come from the shapes."""

    path: Path | None = None
    alpha: float | None = None
    patterns: Mapping[str, float] | None = None
    rank_stabilised: bool = False
    remark: str = ""


def _open(path: Path) -> tuple[Stored, _Config]:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder", next_step="--lora takes FILE or FILE:SCALE")
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path}: no adapters, it lacks {' and '.join(_FILES[:2])}")
        path = found[0]
    stored = read_stored(path)
    if kind := next(
        (kind for key in stored.entries for mark, kind in _OTHER_KINDS.items() if mark in key), None
    ):
        raise CheckpointError(
            f"{path}: holds {kind} adapters, which are not supported",
            next_step="merge them with the trainer's own tool, and give the merged UNet",
        )
    if not any(is_adapter(name) for name in stored.entries):
        raise CheckpointError(
            f"{path}: holds no LoRA", next_step="give whole weights as the checkpoint itself"
        )
    config = folder / "adapter_config.json"
    if path.name.startswith("adapter_model") and config.is_file():
        return stored, _read_config(read_json(config.read_text(encoding="utf-8-sig"), str(config)), config)
    if isinstance(metadata := stored.content.get("lora_adapter_metadata"), str):
        values = read_json(metadata, f"{path}: lora_adapter_metadata")
        return stored, _read_config({k.removeprefix("unet."): v for k, v in values.items()}, None)
    known = any(_ROLES["alpha"].fullmatch(name) for name in stored.entries)
    return stored, _Config(remark="" if known else " (the file has no alpha, so alpha is the rank)")


def _read_config(values: Mapping[str, Any], path: Path | None) -> _Config:
    if values.get("use_dora"):
        raise CheckpointError(f"{path}: holds DoRA adapters, which are not supported")
    return _Config(
        path, values.get("lora_alpha"), values.get("alpha_pattern") or {}, bool(values.get("use_rslora"))
    )


def _pairs(stored: Stored) -> dict[str, dict[str, Entry]]:
    """Group the tensors of a file by layer. Raises CheckpointError: tensors of no pair."""
    pairs: dict[str, dict[str, Entry]] = {}
    unknown = []
    for key, entry in stored.entries.items():
        if old := _OLD_PROCESSOR.fullmatch(key):
            target, role = f"{old[1]}.{old[2].replace('to_out', 'to_out.0')}", old[3]
        else:
            found = [
                (match[1], role) for role, pattern in _ROLES.items() if (match := pattern.fullmatch(key))
            ]
            if not found:
                unknown.append(key)
                continue
            target, role = found[0]
        pairs.setdefault(target, {})[role] = entry
    unknown += [
        f"half of a pair for {target}" for target, parts in pairs.items() if not {"down", "up"} <= set(parts)
    ]
    if unknown:
        raise CheckpointError(
            f"{stored.path}: {len(unknown)} tensors are not pairs of a LoRA: {', '.join(unknown[:3])}",
            next_step="save the adapters alone, for example with peft's save_pretrained",
        )
    return pairs


def _modules(entries: Iterable[str]) -> dict[str, str]:
    """Return the UNet's layers by module path, and by that path with underscores, as kohya writes it."""
    modules = {}
    for name in entries:
        if name.startswith("unet.") and name.endswith(".weight"):
            path = name.removeprefix("unet.").removesuffix(".weight")
            modules[path] = modules[_KOHYA + path.replace(".", "_")] = name
    return modules


def _module_name(target: str, modules: Mapping[str, str]) -> str:
    for _ in _ROOTS:
        if target in modules:
            break
        target = next((target.removeprefix(r) for r in _ROOTS if target.startswith(r)), target)
    return target


def _misfit(
    target: str, name: str | None, parts: Mapping[str, Entry], entries: Mapping[str, Entry]
) -> str | None:
    down, up = parts["down"].header.shape, parts["up"].header.shape
    if name is None:
        return f"{target}: no such layer"
    shape = entries[name].header.shape
    outputs, rank = up[0], down[0]
    fits = torch.Size(up).numel() == outputs * rank and outputs == shape[0]
    if not fits or torch.Size(down[1:]).numel() != torch.Size(shape[1:]).numel():
        return f"{target}: {list(up)} x {list(down)}, the layer is {list(shape)}"
    return None


def _factor(target: str, parts: Mapping[str, Entry], config: _Config) -> float:
    rank = parts["down"].header.shape[0]
    alpha = config.alpha
    for pattern, value in (config.patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?{pattern}", target):
            alpha = value
    if "alpha" in parts:
        ((_, stored),) = Weights({"alpha": parts["alpha"]}).read(["alpha"])
        alpha = float(stored)
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if config.rank_stabilised else rank)
